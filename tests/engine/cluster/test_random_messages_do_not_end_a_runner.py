"""Hypothesis: whatever is decoded is a message or one of two errors, and no sequence of messages,
right or wrong, ends a runner, hangs it or makes it grow."""

from __future__ import annotations

import tempfile
import typing
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from engine.cluster import messages as m
from engine.cluster.codec import Codec
from engine.errors import PeerRefused, ProtocolError
from engine.weights.checkpoint import Checkpoint, open_checkpoint
from tests.engine.cluster.runner_under_attack import (
    GROWTH_BYTES,
    IDS,
    AttackedRunner,
    memory_bytes,
    segment,
)
from tests.tiny_models import save_tiny_llama

pytestmark = pytest.mark.network

UNIONS: dict[str, Any] = {
    "worker accepts": m.WORKER_ACCEPTS,
    "worker sends": m.WORKER_SENDS,
    "runner accepts": m.RUNNER_ACCEPTS,
    "runner sends": m.RUNNER_SENDS,
    "exchange accepts": m.EXCHANGE_ACCEPTS,
}
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=8)
    | st.binary(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=6) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=12,
)
NUMBERS = st.sampled_from([-(2**63), -1, 0, 1, 2, 7, 2**31, 2**53, 2**63, 2**64 - 1])
DRAWS = st.builds(
    m.Draw,
    temperature=st.floats(),
    top_k=st.integers(0, 2**53),
    top_p=st.floats(),
    min_p=st.floats(),
    noises=st.lists(st.floats(), max_size=20).map(tuple),
)


def names_of(union: Any) -> list[str]:
    return [kind.__name__ for kind in typing.get_args(union)]


@pytest.mark.parametrize("name", UNIONS)
@given(data=st.data())
def test_whatever_is_decoded_is_a_message_or_one_of_two_errors(
    name: str, data: st.DataObject
) -> None:
    """Half-right messages: a known name, then anything."""
    union = UNIONS[name]
    body = [data.draw(st.sampled_from(names_of(union))), *data.draw(st.lists(VALUES, max_size=9))]
    specs = data.draw(
        st.lists(st.tuples(st.sampled_from(["float32", "uint8", "x"]), VALUES), max_size=2)
    )
    version = data.draw(st.just(m.PROTOCOL_VERSION) | VALUES)
    header = msgspec.msgpack.encode((version, body, specs))
    frames = [header, *data.draw(st.lists(st.binary(max_size=16), max_size=2))]
    try:
        message, _ = Codec(union).decode(frames)
    except (ProtocolError, PeerRefused) as error:
        assert str(error).isprintable()
        assert len(str(error)) < 1000
    else:
        assert isinstance(message, m.Message)


@pytest.mark.parametrize("name", UNIONS)
@given(frames=st.lists(st.binary(max_size=80), max_size=3), depth=st.integers(1, 5000))
def test_random_bytes_and_depths_are_one_of_two_errors(
    name: str, frames: list[bytes], depth: int
) -> None:
    codec: Codec[Any] = Codec(UNIONS[name])
    for parts in (frames, [b"\x93" + bytes([m.PROTOCOL_VERSION]) + b"\x91" * depth, *frames]):
        with pytest.raises((ProtocolError, PeerRefused)):
            codec.decode(parts)


