"""How many guesses a step verifies follows measured times and guesses that came true.

Machines and texts are made up: a time for each size of a step, a chance for each guess.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.decode.drafting import MAX_DRAFT
from engine.decode.speculation import (
    FORGOTTEN_AFTER,
    LEAST_GAIN,
    MIN_STEPS,
    Acceptance,
    Offer,
    StepTimes,
    choose_lengths,
)

Seconds = Callable[[int], float]
MACHINES: dict[str, Seconds] = {
    "memory is the limit": lambda n: 0.01 + 0.0002 * n,
    "arithmetic is the limit": lambda n: 0.01 * n,
    "half and half": lambda n: 0.01 + 0.002 * n,
    "two tokens take another road": lambda n: 0.01 if n == 1 else 0.025 + 0.0001 * n,
    "the network is the limit": lambda n: 0.08 + 0.005 * n,
}
SOURCE = 3


@dataclass
class Run:
    """A made-up answer: what it took, and what it would have taken in single steps."""

    seconds: float = 0.0
    plain_seconds: float = 0.0
    num_steps: int = 0

    @property
    def gain(self) -> float:
        return self.plain_seconds / self.seconds


def play(
    seconds_of: Seconds,
    probability: Callable[[int], float],
    num_tokens: int,
    times: StepTimes,
    *,
    seed: int = 1,
    noise: float = 0.1,
) -> Run:
    """Follow the rule for one answer.

    Args:
        probability: that a guess comes true, by the number of tokens so far.
        noise: by which times differ, as a share; one in fifty is four times as long.
    """
    random = np.random.default_rng(seed)
    acceptance, run, done = Acceptance(), Run(), 0
    while done < num_tokens:
        truth = list(range(MAX_DRAFT + 1))
        is_right = random.random(MAX_DRAFT) < probability(done)
        guess = [t if right else -1 for t, right in zip(truth, is_right, strict=False)]
        offer = Offer(MAX_DRAFT, acceptance.probability(SOURCE))
        (length,) = choose_lengths([offer], 1, times, 64)
        num_right = int(np.argmin([*is_right[:length], False]))
        took = seconds_of(1 + length)
        pause = 4.0 if random.random() < 0.02 else 1.0
        times.note(1 + length, took * pause * (1 + noise * random.random()))
        acceptance.note(SOURCE, guess, truth[: num_right + 1])
        run.seconds += took
        run.plain_seconds += seconds_of(1) * (num_right + 1)
        run.num_steps += 1
        done += num_right + 1
    return run


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("chance", [0.0, 0.03])
def test_a_text_without_repetition_loses_less_than_two_percent(machine: str, chance: float) -> None:
    """The first text on a new plan, too, which has to find out what steps take."""
    times = StepTimes()
    for seed in range(3):
        run = play(MACHINES[machine], lambda _done: chance, 500, times, seed=seed)
        assert run.gain > 0.98, f"answer {seed}: {run}"


@pytest.mark.parametrize(
    ("machine", "least"),
    [
        ("memory is the limit", 5.0),
        ("half and half", 2.5),
        ("two tokens take another road", 3.0),
        ("the network is the limit", 4.0),
    ],
)
def test_a_copied_text_gains_where_longer_steps_are_cheap(machine: str, least: float) -> None:
    run = play(MACHINES[machine], lambda _done: 0.97, 500, StepTimes())
    assert run.gain > least


@pytest.mark.parametrize("chance", [0.2, 0.5, 0.9, 1.0])
def test_nothing_is_lost_where_every_token_costs_the_same(chance: float) -> None:
    run = play(MACHINES["arithmetic is the limit"], lambda _done: chance, 500, StepTimes())
    assert run.gain > 0.98


def test_a_text_that_begins_to_copy_is_noticed_though_no_guess_was_verified() -> None:
    """Guesses are compared with what comes while none are verified: else none ever would be."""
    times = StepTimes()
    seconds_of = MACHINES["half and half"]
    play(seconds_of, lambda _done: 0.0, 300, times)
    run = play(seconds_of, lambda done: 0.98 if done > 300 else 0.0, 900, times)
    assert run.gain > 1.5


def test_figures_of_a_machine_that_has_changed_are_measured_anew() -> None:
    times = StepTimes()
    busy = play(MACHINES["arithmetic is the limit"], lambda _done: 0.97, 400, times)
    assert busy.gain < 1.05
    play(MACHINES["memory is the limit"], lambda _done: 0.97, 2 * FORGOTTEN_AFTER, times)
    quiet = play(MACHINES["memory is the limit"], lambda _done: 0.97, 500, times)
    assert quiet.gain > 3


def known(seconds_of: Seconds, *sizes: int) -> StepTimes:
    times = StepTimes()
    for size in sizes:
        for _ in range(MIN_STEPS):
            times.note(size, seconds_of(size))
    return times


def test_before_a_plain_step_is_known_nothing_is_verified() -> None:
    assert choose_lengths([Offer(15, 1.0)], 1, StepTimes(), 64) == [0]
    assert choose_lengths([Offer(15, 1.0)], 1, known(lambda _n: 0.01, 4), 64) == [0]


@given(
    offers=st.lists(
        st.builds(Offer, st.integers(1, 15), st.floats(0, 1, exclude_max=True)), max_size=4
    ),
    others=st.integers(0, 3),
    most=st.integers(0, 20),
    fixed=st.floats(0.001, 0.1),
    each=st.floats(0.0, 0.02),
)
def test_no_other_choice_of_guesses_has_a_higher_rate(
    offers: list[Offer], others: int, most: int, fixed: float, each: float
) -> None:
    """Against every choice there is, where times lie on a line."""
    num_sequences = len(offers) + others
    if not num_sequences:
        return
    times = known(lambda n: fixed + each * n, num_sequences, 128)
    found = choose_lengths(offers, num_sequences, times, most)
    assert all(0 <= n <= offer.length for n, offer in zip(found, offers, strict=True))
    assert sum(found) <= most

    def rate(lengths: list[int]) -> float:
        expected = num_sequences + sum(
            offer.probability ** (place + 1)
            for offer, length in zip(offers, lengths, strict=True)
            for place in range(length)
        )
        return expected / (fixed + each * (num_sequences + sum(lengths)))

    plain = rate([0] * len(offers))
    assert not sum(found) or rate(found) > plain * LEAST_GAIN * 0.999
    # One more or one less of any offer is no better, nor is moving one to another.
    for n in range(len(offers)):
        for k in range(-1, len(offers)):
            other = list(found)
            other[n] += 1
            if k >= 0:
                other[k] -= 1
            is_possible = min(other) >= 0 and sum(other) <= most and other[n] <= offers[n].length
            is_likely = offers[n].probability ** other[n] >= 0.1
            if is_possible and is_likely and sum(found):
                assert rate(other) <= rate(found) * 1.001


def test_sequences_that_are_sure_verify_more_than_those_that_are_not() -> None:
    times = known(lambda n: 0.01 + 0.0005 * n, 3, 64)
    sure, unsure, never = choose_lengths(
        [Offer(15, 0.99), Offer(15, 0.5), Offer(15, 0.01)], 3, times, 64
    )
    assert sure == 15
    assert 0 < unsure < 6
    assert never == 0


def test_one_long_pause_does_not_spoil_a_figure() -> None:
    times = known(lambda n: 0.01 * n, 1, 8)
    times.note(8, 60.0)
    predicted = times.predict(8)
    assert predicted is not None
    assert predicted < 0.12
