"""Small hand-overs take a stream between the computing threads, and only its peer may use it."""

from __future__ import annotations

import os
import select
import socket
import sys
import threading
import time
from collections.abc import Iterator

import msgspec
import numpy as np
import pytest
import zmq
from hypothesis import given
from hypothesis import strategies as st

from engine.cluster import direct_form
from engine.cluster import messages as m
from engine.cluster.codec import Codec
from engine.cluster.direct_links import DirectLinks
from engine.cluster.exchange import Exchange
from engine.cluster.peer_links import DIRECT_BYTES
from engine.cluster.sealed_stream import SealedStream
from engine.errors import ProtocolError
from tests.engine.cluster.exchange_members import (
    EPOCH,
    WIDTH,
    Member,
    Members,
    add_doubled,
    plan_of_groups,
)
from tests.engine.cluster.test_exchange_measures_its_links import measure_together

pytestmark = pytest.mark.network

PLAN = plan_of_groups([[0, 1, 2]] * 3, 3)
SMALL, LARGE = 1, 2 * DIRECT_BYTES // (4 * WIDTH)


@pytest.fixture
def members() -> Iterator[Members]:
    with Members(PLAN) as members:
        measure_together(members)
        yield members


def streams_of(member: Member) -> dict[int, object]:
    """Streams by peer."""
    assert member.links is not None
    return dict(member.links.direct.streams)


def hand_over(member: Member, num_tokens: int, step_id: int) -> m.Array:
    """One hand-over of values that only this member has."""
    values = np.random.default_rng(member.index).standard_normal((num_tokens, WIDTH))
    partial = values.astype(np.float32)
    member.exchange.begin_step(step_id, "generated")
    result = member.exchange.hand_over(0, np.ones_like(partial), partial, num_tokens)
    assert result is not None
    return result


def test_every_pair_has_a_stream(members: Members) -> None:
    for member in members.members:
        assert set(streams_of(member)) == {0, 1, 2} - {member.index}


def family_of(stream: SealedStream) -> socket.AddressFamily:
    """What kind of socket a stream has."""
    with socket.socket(fileno=os.dup(stream.fileno())) as same:
        return same.family


@pytest.mark.parametrize("offers_local", [True, False])
def test_devices_of_one_computer_do_without_tcp_where_they_can(*, offers_local: bool) -> None:
    is_local = offers_local and sys.platform == "linux"
    with Members(PLAN, offers_local=offers_local) as members:
        measure_together(members)
        for member in members.members:
            assert member.links is not None
            families = {family_of(one) for one in member.links.direct.streams.values()}
            assert families == {socket.AF_UNIX if is_local else socket.AF_INET}
        results = members.all_do(lambda member: hand_over(member, SMALL, 1))
    parts = [np.random.default_rng(n).standard_normal((SMALL, WIDTH)) for n in range(3)]
    total = parts[0].astype(np.float32) + parts[1].astype(np.float32) + parts[2].astype(np.float32)
    for result in results:
        assert np.array_equal(result, add_doubled(0, np.ones_like(total), total))


def test_a_local_name_that_nobody_has_here_leads_to_tcp() -> None:
    """As from a peer on another computer."""
    poller = zmq.Poller()
    near = DirectLinks(0, "tcp://127.0.0.1:*", poller)
    far = DirectLinks(1, "", poller)
    offer = msgspec.structs.replace(near.offers(EPOCH, [1])[1], local_name="0" * 32)
    far.dial(offer, "tcp://127.0.0.1:1")
    open_both(near, far, poller)
    try:
        assert family_of(near.streams[1]) == family_of(far.streams[0]) == socket.AF_INET
    finally:
        near.close()
        far.close()


@pytest.mark.parametrize("name", ["../run/service", "0" * 31, "0" * 32 + "\n", "\0" * 32])
def test_a_local_name_of_another_shape_is_refused(name: str) -> None:
    offer = msgspec.structs.replace(offer_of(0, 9), local_name=name)
    codec: Codec[m.DirectOffer] = Codec(m.EXCHANGE_ACCEPTS)
    frames = codec.encode(offer)
    with pytest.raises(ProtocolError, match="local_name"):
        codec.decode(frames)


