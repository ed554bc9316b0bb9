"""A worker serves one engine host; a second one hears who has it, and gets in when it is free."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.cluster import messages as m
from engine.cluster.identity import TrustedPeers
from engine.cluster.security import new_key_pair
from tests.workers.hosts import Host, running_worker, wait_until
from workers.lease import Lease

pytestmark = pytest.mark.network

FIRST, SECOND = new_key_pair(), new_key_pair()


def test_the_second_hears_who_has_it_once_for_each_hello(tmp_path: Path) -> None:
    with (
        running_worker(tmp_path, FIRST, SECOND) as worker,
        worker.host(FIRST) as first,
        worker.host(SECOND) as second,
    ):
        first.hello("the kitchen")
        assert first.hear(m.NodeDescription).name == "box"
        for _ in range(2):
            second.hello("the attic")
            assert second.hear(m.Busy).holder == "the kitchen"
        assert second.channel.receive(0) is None
        second.say(m.StartRunner(device="box/cpu", listen_address=""))
        assert "the kitchen has it" in second.hear(m.RunnerExited).cause
        first.hello("the kitchen")
        assert first.hear(m.Telemetry)


def test_it_is_free_again_after_shutdown(tmp_path: Path) -> None:
    with (
        running_worker(tmp_path, FIRST, SECOND) as worker,
        worker.host(FIRST) as first,
        worker.host(SECOND) as second,
    ):
        first.hello()
        first.hear(m.NodeDescription)
        second.say(m.Shutdown())  # Not its to say.
        second.hello()
        second.hear(m.Busy)
        first.say(m.Shutdown())
        _until_served(second)


def test_it_is_free_again_when_the_connection_closes(tmp_path: Path) -> None:
    with running_worker(tmp_path, FIRST, SECOND) as worker, worker.host(SECOND) as second:
        with worker.host(FIRST) as first:
            first.hello()
            first.hear(m.Telemetry)
        _until_served(second)


def test_it_is_free_again_after_a_silence(tmp_path: Path) -> None:
    with (
        running_worker(tmp_path, FIRST, SECOND, lease_seconds=0.5) as worker,
        worker.host(FIRST) as first,
        worker.host(SECOND) as second,
    ):
        first.hello("silent")
        first.hear(m.NodeDescription)
        _until_served(second)


def test_a_host_that_started_over_takes_its_own_lease_at_once(tmp_path: Path) -> None:
    with running_worker(tmp_path, FIRST) as worker:
        with worker.host(FIRST) as before:
            before.hello()
            before.hear(m.Telemetry)
        with worker.host(FIRST) as after:
            after.hello()
            assert after.hear(m.NodeDescription, 5).name == "box"


def test_a_second_host_of_the_same_installation_does_not_push_the_first_out(tmp_path: Path) -> None:
    with (
        running_worker(tmp_path, FIRST) as worker,
        worker.host(FIRST) as window,
        worker.host(FIRST) as command,
    ):
        window.hello("window")
        window.hear(m.Telemetry)
        command.hello("command")
        assert command.hear(m.Busy).holder == "window"


def test_a_host_that_is_unpaired_loses_it(tmp_path: Path) -> None:
    with (
        running_worker(tmp_path, FIRST, SECOND) as worker,
        worker.host(FIRST) as first,
        worker.host(SECOND) as second,
    ):
        first.hello()
        first.hear(m.NodeDescription)
        # By another process, as far as the worker can tell.
        TrustedPeers(tmp_path / "trusted_hosts.json").remove(FIRST.public)
        assert first.hear(m.Failed).error == "PeerRefused"
        _until_served(second)
        first.hello()
        assert "does not trust this computer" in first.hear(m.Failed).message


def test_the_lease_by_itself() -> None:
    lease = Lease(10.0)
    assert lease.claim(b"a", b"1", "A", 0.0, lambda: True) == "new"
    assert lease.claim(b"a", b"1", "A", 9.0, lambda: True) == "kept"
    assert lease.claim(b"b", b"2", "B", 9.1, lambda: True) == "busy"
    assert lease.is_held_by(b"a", b"1")
    assert not lease.is_held_by(b"b", b"1")
    assert not lease.is_expired(19.0)
    assert lease.is_expired(19.1)
    assert lease.claim(b"b", b"2", "B", 19.1, lambda: True) == "taken over"
    assert lease.claim(b"a", b"3", "A", 19.2, lambda: False) == "taken over"
    # A route alone proves nothing: it is drawn anew by every connection.
    assert lease.claim(b"c", b"3", "C", 19.3, lambda: True) == "busy"
    lease.free()
    assert lease.claim(b"c", b"4", "C", 19.4, lambda: True) == "new"
    assert not Lease(None).is_expired(1e9)


def _until_served(host: Host) -> None:
    """Say Hello until the worker introduces itself, as an engine host does."""

    def is_served() -> bool:
        host.hello()
        received = host.channel.receive(200)
        return received is not None and isinstance(received.message, m.NodeDescription)

    wait_until(is_served, "the second host is served")
