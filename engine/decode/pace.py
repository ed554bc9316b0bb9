"""How fast steps go, and so how long a piece of work may be.

In: what each step took. Out: the size of the next piece, and figures for whoever watches.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence

from engine.cluster.coordinator import DeviceAnswer
from engine.decode.listener import Listener, Measured
from engine.decode.sequence import DeviceTotals
from engine.model.batch import StepKind
from engine.model.view import LONGEST_STEP
from engine.plan.plan import Plan

# How long a step may take by measured speed: neighbours wait that long for their next token. A
# prompt alone is read in larger pieces, since weights are widened once for each; a cancel is heard
# between two rows, and who comes meanwhile waits for one piece.
SHARED_PIECE_SECONDS = 0.15
LONE_PIECE_SECONDS = 1.0
FIRST_PIECE = 32
MIN_PIECE = 8
# Full logits travel in one message: 16 rows of a vocabulary of 128 k are 8 MB.
MAX_LOGITS_PIECE = 16
REPORT_SECONDS = 0.125


class Pace:
    """Measured speed of the plan in force."""

    def __init__(self) -> None:
        """Nothing is known."""
        self._tokens_per_second: dict[StepKind, float] = {}
        self._measured = Measured()
        self._reported_at = 0.0

    def forget(self) -> None:
        """Another plan, another speed."""
        self._tokens_per_second = {}

    def piece(self, kind: StepKind, num_together: int, *, is_alone: bool, has_logits: bool) -> int:
        """Tokens of one sequence in the next step.

        Args:
            num_together: sequences in that step, at least 1.
            is_alone: whether nobody else waits for it to end.
        """
        rate = self._tokens_per_second.get(kind)
        seconds = LONE_PIECE_SECONDS if is_alone else SHARED_PIECE_SECONDS
        size = FIRST_PIECE if rate is None else int(rate * seconds / num_together)
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
            rate = num_tokens / max(seconds, 1e-6)
            known = self._tokens_per_second.get(kind, rate)
            self._tokens_per_second[kind] = 0.5 * known + 0.5 * rate
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