@pytest.mark.parametrize("num_tokens", [SMALL, LARGE])
def test_the_bits_are_those_of_the_other_way(members: Members, num_tokens: int) -> None:
    direct = members.all_do(lambda member: hand_over(member, num_tokens, 1))
    for member in members.members:
        assert member.links is not None
        for index in list(streams_of(member)):
            member.links.direct.drop(index)
    other = members.all_do(lambda member: hand_over(member, num_tokens, 2))
    for one in (*direct, *other):
        assert np.array_equal(one, direct[0])


def test_parts_that_are_late_or_early_are_added_in_their_order(members: Members) -> None:
    """Longer than a device looks for one: then it sleeps, and takes what came meanwhile."""

    def walk(member: Member) -> list[m.Array]:
        found: list[m.Array] = []
        random = np.random.default_rng(7)
        for step_id in range(1, 31):
            member.exchange.begin_step(step_id, "generated")
            stream = np.ones((1 + step_id % 3, WIDTH), np.float32)
            for row in range(PLAN.shape.num_rows - 1):
                late = int(random.integers(4))  # The same for all; nobody is 3.
                parts = random.standard_normal((3, *stream.shape)).astype(np.float32)
                if late == member.index:
                    time.sleep(0.003)
                handed = member.exchange.hand_over(row, stream, parts[member.index], len(stream))
                assert handed is not None
                total = parts[0] + parts[1] + parts[2]
                assert np.array_equal(handed, add_doubled(row, stream, total))
                stream = handed / np.float32(np.abs(handed).max())
            found.append(stream)
        return found

    first, *others = members.all_do(walk)
    for other in others:
        assert all(np.array_equal(a, b) for a, b in zip(first, other, strict=True))


def part_head(step_id: int, row: int, index: int, own: m.Array, epoch: int = EPOCH) -> bytes:
    """How the record of a lone partial sum begins."""
    num_tokens, width = own.shape
    wire = str(own.dtype)
    head = direct_form.part_head(epoch, row, index, wire, (num_tokens, width))
    direct_form.write_step(head, step_id)
    return bytes(head)


def test_what_the_record_of_a_part_begins_with_says_everything_about_it() -> None:
    own = np.arange(2 * WIDTH, dtype=np.float32).reshape(2, WIDTH)
    head = part_head(4, 1, 2, own)
    record = bytearray(b"".join([head, direct_form.times(5, None), own.tobytes()]))
    message, (tensor,) = direct_form.decode(bytes(record))
    assert message == m.HandOver(
        epoch=EPOCH,
        step_id=4,
        row=1,
        piece=0,
        device_index=2,
        phase="part",
        has_partial=True,
        has_residual=False,
        sent_ns=5,
    )
    assert np.array_equal(tensor, own)
    assert np.array_equal(direct_form.part_view(record, "float32", (2, WIDTH)), own)
    assert direct_form.read_times(record, direct_form.TIMES_PLACE) == (5, None)
    assert len(record) == direct_form.PART_PLACE + direct_form.part_bytes("float32", (2, WIDTH))
    others = [
        part_head(4, 1, 2, own, EPOCH + 1),
        part_head(5, 1, 2, own),
        part_head(4, 0, 2, own),
        part_head(4, 1, 1, own),
        part_head(4, 1, 2, own[:1]),
        part_head(4, 1, 2, own[:, :-1]),
        part_head(4, 1, 2, own.astype(np.float16)),
    ]
    assert len({head, *others}) == 1 + len(others)


def hostile_parts(own: m.Array) -> dict[str, list[bytes | m.Array]]:
    """Records of device 1 in place of its part of step 1, row 0, and what is wrong with them."""
    times = direct_form.times(5, None)
    more = np.concatenate([own, own])
    return {
        "its next row's": [part_head(1, 1, 1, own), times, own],
        "another step's": [part_head(2, 0, 1, own), times, own],
        "an earlier step's": [part_head(0, 0, 1, own), times, own],
        "another epoch's": [part_head(1, 0, 1, own, EPOCH + 1), times, own],
        "another device's": [part_head(1, 0, 2, own), times, own],
        "longer than it says": [part_head(1, 0, 1, own), times, more],
        "shorter than it says": [part_head(1, 0, 1, more), times, own],
        "of two tokens": [part_head(1, 0, 1, more), times, more],
        "narrower": [part_head(1, 0, 1, own[:, :-1]), times, own[:, :-1].copy()],
        "in another format": [
            part_head(1, 0, 1, own.astype(np.float16)),
            times,
            own[:, ::2].copy(),
        ],
        "a head alone": [part_head(1, 0, 1, own)],
        "a byte": [b"x"],
        "nothing": [b""],
    }


