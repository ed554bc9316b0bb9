"""The step that most likely follows, computed before it is asked for.

An engine host needs a while to choose a token and to send it back, in which a device that computes
everything alone would have nothing to do. Mostly it is the likeliest token, and where the output
head is the embedding too, the device has that token's row itself.

In: the likeliest tokens of a step, then the next step as it was asked for. Out: that step's logits,
if its positions and all its inputs are what was guessed; else all is as if nothing had been
computed. So no answer depends on a guess, only how soon it comes.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from engine.cluster import messages as m
from engine.errors import EngineError
from engine.kernels.torch_kernels import Batch
from engine.model.shard import ModelShard

# Guesses in a row that must have come true before a step is computed on one: a wrong one keeps the
# step that is asked for waiting.
MIN_RIGHT = 3
# What a step may take: so long may wait whoever asks for another one.
MOST_SECONDS = 0.05


@dataclass(frozen=True, slots=True)
class Computed:
    """A step that was computed ahead.

    Attributes:
        logits: float32 [N, vocabulary].
    """

    batch: Batch
    logits: torch.Tensor
    compute_ns: int


class Ahead:
    """What one device computes ahead."""

    def __init__(self, shard: ModelShard) -> None:
        """Args: shard: everything of the model."""
        self._shard = shard
        self._batch: Batch | None = None
        self._rows: torch.Tensor | None = None
        self._computed: Computed | None = None
        self._num_right = 0

    @property
    def is_done(self) -> bool:
        """Whether there is something that `take` would give."""
        return self._computed is not None

    def guess(self, batch: Batch, likeliest: Sequence[int]) -> None:
        """After a step's answer: note what most likely comes next.

        Args:
            batch: the step after it, of one token for each of its segments.
            likeliest: these tokens.
        """
        self._batch = batch
        self._rows = self._shard.tied_rows(likeliest)

    def compute(self, last_ns: int) -> None:
        """Compute the step that was guessed, unless it is in doubt or takes long.

        Args: last_ns: what the last one took.
        """
        batch, rows, shard = self._batch, self._rows, self._shard
        is_sure = self._num_right >= MIN_RIGHT and last_ns < MOST_SECONDS * 1e9
        if batch is None or rows is None or not is_sure:
            return
        if not shard.cache.can_take_back(batch.segments):
            return
        started = time.perf_counter_ns()
        batch = shard.batch(batch.kind, batch.segments)
        row, head_row, x, logits = 0, shard.plan.shape.head_row, rows, None
        try:
            while row < head_row:
                x, row, logits = shard.advance(row, head_row, x, batch, range(len(rows)))
            if logits is None:
                logits = shard.logits(x)
        except (EngineError, RuntimeError, MemoryError):
            shard.cut_back(batch)  # Whoever asks for the step is told why.
            return
        self._computed = Computed(batch, logits, time.perf_counter_ns() - started)

    def hear(self, step: m.Step, tensors: Sequence[m.Array]) -> None:
        """Compare the next step with what was guessed, before its slots are changed."""
        batch, rows, self._batch, self._rows = self._batch, self._rows, None, None
        is_right = (
            batch is not None
            and rows is not None
            and not step.operations
            and step.kind == batch.kind
            and step.segments == batch.segments
            and len(tensors) == 1
            and tensors[0].dtype == np.float32
            and np.array_equal(tensors[0], rows.numpy())
        )
        self._num_right = self._num_right + 1 if is_right else 0
        if not is_right and (computed := self.take()) is not None:
            self._shard.cut_back(computed.batch)

    def take(self) -> Computed | None:
        """What was computed of the step that was heard, once."""
        computed, self._computed = self._computed, None
        return computed
