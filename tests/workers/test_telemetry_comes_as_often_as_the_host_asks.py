"""Hello says how often; nonsense is a rate too."""

from __future__ import annotations

import math
import time
from pathlib import Path

import pytest

from engine.cluster import messages as m
from engine.cluster.security import new_key_pair
from tests.workers.hosts import running_worker

pytestmark = pytest.mark.network

HOST = new_key_pair()


def count_in(seconds: float, host_hz: float, folder: Path) -> int:
    """Readings that come in so many seconds after the first."""
    with running_worker(folder, HOST) as worker, worker.host(HOST) as host:
        host.hello(telemetry_hz=host_hz)
        host.hear(m.Telemetry)
        end = time.monotonic() + seconds
        count = 0
        while (left := end - time.monotonic()) > 0:
            received = host.channel.receive(int(left * 1000))
            count += received is not None and isinstance(received.message, m.Telemetry)
        return count


def test_a_fast_host_hears_more(tmp_path: Path) -> None:
    fast, slow = (count_in(1.0, hz, tmp_path / str(hz)) for hz in (20.0, 2.0))
    assert slow <= 3
    assert slow < fast <= 22


@pytest.mark.parametrize("hz", [math.nan, math.inf, -math.inf, -1.0, 0.0, 1e300])
def test_a_rate_that_is_none_harms_nobody(tmp_path: Path, hz: float) -> None:
    assert count_in(0.5, hz, tmp_path) <= 12


def test_a_host_can_change_its_mind(tmp_path: Path) -> None:
    with running_worker(tmp_path, HOST) as worker, worker.host(HOST) as host:
        host.hello(telemetry_hz=0.2)
        host.hear(m.Telemetry)
        host.hello(telemetry_hz=20.0)
        # At the first rate these would take 15 s.
        for _ in range(3):
            host.hear(m.Telemetry, seconds=4.0)


def test_it_tells_what_the_worker_itself_uses(tmp_path: Path) -> None:
    with running_worker(tmp_path, HOST) as worker, worker.host(HOST) as host:
        host.hello()
        telemetry = host.hear(m.Telemetry)
        assert [usage.role for usage in telemetry.processes] == ["worker"]
        assert 0 < telemetry.memory_used_bytes < telemetry.memory_total_bytes
