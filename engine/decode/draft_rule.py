"""Whether asking the draft model pays, and for how many tokens: a rule of measured times.

In: what its steps and those of the big model took, and how often its guesses came true. Out: how many
tokens it guesses next. Pure: it measures and computes nothing itself.

A guess of the text itself is free, one of a model takes that model's time, whether or not it comes
true. So where nothing is known, or it did not pay lately, it is tried for a small share of the time;
at first for a second and a half.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from engine.decode.speculation import LEAST_GAIN, PRIOR_RIGHT, PRIOR_SEEN, StepTimes

# Guessed tokens of a sequence in a row; each takes a step of the draft model.
MOST_GUESSED = 8
# Of the big model's time, what may go into guesses that are not expected to pay: while the draft
# model's worth is not known, and later.
FIRST_SHARE, LATER_SHARE = 0.03, 0.01
# Guesses that were compared with what came, after which its worth is known.
KNOWN_AFTER = 20
MOST_ALLOWANCE_SECONDS = 0.5
# What may be tried away at first, for reading a prompt and some guesses: who gives a draft model
# wants it tried.
FIRST_ALLOWANCE_SECONDS = 1.5
# An answer is hoped to use this share of the tokens that it may have.
HOPED_LENGTH = 0.5
# How much the last answer says of the next one.
NEWS_WEIGHT = 0.5


class Choice(NamedTuple):
    """What the rule says.

    Attributes:
        length: tokens to guess for each sequence; 0: it does not pay.
        gain_seconds: that each token of the answers takes less, by prediction.
    """

    length: int
    gain_seconds: float


class DraftRule:
    """What is known of the worth of a draft model.

    Attributes:
        times: of its steps, by their number of tokens.
        probability: that its guesses come true in an answer of which nothing is known yet.
    """

    def __init__(self) -> None:
        """Nothing is known."""
        self.times = StepTimes()
        self.probability = PRIOR_RIGHT / PRIOR_SEEN
        self._num_compared = 0
        self._allowance = FIRST_ALLOWANCE_SECONDS
        self._seconds_per_read: float | None = None

    @property
    def may_try(self) -> bool:
        """Whether there is time left for a guess that is not expected to pay."""
        return self._allowance > 0

    def note_big_step(self, seconds: float) -> None:
        """The big model computed: a small share of that may be tried away."""
        share = FIRST_SHARE if self._num_compared < KNOWN_AFTER else LATER_SHARE
        if self._allowance < MOST_ALLOWANCE_SECONDS:
            self._allowance += share * seconds

    def note_try(self, seconds: float, num_compared: int) -> None:
        """So much was tried away, for so many guesses to be compared with what comes."""
        self._allowance -= seconds
        was_known = self._num_compared >= KNOWN_AFTER
        self._num_compared += num_compared
        if self._num_compared >= KNOWN_AFTER and not was_known:
            self._allowance = min(self._allowance, 0.0)

    def note_read(self, num_tokens: int, seconds: float) -> None:
        """The draft model read a piece of a conversation."""
        each = seconds / num_tokens
        known = self._seconds_per_read
        self._seconds_per_read = each if known is None else 0.5 * (known + each)

    def note_answer(self, probability: float) -> None:
        """An answer ended, in which guesses came true so often."""
        self.probability += NEWS_WEIGHT * (probability - self.probability)

    def read_seconds(self, num_tokens: int) -> float | None:
        """How long reading takes; None where nothing was read yet."""
        return None if self._seconds_per_read is None else num_tokens * self._seconds_per_read

    def choose(
        self, probabilities: Sequence[float], num_sequences: int, big: StepTimes, most_tokens: int
    ) -> Choice:
        """How many tokens to guess, for the most tokens per second of both models together.

        Args:
            probabilities: of the sequences to guess for, that a guess comes true where those before
                it did.
            num_sequences: in the big model's step, each with one token that is not guessed.
            big: what the big model's steps take.
            most_tokens: guessed tokens of all sequences together at most.
        Returns: the same number of tokens for each, 0 where it does not pay or is not known.
        """
        plain = big.predict(num_sequences)
        guessing = self.times.predict(len(probabilities))
        if plain is None or guessing is None or not big.is_known(num_sequences):
            return Choice(0, 0.0)
        # What is verified is bound by this, too.
        most_tokens = min(most_tokens, int(big.longest_tried()) - num_sequences)
        best, best_each = 0, plain / num_sequences / LEAST_GAIN
        expected = float(num_sequences)
        for length in range(1, min(MOST_GUESSED, most_tokens // len(probabilities)) + 1):
            expected += sum(p**length for p in probabilities)
            verifying = big.predict(num_sequences + length * len(probabilities))
            assert verifying is not None
            each = (verifying + length * guessing) / expected
            if each < best_each:
                best, best_each = length, each
        return Choice(best, plain / num_sequences - best_each if best else 0.0)

    def could_pay(self, num_guessing: int, num_sequences: int, big: StepTimes) -> bool:
        """Whether guesses would pay that always come true; True while that is not known."""
        if self.times.predict(num_guessing) is None or not big.is_known(num_sequences):
            return True
        most = num_guessing * MOST_GUESSED
        return self.choose([1.0] * num_guessing, num_sequences, big, most).length > 0

    def is_worth_reading(self, num_tokens: int, gain_seconds: float, num_left: int) -> bool:
        """Whether what guesses gain makes up for reading a conversation first.

        Args:
            gain_seconds: of each token.
            num_left: tokens that the answer may still have.
        """
        seconds = self.read_seconds(num_tokens)
        return seconds is not None and seconds < gain_seconds * HOPED_LENGTH * num_left