class RunnerMachine(RuleBasedStateMachine):
    """Messages of an engine host in any order; at the end a good load and step work as ever."""

    checkpoint: Checkpoint
    expected: m.Array

    def __init__(self) -> None:
        super().__init__()
        self._folder = tempfile.TemporaryDirectory()
        self.attacked = AttackedRunner(self.checkpoint, Path(self._folder.name))
        self.before = memory_bytes()

    @initialize(is_loaded=st.booleans())
    def begin(self, is_loaded: bool) -> None:
        if is_loaded:
            self.attacked.load()

    def epoch(self, shift: int) -> int:
        return max(0, self.attacked.epoch + shift)

    @rule(shift=st.integers(-1, 1))
    def abort(self, shift: int) -> None:
        self.attacked.say(m.Abort(epoch=self.epoch(shift)))

    @rule(number=st.integers(0, 2**53))
    def abort_any(self, number: int) -> None:
        self.attacked.say(m.Abort(epoch=number))

    @rule(shift=st.integers(-1, 1), step_id=st.integers(0, 4))
    def abort_step(self, shift: int, step_id: int) -> None:
        self.attacked.say(m.AbortStep(epoch=self.epoch(shift), step_id=step_id))

    @rule()
    def connect(self) -> None:
        self.attacked.say(m.Connect(epoch=self.attacked.epoch))

    @rule()
    def load_without_weights(self) -> None:
        self.attacked.say(self.attacked.good_load(checkpoint_id=f"n{self.attacked.epoch}"))

    @rule()
    def load(self) -> None:
        self.attacked.load()

    @rule(window=NUMBERS, device=st.integers(0, 3), threads=st.integers(0, 2**31 - 1))
    def load_other(self, window: int, device: int, threads: int) -> None:
        self.attacked.say(
            self.attacked.good_load(kv_window=window, device_index=device, num_threads=threads)
        )

    @rule(
        slot=st.integers(0, 3),
        position=st.integers(0, 8),
        count=st.integers(0, 6),
        rows=st.integers(0, 6),
        offsets=st.lists(st.integers(0, 6), max_size=3),
        kind=st.sampled_from(["prompt", "generated"]),
        action=st.sampled_from(["free", "truncate", "copy"]),
        source=st.integers(0, 3),
        continued=st.integers(0, 20),
        draw=st.none() | DRAWS,
        temperature=st.none() | st.sampled_from([0.0, 0.5]) | st.floats(),
    )
    def step(
        self,
        slot: int,
        position: int,
        count: int,
        rows: int,
        offsets: list[int],
        kind: str,
        action: Any,
        source: int,
        continued: int,
        draw: m.Draw | None,
        temperature: float | None,
    ) -> None:
        part = segment(
            slot=slot, first_position=position, token_count=count, logit_offsets=tuple(offsets)
        )
        operation = m.SlotOperation(action=action, slot=slot, length=position, source=source)
        wanted = m.LogitsWanted(form="full")
        if temperature is not None:
            each = len(offsets)
            wanted = m.LogitsWanted(
                form="top",
                ids=((),) * each,
                temperatures=(temperature,) * each,
                raw_sums=(False,) * each,
            )
        step = self.attacked.good_step(
            segments=(part,),
            operations=(operation,),
            kind=kind,
            logits=wanted,
            continued=continued,
            draw=draw,
        )
        self.attacked.say(step, np.ones((rows, self.checkpoint.config.width), np.float32))

    @rule()
    def step_well(self) -> None:
        self.attacked.say(self.attacked.good_step(), self.checkpoint.embed(IDS))

    @rule(step_id=st.integers(0, 5))
    def fetch(self, step_id: int) -> None:
        self.attacked.say(m.FetchLogits(epoch=self.attacked.epoch, step_id=step_id))

    @rule(start=st.integers(0, 99), end=st.integers(0, 99), size=st.integers(0, 99))
    def weights(self, start: int, end: int, size: int) -> None:
        epoch = self.attacked.epoch
        self.attacked.say(
            m.WeightSlice(epoch=epoch, name="head", axis=0, start=start, end=end),
            np.zeros(size, np.uint8),
        )
        self.attacked.say(
            m.SliceHashes(epoch=epoch, name="head", axis=0, unit=1, start=start, end=end)
        )

    @rule()
    def failed(self) -> None:
        self.attacked.say(m.Failed(epoch=self.attacked.epoch, error="\x1b", message="\0" * 999))

    @rule(name=st.sampled_from(names_of(m.RUNNER_ACCEPTS)), body=st.lists(VALUES, max_size=9))
    def anything(self, name: str, body: list[Any]) -> None:
        if name != "Shutdown":
            header = msgspec.msgpack.encode((m.PROTOCOL_VERSION, [name, *body], []))
            self.attacked.channel.socket.send(header)

    def teardown(self) -> None:
        with self._folder, self.attacked:
            self.attacked.load()
            np.testing.assert_array_equal(self.attacked.logits(), self.expected)
            assert self.attacked.error is None
            assert memory_bytes() - self.before < GROWTH_BYTES


def test_no_sequence_of_messages_ends_a_runner(tmp_path: Path) -> None:
    save_tiny_llama(tmp_path / "model")
    with open_checkpoint(tmp_path / "model") as checkpoint:
        with AttackedRunner(checkpoint, tmp_path) as attacked:
            attacked.load()
            expected = attacked.logits()
        RunnerMachine.checkpoint, RunnerMachine.expected = checkpoint, expected
        state_machine = RunnerMachine.TestCase
        state_machine.settings = settings(max_examples=25, stateful_step_count=25, deadline=None)
        state_machine("runTest").runTest()
