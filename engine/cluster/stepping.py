"""One step on one device: its share of every plan row, and the hand-overs between them.

In: a step, with input embeddings where this device has a share of the first row. Out: the tensors
of its answer. It checks what the engine host sent; it opens no socket.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch

from engine.cluster import messages as m
from engine.cluster.exchange import Exchange
from engine.cluster.short_logits import check_wanted, short_form
from engine.errors import ProtocolError
from engine.model.shard import ModelShard

MAX_STEP_TOKENS = 1 << 16


class Stepping:
    """Computes the steps of one epoch."""

    def __init__(
        self,
        shard: ModelShard,
        exchange: Exchange,
        device: torch.device,
        between_rows: Callable[[], None],
    ) -> None:
        """Args: between_rows: called in a prompt's steps; raises to give the step up."""
        self.shard = shard
        self.exchange = exchange
        self._device = device
        self._between_rows = between_rows
        self._last_logits: torch.Tensor | None = None

    def compute(self, step: m.Step, tensors: list[m.Array]) -> list[m.Array]:
        """The tensors of a StepAnswer.

        Raises: ProtocolError: the step breaks a rule.
        """
        self._last_logits = None
        if not step.segments:
            return []
        shard, exchange = self.shard, self.exchange
        plan, counters = shard.plan, exchange.counters
        num_tokens = _check_segments(step)
        logit_rows = _logit_rows(step.segments)
        check_wanted(step.logits, len(logit_rows))
        me = exchange.device_index
        x: torch.Tensor | None = None
        if me in plan.group(0):
            if len(tensors) != 1:
                raise ProtocolError("a step for the first row needs its input embeddings")
            m.expect_tensor(
                tensors[0], "float32", (num_tokens, shard.config.width), "input embeddings"
            )
            x = to_tensor(tensors[0], self._device)
        batch = shard.batch(step.kind, step.segments)
        last_row = plan.shape.head_row - 1
        rows = num_tokens
        for row in range(plan.shape.head_row):
            if step.kind == "prompt":  # A piece of a prompt takes long enough to be given up.
                self._between_rows()
            table = exchange.row(row)
            partial: torch.Tensor | None = None
            if table.contributes:
                assert x is not None
                started = time.perf_counter_ns()
                partial = shard.part(row, x, batch)
                if row == last_row:
                    x, partial = x[logit_rows], partial[logit_rows]
                if not table.is_local:
                    # To the exchange's memory; on a GPU this waits until it has computed.
                    x, partial = x.cpu(), partial.cpu()
                counters.compute_ns += time.perf_counter_ns() - started
            if row == last_row:
                rows = len(logit_rows)
                if not rows:
                    return []
            if table.is_local and table.contributes:
                assert x is not None
                assert partial is not None
                x = shard.add(row, x, partial)
            elif table.contributes or table.receives:
                handed = exchange.hand_over(
                    step.step_id,
                    row,
                    None if x is None else x.numpy(),
                    None if partial is None else partial.numpy(),
                    rows,
                )
                x = None if handed is None else to_tensor(handed, self._device)
        if x is None:
            return []
        started = time.perf_counter_ns()
        self._last_logits = shard.logits(x)
        answer = self._answer_tensors(step.logits, self._last_logits)
        counters.compute_ns += time.perf_counter_ns() - started
        return answer

    def full_logits(self) -> m.Array | None:
        """All logits of the last step, float32 [N, shard rows]; None where there are none."""
        return None if self._last_logits is None else self._last_logits.float().cpu().numpy()

    def _answer_tensors(self, wanted: m.LogitsWanted, logits_NV: torch.Tensor) -> list[m.Array]:
        if wanted.form == "full":
            return [logits_NV.float().cpu().numpy()]
        plan = self.shard.plan
        first, _end = plan.unit_range(plan.shape.head_row, self.exchange.device_index)
        return short_form(logits_NV, wanted, first)


def to_tensor(array: m.Array, device: torch.device) -> torch.Tensor:
    """A float32 tensor where the shard computes."""
    # A frame is read-only; torch wants memory of its own.
    writable = array if array.flags.writeable else np.array(array, dtype=np.float32)
    return torch.as_tensor(writable).to(device)


def _check_segments(step: m.Step) -> int:
    """Tokens of a step, after checking each segment against the rules."""
    seen: set[int] = set()
    for segment in step.segments:
        if segment.slot in seen:
            raise ProtocolError(f"slot {segment.slot} appears twice in a step")
        seen.add(segment.slot)
        if segment.token_count < 1 or segment.first_position < 0:
            raise ProtocolError(
                f"slot {segment.slot}: {segment.token_count} tokens at position "
                f"{segment.first_position}"
            )
        if any(not 0 <= offset < segment.token_count for offset in segment.logit_offsets):
            raise ProtocolError(f"slot {segment.slot}: a logits offset is outside the segment")
    num_tokens = sum(segment.token_count for segment in step.segments)
    if num_tokens > MAX_STEP_TOKENS:
        raise ProtocolError(f"a step of {num_tokens:,} tokens exceeds {MAX_STEP_TOKENS:,}")
    return num_tokens


def _logit_rows(segments: tuple[m.Segment, ...]) -> list[int]:
    """Rows of a step's batch whose logits are wanted."""
    rows: list[int] = []
    start = 0
    for segment in segments:
        rows += [start + offset for offset in segment.logit_offsets]
        start += segment.token_count
    return rows
