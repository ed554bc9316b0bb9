"""A device that goes on by itself gives the bits of one that waits to be asked."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import gguf
import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.cluster import messages as m
from engine.cluster import stepping
from engine.cluster.ahead import LOOK_EVERY, MOST_SECONDS, Worth
from engine.cluster.foresight import check_draw, foresee
from engine.cluster.lockstep import Lockstep
from engine.cluster.short_logits import short_form
from engine.cluster.stepping import MOST_CONTINUED, Stepping
from engine.errors import ConfigError, ProtocolError
from engine.kernels.build_native import source_hash
from engine.kernels.native_library import PATH, NativeLibrary
from engine.model.batch import Segment, StepKind
from engine.model.view import LONGEST_STEP
from engine.plan.plan import PlanShape
from engine.plan.presets import single
from engine.sampling.choice import ShardLogits, all_candidates, choose, merge_shards
from engine.sampling.logit_changes import NO_CHANGES
from engine.weights.checkpoint import Checkpoint, open_checkpoint
from tests.engine.cluster.exchange_members import Members
from tests.tiny_files import save_tiny_gguf
from tests.tiny_models import save_tiny_llama
from tests.weight_loading import RunnerProcesses

pytestmark = pytest.mark.network

WINDOW = 64
IDS = np.random.default_rng(6).integers(3, 88, LONGEST_STEP).tolist()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Checkpoint]:
    """A model whose head is its embedding, in a file whose blocks are computed with as they are."""
    try:
        NativeLibrary(PATH, source_hash())
    except (OSError, ConfigError) as error:
        pytest.skip(f"only native kernels go ahead: {error}")
    folder = tmp_path_factory.mktemp("tied")
    sizes = {"hidden_size": 96, "intermediate_size": 160, "head_dim": 32}
    oracle = save_tiny_llama(
        folder / "oracle", tie_word_embeddings=True, max_position_embeddings=8192, **sizes
    )
    path = folder / "tied.gguf"
    save_tiny_gguf(oracle, path, kind=gguf.GGMLQuantizationType.Q8_0)
    with open_checkpoint(path) as opened:
        yield opened


class Device:
    """All rows of a model, with a runner's way of working a step."""

    def __init__(self, checkpoint: Checkpoint, *, goes_ahead: bool) -> None:
        self._checkpoint, self._goes_ahead = checkpoint, goes_ahead
        plan = single(PlanShape.from_config(checkpoint.config), "this/cpu")
        self._members = Members(plan, checkpoint.config.width)
        loaded = Lockstep(checkpoint, plan, "int8", window=WINDOW)
        self.shard = loaded.shards[0]
        exchange = self._members.members[0].exchange
        self.stepping = Stepping(
            self.shard, exchange, torch.device("cpu"), lambda _row, _kind: None
        )
        self._step_id = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._members.close()

    def ask(
        self,
        tokens: dict[int, tuple[int, list[int]]],
        kind: StepKind = "generated",
        operations: tuple[m.SlotOperation, ...] = (),
        continued: int = 0,
        draw: m.Draw | None = None,
    ) -> list[m.Array]:
        """The answer to a step: for each slot its first position and new tokens."""
        self._step_id += 1
        step = step_of(self._step_id, tokens, kind, operations, temperature=temperature_of(draw))
        step = msgspec.structs.replace(step, continued=continued, draw=draw)
        rows = self._checkpoint.embed([i for _, ids in tokens.values() for i in ids])
        # What the host takes to think: longer than a step of so small a model.
        time.sleep(0.002)
        self.stepping.exchange.begin_step(step.step_id, kind)
        self.stepping.hear(step, [rows])
        self.stepping.change_slots(operations)
        with torch.inference_mode():
            answer = self.stepping.compute(step, [rows])
            answer = [array.copy() for array in answer]
            if self._goes_ahead:
                self.stepping.prepare_next()
                self.stepping.go_ahead()
        return answer


def step_of(
    step_id: int,
    tokens: dict[int, tuple[int, list[int]]],
    kind: StepKind,
    operations: tuple[m.SlotOperation, ...] = (),
    epoch: int = 3,
    temperature: float = 0.0,
) -> m.Step:
    """A step that wants the logits of each slot's last token."""
    segments = tuple(
        Segment(
            slot=slot, first_position=first, token_count=len(ids), logit_offsets=(len(ids) - 1,)
        )
        for slot, (first, ids) in tokens.items()
    )
    count = len(segments)
    wanted = m.LogitsWanted(
        form="top", ids=((),) * count, temperatures=(temperature,) * count, raw_sums=(True,) * count
    )
    return m.Step(
        epoch=epoch,
        step_id=step_id,
        kind=kind,
        segments=segments,
        operations=operations,
        logits=wanted,
    )


