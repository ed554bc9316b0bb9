"""Records of a sealed stream arrive in order and unchanged, or not at all."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.cluster.sealed_stream import (
    CIPHERS,
    MAX_RECORD_BYTES,
    Cipher,
    SealedStream,
    StreamEndedError,
)

KEYS = (b"a" * 32, b"b" * 32)
CIPHER: Cipher = "chacha20-poly1305"


class Ends:
    """Two ends of a connection, and what lies between them."""

    def __init__(
        self, keys: tuple[bytes | None, bytes | None] = KEYS, cipher: Cipher = CIPHER
    ) -> None:
        self.sockets = socket.socketpair()
        self.near = SealedStream(self.sockets[0], cipher, *keys)
        self.far = SealedStream(self.sockets[1], cipher, keys[1], keys[0])

    def close(self) -> None:
        self.near.close()
        self.far.close()


@pytest.fixture
def ends() -> Iterator[Ends]:
    ends = Ends()
    yield ends
    ends.close()


def sealed_record(record: bytes) -> bytes:
    """What one record looks like on its way, as the first of a stream."""
    near, between = socket.socketpair()
    stream = SealedStream(near, CIPHER, *KEYS)
    with between:
        assert stream.send([record])
        found = between.recv(1 << 20)
    stream.close()
    return found


@given(
    st.lists(st.binary(min_size=1, max_size=3000), max_size=12),
    st.booleans(),
    st.sampled_from(sorted(CIPHERS)),
)
def test_records_come_in_order_both_ways(
    records: list[bytes], is_sealed: bool, cipher: Cipher
) -> None:
    ends = Ends(KEYS if is_sealed else (None, None), cipher)
    try:
        for record in records:
            assert ends.near.send([record[:1], record[1:]])
            assert ends.far.send([record, b"back"])
        for record in records:
            assert ends.far.has_record()
            assert ends.far.receive() == record
            assert ends.near.receive() == record + b"back"
        assert ends.far.receive() is ends.near.receive() is None
    finally:
        ends.close()


def test_the_longest_record_fits_and_a_longer_one_is_not_taken(ends: Ends) -> None:
    longest = os.urandom(MAX_RECORD_BYTES)
    assert not ends.near.send([longest, b"x"])
    assert ends.near.send([longest])
    found = None
    while found is None:
        ends.near.flush()
        found = ends.far.receive()
    assert found == longest


def test_what_a_slow_reader_leaves_is_kept_and_sent_later(ends: Ends) -> None:
    sent = 0
    while ends.near.send([sent.to_bytes(4), bytes(50_000)]):
        sent += 1
    assert ends.near.has_unsent
    received = 0
    while received < sent:
        ends.near.flush()
        record = ends.far.receive()
        if record is not None:
            assert int.from_bytes(record[:4]) == received
            received += 1
    assert not ends.near.has_unsent
    assert ends.near.send([b"and on"])
    assert ends.far.receive() == b"and on"


@given(st.data())
def test_a_changed_byte_is_refused(data: st.DataObject) -> None:
    sealed = bytearray(sealed_record(b"eight thousand bytes" * 20))
    place = data.draw(st.integers(4, len(sealed) - 1))
    sealed[place] ^= data.draw(st.integers(1, 255))
    ends = Ends()
    try:
        ends.sockets[0].send(sealed)
        with pytest.raises(StreamEndedError, match="was not sealed with the key"):
            ends.far.receive()
    finally:
        ends.close()


def test_a_repeated_record_is_refused(ends: Ends) -> None:
    sealed = sealed_record(b"once")
    ends.sockets[0].send(sealed + sealed)
    assert ends.far.receive() == b"once"
    with pytest.raises(StreamEndedError):
        ends.far.receive()


def test_a_record_sent_back_to_its_sender_is_refused(ends: Ends) -> None:
    ends.sockets[1].send(sealed_record(b"mine"))
    with pytest.raises(StreamEndedError):
        ends.near.receive()


@pytest.mark.parametrize("length", [0, MAX_RECORD_BYTES + 17, (1 << 32) - 1])
def test_a_length_that_no_record_has_is_refused(ends: Ends, length: int) -> None:
    ends.sockets[0].send(length.to_bytes(4, "little") + b"more")
    with pytest.raises(StreamEndedError, match=f"a record of {length:,} bytes was announced"):
        ends.far.receive()


@pytest.mark.parametrize("length", [1, 15])
def test_a_record_too_short_to_be_sealed_is_refused(ends: Ends, length: int) -> None:
    ends.sockets[0].send(length.to_bytes(4, "little") + bytes(length))
    with pytest.raises(StreamEndedError, match="was not sealed with the key"):
        ends.far.receive()


def test_a_taken_record_stays_until_the_next_is_taken(ends: Ends) -> None:
    memory = ends.far.record
    for record in (b"first and longer", b"second"):
        assert ends.near.send([record])
    assert ends.far.take()
    assert ends.far.has_record()
    assert not ends.far.has_more()  # The second is in this process already.
    assert memory[: ends.far.num_bytes] == b"first and longer"
    assert ends.far.take()
    assert memory[: ends.far.num_bytes] == b"second"
    assert not ends.far.take()
    assert memory[: ends.far.num_bytes] == b"second"
    ends.near.send([b"third"])
    assert ends.far.has_more()
    assert ends.far.receive() == b"third"


def test_the_end_of_the_connection_is_told_after_its_last_record(ends: Ends) -> None:
    ends.near.send([b"last"])
    ends.sockets[0].shutdown(socket.SHUT_RDWR)
    assert ends.far.receive() == b"last"
    with pytest.raises(StreamEndedError):
        ends.far.receive()
