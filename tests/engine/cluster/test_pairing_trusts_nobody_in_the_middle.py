"""Pairing: honest ends show the same digits, everybody else is found out or refused."""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.cluster.codec import Codec
from engine.cluster.pairing import (
    HOST_SENDS,
    PAIRING_KEYS,
    WORKER_SENDS,
    PairAnswer,
    Pairing,
    PairMessage,
    PairOpen,
    PairRefused,
    PairReveal,
    PairVerdict,
    commitment,
    pairing_code,
    pairing_endpoint,
)
from engine.cluster.security import new_key_pair, public_half
from engine.errors import PeerRefused, ProtocolError

KEYS = [new_key_pair().public for _ in range(3)]
HOST, WORKER, MALLORY = KEYS
DEADLINE = 60.0

nonces = st.binary(min_size=32, max_size=32)
names = st.text(st.characters(categories=("L", "N", "Zs")), min_size=1, max_size=64).filter(
    str.isprintable
)


class Ends(NamedTuple):
    """Both ends of an attempt."""

    host: Pairing
    worker: Pairing


def two_ends(host_nonce: bytes = b"h" * 32, worker_nonce: bytes = b"w" * 32) -> Ends:
    """Two ends that have said nothing yet."""
    return Ends(
        Pairing("host", HOST, "desk", host_nonce, DEADLINE),
        Pairing("worker", WORKER, "attic", worker_nonce, DEADLINE),
    )


def talk(ends: Ends) -> None:
    """Carry messages to and fro until both show digits."""
    answer = ends.worker.take(ends.host.open(), HOST, 1.0)
    assert answer is not None
    reveal = ends.host.take(answer, b"", 1.0)
    assert reveal is not None
    own_reveal = ends.worker.take(reveal, HOST, 1.0)
    assert own_reveal is not None
    assert ends.host.take(own_reveal, b"", 1.0) is None


@given(nonces, nonces, names, names)
def test_honest_ends_show_the_same_six_digits(
    host_nonce: bytes, worker_nonce: bytes, host_name: str, worker_name: str
) -> None:
    ends = Ends(
        Pairing("host", HOST, host_name, host_nonce, DEADLINE),
        Pairing("worker", WORKER, worker_name, worker_nonce, DEADLINE),
    )
    talk(ends)
    assert ends.host.code == ends.worker.code
    assert len(ends.host.code) == 6
    assert ends.host.code.isdecimal()
    assert (ends.host.peer_key, ends.host.peer_name) == (WORKER, worker_name)
    assert (ends.worker.peer_key, ends.worker.peer_name) == (HOST, host_name)


def test_both_are_paired_when_both_persons_say_so() -> None:
    ends = two_ends()
    talk(ends)
    to_worker = ends.host.judge(True, 2.0)
    assert not ends.host.is_paired
    ends.worker.take(to_worker, HOST, 2.0)
    assert not ends.worker.is_paired
    ends.host.take(ends.worker.judge(True, 2.0), b"", 2.0)
    assert ends.host.is_paired
    assert ends.worker.is_paired


@pytest.mark.parametrize("who", ["host", "worker"])
def test_one_person_who_says_no_leaves_both_unpaired(who: str) -> None:
    ends = two_ends()
    talk(ends)
    one, other = ends if who == "host" else reversed(ends)
    with pytest.raises(PeerRefused, match="not the same, says the person at the other"):
        other.take(one.judge(False, 2.0), b"", 2.0)
    for end in ends:
        assert not end.is_paired
        assert "not the same" in end.reason
        with pytest.raises(PeerRefused):
            end.judge(True, 2.0)
        with pytest.raises(PeerRefused):
            end.take(PairVerdict(is_same=True), b"", 2.0)
        assert not end.is_paired


@given(nonces, nonces, nonces, nonces, st.booleans(), st.booleans())
def test_a_man_in_the_middle_makes_the_ends_show_different_digits(
    host_nonce: bytes, worker_nonce: bytes, to_host: bytes, to_worker: bytes, a: bool, b: bool
) -> None:
    """Mallory talks to each end, as itself and under the other's name or its own.

    Equal digits are possible by luck, one time in a million; hypothesis would have to find it.
    """
    ends = two_ends(host_nonce, worker_nonce)
    opened = ends.host.open()
    answer = ends.worker.take(
        PairOpen(
            public_key=MALLORY,
            name=opened.name if a else "mallory",
            commitment=commitment(MALLORY, to_worker),
        ),
        MALLORY,
        1.0,
    )
    assert isinstance(answer, PairAnswer)
    ends.host.take(
        PairAnswer(
            public_key=MALLORY,
            name=answer.name if b else "mallory",
            commitment=commitment(MALLORY, to_host),
        ),
        b"",
        1.0,
    )
    ends.worker.take(PairReveal(nonce=to_worker), MALLORY, 1.0)
    ends.host.take(PairReveal(nonce=to_host), b"", 1.0)
    assert ends.host.code != ends.worker.code