def temperature_of(draw: m.Draw | None) -> float:
    return 0.0 if draw is None else draw.temperature


def operation(action: Any, slot: int, source: int = 0, length: int = 0) -> m.SlotOperation:
    """A change of a slot."""
    return m.SlotOperation(action=action, slot=slot, source=source, length=length)


def likeliest(answer: list[m.Array]) -> list[int]:
    """What a greedy host goes on with, per slot."""
    return answer[0][:, 0].tolist()


def chosen_from(answer: list[m.Array], draw: m.Draw | None, n: int) -> int:
    """What the host chooses from the logits of a whole small vocabulary."""
    ids, values, log_sums = (array[0].tolist() for array in answer[:3])
    if draw is None:
        return ids[0]
    candidates = merge_shards([ShardLogits(ids, values, {}, log_sums, is_whole=True)])
    token = choose(candidates, draw, NO_CHANGES, draw.noises[n])
    assert token is not None
    return token


class Both:
    """A device that goes ahead beside one that does not; their answers must be the same."""

    def __init__(self, eager: Device, patient: Device) -> None:
        self._eager, self._patient = eager, patient
        self.num_ahead = 0

    def ask(self, *arguments: Any) -> list[m.Array]:
        """An answer of either."""
        found, expected = self._eager.ask(*arguments), self._patient.ask(*arguments)
        for ours, theirs in zip(found, expected, strict=True):
            np.testing.assert_array_equal(ours, theirs)
        assert not self._patient.stepping.is_ahead
        self.num_ahead += self._eager.stepping.is_ahead
        return found

    def ask_to_go_on(
        self,
        first: int,
        token: int,
        continued: int,
        operations: tuple[m.SlotOperation, ...] = (),
        draw: m.Draw | None = None,
    ) -> list[int]:
        """A token of slot 0, and what one device goes on with and the other is asked for.

        Returns: what follows each.
        """
        device = self._eager
        found = device.ask({0: (first, [token])}, "generated", operations, continued, draw)
        # Without noise nothing is foreseen; the sums are at the same temperature.
        plain = None if draw is None else msgspec.structs.replace(draw, noises=())
        chosen: list[int] = []
        expected: list[list[m.Array]] = []
        for n in range(1 + len(device.stepping.continued)):
            asked = {0: (first + n, [token])}
            expected.append(self._patient.ask(asked, "generated", operations, 0, plain))
            token, operations = chosen_from(expected[-1], draw, n), ()
            chosen.append(token)
        assert device.stepping.continued == chosen[:-1]
        for ours, theirs in zip(found, zip(*expected, strict=True), strict=True):
            np.testing.assert_array_equal(ours, np.concatenate(theirs))
        ours, theirs = self._eager.stepping.full_logits(), self._patient.stepping.full_logits()
        assert ours is not None and theirs is not None
        assert len(ours) == len(chosen)
        np.testing.assert_array_equal(ours[-1:], theirs)
        self.num_ahead += self._eager.stepping.is_ahead
        return chosen

    def go_on(self, slot: int, first: int, token: int, count: int) -> int:
        """So many greedy tokens of one slot, beginning with `token`; returns the one after them."""
        for n in range(count):
            (token,) = likeliest(self.ask({slot: (first + n, [token])}))
        return token


@pytest.fixture
def both(checkpoint: Checkpoint) -> Iterator[Both]:
    with (
        Device(checkpoint, goes_ahead=True) as eager,
        Device(checkpoint, goes_ahead=False) as patient,
    ):
        yield Both(eager, patient)


def test_greedy_tokens_are_computed_before_they_are_asked_for(both: Both) -> None:
    (token,) = likeliest(both.ask({0: (0, IDS[:20])}, "prompt"))
    both.go_on(0, 20, token, 60)
    assert both.num_ahead > 0


