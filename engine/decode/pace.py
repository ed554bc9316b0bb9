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

    Every piece pays for widening all weights, however short it is: with a model of 1B and two cores
    that is a second. Pieces that are short beside that are read at a fraction of the speed.

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
# A cancel is heard between two rows, and who comes meanwhile waits for one piece.
LONE = PieceRule(1.0, 4.0, 64, 4.0)
# Full logits travel in one message: 16 rows of a vocabulary of 128 k are 8 MB.
MAX_LOGITS_PIECE = 16
REPORT_SECONDS = 0.125
# How much the steps before count with each new one.
_KEPT = 0.8
# Of the mean size, how far sizes must be apart to tell anything: measured times are noisy.
_MIN_SPREAD = 0.3
# Of a step of the mean size, what is paid for without any token, at most in its tokens' times.
_MOST_FIXED = 9.0


class StepCost:
    """What a step takes whatever it holds, and what each token adds, from steps of several sizes.

    A straight line through the latest steps, the older ones counting less.

    Attributes:
        large_size: tokens of about the longest of the latest steps; 0 before the first.
    """

    def __init__(self) -> None:
        """Nothing is known."""
        self.large_size = 0.0
        self._weight = self._tokens = self._seconds = 0.0
        self._square = self._product = 0.0
        # What a step takes without tokens, in tokens' times; None until sizes differ.
        self._ratio: float | None = None

    def note(self, num_tokens: int, seconds: float) -> None:
        """Take note of a step of at least one token."""
        self.large_size = max(num_tokens, _KEPT * self.large_size)
        self._weight = _KEPT * self._weight + 1.0
        self._tokens = _KEPT * self._tokens + num_tokens
        self._seconds = _KEPT * self._seconds + seconds
        self._square = _KEPT * self._square + num_tokens**2
        self._product = _KEPT * self._product + num_tokens * seconds
        mean, mean_seconds = self._tokens / self._weight, self._seconds / self._weight
        spread = self._square / self._weight - mean**2
        if spread > (_MIN_SPREAD * mean) ** 2:
            slope = (self._product / self._weight - mean * mean_seconds) / spread
            most = _MOST_FIXED * mean
            ratio = most if slope <= 0 else min(max(mean_seconds / slope - mean, 0.0), most)
            self._ratio = ratio if self._ratio is None else 0.5 * (self._ratio + ratio)

    @property
    def is_known(self) -> bool:
        """Whether steps of different sizes were seen."""
        return self._ratio is not None

    def fixed_and_each(self) -> tuple[float, float]:
        """Seconds of a step without tokens, and of each token; after at least one step."""
        ratio = self._ratio or 0.0
        tokens = self._tokens / self._weight + ratio
        each = max(self._seconds / self._weight, 1e-9) / tokens
        return ratio * each, each


def next_size(cost: StepCost, rule: PieceRule) -> float:
    """Tokens of the next step."""
    if not cost.large_size:
        return rule.first
    # A second size tells what a piece costs however short it is.
    if not cost.is_known:
        return 2 * cost.large_size
    fixed, each = cost.fixed_and_each()
    size = max((rule.seconds - fixed) / each, rule.work * fixed / each)
    return min(size, max(rule.growth * cost.large_size, rule.first))


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

    def piece(self, kind: StepKind, num_together: int, *, is_alone: bool, has_logits: bool) -> int:
        """Tokens of one sequence in the next step.

        Args:
            num_together: sequences in that step, at least 1.
            is_alone: whether nobody else waits for it to end.
        """
        size = int(next_size(self._costs[kind], LONE if is_alone else SHARED) / num_together)
        return min(max(size, MIN_PIECE), MAX_LOGITS_PIECE if has_logits else LONGEST_STEP)

    def measure(
        self,
        kind: StepKind,
        num_tokens: int,
        num_wasted: int,
        seconds: float,
        plan: Plan,
        answers: Sequence[DeviceAnswer],
        totals: Iterable[dict[str, DeviceTotals]],
    ) -> None:
        """Take note of a step.

        Args:
            num_wasted: of the tokens, guesses that did not come true.
            totals: per sequence of the step, where its devices' figures are summed.
        """
        if num_tokens:
            self._costs[kind].note(num_tokens, seconds)
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
