"""Table D1, a runner of the plan against another one's inbox: the engine host hears, and all goes on."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from engine.cluster import messages as m
from engine.cluster.transport import MAX_MESSAGE_BYTES
from engine.weights.checkpoint import Checkpoint, open_checkpoint
from tests.engine.cluster.runner_under_attack import (
    GROWTH_BYTES,
    IDS,
    AttackedRunner,
    memory_bytes,
    plan_of,
)
from tests.tiny_models import save_tiny_llama

pytestmark = pytest.mark.network


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Checkpoint]:
    """A tiny model."""
    folder = tmp_path_factory.mktemp("tiny")
    save_tiny_llama(folder)
    with open_checkpoint(folder) as opened:
        yield opened


@pytest.fixture
def attacked(checkpoint: Checkpoint, tmp_path: Path) -> Iterator[AttackedRunner]:
    """Device 0 of a plan of two; this end is device 1."""
    with AttackedRunner(checkpoint, tmp_path, num_devices=2, checks_numbers=True) as attacked:
        yield attacked


def connect(attacked: AttackedRunner) -> None:
    """A good load of both, and the links measured."""
    attacked.load()
    outbox = attacked.attack_inbox()
    attacked.say(m.Connect(epoch=attacked.epoch))
    while (received := attacked.inbox.receive(200)) is not None or not is_connected(attacked):
        if received is not None and isinstance(received.message, m.Ping):
            ping = received.message
            pong = m.Pong(epoch=ping.epoch, device_index=1, number=ping.number)
            data = [np.zeros(ping.reply_bytes, np.uint8)] if ping.reply_bytes else []
            outbox.send(pong, data)


def is_connected(attacked: AttackedRunner) -> bool:
    received = attacked.channel.receive(0)
    return received is not None and isinstance(received.message, m.Connected)


def serves_alone(attacked: AttackedRunner) -> m.Array:
    """What the runner answers under a plan without the other."""
    plan, peers = attacked.plan, attacked.peers
    attacked.plan, attacked.peers = plan_of(attacked.checkpoint, 1), ()
    attacked.load()
    logits = attacked.logits()
    attacked.plan, attacked.peers = plan, peers
    return logits


def hand_over(attacked: AttackedRunner, **changes: Any) -> m.HandOver:
    """What device 1 owes after row 0 of the step to come, but for the changes."""
    fields: dict[str, Any] = {
        "epoch": attacked.epoch,
        "step_id": 1,
        "row": 0,
        "piece": 0,
        "device_index": 1,
        "phase": "part",
        "has_partial": True,
        "has_residual": False,
        "sent_ns": 0,
    }
    return m.HandOver(**{**fields, **changes})


def frames(message: Any, *specs: Any) -> bytes:
    return msgspec.msgpack.encode((m.PROTOCOL_VERSION, message, specs))


NO_MESSAGES: dict[str, tuple[list[bytes], str]] = {
    "pickle": ([pickle.dumps([1])], "first bytes 80 0"),
    "nothing": ([b""], "part 0"),
    "deep nesting": ([b"\x91" * 100_000], "first bytes 91 91"),
    "a thousand parts": ([frames(["Ping", 1, 1, 0, 0]), *[b""] * 1000], "brings 1000"),
    "a message for a runner's host": ([frames(["Abort", 1])], "Abort"),
    "a dtype nobody knows": (
        [frames(["Ping", 1, 1, 0, 0], (250, (1,))), b"x"],
        "dtype of tensor 0",
    ),
    "a part too short": (
        [frames(["Ping", 1, 1, 0, 0], ("float32", (5, 48))), b"x" * 958],
        "960 bytes, part has 958",
    ),
    "a phase nobody knows": (
        [frames(["HandOver", 1, 1, 0, 0, 1, "\x1b[2J", True, False, 0])],
        "which is phase",
    ),
    "a clock past 62 bits": (
        [frames(["HandOver", 1, 1, 0, 0, 1, "part", True, False, 2**64 - 1])],
        "which is sent_ns",
    ),
    "another age past 62 bits": (
        [frames(["HandOver", 1, 1, 0, 0, 1, "part", True, False, 0, -(2**63)])],
        "which is heard_ns",
    ),
    "a row past 31 bits": (
        [frames(["HandOver", 1, 1, 2**63, 0, 1, "part", True, False, 0])],
        "which is row",
    ),
}

BROKEN: dict[str, tuple[dict[str, Any], str]] = {
    "a row past the plan": ({"row": 6}, "owes this device nothing there"),
    "a piece that no step has": ({"piece": 4}, "owes this device nothing there"),
    "a sender past the plan": ({"device_index": 7}, "no peer of this plan"),
    "the receiver itself": ({"device_index": 0}, "no peer of this plan"),
}


def test_what_is_no_message_reaches_the_host_as_an_error(attacked: AttackedRunner) -> None:
    alone = serves_alone(attacked)
    connect(attacked)
    before = memory_bytes()
    assert attacked.outbox is not None
    for what, (parts, words) in NO_MESSAGES.items():
        attacked.outbox.socket.send_multipart(parts)
        failed, _ = attacked.hear(m.Failed)
        assert failed.error == "ProtocolError", what
        assert failed.message.isprintable(), what
        with pytest.raises(AssertionError, match=words):
            raise AssertionError(failed.message)
    for what, (changes, words) in BROKEN.items():
        attacked.outbox.send(hand_over(attacked, **changes), [np.ones((5, 48), np.float32)])
        failed, _ = attacked.hear(m.Failed)
        assert failed.error == "ProtocolError", what
        with pytest.raises(AssertionError, match=words):
            raise AssertionError(failed.message)
    ping = m.Ping(epoch=attacked.epoch, device_index=1, number=0, reply_bytes=1 << 40)
    attacked.outbox.send(ping)
    assert "asks for an answer of" in attacked.hear(m.Failed)[0].message
    assert memory_bytes() - before < GROWTH_BYTES
    np.testing.assert_array_equal(serves_alone(attacked), alone)


ONES = np.ones((len(IDS), 48), np.float32)
NOT_NUMBERS = ONES.copy()
NOT_NUMBERS[1, :3] = np.nan, np.inf, -np.inf
PARTS: dict[str, tuple[dict[str, Any], list[m.Array], str]] = {
    "fewer tensors than it says": ({}, [], "handed over 0 tensors"),
    "another stream": ({"has_residual": True}, [ONES, ONES], "other tensors"),
    "an empty shape": ({}, [np.ones((), np.float32)], r"\[\], expected float32 \[5, 48\]"),
    "no rows": ({}, [ONES[:0]], r"\[0, 48\]"),
    "too few rows": ({}, [ONES[:3]], r"\[3, 48\]"),
    "another dtype": ({}, [ONES.astype(np.float64)], "float64"),
    "values that are no numbers": (
        {},
        [NOT_NUMBERS],
        "3 non-finite values from node-1/cpu for layer 0 attention",
    ),
}


def test_a_part_that_does_not_fit_the_step_fails_it(attacked: AttackedRunner) -> None:
    """Rows 8, 9 and 12."""
    alone = serves_alone(attacked)
    for what, (changes, tensors, words) in PARTS.items():
        connect(attacked)
        assert attacked.outbox is not None
        step = attacked.good_step()
        attacked.say(step, attacked.checkpoint.embed(IDS))
        attacked.outbox.send(hand_over(attacked, step_id=step.step_id, **changes), tensors)
        failed, _ = attacked.hear(m.Failed)
        assert (failed.error, failed.step_id) == ("ProtocolError", step.step_id), what
        with pytest.raises(AssertionError, match=words):
            raise AssertionError(failed.message)
    np.testing.assert_array_equal(serves_alone(attacked), alone)


def test_a_hand_over_twice_is_refused(attacked: AttackedRunner) -> None:
    """Row 11."""
    connect(attacked)
    assert attacked.outbox is not None
    for _ in range(2):
        attacked.outbox.send(hand_over(attacked), [ONES])
    assert "twice" in attacked.hear(m.Failed)[0].message
    serves_alone(attacked)


def test_a_flood_does_not_keep_the_runner_from_its_host(attacked: AttackedRunner) -> None:
    """Messages of old plans, and pings whose answers nobody reads: the host is heard meanwhile."""
    connect(attacked)
    before = memory_bytes()
    assert attacked.outbox is not None
    old = hand_over(attacked, epoch=0)
    ping = m.Ping(epoch=attacked.epoch, device_index=1, number=0, reply_bytes=8 << 20)
    for n in range(900):
        attacked.outbox.send(ping if n % 100 == 0 else old, [] if n % 100 == 0 else [ONES])
    attacked.say(m.FetchLogits(epoch=attacked.epoch, step_id=77))
    assert "logits of step 77" in attacked.hear(m.Failed)[0].message
    assert memory_bytes() - before < 2 * GROWTH_BYTES  # Ours read, some 80 MB of them.
    serves_alone(attacked)


def test_what_nobody_asked_for_yet_is_kept_up_to_a_limit(
    attacked: AttackedRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real limit is a gigabyte; this test has less of it."""
    monkeypatch.setattr("engine.cluster.exchange.MAX_EARLY_BYTES", 8 << 20)
    connect(attacked)
    before = memory_bytes()
    assert attacked.outbox is not None
    large = np.zeros((1024, 512), np.float32)
    for step_id in range(1, 6):
        attacked.outbox.send(hand_over(attacked, step_id=step_id), [large])
    assert "bytes that nothing has asked for" in attacked.hear(m.Failed)[0].message
    assert memory_bytes() - before < GROWTH_BYTES
    serves_alone(attacked)


def test_a_frame_past_the_limit_loses_the_peer_alone(attacked: AttackedRunner) -> None:
    """Row 5."""
    connect(attacked)
    assert attacked.outbox is not None
    events = attacked.outbox.socket.get_monitor_socket()
    attacked.outbox.socket.send_multipart(
        [frames(["Ping", 1, 1, 0, 0]), bytes(MAX_MESSAGE_BYTES + 1)], copy=False
    )
    assert events.poll(30_000), "the connection stands"
    attacked.outbox.socket.disable_monitor()
    events.close(linger=0)
    serves_alone(attacked)


def test_a_peer_that_vanishes_in_a_step_is_named(attacked: AttackedRunner) -> None:
    """Row 16."""
    connect(attacked)
    attacked.say(attacked.good_step(), attacked.checkpoint.embed(IDS))
    attacked.inbox.close()
    failed, _ = attacked.hear(m.Failed)
    assert (failed.error, failed.peer_index) == ("WorkerLost", 1)
    assert "node-1/cpu" in failed.message
    serves_alone(attacked)