def test_it_is_done_where_it_pays() -> None:
    step, pause = 0.008, 0.002
    worth = Worth()
    worth.note_guess(is_right=True)
    assert not worth.expects_gain(step)  # Nothing is known of the pause.
    worth.note_pause(pause)
    worth.note_pause(10.0)  # Somebody read the answer first.
    assert not worth.expects_gain(step)  # Three of four must come true.
    for _ in range(2):
        worth.note_guess(is_right=True)
    assert worth.expects_gain(step)
    assert not worth.expects_gain(0.03)
    for _ in range(60):
        worth.note_guess(is_right=True)
    assert worth.expects_gain(0.03)
    assert not worth.expects_gain(MOST_SECONDS * 1.01)
    # Now and then it looks how long the pause is, and one long one is soon forgotten.
    looks = 0
    for _ in range(2 * LOOK_EVERY):
        worth.note_guess(is_right=True)
        looks += not worth.expects_gain(step)
    assert looks == 2
    worth.note_pause(MOST_SECONDS / 2)
    worth.note_pause(pause)
    # Drawn tokens: every fifth is another one.
    for n in range(101):
        worth.note_guess(is_right=n % 5 > 0)
    assert worth.expects_gain(step)
    assert not worth.expects_gain(0.03)
    # Whatever a right guess saves, mostly wrong ones are not computed.
    for _ in range(101):
        worth.note_guess(is_right=False)
    assert not worth.expects_gain(pause / 2)


def test_what_was_computed_in_vain_leaves_nothing(both: Both) -> None:
    token, other = likeliest(both.ask({0: (0, IDS[:20]), 1: (0, IDS[30:64])}, "prompt"))
    token = both.go_on(0, 20, token, 8)
    # Another token comes, then three at once, then another slot's, then a prompt's.
    both.go_on(0, 28, token + 1, 8)
    (token,) = likeliest(both.ask({0: (36, IDS[70:73])}))
    both.go_on(0, 39, token, 8)
    token = both.go_on(1, 34, other, 8)
    (token,) = likeliest(both.ask({1: (42, IDS[80:110])}, "prompt"))
    token = both.go_on(1, 72, token, 8)
    # Slots change under it.
    both.ask({}, "generated", (operation("free", 0),))
    token = both.go_on(1, 80, token, 8)
    both.ask({1: (84, [4])}, "generated", (operation("truncate", 1, length=84),))
    token = both.go_on(1, 85, token, 8)
    copied = both.ask({0: (86, [6])}, "generated", (operation("copy", 0, source=1, length=86),))
    both.go_on(0, 87, likeliest(copied)[0], 8)
    begun = both.ask({1: (0, IDS[5:9])}, "prompt", (operation("free", 1),))
    num_before = both.num_ahead
    both.go_on(1, 4, likeliest(begun)[0], 8)
    assert both.num_ahead > num_before > 0


@pytest.mark.parametrize("seed", range(4))
def test_no_order_of_steps_changes_a_bit(both: Both, seed: int) -> None:
    draw = np.random.default_rng(seed)
    lengths = {0: 0, 1: 0}
    following = {0: 3, 1: 3}
    for _ in range(120):
        slots = [0, 1] if draw.random() < 0.3 else [int(draw.integers(2))]
        kind: StepKind = "generated" if draw.random() < 0.9 else "prompt"
        operations: tuple[m.SlotOperation, ...] = ()
        if draw.random() < 0.05:
            lengths[slots[0]] = int(draw.integers(lengths[slots[0]] + 1))
            operations = (operation("truncate", slots[0], length=lengths[slots[0]]),)
        tokens: dict[int, tuple[int, list[int]]] = {}
        for slot in slots:
            count = 1 if kind == "generated" and draw.random() < 0.95 else int(draw.integers(1, 20))
            ids = draw.integers(3, 89, count).tolist()
            if draw.random() < 0.9:
                ids[0] = following[slot]
            tokens[slot] = (lengths[slot], ids)
        # Mostly a run of greedy steps, so that guesses have a reason.
        for _ in range(int(draw.integers(1, 9))):
            answer = both.ask(tokens, kind, operations)
            for slot, (first, ids), token in zip(
                tokens, tokens.values(), likeliest(answer), strict=True
            ):
                lengths[slot], following[slot] = first + len(ids), token
            tokens = {slot: (lengths[slot], [following[slot]]) for slot in tokens}
            kind, operations = "generated", ()
    assert both.num_ahead > 0


