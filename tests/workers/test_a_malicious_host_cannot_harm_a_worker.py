"""Table D1, a paired engine host against a worker: what is wrong is answered with one error."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest

from engine.cluster import messages as m
from engine.cluster.codec import MAX_HEADER_BYTES
from engine.cluster.security import new_key_pair
from tests.workers.hosts import (
    PATIENCE_SECONDS,
    Host,
    RunningWorker,
    running_worker,
    wait_until,
)

pytestmark = pytest.mark.network

PAIRED = new_key_pair()
GROWTH_BYTES = 64 << 20


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[RunningWorker]:
    """A worker that knows one engine host."""
    with running_worker(tmp_path, PAIRED) as running:
        yield running


def is_served(worker: RunningWorker) -> None:
    with worker.host(PAIRED) as host:

        def is_described() -> bool:
            host.hello()  # As a host does every second, until the line before counts as gone.
            received = host.channel.receive(500)
            return received is not None and isinstance(received.message, m.NodeDescription)

        wait_until(is_described, "the worker says who it is")


def header(*body: Any, specs: Any = ()) -> bytes:
    return msgspec.msgpack.encode((m.PROTOCOL_VERSION, body, specs))


NO_MESSAGES: dict[str, tuple[list[bytes], str]] = {
    "pickle": ([pickle.dumps([1])], "first bytes 80 0"),
    "nothing": ([b""], "part 0"),
    "deep nesting": ([b"\x91" * 100_000], "first bytes 91 91"),
    "a thousand parts": ([header("Probe", 1), *[b""] * 1000], "brings 1000"),
    "a dtype nobody knows": ([header("Probe", 1, specs=[(250, (1,))]), b"x"], "dtype of tensor 0"),
    "a part too short": ([header("Probe", 1, specs=[("uint8", (9,))]), b"x"], "part has 1"),
    "a number past 53 bits": ([header("Probe", 1 << 63)], "which is number"),
    "a negative number": ([header("Probe", -1)], "which is number"),
    "a rate that is a text": ([header("Hello", "x", "\x1b" * 99)], "which is telemetry_hz"),
    "a transport nobody knows": (
        [header("StartRunner", "box/cpu", "", "pigeon\x1b")],
        "which is transport",
    ),
    "a field too many": ([header("Shutdown", 1)], "at most"),
    "a message for a runner": ([header("Abort", 1)], "Abort"),
}


def test_what_is_no_message_is_answered_with_the_field(worker: RunningWorker) -> None:
    before = psutil.Process().memory_info().rss
    with worker.host(PAIRED) as host:
        host.hello()
        for what, (frames, words) in NO_MESSAGES.items():
            host.channel.socket.send_multipart(frames)
            failed = host.hear(m.Failed)
            assert failed.error == "ProtocolError", what
            assert failed.message.isprintable(), what
            with pytest.raises(AssertionError, match=words):
                raise AssertionError(failed.message)
        host.say(m.Probe(number=7))
        assert host.hear(m.ProbeAnswer).number == 7
    assert psutil.Process().memory_info().rss - before < GROWTH_BYTES


def test_a_frame_past_the_limit_ends_the_connection(worker: RunningWorker) -> None:
    """Row 5: no message to a worker is larger than a header."""
    with worker.host(PAIRED) as host:
        host.hello()
        host.hear(m.NodeDescription)
        events = host.channel.socket.get_monitor_socket()
        host.channel.socket.send(bytes(MAX_HEADER_BYTES + 1))
        assert events.poll(int(PATIENCE_SECONDS * 1000)), "the connection stands"
        host.channel.socket.disable_monitor()
        events.close(linger=0)
    is_served(worker)


@pytest.mark.parametrize("hz", [float("nan"), float("inf"), -1.0, 0.0, 1e300])
def test_any_rate_of_telemetry_is_a_rate_between_the_bounds(
    worker: RunningWorker, hz: float
) -> None:
    with worker.host(PAIRED) as host:
        host.hello(telemetry_hz=hz)
        host.hear(m.NodeDescription)
        host.hear(m.Telemetry)


def test_a_device_that_is_not_lent_is_not_started(worker: RunningWorker) -> None:
    with worker.host(PAIRED) as host:
        host.hello("\x1b[2J" * 1000)
        host.hear(m.NodeDescription)
        for device in ("", "box/../cpu", "box/cuda99", "\x1b" * 100_000, "; rm -rf /"):
            host.say(m.StopRunner(device=device))
            host.say(m.StartRunner(device=device, listen_address="127.0.0.1"))
            assert "does not lend a device" in host.hear(m.RunnerExited).cause
        start = m.StartRunner(device="box/cpu", listen_address="", transport="torch")
        host.say(start)
        assert "--trusted-network" in host.hear(m.RunnerExited).cause


@pytest.mark.parametrize(
    "address", ["/etc/passwd", "*;127.0.0.1", "no such host", "\0\n\x1b" * 1000]
)
def test_an_address_that_is_none_is_a_runner_that_exited(
    worker: RunningWorker, address: str
) -> None:
    with worker.host(PAIRED) as host:
        host.hello()
        host.hear(m.NodeDescription)
        host.say(m.StartRunner(device="box/cpu", listen_address=address))
        exited = host.hear(m.RunnerExited)
        assert exited.cause.startswith("listen_address")
        assert exited.cause.isprintable()
        host.say(m.Probe(number=1))
        host.hear(m.ProbeAnswer)


def test_a_host_that_starts_and_stops_without_end_leaves_nothing(worker: RunningWorker) -> None:
    with worker.host(PAIRED) as host:
        host.hello()
        host.hear(m.NodeDescription)
        for _ in range(100):
            host.say(m.StartRunner(device="box/cpu", listen_address="127.0.0.1"))
            host.say(m.StopRunner(device="box/cpu"))
        host.say(m.Probe(number=1))
        host.hear(m.ProbeAnswer)
        assert len(psutil.Process().children()) < 20
    is_served(worker)


def test_a_host_that_reads_nothing_does_not_stop_the_worker(worker: RunningWorker) -> None:
    """Row 2."""
    with (
        worker.host(PAIRED) as deaf,
        Host(worker.worker.endpoint, worker.keys.public, PAIRED) as other,
    ):
        for number in range(3000):
            deaf.channel.socket.send(header("Probe", number))
        other.say(m.Probe(number=3001))
        assert other.hear(m.ProbeAnswer).number == 3001
