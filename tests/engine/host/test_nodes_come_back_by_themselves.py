"""A remembered node that dies, freezes or moves is lost with a reason, and then there again."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from engine.host import messages as api
from tests.engine.host.elsewhere import Desk, Elsewhere, free_port, remember, remembered

pytestmark = pytest.mark.network


@pytest.fixture
def attic(tmp_path: Path) -> Elsewhere:
    """A computer that is trusted already; its worker does not run yet."""
    there = Elsewhere(tmp_path / "attic")
    remember(there)
    return there


def test_a_worker_that_ends_and_starts_again_is_ready_again(attic: Elsewhere) -> None:
    with attic, Desk() as desk:
        since = desk.node("attic", "ready").since_s
        attic.end(signal.SIGKILL)
        lost = desk.node("attic", "lost")
        assert lost.since_s > since
        assert "cut" in lost.reason
        assert lost.processes == ()
        desk.wait_until(
            lambda: "nothing listens at 127.0.0.1:" in desk.node("attic").reason, "told apart"
        )
        attic.start()
        back = desk.node("attic", "ready")
        assert back.reason == ""
        assert back.since_s > lost.since_s


def test_a_frozen_worker_is_lost_and_ready_when_it_wakes(attic: Elsewhere) -> None:
    with attic, Desk() as desk:
        desk.node("attic", "ready")
        attic.send(signal.SIGSTOP)
        assert desk.node("attic", "stale", "lost").reason
        assert desk.node("attic", "lost").reason
        attic.send(signal.SIGCONT)
        desk.node("attic", "ready")


def test_a_host_that_starts_first_waits_for_the_worker(attic: Elsewhere) -> None:
    with Desk() as desk:
        desk.node("attic", "starting")
        assert "nothing listens" in desk.node("attic", "lost").reason
        with attic:
            desk.node("attic", "ready")


def test_a_node_is_its_key_and_not_its_address(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker has moved while nobody looked; announcements lead to it."""
    monkeypatch.setenv("SHARDMIX_DISCOVERY", "127.0.0.1")
    attic = Elsewhere(tmp_path / "attic", discovery="127.0.0.1")
    remember(attic, endpoint=f"tcp://127.0.0.1:{free_port()}")
    with attic, Desk() as desk:
        ready = desk.node("attic", "ready")
        assert ready.endpoint == attic.endpoint
        assert [peer.endpoint for peer in remembered()] == [attic.endpoint]
        assert desk.names() == {"attic"}
        attic.end()
        desk.node("attic", "lost")
        attic.port = free_port()
        attic.start()
        desk.wait_until(lambda: desk.node("attic").endpoint == attic.endpoint, "found again")
        desk.node("attic", "ready")


def test_a_forgotten_node_is_gone_for_good_and_may_be_discovered_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHARDMIX_DISCOVERY", "127.0.0.1")
    attic = Elsewhere(tmp_path / "attic", discovery="127.0.0.1")
    remember(attic)
    with attic:
        with Desk() as desk:
            desk.node("attic", "ready")
            desk.call(api.ForgetNode, name="attic")
            assert remembered() == []
            seen = desk.node("attic", "discovered")
            assert seen.key == attic.key
            assert seen.devices == ()
        with Desk() as desk:
            assert desk.node("attic").state == "discovered"
            attic.end()
            desk.wait_until(lambda: desk.names() == set(), "gone")