@pytest.mark.parametrize("seed", range(3))
def test_a_step_that_is_gone_on_with_gives_the_answers_of_single_ones(
    both: Both, seed: int
) -> None:
    draw = np.random.default_rng(seed)
    (token,) = likeliest(both.ask({0: (0, IDS[:20])}, "prompt"))
    first, operations = 20, ()
    for _ in range(40):
        chosen = both.ask_to_go_on(first, token, int(draw.integers(9)), operations)
        first, operations = first + len(chosen), ()
        token = chosen[-1]
        if draw.random() < 0.2:  # Only some of them were wanted.
            first -= int(draw.integers(len(chosen)))
            operations = (operation("truncate", 0, length=first),)
            token = int(draw.integers(3, 89))
        elif draw.random() < 0.1:
            token = int(draw.integers(3, 89))
    assert first > 100
    assert both.num_ahead > 0


@pytest.mark.parametrize("seed", range(3))
def test_drawn_tokens_are_gone_on_with_as_the_host_draws_them(
    both: Both, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stepping, "MOST_CONTINUED_SECONDS", 600.0)  # However busy the computer is.
    random = np.random.default_rng(seed)
    (token,) = likeliest(both.ask({0: (0, IDS[:20])}, "prompt"))
    first = 20
    for _ in range(30):
        continued = int(random.integers(9))
        draw = m.Draw(
            temperature=float(random.uniform(0.2, 2.0)),
            top_k=int(random.choice([0, 0, 7])),
            top_p=float(random.choice([1.0, 0.9, 0.5])),
            min_p=float(random.choice([0.0, 0.05])),
            noises=tuple(random.random(1 + continued).tolist()),
        )
        chosen = both.ask_to_go_on(first, token, continued, draw=draw)
        assert len(chosen) == 1 + continued
        first, token = first + len(chosen), chosen[-1]
    assert both.num_ahead > 0


def test_a_step_is_gone_on_with_as_far_as_it_can_be_undone(both: Both) -> None:
    """Up to the end of its slot's memory, or of a ring; there a single step takes new memory."""
    (token,) = likeliest(both.ask({0: (0, IDS[:20])}, "prompt"))
    counts: list[int] = []
    first = 20
    while first < WINDOW + LONGEST_STEP + 20:
        chosen = both.ask_to_go_on(first, token, MOST_CONTINUED)
        counts.append(len(chosen))
        first, token = first + len(chosen), chosen[-1]
    assert max(counts) == 1 + MOST_CONTINUED
    assert counts[-10:] == [1] * 10


def test_only_a_single_token_of_one_conversation_is_gone_on_with(
    checkpoint: Checkpoint,
) -> None:
    with Device(checkpoint, goes_ahead=True) as device:
        device.ask({0: (0, IDS[:5]), 1: (0, IDS[:5])}, "prompt")
        assert len(device.ask({0: (5, [4])}, "generated", (), 3)[0]) == 4
        first = 9
        cases: list[tuple[dict[int, tuple[int, list[int]]], StepKind, int]] = [
            ({0: (first, [4, 5])}, "generated", 1),
            ({0: (first, [4]), 1: (5, [4])}, "generated", 1),
            ({0: (first, [4])}, "prompt", 1),
            ({0: (first, [4])}, "generated", MOST_CONTINUED + 1),
        ]
        for tokens, kind, continued in cases:
            with pytest.raises(ProtocolError, match="gone on with"):
                device.ask(tokens, kind, (), continued)


GOOD_DRAW = m.Draw(temperature=0.5, top_k=0, top_p=0.9, min_p=0.0, noises=(0.5,))


@pytest.mark.parametrize(
    "wrong",
    [
        *({"temperature": value} for value in (0.0, -1.0, math.inf, math.nan, 0.6)),
        *({"top_p": value} for value in (0.0, 1.1, math.nan)),
        *({"min_p": value} for value in (-0.1, 1.1, math.nan)),
        *({"noises": value} for value in ((0.5, 1.0), (-0.1,), (math.nan,))),
    ],
    ids=str,
)
def test_draws_that_mean_nothing_are_refused(wrong: dict[str, Any]) -> None:
    step = step_of(1, {0: (5, [4])}, "generated", temperature=GOOD_DRAW.temperature)
    check_draw(msgspec.structs.replace(step, draw=GOOD_DRAW))
    draw = msgspec.structs.replace(GOOD_DRAW, **wrong)
    (name,) = wrong
    with pytest.raises(ProtocolError, match=f"a draw must have {name} .*, the step says "):
        check_draw(msgspec.structs.replace(step, draw=draw))