@pytest.mark.parametrize("wrong", hostile_parts(np.ones((1, WIDTH), np.float32)))
def test_what_is_not_the_part_that_is_due_is_never_added(members: Members, wrong: str) -> None:
    """It is refused, or kept for its own turn while this device waits for what is due."""
    first, second, third = members.members
    own = np.ones((SMALL, WIDTH), np.float32)
    assert second.links is not None
    assert third.links is not None
    assert second.links.send_record(0, hostile_parts(own)[wrong])
    assert third.links.send_record(0, [part_head(1, 0, 2, own), direct_form.times(5, None), own])

    class StillWaitsError(Exception):
        pass

    waits = 0

    def wait(seconds: float) -> None:
        nonlocal waits
        first.wait(min(seconds, 0.01))
        waits += 1
        if waits > 10:
            raise StillWaitsError

    first.exchange = Exchange(EPOCH, PLAN, 0, WIDTH, first.exchange.links, wait, add_doubled)
    first.exchange.begin_step(1, "generated")
    with pytest.raises((StillWaitsError, ProtocolError)):
        first.exchange.hand_over(0, own, own, SMALL)


@given(st.data())
def test_a_damaged_record_is_refused_or_read_never_worse(data: st.DataObject) -> None:
    own = np.ones((1, WIDTH), np.float16)
    record = b"".join(
        [
            part_head(4, 1, 2, own),
            direct_form.times(5, 6),
            own.tobytes(),
        ]
    )
    changed = bytearray(record[: data.draw(st.integers(0, len(record)))])
    for _ in range(data.draw(st.integers(0, 3))):
        if changed:
            changed[data.draw(st.integers(0, len(changed) - 1))] = data.draw(st.integers(0, 255))
    try:
        message, tensors = direct_form.decode(bytes(changed))
    except ProtocolError as error:
        assert "\n" not in str(error)
        return
    assert message.row >= 0
    assert sum(tensor.nbytes for tensor in tensors) <= len(changed)


@pytest.mark.parametrize(("index", "epoch"), [(2, EPOCH), (1, EPOCH + 1)])
def test_a_stream_carries_only_its_own_peers_hand_overs_of_this_epoch(
    members: Members, index: int, epoch: int
) -> None:
    first, second, _ = members.members
    assert first.links is not None
    assert second.links is not None
    forged = m.HandOver(
        epoch=epoch,
        step_id=1,
        row=0,
        piece=0,
        device_index=index,
        phase="part",
        has_partial=True,
        has_residual=False,
        sent_ns=0,
    )
    assert second.links.direct.send(0, direct_form.encode(forged, []))
    assert first.links.look_for(5_000_000_000)
    with pytest.raises(ProtocolError, match="node-1/cpu handed over as device"):
        first.links.receive()


def test_an_offer_out_of_turn_is_refused(members: Members) -> None:
    first, second, _ = members.members
    for sender, receiver in ((first, second), (second, first)):
        assert sender.links is not None
        assert receiver.links is not None
        sender.links.send(receiver.index, offer_of(sender.index, 9))
        receiver.wait(5.0)
        with pytest.raises(ProtocolError, match="offers a stream out of turn"):
            receiver.links.receive()
    later = DirectLinks(1, "", zmq.Poller())
    with pytest.raises(ProtocolError, match="that this device is to offer"):
        later.dial(offer_of(1, 9), "tcp://127.0.0.1:9")


def test_a_time_that_no_clock_shows_is_refused(members: Members) -> None:
    first, second, _ = members.members
    assert second.links is not None
    own = np.ones((SMALL, WIDTH), np.float32)
    head = part_head(1, 0, 1, own)
    bad_times = (-(1 << 63)).to_bytes(8, "little", signed=True) + bytes(8)
    assert second.links.direct.send(0, [head, bad_times, own])
    first.exchange.begin_step(1, "generated")
    with pytest.raises(ProtocolError, match="which no clock shows"):
        first.exchange.hand_over(0, own, own, SMALL)


