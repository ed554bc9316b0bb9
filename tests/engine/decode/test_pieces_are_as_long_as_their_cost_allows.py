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
            size = self.pace.piece("prompt", 1, is_alone=is_alone, has_logits=False)
            size = min(size, num_tokens)
            seconds = (self._fixed + self._each * size) * (1 + self._noise * self._draw.random())
            self.pace.measure("prompt", size, 0, seconds, PLAN, [], [])
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
    # Three steps to find out: 32, 64 and the rest in at most two.
    assert sum(seconds for _, seconds in first) <= best + 4 * fixed * (1 + noise) + 1e-9
    later = machine.read(512, is_alone=True)
    assert sum(seconds for _, seconds in later) <= 1.5 * best


@pytest.mark.parametrize("noise", [0.0, 0.3])
@pytest.mark.parametrize(("fixed", "each"), MACHINES)
def test_neighbours_wait_as_briefly_as_the_weights_allow(
    fixed: float, each: float, noise: float
) -> None:
    machine = Machine(fixed, each, noise)
    pieces = machine.read(2048, is_alone=False)[2:]
    longest = max(seconds for _, seconds in pieces)
    least = fixed + MIN_PIECE * each
    assert longest <= max(0.15, 2 * least) * (1 + 2 * noise) + 1e-9
    # And not for ever: nobody gains from more pieces than that.
    in_all = sum(seconds for _, seconds in pieces)
    assert in_all <= 3 * (1 + noise) * (fixed + 2048 * each) + 2048 / LONGEST_STEP * fixed


def test_nothing_is_known_of_a_new_plan() -> None:
    machine = Machine(1.1, 0.0155, 0.0)
    machine.read(600, is_alone=True)
    machine.pace.forget()
    kinds: tuple[StepKind, ...] = ("prompt", "generated")
    for kind in kinds:
        assert machine.pace.piece(kind, 1, is_alone=True, has_logits=False) == LONE.first
        assert machine.pace.piece(kind, 1, is_alone=False, has_logits=False) == SHARED.first
        assert machine.pace.piece(kind, 99, is_alone=False, has_logits=False) == MIN_PIECE


def test_a_line_through_exact_times_is_found() -> None:
    cost = StepCost()
    for size in (32, 64, 200):
        cost.note(size, 1.5 + 0.02 * size)
    fixed, each = cost.fixed_and_each()
    assert fixed == pytest.approx(1.5)
    assert each == pytest.approx(0.02)
    # Steps of one size tell nothing new of the slope, and keep its share.
    for _ in range(50):
        cost.note(100, 2 * (1.5 + 0.02 * 100))
    fixed, each = cost.fixed_and_each()
    assert fixed + 100 * each == pytest.approx(7.0, rel=1e-3)
    assert fixed > 0
    assert each > 0
