"""The gatekeeper lets the right keys in, says whose a message is, and remembers refusals."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest
import zmq

from engine.cluster import messages as m
from engine.cluster.security import Gatekeeper, KeyPair, new_key_pair
from engine.cluster.transport import Channel, connect, connect_once, listen

pytestmark = pytest.mark.network


class Door:
    """A listening channel, and those who knock."""

    def __init__(self) -> None:
        self.context: zmq.Context[Any] = zmq.Context()
        self.gatekeeper = Gatekeeper(self.context)
        self.keys = new_key_pair()
        socket, self.endpoint = listen(
            self.context, zmq.ROUTER, self.keys, "door", "tcp://127.0.0.1:*"
        )
        self.channel: Channel[Any] = Channel(socket, m.WORKER_ACCEPTS)
        self.guests: list[Channel[Any]] = []

    def knock(self, keys: KeyPair) -> Channel[Any]:
        """Connect and say Hello."""
        socket = connect(self.context, zmq.DEALER, keys, self.keys.public, self.endpoint)
        self.guests.append(Channel(socket, m.WORKER_SENDS))
        self.guests[-1].send(m.Hello(host_name="desk"))
        return self.guests[-1]

    def close(self) -> None:
        """Leave nothing."""
        for channel in [*self.guests, self.channel]:
            channel.close()
        self.gatekeeper.close()
        self.context.term()


@pytest.fixture
def door() -> Iterator[Door]:
    door = Door()
    yield door
    door.close()


def test_a_message_names_the_key_of_its_sender(door: Door) -> None:
    one, two = new_key_pair(), new_key_pair()
    door.gatekeeper.allow("door", one.public, two.public)
    routes: dict[bytes, bytes] = {}
    for keys in (one, two):
        door.knock(keys)
        received = door.channel.receive(5000)
        assert received is not None
        assert received.message == m.Hello(host_name="desk")
        routes[received.peer_key] = received.route
    assert routes.keys() == {one.public, two.public}
    assert len(set(routes.values())) == 2


def test_a_stranger_is_kept_out_and_remembered(door: Door) -> None:
    friend, stranger = new_key_pair(), new_key_pair()
    door.gatekeeper.allow("door", friend.public)
    door.knock(stranger)
    door.knock(friend)
    received = door.channel.receive(5000)
    assert received is not None
    assert received.peer_key == friend.public
    # The door is busy with one connection at a time, in no certain order.
    for _ in range(100):
        if door.gatekeeper.refusals():
            break
        assert door.channel.receive(50) is None
    refusal = door.gatekeeper.refusals()[-1]
    assert (refusal.domain, refusal.key) == ("door", stranger.public)
    assert refusal.address == "127.0.0.1"
    assert "not on the allow list" in refusal.reason


def test_a_door_that_is_open_to_all_still_knows_who_came(door: Door) -> None:
    anybody = new_key_pair()
    door.gatekeeper.allow_any("door")
    door.knock(anybody)
    received = door.channel.receive(5000)
    assert received is not None
    assert received.peer_key == anybody.public
    assert door.gatekeeper.refusals() == ()


def test_last_words_ahead_of_a_cut_are_heard(door: Door) -> None:
    guest = new_key_pair()
    door.gatekeeper.allow("door", guest.public)
    socket, watch = connect_once(door.context, guest, door.keys.public, door.endpoint)
    door.guests.append(Channel(socket, m.WORKER_SENDS))
    try:
        door.guests[-1].send(m.Hello(host_name="desk"))
        received = door.channel.receive(5000)
        assert received is not None
        goodbye = m.Failed(epoch=0, error="PeerRefused", message="goodbye")
        door.channel.send(goodbye, route=received.route)
        door.channel.socket.close(linger=1000)
        seen = [watch.connection()]
        while seen[-1] != "cut":
            assert watch.socket.poll(5000), seen
            seen.append(watch.connection())
        time.sleep(0.1)  # libzmq tells of the cut first, and then takes the connection down.
        socket.poll(0)
        last = door.guests[-1].receive(0)
    finally:
        watch.close()
    assert last is not None
    assert last.message == goodbye
