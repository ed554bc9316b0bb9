"""How fast steps go, and so how long a piece of work may be.

In: what each step took. Out: the size of the next piece, and figures for whoever watches.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from engine.cluster.coordinator import DeviceAnswer
from engine.decode.listener import Listener, Measured
from engine.decode.sequence import DeviceTotals
from engine.model.batch import StepKind
from engine.model.view import LONGEST_STEP
from engine.plan.plan import Plan

MIN_PIECE = 8


class PieceRule(NamedTuple):
    """How long a piece of a prompt is, as far as measured speed decides.

    Where torch multiplies, every piece pays for widening all weights, however short it is: with a model
    of 1B and two cores that is a second. Pieces that are short beside that are read at a fraction of
    the speed.

    Attributes:
        seconds: that it takes, or
        work: what its tokens take, in parts of what every piece does: whichever is longer.
        first: tokens, before anything is known.
        growth: how many times as many tokens as one of the latest it has, at most.
    """

    seconds: float
    work: float
    first: int
    growth: float


# Neighbours wait for a whole piece; fewer pieces are less to wait for in all.
SHARED = PieceRule(0.15, 1.0, 32, 2.0)
# A cancel is heard between two rows or native calls, and who comes meanwhile waits for one piece.
LONE = PieceRule(1.0, 4.0, 64, 4.0)
# Full logits of a piece travel in one frame, in which no heartbeat is heard: 16 rows of a vocabulary
# of 128 k take 2.5 s at 27 Mbit/s.
MAX_LOGITS_PIECE_BYTES = 8 << 20
REPORT_SECONDS = 0.125
# How much the steps before count with each new one.
_KEPT = 0.8
# Of the mean size, how far sizes must be apart to tell anything: measured times are noisy.
_MIN_SPREAD = 0.3
# Of a step of the mean size, what is paid for without any token, at most.
_MOST_FIXED = 0.9
# A step that takes more times what was expected says more of the computer than of the step.
_MOST_SURPRISE = 2.0
# Steps after which another size is tried again: one wrong line must not last.
_LOOK_EVERY = 16


class StepCost:
    """What a step takes whatever it holds, and what each token adds, from steps of several sizes.

    A straight line through the latest steps, the older ones counting less. The first step of all
    counts for nothing: it touches new memory.

    Attributes:
        large_size: tokens of about the longest of the latest steps; 0 before the first.
    """

    def __init__(self) -> None:
        """Nothing is known."""
        self.large_size = 0.0
        self._has_begun = False
        self._weight = self._tokens = self._seconds = 0.0
        self._square = self._product = 0.0
        # Seconds of a step without tokens; None until sizes differ.
        self._fixed: float | None = None
        self._num_alike = 0

    def note(self, num_tokens: int, seconds: float) -> None:
        """Take note of a step of at least one token."""
        self.large_size = max(num_tokens, _KEPT * self.large_size)
        if not self._has_begun:
            self._has_begun = True
            return
        if self.is_known:
            fixed, each = self.fixed_and_each()
            seconds = min(seconds, _MOST_SURPRISE * (fixed + num_tokens * each))
        self._weight = _KEPT * self._weight + 1.0
        self._tokens = _KEPT * self._tokens + num_tokens
        self._seconds = _KEPT * self._seconds + seconds
        self._square = _KEPT * self._square + num_tokens**2
        self._product = _KEPT * self._product + num_tokens * seconds
        mean, mean_seconds = self._tokens / self._weight, self._seconds / self._weight
        spread = self._square / self._weight - mean**2
        is_apart = spread > (_MIN_SPREAD * mean) ** 2
        # What was to be another size may have been cut short by the end of its prompt.
        self._num_alike = 0 if is_apart or self.is_stale else self._num_alike + 1
        if is_apart:
            slope = (self._product / self._weight - mean * mean_seconds) / spread
            if slope > 0:
                fixed = min(max(mean_seconds - slope * mean, 0.0), _MOST_FIXED * mean_seconds)
                self._fixed = fixed if self._fixed is None else 0.5 * (self._fixed + fixed)

    @property
    def is_known(self) -> bool:
        """Whether steps of different sizes were seen."""
        return self._fixed is not None

    @property
    def is_stale(self) -> bool:
        """Whether the latest steps, many of them, were all about as long."""
        return self._num_alike >= _LOOK_EVERY

    def fixed_and_each(self) -> tuple[float, float]:
        """Seconds of a step without tokens, and of each token; after at least two steps."""
        mean, mean_seconds = self._tokens / self._weight, self._seconds / self._weight
        mean_seconds = max(mean_seconds, 1e-9)
        fixed = min(self._fixed or 0.0, _MOST_FIXED * mean_seconds)
        return fixed, (mean_seconds - fixed) / mean


def next_size(cost: StepCost, rule: PieceRule) -> float:
    """Tokens of the next step."""
    if not cost.large_size:
        return rule.first
    # A second size tells what a piece costs however short it is.
    if not cost.is_known:
        return 2 * cost.large_size
    fixed, each = cost.fixed_and_each()
    size = max((rule.seconds - fixed) / each, rule.work * fixed / each)
    size = min(size, max(rule.growth * cost.large_size, rule.first), LONGEST_STEP)
    if not cost.is_stale:
        return size
    return 2 * size if 2 * size <= LONGEST_STEP else size / 4  # So far apart that a line shows.


class Pace:
    """Measured speed of the plan in force."""

    def __init__(self) -> None:
        """Nothing is known."""
        self._costs: dict[StepKind, StepCost] = {"prompt": StepCost(), "generated": StepCost()}
        self._measured = Measured()
        self._reported_at = 0.0

    def forget(self) -> None:
        """Another plan, another speed."""
        self._costs = {"prompt": StepCost(), "generated": StepCost()}

    def piece(
        self, kind: StepKind, num_together: int, *, is_alone: bool, num_logits: int = 0
    ) -> int:
        """Tokens of one sequence in the next step.

        Args:
            num_together: sequences in that step, at least 1.
            is_alone: whether nobody else waits for it to end.
            num_logits: of each token, where all of them are wanted.
        """
        size = int(next_size(self._costs[kind], LONE if is_alone else SHARED) / num_together)
        most = MAX_LOGITS_PIECE_BYTES // (4 * num_logits) if num_logits else LONGEST_STEP
        return max(1, min(max(size, MIN_PIECE), most, LONGEST_STEP))

    def measure(
        self,
        kind: StepKind,
        num_tokens: int,
        num_continued: int,
        num_wasted: int,
        seconds: float,
        plan: Plan,
        answers: Sequence[DeviceAnswer],
        totals: Iterable[dict[str, DeviceTotals]],
    ) -> None:
        """Take note of a step.

        Args:
            num_continued: of the tokens, those that a device went on with, in steps of their own.
            num_wasted: of the tokens, guesses that did not come true, and what was gone on with
                after the answer's end.
            totals: per sequence of the step, where its devices' figures are summed.
        """
        if num_tokens:
            num_steps = 1 + num_continued
            self._costs[kind].note(num_tokens // num_steps, seconds / num_steps)
        measured = self._measured
        measured.seconds += seconds
        if kind == "prompt":
            measured.prompt_tokens += num_tokens - num_wasted
        else:
            measured.generated_tokens += num_tokens - num_wasted
        everyone = [measured.devices, *totals]
        for index, answer, _tensors in answers:
            for devices in everyone:
                entry = devices.setdefault(plan.devices[index], DeviceTotals())
                entry.compute_ns += answer.compute_ns
                entry.wait_ns += answer.wait_ns
                entry.serialise_ns += answer.serialise_ns
                entry.sent_bytes += answer.sent_bytes
                entry.received_bytes += answer.received_bytes
                entry.cache_bytes = answer.cache_bytes

    def report(self, listener: Listener) -> None:
        """Tell what was measured since the last time, a few times a second."""
        now = time.monotonic()
        if self._measured.seconds and now - self._reported_at >= REPORT_SECONDS:
            self._reported_at = now
            listener.on_measured(self._measured)
            self._measured = Measured()