def test_records_without_end_do_not_keep_the_engine_host_unheard(members: Members) -> None:
    first, second, _ = members.members
    assert second.links is not None
    own = np.ones((SMALL, WIDTH), np.float32)
    stale = [part_head(1, 0, 1, own)]
    stale += [direct_form.times(1, None), own]
    ends = threading.Event()
    stream = second.links.direct

    def flood() -> None:
        while not ends.is_set():
            stream.send(0, stale)

    class GivenUpError(Exception):
        pass

    heard = 0
    wait = first.wait

    def wait_and_hear(seconds: float) -> None:
        nonlocal heard
        wait(seconds)
        heard += 1
        if heard > 20:
            raise GivenUpError

    first.exchange = Exchange(
        EPOCH, PLAN, 0, WIDTH, first.exchange.links, wait_and_hear, add_doubled
    )
    flooding = threading.Thread(target=flood)
    flooding.start()
    try:
        first.exchange.begin_step(2, "generated")
        with pytest.raises(GivenUpError):
            first.exchange.hand_over(0, own, own, SMALL)
    finally:
        ends.set()
        flooding.join()


def open_both(near: DirectLinks, far: DirectLinks, poller: zmq.Poller) -> None:
    """What two runners do in turns."""
    deadline = time.monotonic() + 5
    while (near.is_opening or far.is_opening) and time.monotonic() < deadline:
        poller.poll(10)
        near.progress()
        far.progress()


def test_strangers_get_no_stream_and_keep_nobody_out() -> None:
    poller, endpoint = zmq.Poller(), "tcp://127.0.0.1:*"
    near = DirectLinks(0, endpoint, poller)
    far = DirectLinks(1, endpoint, poller)
    offer = near.offers(EPOCH, [1])[1]
    strangers = [socket.create_connection(("127.0.0.1", offer.port)) for _ in range(40)]
    strangers[0].sendall((1).to_bytes(4, "little") + b"\x18\0\0\0" + bytes(24))  # Without the key.
    strangers[1].sendall((7).to_bytes(4, "little"))
    strangers[2].close()  # The others say nothing.
    far.dial(offer, f"tcp://127.0.0.1:{offer.port}")
    far.dial(offer_of(0, 9), "tcp://127.0.0.1:9")  # A second offer changes nothing.
    open_both(near, far, poller)
    near.stop_opening()
    try:
        assert set(near.streams) == {1}
        assert set(far.streams) == {0}
        assert far.send(0, [b"hello"])
        while not near.streams[1].has_record():
            assert poller.poll(5000)
        assert near.streams[1].receive() == b"hello"
    finally:
        for one in (near, far, *strangers):
            one.close()


def test_a_port_that_nobody_reaches_is_done_without() -> None:
    poller = zmq.Poller()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        links = DirectLinks(0, f"tcp://127.0.0.1:{port}", poller)
        assert links.offers(EPOCH, [1]) == {}
    far = DirectLinks(1, "tcp://127.0.0.1:*", poller)
    far.dial(offer_of(0, port), "tcp://127.0.0.1:1")
    near = DirectLinks(0, "tcp://127.0.0.1:*", poller)
    assert set(near.offers(EPOCH, [1])) == {1}
    deadline = time.monotonic() + 5
    while far.is_opening and time.monotonic() < deadline:
        poller.poll(10)
        far.progress()
    assert not far.is_opening
    near.stop_opening()
    assert near.streams == far.streams == {}


def test_a_stream_whose_greeting_is_not_answered_is_no_loss() -> None:
    """The listener may have given up before it saw the connection."""
    poller = zmq.Poller()
    far = DirectLinks(1, "", poller)
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        far.dial(offer_of(0, deaf.getsockname()[1]), "tcp://127.0.0.1:1")
        deadline = time.monotonic() + 5
        while not select.select([deaf], [], [], 0)[0]:
            assert time.monotonic() < deadline
        far.progress()
        assert far.streams == {}
    while far.is_opening:
        assert time.monotonic() < deadline
        far.progress()
    assert far.streams == {}


def offer_of(device_index: int, port: int) -> m.DirectOffer:
    """An offer that nobody means."""
    return m.DirectOffer(
        epoch=EPOCH,
        device_index=device_index,
        port=port,
        cipher="aes-256-gcm",
        key_there=bytes(32),
        key_back=bytes(32),
    )
