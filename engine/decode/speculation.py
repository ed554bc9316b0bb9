"""Whether verifying guesses pays, and how many of them: a rule of measured times.

In: how long steps of so many tokens took, and which guesses came true. Out: how many guessed tokens
each sequence of the next step verifies. Pure: it measures and computes nothing itself.

A step reads the weights once, for one token as for several, so a few more tokens cost little where
memory is the limit, and much where arithmetic is. Nothing of this is assumed: times are measured,
and guesses are compared with what came also while none are verified, which costs no step.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

# Predicted tokens per second must be this much better: less is noise.
LEAST_GAIN = 1.05
# A guess less likely than this is not worth a thought.
LEAST_PROBABILITY = 0.1
# One more token costs at least this share of a step, until more is known.
HOPED_COST = 0.02
# Steps of so many tokens share a figure; above, each twice as long as the one before the last.
SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
# No step is longer than this many times the longest one that is known: what a long one takes is hoped.
LEAP = 4
# A figure of fewer steps is not trusted: the first of a size warm caches and scratch memory.
MIN_STEPS = 3
TIME_WEIGHT = 0.15
# A longer one than this many times the known figure is taken as this long: the machine paused.
MOST_SURPRISE = 2.0
# Steps after which a figure that nothing renewed is forgotten: contexts grow, machines get busy.
FORGOTTEN_AFTER = 1000
# A new sequence begins with what one right guess in three would have taught.
PRIOR_RIGHT, PRIOR_SEEN = 1.0, 3.0
# How much an older guess counts against the next one: texts change between writing and copying.
MEMORY = 0.9


class Offer(NamedTuple):
    """What one sequence could verify.

    Attributes:
        length: guessed tokens.
        probability: that a guess comes true where all before it did, 0 to 1.
    """

    length: int
    probability: float


@dataclass(slots=True)
class _Figure:
    """What steps of about one size took."""

    num_tokens: float
    seconds: float
    num_steps: int
    noted_at: int


class StepTimes:
    """What steps of generated tokens take, by their number of tokens, under one plan."""

    def __init__(self) -> None:
        """Nothing is known."""
        self._figures: dict[int, _Figure] = {}
        self._clock = 0

    def note(self, num_tokens: int, seconds: float) -> None:
        """Take note of a step."""
        self._clock += 1
        size = _size(num_tokens)
        figure = self._figures.get(size)
        if figure is None:
            self._figures[size] = _Figure(num_tokens, seconds, 1, self._clock)
        else:
            figure.num_steps += 1
            figure.noted_at = self._clock
            weight = max(1 / figure.num_steps, TIME_WEIGHT)
            bounded = min(seconds, MOST_SURPRISE * figure.seconds)
            figure.seconds += weight * (bounded - figure.seconds)
            figure.num_tokens += weight * (num_tokens - figure.num_tokens)
        self._figures = {
            n: f for n, f in self._figures.items() if self._clock - f.noted_at < FORGOTTEN_AFTER
        }

    def is_known(self, num_tokens: int) -> bool:
        """Whether steps of that size were measured often enough, and not too long ago."""
        figure = self._figures.get(_size(num_tokens))
        return figure is not None and figure.num_steps >= MIN_STEPS

    def longest_tried(self) -> float:
        """Tokens of the longest step that may be taken without knowing what it takes."""
        sizes = [f.num_tokens for f in self._figures.values() if f.num_steps >= MIN_STEPS]
        return LEAP * max(sizes, default=0.0)

    def predict(self, num_tokens: int) -> float | None:
        """Seconds of a step; between measured sizes on a line, beyond them hopefully cheap.

        Returns: None while no size is known.
        """
        known = sorted(
            (f.num_tokens, f.seconds) for f in self._figures.values() if f.num_steps >= MIN_STEPS
        )
        if not known:
            return None
        at = bisect_left(known, (num_tokens, 0.0))
        if at < len(known) and (at == 0 or known[at][0] == num_tokens):
            return known[at][1]
        before, seconds = known[at - 1]
        if at < len(known):
            after, longer = known[at]
            return seconds + (longer - seconds) * (num_tokens - before) / (after - before)
        slope = HOPED_COST * seconds / before
        if at >= 2:
            earlier, shorter = known[at - 2]
            slope = max(slope, (seconds - shorter) / (before - earlier))
        return seconds + slope * (num_tokens - before)


@dataclass(slots=True)
class Acceptance:
    """How often the guesses for one sequence came true, for each source of guesses."""

    _right: dict[int, float] = field(default_factory=dict[int, float])
    _seen: dict[int, float] = field(default_factory=dict[int, float])

    def expect(self, source: int, probability: float) -> None:
        """Begin with what other sequences taught of a source, where nothing is known yet."""
        if source not in self._seen:
            self._right[source], self._seen[source] = PRIOR_SEEN * probability, PRIOR_SEEN

    def probability(self, source: int) -> float:
        """That a guess from a source comes true where those before it did."""
        return self._right.get(source, PRIOR_RIGHT) / self._seen.get(source, PRIOR_SEEN)

    def note(self, source: int, guessed: Sequence[int], chosen: Sequence[int]) -> None:
        """Compare a guess with what was chosen, whether or not it was verified.

        Args:
            chosen: the tokens that came, as many as are known; what comes later says nothing.
        """
        for guess, choice in zip(guessed, chosen, strict=False):
            is_right = guess == choice
            self._right[source] = MEMORY * self._right.get(source, PRIOR_RIGHT) + is_right
            self._seen[source] = MEMORY * self._seen.get(source, PRIOR_SEEN) + 1
            if not is_right:
                return


def choose_lengths(
    offers: Sequence[Offer], num_sequences: int, times: StepTimes, most_tokens: int
) -> list[int]:
    """How many guessed tokens of each offer to verify, for the most tokens per second.

    Args:
        offers: of some of the sequences in the step.
        num_sequences: in the step, each with one token that is not guessed.
        most_tokens: guessed tokens in all at most.
    Returns: per offer 0 to its length; all 0 where guessing does not pay, or plain steps of so many
        sequences have not been measured.
    """
    lengths = [0] * len(offers)
    plain = times.predict(num_sequences)
    if plain is None or not times.is_known(num_sequences):
        return lengths
    # The most probable tokens first: a later guess of a sequence is never likelier than the one
    # before it, so what is taken of each is a beginning.
    tokens = sorted(
        (
            (offer.probability ** (place + 1), -place, n)
            for n, offer in enumerate(offers)
            for place in range(offer.length)
        ),
        reverse=True,
    )
    most_tokens = min(most_tokens, int(times.longest_tried()) - num_sequences)
    best, best_rate = 0, LEAST_GAIN * num_sequences / plain
    expected = float(num_sequences)
    for count, (probability, _, _) in enumerate(tokens[: max(0, most_tokens)], start=1):
        if probability < LEAST_PROBABILITY:
            break
        expected += probability
        seconds = times.predict(num_sequences + count)
        if seconds is not None and expected / seconds > best_rate:
            best, best_rate = count, expected / seconds
    for _, _, n in tokens[:best]:
        lengths[n] += 1
    return lengths


def _size(num_tokens: int) -> int:
    """The size that a step's figure is kept under: the largest that is not longer."""
    at = bisect_left(SIZES, num_tokens)
    return SIZES[at] if at < len(SIZES) and SIZES[at] == num_tokens else SIZES[max(0, at - 1)]