@given(st.sampled_from(["key", "name", "nonce"]), st.sampled_from([0, 1]), st.binary(min_size=1))
def test_the_digits_depend_on_every_key_name_and_nonce(what: str, end: int, salt: bytes) -> None:
    sides = [[HOST, "desk", b"h" * 32], [WORKER, "attic", b"w" * 32]]
    before = pairing_code(tuple(sides[0]), tuple(sides[1]))  # type: ignore[arg-type]
    other = hashlib.sha256(salt).hexdigest()
    change = {"key": other.encode()[:40], "name": other, "nonce": other.encode()[:32]}[what]
    sides[end][["key", "name", "nonce"].index(what)] = change
    assert pairing_code(tuple(sides[0]), tuple(sides[1])) != before  # type: ignore[arg-type]


def test_text_cannot_move_from_one_part_to_the_next() -> None:
    one = pairing_code((HOST, "ab", b"h" * 32), (WORKER, "c", b"w" * 32))
    two = pairing_code((HOST, "a", b"h" * 32), (WORKER, "bc", b"w" * 32))
    assert one != two


@given(nonces)
def test_a_number_that_does_not_fit_its_commitment_is_refused(other: bytes) -> None:
    """Whoever could choose its number after seeing the other's could make the digits fit."""
    ends = two_ends()
    answer = ends.worker.take(ends.host.open(), HOST, 1.0)
    assert answer is not None
    reveal = ends.host.take(answer, b"", 1.0)
    assert isinstance(reveal, PairReveal)
    if other not in (b"h" * 32, b"w" * 32):
        for end in ends:
            with pytest.raises(PeerRefused, match="another number than it had committed to"):
                end.take(PairReveal(nonce=other), b"", 1.0)
            assert not end.code


def test_a_commitment_cannot_be_used_with_another_key() -> None:
    """Mallory answers with the worker's commitment and its own key, then with its number."""
    ends = two_ends()
    answer = ends.worker.take(ends.host.open(), HOST, 1.0)
    assert isinstance(answer, PairAnswer)
    stolen = PairAnswer(public_key=MALLORY, name="attic", commitment=answer.commitment)
    ends.host.take(stolen, b"", 1.0)
    with pytest.raises(PeerRefused, match="committed"):
        ends.host.take(PairReveal(nonce=b"w" * 32), b"", 1.0)


def test_nobody_reveals_before_both_have_committed() -> None:
    ends = two_ends()
    with pytest.raises(PeerRefused, match="out of turn"):
        ends.worker.take(PairReveal(nonce=b"h" * 32), HOST, 1.0)
    ends = two_ends()
    opened = ends.host.open()
    assert b"h" * 32 not in (opened.commitment, opened.public_key)
    answer = ends.worker.take(opened, HOST, 1.0)
    assert isinstance(answer, PairAnswer)
    with pytest.raises(PeerRefused, match="out of turn"):
        ends.host.take(PairReveal(nonce=b"w" * 32), b"", 1.0)


MESSAGES: list[PairMessage] = [
    PairOpen(public_key=HOST, name="desk", commitment=commitment(HOST, b"h" * 32)),
    PairAnswer(public_key=WORKER, name="attic", commitment=commitment(WORKER, b"w" * 32)),
    PairReveal(nonce=b"h" * 32),
    PairReveal(nonce=b"w" * 32),
    PairVerdict(is_same=True),
    PairRefused(reason="no"),
]


@given(st.sampled_from(["host", "worker"]), st.lists(st.sampled_from(MESSAGES), max_size=8))
def test_only_the_one_right_order_of_messages_leads_to_digits(
    role: str, order: list[PairMessage]
) -> None:
    ends = two_ends()
    end = ends.host if role == "host" else ends.worker
    right = [MESSAGES[1], MESSAGES[3]] if role == "host" else [MESSAGES[0], MESSAGES[2]]
    if role == "host":
        ends.host.open()
    taken: list[PairMessage] = []
    for message in order:
        try:
            end.take(message, b"", 1.0)
        except PeerRefused:
            assert end.reason
            break
        taken.append(message)
    assert taken[:2] == right[: len(taken[:2])]
    assert bool(end.code) == (taken[:2] == right)
    assert not end.is_paired  # The person here has not been asked.
    if end.reason:
        for message in MESSAGES:
            with pytest.raises(PeerRefused, match="this attempt to pair is over"):
                end.take(message, b"", 1.0)


