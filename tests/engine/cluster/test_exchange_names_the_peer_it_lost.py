"""A peer that dies or freezes while a device waits for it in an exchange is named, and soon."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import numpy as np
import pytest

from engine.cluster import messages as m
from engine.errors import ProtocolError, WorkerLost
from tests.engine.cluster.exchange_members import (
    EPOCH,
    WIDTH,
    Member,
    Members,
    plan_of_groups,
)

pytestmark = pytest.mark.network

VALUES = np.ones((4, WIDTH), np.float32)
PLAN = plan_of_groups([[0, 1]] * 3, 2)
# Promised: a closed connection at once, a frozen peer after the heartbeat's 3 s. Loaded machines
# are slow to start and to notice.
DEAD_SECONDS, FROZEN_SECONDS = 2.0, 5.0


class Pair:
    """This process as device 0, another one as device 1, in the middle of exchanging."""

    def __init__(self) -> None:
        self.member = Member(PLAN, 0)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.engine.cluster.exchange_peer"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        endpoint, key = self.process.stdout.readline().split()
        other = m.Peer(device_index=1, exchange_endpoint=endpoint, public_key=key.encode())
        self.member.allow([other])
        mine = self.member.peer
        words = {"endpoint": mine.exchange_endpoint, "key": mine.public_key.decode()}
        self.process.stdin.write(json.dumps(words) + "\n")
        self.process.stdin.flush()
        assert self.process.stdout.readline() == "ready\n"
        self.member.connect([other])
        self._step_id = 0

    def exchange(self) -> None:
        """One step of one hand-over."""
        self._step_id += 1
        self.member.exchange.begin_step(self._step_id, "generated")
        self.member.exchange.hand_over(0, VALUES, VALUES, 4)

    def close(self) -> None:
        """End the other process, whatever it does."""
        self.process.kill()
        self.process.communicate()
        self.member.close()


@pytest.fixture
def pair() -> Iterator[Pair]:
    """Two processes that have exchanged a few times."""
    pair = Pair()
    try:
        for _ in range(5):
            pair.exchange()
        yield pair
    finally:
        pair.close()


@pytest.mark.skipif(os.name == "nt", reason="Windows has no signals to stop a process with")
@pytest.mark.parametrize(
    ("sign", "bound"), [(signal.SIGKILL, DEAD_SECONDS), (signal.SIGSTOP, FROZEN_SECONDS)]
)
def test_a_lost_peer_is_named(pair: Pair, sign: signal.Signals, bound: float) -> None:
    pair.process.send_signal(sign)
    started = time.monotonic()
    with pytest.raises(WorkerLost, match="node-1/cpu") as caught:
        while True:
            pair.exchange()
    assert caught.value.device == "node-1/cpu"
    assert "\n" not in str(caught.value)
    assert time.monotonic() - started <= bound


def test_a_peer_lost_between_two_steps_is_named_by_the_next(pair: Pair) -> None:
    pair.process.kill()
    pair.process.wait()
    links = pair.member.links
    assert links is not None
    assert pair.member.poller.poll(10_000)
    links.note_losses()  # As a runner does while it is idle.
    pair.member.exchange.take_early()
    with pytest.raises(WorkerLost, match="node-1/cpu"):
        pair.exchange()


def test_a_peer_that_does_not_let_this_device_in_is_named() -> None:
    with Members(PLAN) as members:
        for member in members.members:
            assert member.links is not None
            member.links.close()
            member.links = None
            member.allow([])
        first, second = members.members
        first.connect([first.peer, second.peer])
        assert first.links is not None
        with pytest.raises(WorkerLost, match="refused this device's key"):
            first.links.measure(first.wait)


def hand_over(**changes: object) -> m.HandOver:
    """What device 1 owes device 0 after row 0 of step 1, but for the changes."""
    fields: dict[str, object] = {
        "epoch": EPOCH,
        "step_id": 1,
        "row": 0,
        "piece": 0,
        "device_index": 1,
        "phase": "part",
        "has_partial": True,
        "has_residual": False,
        "sent_ns": 0,
    }
    return m.HandOver(**{**fields, **changes})  # type: ignore[arg-type]


BROKEN = {
    "an unknown row": (hand_over(row=2), [VALUES]),
    "a piece that no step has": (hand_over(piece=9), [VALUES]),
    "a negative piece": (hand_over(piece=-1), [VALUES]),
    "an unknown sender": (hand_over(device_index=7), [VALUES]),
    "fewer tensors than it says": (hand_over(), []),
    "another shape": (hand_over(), [VALUES[:2]]),
    "another dtype": (hand_over(), [VALUES.astype(np.float16)]),
    "a stream nobody lacks": (hand_over(has_residual=True), [VALUES, VALUES]),
    "an answer too large": (
        m.Ping(epoch=EPOCH, device_index=1, number=0, reply_bytes=1 << 40),
        [],
    ),
}


@pytest.mark.parametrize("what", BROKEN)
def test_what_the_plan_does_not_say_is_refused(what: str) -> None:
    message, tensors = BROKEN[what]
    with Members(PLAN) as members:
        first, second = members.members
        assert second.links is not None
        second.links.send(0, message, tensors)
        first.exchange.begin_step(1, "generated")
        with pytest.raises(ProtocolError):
            first.exchange.hand_over(0, VALUES, VALUES, 4)


def test_a_repeated_hand_over_is_refused() -> None:
    with Members(PLAN) as members:
        first, second = members.members
        assert second.links is not None
        for _ in range(2):
            second.links.send(0, hand_over(row=1), [VALUES])
        first.exchange.begin_step(1, "generated")
        with pytest.raises(ProtocolError, match="twice"):
            first.exchange.hand_over(0, VALUES, VALUES, 4)


def test_hand_overs_of_other_epochs_and_past_steps_are_passed_over() -> None:
    with Members(PLAN) as members:
        first, second = members.members
        assert second.links is not None
        second.links.send(0, hand_over(epoch=EPOCH - 1), [VALUES * 5])
        second.links.send(0, hand_over(step_id=0), [VALUES * 6])
        second.links.send(0, hand_over(), [VALUES])
        first.exchange.begin_step(1, "generated")
        found = first.exchange.hand_over(0, VALUES, VALUES, 4)
        np.testing.assert_array_equal(found, VALUES + 4 * np.float32(1.5))
