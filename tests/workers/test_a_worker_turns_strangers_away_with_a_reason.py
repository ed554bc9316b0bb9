"""Who is not paired, shows another key, does not encrypt or is too old is refused, and listed."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq
from zmq.utils.monitor import recv_monitor_message

from engine.cluster import messages as m
from engine.cluster.identity import TrustedPeers, fingerprint
from engine.cluster.join_token import TOKEN_SECONDS, decode_token
from engine.cluster.security import Gatekeeper, KeyPair, new_key_pair
from engine.cluster.transport import connect, listen
from tests.workers.hosts import (
    PATIENCE_SECONDS,
    Host,
    RunningWorker,
    older_hello,
    running_worker,
    wait_until,
)
from workers import local_messages as local
from workers.access import DOMAIN, Access
from workers.listener_watch import UNKNOWN_ADDRESS
from workers.presence import LocalConnection, PresenceLock

pytestmark = pytest.mark.network

PAIRED = new_key_pair()
HANDSHAKES = zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_HANDSHAKE_FAILED_AUTH


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[RunningWorker]:
    """A worker that knows one engine host, and that commands of this computer can find."""
    with running_worker(tmp_path, PAIRED) as running, PresenceLock(tmp_path) as presence:
        presence.publish(running.worker.endpoint)
        yield running


def wait_for_refusal(worker: RunningWorker, reason: str, key: KeyPair | None = None) -> None:
    """Until status lists it."""
    mark = fingerprint(key.public) if key is not None else ""
    with LocalConnection(worker.folder) as connection:

        def is_listed() -> bool:
            status = connection.ask(local.AskStatus(), local.Status)
            return any(
                # A connection that libzmq drops at once may be gone before its address is read.
                reason in r.reason
                and r.fingerprint == mark
                and r.address.startswith(("127.0.0.1", UNKNOWN_ADDRESS))
                for r in status.refusals
            )

        wait_until(is_listed, f"a refusal: {reason}")


def is_served(worker: RunningWorker) -> bool:
    """Whether the paired host is."""
    with worker.host(PAIRED) as host:
        host.hello()
        return host.hear(m.NodeDescription).name == "box"


def test_an_unknown_key_is_refused_before_it_says_anything(worker: RunningWorker) -> None:
    stranger = new_key_pair()
    with worker.host(stranger) as host:
        host.wait_for_refusal()
    wait_for_refusal(worker, "its key is not on the allow list", stranger)
    assert is_served(worker)


def test_who_expects_another_worker_here_is_refused(worker: RunningWorker) -> None:
    with Host(worker.worker.endpoint, new_key_pair().public, PAIRED):
        wait_for_refusal(worker, "it takes this worker for another one")
    assert is_served(worker)


@pytest.mark.parametrize("said", [b"GET / HTTP/1.1\r\n\r\n", b"\x80\x04\x95pickle", b"\0" * 5000])
def test_plain_bytes_are_refused(worker: RunningWorker, said: bytes) -> None:
    address, _, port = worker.worker.endpoint.removeprefix("tcp://").rpartition(":")
    with socket.create_connection((address, int(port))) as connection:
        connection.sendall(said)
        with contextlib.suppress(ConnectionError):  # Refused is closed, politely or not.
            connection.settimeout(1)
            with contextlib.suppress(TimeoutError):
                while connection.recv(1000):
                    pass
    wait_for_refusal(worker, "it does not speak this protocol")
    assert is_served(worker)


def test_a_peer_without_encryption_is_refused(worker: RunningWorker) -> None:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    plain = context.socket(zmq.DEALER)
    plain.linger = 0
    plain.connect(worker.worker.endpoint)
    plain.send(b"hello")
    try:
        # Either end may be the first to see that the other one is not of its kind.
        wait_for_refusal(worker, "it does not speak this protocol")
    finally:
        plain.close()
        context.term()
    assert is_served(worker)


def test_an_older_protocol_is_refused_and_told_so(worker: RunningWorker) -> None:
    with worker.host(PAIRED) as host:
        host.channel.socket.send(older_hello())
        failed = host.hear(m.Failed)
        assert failed.error == "PeerRefused"
        assert "install the same version of shardmix on both" in failed.message
        wait_for_refusal(worker, f"speaks protocol version {m.PROTOCOL_VERSION - 1}", PAIRED)
        # The worker goes on, even with this connection.
        host.hello()
        assert host.hear(m.NodeDescription)


def test_a_paired_host_that_talks_nonsense_hears_what_is_wrong(worker: RunningWorker) -> None:
    with worker.host(PAIRED) as host:
        for nonsense in (
            b"",
            b"\x80\x04",
            b"\xc1" * 100,
            bytes([0x93, m.PROTOCOL_VERSION]) + b"\x91\xa5Hello\x90",
        ):
            host.channel.socket.send(nonsense)
            assert host.hear(m.Failed).error == "ProtocolError"
        host.hello()
        assert host.hear(m.NodeDescription)


def test_a_paired_host_cannot_give_the_commands_of_the_owner(worker: RunningWorker) -> None:
    with worker.host(PAIRED) as host:
        for command in (local.MakeToken(), local.BeginPairing(), local.Unpair(who="desk-1")):
            host.say(command)
            assert "for the commands of this computer" in host.hear(m.Failed).message
    assert is_served(worker)


@pytest.mark.parametrize("is_from_outside", [False, True])
def test_a_join_token_does_not_undo_unpair(worker: RunningWorker, is_from_outside: bool) -> None:
    """By a guest that keeps its connection; the list may also be changed by another process."""
    own = new_key_pair()
    enroll = m.Enroll(public_key=own.public, host_name="kitchen")
    with LocalConnection(worker.folder) as connection:
        token = decode_token(connection.ask(local.MakeToken(), local.Token).token)
        with worker.host(token.guest) as guest:
            for _ in range(2):  # The first answer may be lost.
                guest.say(enroll)
                guest.hear(m.Enrolled)
            if is_from_outside:
                assert TrustedPeers(worker.folder / "trusted_hosts.json").remove(own.public)
                wait_until(
                    lambda: len(connection.ask(local.AskStatus(), local.Status).hosts) == 1,
                    "the worker has read the list",
                )
            else:
                connection.ask(local.Unpair(who="kitchen"), local.Unpaired)
            guest.say(enroll)
            assert "does not trust this computer" in guest.hear(m.Failed).message
        (left,) = connection.ask(local.AskStatus(), local.Status).hosts
        assert left.fingerprint == fingerprint(PAIRED.public)
    with worker.host(own) as host:
        host.wait_for_refusal()


def test_a_token_is_good_still_when_its_host_could_not_be_written_down(
    worker: RunningWorker,
) -> None:
    own = new_key_pair()
    enroll = m.Enroll(public_key=own.public, host_name="kitchen")
    listed = worker.folder / "trusted_hosts.json"
    with LocalConnection(worker.folder) as connection:
        token = decode_token(connection.ask(local.MakeToken(), local.Token).token)
    content = listed.read_bytes()
    listed.write_bytes(b"damaged")
    with worker.host(token.guest) as guest:
        guest.say(enroll)
        assert guest.hear(m.Failed).error == "ConfigError"
        listed.write_bytes(content)
        guest.say(enroll)
        guest.hear(m.Enrolled)
    with worker.host(own) as host:
        host.hello()
        host.hear(m.NodeDescription)


def test_a_join_token_lets_one_host_in_once(worker: RunningWorker) -> None:
    with LocalConnection(worker.folder) as connection:
        token = decode_token(connection.ask(local.MakeToken(), local.Token).token)
    assert (token.name, token.endpoint) == ("box", worker.worker.endpoint)
    assert token.public_key == worker.keys.public
    own, other = new_key_pair(), new_key_pair()
    with worker.host(token.guest) as guest:
        guest.hello()
        assert "for enrolling alone" in guest.hear(m.Failed).message
        guest.say(m.Enroll(public_key=b"no key", host_name="desk"))
        assert guest.hear(m.Failed).error == "PeerRefused"
        enroll = m.Enroll(public_key=own.public, host_name="the desk")
        guest.say(enroll)
        guest.hear(m.Enrolled)
        guest.say(enroll)  # Its answer may have been lost.
        guest.hear(m.Enrolled)
        guest.say(m.Enroll(public_key=other.public, host_name="thief"))
        assert "was used already" in guest.hear(m.Failed).message
    with worker.host(token.guest) as again:
        again.wait_for_refusal()
    with worker.host(other) as thief:
        thief.wait_for_refusal()
    with worker.host(own) as host:
        host.hello()
        assert host.hear(m.NodeDescription)
    with LocalConnection(worker.folder) as connection:
        hosts = connection.ask(local.AskStatus(), local.Status).hosts
    assert ("the desk", fingerprint(own.public)) in {(h.name, h.fingerprint) for h in hosts}


def test_a_join_token_expires() -> None:
    """On a real socket; the worker's clock is an argument."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    gatekeeper = Gatekeeper(context)
    keys, owner, guest = new_key_pair(), new_key_pair(), new_key_pair()
    access = Access(gatekeeper, owner.public)
    listener, endpoint = listen(context, zmq.ROUTER, keys, DOMAIN, "tcp://127.0.0.1:*")
    try:
        access.invite(guest.public, 100.0 + TOKEN_SECONDS)
        watch = listener.get_monitor_socket(HANDSHAKES)
        outcomes: list[int] = []
        for now in (100.0, 99.0 + TOKEN_SECONDS, 100.0 + TOKEN_SECONDS):
            access.refresh(now)
            comer = connect(context, zmq.DEALER, guest, keys.public, endpoint)
            assert watch.poll(int(PATIENCE_SECONDS * 1000))
            outcomes.append(recv_monitor_message(watch)["event"])
            comer.close(linger=0)
        listener.disable_monitor()
        watch.close(linger=0)
        good, refused = zmq.EVENT_HANDSHAKE_SUCCEEDED, zmq.EVENT_HANDSHAKE_FAILED_AUTH
        assert outcomes == [good, good, refused]
        assert access.standing(guest.public) == "stranger"
    finally:
        listener.close(linger=0)
        gatekeeper.close()
        context.term()


def test_a_flood_of_strangers_keeps_nobody_else_out(worker: RunningWorker) -> None:
    address, _, port = worker.worker.endpoint.removeprefix("tcp://").rpartition(":")
    for _ in range(300):
        socket.create_connection((address, int(port))).close()
    assert is_served(worker)
