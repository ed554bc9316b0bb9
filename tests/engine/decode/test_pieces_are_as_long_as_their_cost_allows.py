"""A piece of a prompt is long enough that what every piece costs does not decide the speed.

Where a model's weights take a second to widen, pieces chosen by tokens per second alone became
shorter and shorter: 5 tokens a second of a 1B model that reads 50.
"""

from __future__ import annotations

import numpy as np
import pytest

from engine.decode.pace import LONE, MIN_PIECE, SHARED, Pace, StepCost
from engine.model.batch import StepKind
from engine.model.view import LONGEST_STEP
from engine.plan.plan import PlanShape
from engine.plan.presets import single

PLAN = single(PlanShape(1, 1, 1, 32, 256), "this/cpu")
# Seconds of every step, and of each token: models of 135M, 1B and 7B on two cores, and a quick GPU.
MACHINES = [(0.13, 0.0024), (1.1, 0.0155), (8.0, 0.11), (0.002, 0.0001)]


class Machine:
    """Reads prompts in the pieces that a pace says, with the noise of a shared computer."""

    def __init__(self, fixed: float, each: float, noise: float, seed: int = 0) -> None:
        self.pace = Pace()
        self._fixed, self._each, self._noise = fixed, each, noise
        self._draw = np.random.default_rng(seed)

    def read(self, num_tokens: int, *, is_alone: bool) -> list[tuple[int, float]]:
        """Tokens and seconds of each piece."""
        pieces: list[tuple[int, float]] = []
        while num_tokens:
            size = self.pace.piece("prompt", 1, is_alone=is_alone)
            size = min(size, num_tokens)
            seconds = (self._fixed + self._each * size) * (1 + self._noise * self._draw.random())
            self.pace.measure("prompt", size, 0, 0, seconds, PLAN, [], [])
            pieces.append((size, seconds))
            num_tokens -= size
        return pieces


@pytest.mark.parametrize("noise", [0.0, 0.3])
@pytest.mark.parametrize(("fixed", "each"), MACHINES)
def test_a_prompt_alone_takes_little_longer_than_in_one_piece(
    fixed: float, each: float, noise: float
) -> None:
    machine = Machine(fixed, each, noise)
    first = machine.read(512, is_alone=True)
    best = (fixed + 512 * each) * (1 + noise)
    # It takes three steps of different sizes to find out, and the rest goes into one or two.
    assert sum(seconds for _, seconds in first) <= best + 4 * fixed * (1 + noise) + 1e-9
    later = machine.read(512, is_alone=True)
    assert sum(seconds for _, seconds in later) <= 1.5 * best


@pytest.mark.parametrize("noise", [0.0, 0.3])
@pytest.mark.parametrize(("fixed", "each"), MACHINES)
def test_neighbours_wait_as_briefly_as_the_weights_allow(
    fixed: float, each: float, noise: float
) -> None:
    machine = Machine(fixed, each, noise)
    pieces = machine.read(4096, is_alone=False)[3:]
    least = fixed + MIN_PIECE * each
    allowed = max(0.15, 2 * least) * (1 + 2 * noise) + 1e-9
    seconds = sorted(seconds for _, seconds in pieces)
    # Now and then one of another size, in case the line is a wrong one.
    assert seconds[int(0.85 * len(seconds))] <= allowed
    assert seconds[-1] <= 2 * allowed
    # And not for ever: nobody gains from more pieces than that.
    assert sum(seconds) <= 3 * (1 + noise) * (4096 * each + 4096 / LONGEST_STEP * fixed) + fixed


@pytest.mark.parametrize(("fixed", "each"), [*MACHINES, (0.08, 0.0012)])
def test_a_neighbour_waits_no_longer_because_prompts_were_alone_before(
    fixed: float, each: float
) -> None:
    """After many pieces of one length another one is tried, by the rule that holds then."""
    machine = Machine(fixed, each, 0.0)
    for _ in range(40):
        machine.read(700, is_alone=True)
        machine.pace.measure("prompt", 700, 0, 0, fixed + 700 * each, PLAN, [], [])
    longest = max(seconds for _, seconds in machine.read(4096, is_alone=False))
    allowed = max(0.15, 2 * (fixed + MIN_PIECE * each))
    assert longest <= 2.1 * allowed


def test_nothing_is_known_of_a_new_plan() -> None:
    machine = Machine(1.1, 0.0155, 0.0)
    machine.read(600, is_alone=True)
    machine.pace.forget()
    kinds: tuple[StepKind, ...] = ("prompt", "generated")
    for kind in kinds:
        assert machine.pace.piece(kind, 1, is_alone=True) == LONE.first
        assert machine.pace.piece(kind, 1, is_alone=False) == SHARED.first
        assert machine.pace.piece(kind, 99, is_alone=False) == MIN_PIECE


def test_full_logits_of_a_piece_fit_into_a_message() -> None:
    pace = Machine(0.002, 0.0001, 0.0).pace
    for _ in range(9):
        size = pace.piece("prompt", 1, is_alone=True)
        pace.measure("prompt", size, 0, 0, 0.002 + 0.0001 * size, PLAN, [], [])
    assert pace.piece("prompt", 1, is_alone=True) == LONGEST_STEP
    for vocab_size in (256, 49_152, 262_144, 1 << 24):
        size = pace.piece("prompt", 1, is_alone=True, num_logits=vocab_size)
        assert 1 <= size <= LONGEST_STEP
        assert size == 1 or 4 * size * vocab_size <= 8 << 20


def test_a_line_through_exact_times_is_found() -> None:
    cost = StepCost()
    cost.note(32, 99.0)  # The first step of a plan is like no other.
    assert not cost.is_known
    for size in (64, 200):
        cost.note(size, 1.5 + 0.02 * size)
    assert cost.is_known
    fixed, each = cost.fixed_and_each()
    assert fixed == pytest.approx(1.5)
    assert each == pytest.approx(0.02)
    for _ in range(20):
        cost.note(100, 3.5)
    # Deep in a conversation tokens become dearer, and what every step does does not.
    for _ in range(50):
        cost.note(100, 6.5)
    fixed, each = cost.fixed_and_each()
    assert fixed == pytest.approx(1.5)
    assert each == pytest.approx(0.05, rel=1e-3)
    assert cost.is_known


def test_one_slow_step_does_not_last() -> None:
    """With sizes all alike, nothing told that a line was wrong."""
    fixed, each = 1.1, 0.0155
    machine = Machine(fixed, each, 0.0)
    machine.read(64, is_alone=True)
    machine.pace.measure("prompt", 128, 0, 0, 30.0, PLAN, [], [])
    machine.read(2000, is_alone=True)
    later = machine.read(2000, is_alone=True)
    assert sum(seconds for _, seconds in later) <= 2 * (fixed + 2000 * each)
