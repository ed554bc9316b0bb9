"""Pairing at the worker's end, over real sockets: one attempt, while somebody there waits for it."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import zmq

from engine.cluster import messages as m
from engine.cluster.identity import fingerprint
from engine.cluster.pairing import PAIRING_SECONDS, PairVerdict, pairing_endpoint
from engine.cluster.security import Gatekeeper, new_key_pair
from engine.errors import ConfigError, PeerRefused
from tests.workers.hosts import PairingHost, RunningWorker, free_port, running_worker, wait_until
from workers import local_messages as local
from workers.pairing import UNATTENDED_SECONDS, PairingDesk
from workers.presence import LocalConnection, PresenceLock

pytestmark = pytest.mark.network


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[RunningWorker]:
    """A worker that is paired with nobody."""
    with running_worker(tmp_path) as running, PresenceLock(tmp_path) as presence:
        presence.publish(running.worker.endpoint)
        yield running


@pytest.fixture
def commands(worker: RunningWorker) -> Iterator[LocalConnection]:
    """What `shardmix-worker pair` speaks through."""
    with LocalConnection(worker.folder) as connection:
        yield connection


@pytest.fixture
def desk() -> Iterator[PairingDesk]:
    """The worker's end of pairing alone."""
    context: zmq.Context[Any] = zmq.Context()
    gatekeeper = Gatekeeper(context)
    keys = new_key_pair()
    endpoint = f"tcp://127.0.0.1:{free_port()}"
    desk = PairingDesk(context, gatekeeper, endpoint, keys.public, "box", lambda key, name: None)
    try:
        yield desk
    finally:
        desk.close()
        gatekeeper.close()
        context.term()


def ask(commands: LocalConnection, request: local.LocalRequest) -> local.PairingState:
    return commands.ask(request, local.PairingState)


def test_who_was_paired_is_served(worker: RunningWorker, commands: LocalConnection) -> None:
    assert ask(commands, local.BeginPairing()).stage == "waiting"
    with PairingHost(worker.worker.endpoint, name="kitchen") as desk:
        code = desk.reach_code()
        state = ask(commands, local.AskPairing())
        assert (state.stage, state.host_name, state.code) == ("compare", "kitchen", code)
        assert state.fingerprint == fingerprint(desk.keys.public)
        assert ask(commands, local.JudgePairing(is_same=True)).stage == "confirmed"
        desk.judge(True)
        assert isinstance(desk.hear(), PairVerdict)
        assert desk.pairing.is_paired
        assert desk.pairing.peer_key == worker.keys.public
        assert _settled(commands).stage == "paired"
        with worker.host(desk.keys) as host:
            host.hello()
            assert host.hear(m.NodeDescription).name == "box"
    hosts = commands.ask(local.AskStatus(), local.Status).hosts
    assert [(h.name, h.fingerprint) for h in hosts] == [("kitchen", fingerprint(desk.keys.public))]
    gone = commands.ask(local.Unpair(who="kitchen"), local.Unpaired)
    assert gone.fingerprint == fingerprint(desk.keys.public)
    with worker.host(desk.keys) as host:
        host.wait_for_refusal()
    with pytest.raises(ConfigError, match="no paired computer is called 'kitchen'"):
        commands.ask(local.Unpair(who="kitchen"), local.Unpaired)


@pytest.mark.parametrize("who_says_no", ["here", "there"])
def test_nobody_is_trusted_when_one_of_the_two_says_no(
    worker: RunningWorker, commands: LocalConnection, who_says_no: str
) -> None:
    ask(commands, local.BeginPairing())
    with PairingHost(worker.worker.endpoint) as desk:
        desk.reach_code()
        if who_says_no == "here":
            ask(commands, local.JudgePairing(is_same=False))
            with pytest.raises(PeerRefused, match="codes were not the same"):
                desk.hear()
        else:
            ask(commands, local.JudgePairing(is_same=True))
            desk.judge(False)
        state = _settled(commands)
        assert state.stage == "refused"
        assert "the codes were not the same" in state.reason
        # One attempt: whoever wants another asks the person for it.
        with pytest.raises(PeerRefused, match="begin to pair again"):
            ask(commands, local.JudgePairing(is_same=True))
        with worker.host(desk.keys) as host:
            host.wait_for_refusal()
    assert not is_listening(worker)
    assert commands.ask(local.AskStatus(), local.Status).hosts == ()


def test_nothing_listens_outside_of_pairing_mode(
    worker: RunningWorker, commands: LocalConnection
) -> None:
    assert not is_listening(worker)
    for _ in range(2):
        ask(commands, local.BeginPairing())
        assert is_listening(worker)
        with PairingHost(worker.worker.endpoint) as desk:
            desk.reach_code()
            ask(commands, local.EndPairing())
            with pytest.raises(PeerRefused, match="gave up"):
                desk.hear()
        wait_until(lambda: not is_listening(worker), "the pairing socket is closed")