def test_no_verdict_counts_before_the_digits_are_there() -> None:
    ends = two_ends()
    ends.worker.take(ends.host.open(), HOST, 1.0)
    with pytest.raises(PeerRefused, match="no code"):
        ends.worker.judge(True, 1.0)
    with pytest.raises(PeerRefused, match="out of turn"):
        ends.worker.take(PairVerdict(is_same=True), HOST, 1.0)


def test_a_verdict_counts_once() -> None:
    ends = two_ends()
    talk(ends)
    ends.host.judge(True, 1.0)
    with pytest.raises(PeerRefused, match="no code to confirm"):
        ends.host.judge(True, 1.0)
    ends.worker.take(PairVerdict(is_same=True), HOST, 1.0)
    with pytest.raises(PeerRefused, match="out of turn"):
        ends.worker.take(PairVerdict(is_same=True), HOST, 1.0)


def test_the_key_that_was_shown_is_the_key_that_is_named() -> None:
    ends = two_ends()
    with pytest.raises(PeerRefused, match="shows one key and names another"):
        ends.worker.take(ends.host.open(), MALLORY, 1.0)
    ends = two_ends()
    ends.worker.take(ends.host.open(), HOST, 1.0)
    with pytest.raises(PeerRefused, match="somebody else"):
        ends.worker.take(PairReveal(nonce=b"h" * 32), MALLORY, 1.0)


@pytest.mark.parametrize(
    ("key", "name", "reason"),
    [
        (b" " * 40, "attic", "key is not one"),
        (HOST, "attic", "this computer itself"),
        (WORKER, "attic\n\x1b[2J", "name cannot be shown"),
    ],
)
def test_nonsense_about_oneself_is_refused(key: bytes, name: str, reason: str) -> None:
    ends = two_ends()
    ends.host.open()
    with pytest.raises(PeerRefused, match=reason):
        ends.host.take(PairAnswer(public_key=key, name=name, commitment=b"c" * 32), b"", 1.0)


def test_an_attempt_ends_after_its_time() -> None:
    ends = two_ends()
    talk(ends)
    with pytest.raises(PeerRefused, match="took longer than 60 s"):
        ends.host.judge(True, DEADLINE + 0.1)
    with pytest.raises(PeerRefused, match="took longer"):
        ends.worker.take(PairVerdict(is_same=True), HOST, DEADLINE + 0.1)
    assert not ends.host.is_paired


def test_a_refusal_is_told_in_one_line() -> None:
    ends = two_ends()
    ends.host.open()
    with pytest.raises(PeerRefused, match="refused to pair: pairing is off; run it") as told:
        ends.host.take(PairRefused(reason="pairing is\noff;\x1b run it"), b"", 1.0)
    assert str(told.value).isprintable()


@pytest.mark.parametrize(
    "message",
    [
        PairOpen(public_key=HOST[:-1], name="desk", commitment=b"c" * 32),
        PairOpen(public_key=HOST, name="", commitment=b"c" * 32),
        PairOpen(public_key=HOST, name="d" * 65, commitment=b"c" * 32),
        PairOpen(public_key=HOST, name="desk", commitment=b"c" * 31),
        PairReveal(nonce=b"n" * 33),
        PairRefused(reason="r" * 501),
    ],
)
def test_wrong_sizes_do_not_get_past_the_decoder(message: PairMessage) -> None:
    with pytest.raises(ProtocolError):
        Codec(HOST_SENDS).decode(Codec(HOST_SENDS).encode(message))


def test_each_end_takes_only_what_the_other_sends() -> None:
    answer = PairAnswer(public_key=WORKER, name="attic", commitment=b"c" * 32)
    frames = Codec(WORKER_SENDS).encode(answer)
    assert Codec(WORKER_SENDS).decode(frames)[0] == answer
    with pytest.raises(ProtocolError):
        Codec(HOST_SENDS).decode(frames)


def test_the_key_of_the_pairing_socket_is_a_pair() -> None:
    assert public_half(PAIRING_KEYS.secret) == PAIRING_KEYS.public


def test_a_worker_pairs_on_the_port_after_its_own() -> None:
    assert pairing_endpoint("tcp://192.168.1.7:47500") == "tcp://192.168.1.7:47501"
    assert pairing_endpoint("tcp://[fe80::1]:47500") == "tcp://[fe80::1]:47501"
