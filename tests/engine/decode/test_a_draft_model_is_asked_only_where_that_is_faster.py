"""How many tokens a draft model guesses follows measured times of both models.

Machines are made up: a time for each size of a step of either model, a chance for each guess.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.decode.draft_rule import (
    FIRST_ALLOWANCE_SECONDS,
    FIRST_SHARE,
    KNOWN_AFTER,
    MOST_GUESSED,
    DraftRule,
)
from engine.decode.drafting import MODEL_SOURCE as SOURCE
from engine.decode.speculation import MIN_STEPS, Acceptance, StepTimes

Seconds = Callable[[int], float]
MACHINES: dict[str, Seconds] = {
    "memory is the limit": lambda n: 0.05 + 0.001 * n,
    "half and half": lambda n: 0.05 + 0.01 * n,
    "arithmetic is the limit": lambda n: 0.05 * n,
}
MANY = 64


@dataclass
class Run:
    """A made-up answer: what it took, and what it would have taken without the draft model."""

    seconds: float = 0.0
    plain_seconds: float = 0.0
    num_guessed: int = 0

    @property
    def gain(self) -> float:
        return self.plain_seconds / self.seconds


def play(big: Seconds, draft_seconds: float, chance: float, num_tokens: int) -> Run:
    """Follow the rule for one answer, all of whose guesses are verified unless they are tries."""
    random = np.random.default_rng(1)
    rule, times, acceptance, run, done = DraftRule(), StepTimes(), Acceptance(), Run(), 0
    while done < num_tokens:
        length = rule.choose([acceptance.probability(SOURCE)], 1, times, MANY).length
        is_try = not length and rule.may_try and rule.could_pay(1, 1, times)
        num_guessed = 1 if is_try else length
        num_right = int(np.argmin([*(random.random(num_guessed) < chance), False]))
        acceptance.note(SOURCE, [1] * num_guessed, [*[1] * num_right, 0])
        for _ in range(num_guessed):
            rule.times.note(1, draft_seconds)
        if is_try:
            rule.note_try(draft_seconds, 1)
            num_right = 0
        num_verified = 0 if is_try else num_guessed
        took = big(1 + num_verified)
        times.note(1 + num_verified, took)
        rule.note_big_step(took)
        run.seconds += num_guessed * draft_seconds + took
        run.plain_seconds += (1 + num_right) * big(1)
        run.num_guessed += num_guessed
        done += 1 + num_right
    return run


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("draft_seconds", [0.001, 0.01, 0.04, 0.2])
def test_a_model_that_is_nearly_never_right_costs_a_moment_and_four_percent(
    machine: str, draft_seconds: float
) -> None:
    run = play(MACHINES[machine], draft_seconds, 0.02, 400)
    allowed = FIRST_ALLOWANCE_SECONDS + draft_seconds + (FIRST_SHARE + 0.01) * run.plain_seconds
    assert run.seconds - run.plain_seconds < allowed, run


@pytest.mark.parametrize("machine", MACHINES)
def test_a_model_as_slow_as_the_big_one_is_asked_until_that_is_known(machine: str) -> None:
    run = play(MACHINES[machine], MACHINES[machine](1), 1.0, 400)
    assert 0 < run.num_guessed <= MIN_STEPS + 1


@pytest.mark.parametrize(
    ("machine", "least"), [("memory is the limit", 2.0), ("half and half", 1.4)]
)
def test_a_small_model_that_is_mostly_right_gains(machine: str, least: float) -> None:
    run = play(MACHINES[machine], 0.004, 0.85, 400)
    assert run.gain > least


def test_the_worth_of_a_small_model_is_known_within_a_short_answer() -> None:
    run = play(MACHINES["memory is the limit"], 0.01, 0.9, 60)
    assert run.gain > 1.2


def test_the_first_tries_end_when_enough_guesses_were_compared() -> None:
    rule = DraftRule()
    for _ in range(KNOWN_AFTER):
        assert rule.may_try
        rule.note_try(1e-6, 1)
    assert not rule.may_try


def known(seconds_of: Seconds, *sizes: int) -> StepTimes:
    times = StepTimes()
    for size in sizes:
        for _ in range(MIN_STEPS):
            times.note(size, seconds_of(size))
    return times


@given(
    probability=st.floats(0.0, 1.0),
    num_guessing=st.integers(1, 6),
    num_others=st.integers(0, 4),
    fixed=st.floats(0.001, 0.1),
    each=st.floats(0.0, 0.1),
    draft_seconds=st.floats(0.0001, 0.1),
    most_tokens=st.integers(0, 40),
)
def test_no_other_length_is_predicted_to_be_faster(
    probability: float,
    num_guessing: int,
    num_others: int,
    fixed: float,
    each: float,
    draft_seconds: float,
    most_tokens: int,
) -> None:
    """Compared with every length that is allowed, by the time of a token as the text-book has it."""
    num_sequences = num_guessing + num_others
    big = known(lambda n: fixed + each * n, num_sequences, 64)
    rule = DraftRule()
    rule.times = known(lambda n: draft_seconds * n, num_guessing)

    def seconds_each(length: int) -> float:
        verifying = big.predict(num_sequences + length * num_guessing)
        assert verifying is not None
        right = sum(probability**n for n in range(1, length + 1))
        expected = num_sequences + num_guessing * right
        return (verifying + length * draft_seconds * num_guessing) / expected

    found = rule.choose([probability] * num_guessing, num_sequences, big, most_tokens)
    assert found.length * num_guessing <= most_tokens
    for length in range(MOST_GUESSED + 1):
        if length * num_guessing <= most_tokens and found.length:
            assert seconds_each(found.length) <= seconds_each(length) * (1 + 1e-9)
    assert found.gain_seconds == pytest.approx(
        seconds_each(0) - seconds_each(found.length) if found.length else 0.0, abs=1e-12
    )


def test_nothing_is_asked_for_before_plain_steps_are_known() -> None:
    rule = DraftRule()
    rule.times = known(lambda _n: 0.001, 1)
    assert rule.choose([0.99], 1, StepTimes(), MANY).length == 0
    assert rule.choose([0.99], 1, known(lambda _n: 1.0, 1), MANY).length > 0


def test_a_long_conversation_is_read_only_for_an_answer_that_makes_up_for_it() -> None:
    rule = DraftRule()
    assert not rule.is_worth_reading(1000, 1.0, 10_000)  # It may take for ever.
    rule.note_read(100, 0.1)
    assert rule.is_worth_reading(1000, 0.02, 500)
    assert not rule.is_worth_reading(1000, 0.02, 50)