def test_a_step_is_checked_before_it_is_foreseen(checkpoint: Checkpoint) -> None:
    with Device(checkpoint, goes_ahead=True) as device:
        device.ask({0: (0, IDS[:5])}, "prompt")
        draw = msgspec.structs.replace(GOOD_DRAW, top_p=0.0)
        with pytest.raises(ProtocolError, match="a draw must have top_p"):
            device.ask({0: (5, [4])}, "generated", (), 1, draw)


@given(
    temperature=st.floats(1e-300, 1e300),
    top_k=st.integers(0, 2**53),
    top_p=st.floats(0.0, 1.0, exclude_min=True),
    min_p=st.floats(0.0, 1.0),
    noise=st.floats(0.0, 1.0, exclude_max=True),
    spread=st.sampled_from([0.0, 1e-6, 1.0, 1e30, math.inf, math.nan]),
    num_rows=st.sampled_from([5, m.TOP_LOGITS, 3 * m.TOP_LOGITS]),
)
def test_whatever_is_drawn_from_whatever_logits_no_runner_ends(
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    noise: float,
    spread: float,
    num_rows: int,
) -> None:
    step = step_of(1, {0: (5, [4])}, "generated", temperature=temperature)
    draw = m.Draw(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, noises=(noise,))
    step = msgspec.structs.replace(step, draw=draw)
    check_draw(step)
    logits = torch.linspace(1.0, -1.0, num_rows)[None] * spread
    token = foresee(short_form(logits, step.logits, 0), step, 0, num_rows)
    assert token is None or 0 <= token < num_rows


def test_what_the_largest_logits_do_not_prove_is_not_foreseen() -> None:
    """Of a flat vocabulary: the token that is drawn is not among them."""
    num_rows = 4 * m.TOP_LOGITS
    wanted = m.LogitsWanted(form="top", ids=((),), temperatures=(1.0,), raw_sums=(False,))
    logits = torch.linspace(0.01, 0.0, num_rows)[None]
    short = short_form(logits, wanted, 0)
    seen = msgspec.structs.replace(GOOD_DRAW, temperature=1.0, top_p=1.0, noises=(0.1, 0.9))
    step = step_of(1, {0: (5, [4])}, "generated", temperature=1.0)
    step = msgspec.structs.replace(step, draw=seen)
    token = foresee(short, step, 0, num_rows)
    assert token == choose(all_candidates(logits[0].numpy()), seen, NO_CHANGES, 0.1)
    assert foresee(short, step, 1, num_rows) is None
    assert foresee(short, step, 2, num_rows) is None  # Nor is what has no noise.


def test_a_ring_that_is_full_is_not_written_ahead(both: Both) -> None:
    """What is written there takes the place of what a cut back would bring to light."""
    capacity = WINDOW + LONGEST_STEP
    both.ask({0: (0, IDS[: LONGEST_STEP - 10])}, "prompt")
    (token,) = likeliest(both.ask({0: (LONGEST_STEP - 10, IDS[100:150])}, "prompt"))
    first = LONGEST_STEP + 40
    token = both.go_on(0, first, token, capacity - first)
    num_before = both.num_ahead
    assert num_before > 0
    both.go_on(0, capacity, token, 8)
    assert both.num_ahead == num_before


def test_a_runner_process_answers_as_one_that_waits(checkpoint: Checkpoint, tmp_path: Path) -> None:
    plan = single(PlanShape.from_config(checkpoint.config), "this/cpu")
    with (
        RunnerProcesses(tmp_path, ["this/cpu"]) as runners,
        Device(checkpoint, goes_ahead=False) as patient,
    ):
        runners.load(checkpoint, plan, dtype="int8")
        tokens: dict[int, tuple[int, list[int]]] = {0: (0, IDS[:20])}
        kind: StepKind = "prompt"
        for step_id in range(1, 40):
            found = runners.step(checkpoint, step_of(step_id, tokens, kind, epoch=1), tokens[0][1])
            expected = patient.ask(tokens, kind)
            for ours, theirs in zip(found, expected, strict=True):
                np.testing.assert_array_equal(ours, theirs, err_msg=f"step {step_id}")
            first, ids = tokens[0]
            # Now and then another token than the likeliest.
            token = 11 if step_id % 9 == 0 else likeliest(expected)[0]
            tokens, kind = {0: (first + len(ids), [token])}, "generated"