def test_a_flood_ends_pairing_and_is_forgotten(desk: PairingDesk) -> None:
    """One message of many frames, which libzmq keeps until the last one has come."""
    flood = (
        "import sys, zmq; from engine.cluster.pairing import PAIRING_KEYS as keys\n"
        "from engine.cluster.transport import connect; context = zmq.Context()\n"
        "socket = connect(context, zmq.DEALER, keys, keys.public, sys.argv[1])\n"
        "socket.send_multipart([bytes(3900)] * 60_000); sys.stdin.read()"
    )
    desk.begin(0.0)
    before = psutil.Process().memory_info().rss
    stranger = subprocess.Popen([sys.executable, "-c", flood, desk.endpoint], stdin=subprocess.PIPE)
    try:
        with stranger:
            wait_until(lambda: _step(desk).stage == "refused", "pairing has ended")
            assert "flooded the pairing socket" in desk.state(0.0).reason
            stranger.kill()
    finally:
        stranger.kill()
    wait_until(
        lambda: psutil.Process().memory_info().rss - before < 200 << 20, "the memory is given back"
    )


@pytest.mark.parametrize("who_is_last", ["here", "there"])
def test_a_list_that_cannot_be_written_ends_the_attempt_alone(
    worker: RunningWorker, commands: LocalConnection, who_is_last: str
) -> None:
    ask(commands, local.BeginPairing())
    (worker.folder / "trusted_hosts.json").write_text("damaged")
    with PairingHost(worker.worker.endpoint) as desk:
        desk.reach_code()
        if who_is_last == "here":
            desk.channel.send(PairVerdict(is_same=True))
            with PairingHost(worker.worker.endpoint) as other:
                other.open()
                with pytest.raises(PeerRefused, match="another computer is pairing"):
                    other.hear()  # So the verdict, which came before it, was heard.
            with pytest.raises(ConfigError, match="is damaged"):
                ask(commands, local.JudgePairing(is_same=True))
            with pytest.raises(PeerRefused, match="cannot write down whom it trusts"):
                desk.hear()
        else:
            ask(commands, local.JudgePairing(is_same=True))
            desk.hear()
            desk.channel.send(PairVerdict(is_same=True))
            received = desk.channel.receive(30_000)
            assert received is not None
            assert "cannot write down whom it trusts" in received.message.reason
    state = _settled(commands)
    assert (state.stage, "is damaged" in state.reason) == ("refused", True)
    assert commands.ask(local.AskStatus(), local.Status).name == "box"


def test_a_second_computer_does_not_disturb_the_first(
    worker: RunningWorker, commands: LocalConnection
) -> None:
    ask(commands, local.BeginPairing())
    with PairingHost(worker.worker.endpoint) as desk, PairingHost(worker.worker.endpoint) as other:
        code = desk.reach_code()
        other.open()
        with pytest.raises(PeerRefused, match="another computer is pairing"):
            other.hear()
        assert ask(commands, local.AskPairing()).code == code


def test_a_host_that_names_another_ones_key_is_refused(
    worker: RunningWorker, commands: LocalConnection
) -> None:
    ask(commands, local.BeginPairing())
    victim = new_key_pair()
    with PairingHost(worker.worker.endpoint) as desk:
        opening = desk.pairing.open()
        forged = type(opening)(
            public_key=victim.public, name=opening.name, commitment=opening.commitment
        )
        desk.channel.send(forged)
        with pytest.raises(PeerRefused, match="shows one key and names another"):
            desk.hear()
    assert ask(commands, local.AskPairing()).stage == "refused"


def test_giving_up_here_is_told_there(worker: RunningWorker, commands: LocalConnection) -> None:
    ask(commands, local.BeginPairing())
    with PairingHost(worker.worker.endpoint) as desk:
        desk.reach_code()
        assert ask(commands, local.EndPairing()).stage == "refused"
        with pytest.raises(PeerRefused, match="gave up"):
            desk.hear()


def test_pairing_mode_ends_by_itself(desk: PairingDesk) -> None:
    """On a real socket; the time is an argument."""
    desk.begin(100.0)
    desk.step(100.0 + UNATTENDED_SECONDS)
    assert desk.state(100.0 + UNATTENDED_SECONDS).stage == "waiting"
    desk.step(101.0 + 2 * UNATTENDED_SECONDS)
    assert "does not wait any more" in desk.state(111.0).reason
    desk.begin(200.0)
    for now in range(200, 200 + int(PAIRING_SECONDS) + 1):
        desk.step(float(now))
        assert desk.state(float(now)).stage == "waiting"
    desk.step(201.0 + PAIRING_SECONDS)
    assert desk.state(261.5).reason == "nobody paired within 60 s; begin again"


def is_listening(worker: RunningWorker) -> bool:
    """Whether anything takes connections where the worker pairs."""
    host, _, port = pairing_endpoint(worker.worker.endpoint).removeprefix("tcp://").rpartition(":")
    with socket.socket() as probe:
        return probe.connect_ex((host, int(port))) == 0


def _step(desk: PairingDesk) -> local.PairingState:
    desk.step(0.0)
    return desk.state(0.0)


def _settled(commands: LocalConnection) -> local.PairingState:
    """The state once the worker has heard the other end's verdict."""
    wait_until(
        lambda: ask(commands, local.AskPairing()).stage in ("paired", "refused"),
        "the attempt is decided",
    )
    return ask(commands, local.AskPairing())
