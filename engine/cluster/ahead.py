"""The step that most likely follows, computed before it is asked for.

An engine host needs a while to choose a token and to send it back, in which a device that computes
everything alone would have nothing to do. Mostly it is the likeliest token, or one that `foresight`
can tell, and where the output head is the embedding too, the device has that token's row itself.

In: the tokens that are foreseen after a step, then the next step as it was asked for. Out: that
step's logits, if its positions and all its inputs are what was guessed; else all is as if nothing
had been computed. So no answer depends on a guess, only how soon it comes. Where a step asks for
the tokens that follow it, too, whoever asked has made sure that the head's rows are the inputs.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from engine.cluster import messages as m
from engine.errors import EngineError
from engine.kernels.torch_kernels import Batch
from engine.model.shard import ModelShard

# A guess is no reason to fail: whoever asks for the step is told what is wrong.
_FAILURES = (EngineError, RuntimeError, MemoryError)
# What a step may take: so long may wait whoever asks for another one.
MOST_SECONDS = 0.05
# Whatever is saved: what is computed in vain takes time from whoever else computes here.
LEAST_CHANCE = 0.6
# Of so many guesses one is only watched.
LOOK_EVERY = 32
# How much the guesses before count with each new one.
_KEPT = 0.98


class Worth:
    """Whether going on pays: a wrong guess keeps the step that is asked for waiting."""

    def __init__(self) -> None:
        """Nothing is known, and nothing is worth it."""
        self._num_right = self._num_wrong = 0.0
        self._num_guesses = 0
        self._pause: float | None = None

    def note_pause(self, seconds: float) -> None:
        """How long nobody asked for anything after an answer, with nothing computed meanwhile."""
        if seconds >= MOST_SECONDS:
            return  # The next step was another answer's.
        # Others' load only ever adds.
        if self._pause is None or seconds < self._pause:
            self._pause = seconds
        else:
            self._pause += 0.2 * (seconds - self._pause)

    def note_guess(self, *, is_right: bool) -> None:
        """Whether a guess came true, computed or not."""
        self._num_guesses += 1
        self._num_right = _KEPT * self._num_right + is_right
        self._num_wrong = _KEPT * self._num_wrong + (not is_right)

    def expects_gain(self, step_seconds: float) -> bool:
        """Whether a step of so many seconds should be computed on the next guess.

        A right guess saves the pause, or the step if that is shorter; a wrong one costs what of the
        step goes on after the pause. Now and then nothing is computed, to see the pause again.
        """
        is_look = self._num_guesses % LOOK_EVERY == 0
        if self._pause is None or is_look or step_seconds > MOST_SECONDS:
            return False
        chance = (self._num_right + 1) / (self._num_right + self._num_wrong + 2)
        saved = min(self._pause, step_seconds)
        gain, loss = chance * saved, (1 - chance) * (step_seconds - saved)
        return chance >= LEAST_CHANCE and gain > loss


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
        self._worth = Worth()
        self._answered_ns = 0

    @property
    def is_done(self) -> bool:
        """Whether there is something that `take` would give."""
        return self._computed is not None

    def guess(self, batch: Batch, foreseen: Sequence[int]) -> None:
        """After a step's answer: note what most likely comes next.

        Args:
            batch: the step after it, of one token for each of its segments.
            foreseen: these tokens.
        """
        self._answered_ns = time.perf_counter_ns()
        with contextlib.suppress(*_FAILURES):
            self._rows = self._shard.tied_rows(foreseen)
            self._batch = batch

    def follow(self, batch: Batch, foreseen: Sequence[int]) -> Computed | None:
        """Compute the step after one, if it can be undone. Its inputs are compared with nothing.

        Args:
            batch: computed last.
            foreseen: the token that comes next of each of its segments.
        Returns: None where the step cannot be computed, which changes nothing.
        """
        with contextlib.suppress(*_FAILURES):
            following = self._shard.prepare_next(batch)
            rows = None if following is None else self._shard.tied_rows(foreseen)
            if following is not None and rows is not None:
                return self._computed_step(following, rows)
        return None

    def compute(self, last_ns: int) -> None:
        """Compute the step that was guessed, if that is worth it and can be undone.

        Args: last_ns: what the last one took.
        """
        batch, rows = self._batch, self._rows
        if batch is None or rows is None or not self._worth.expects_gain(last_ns / 1e9):
            return
        self._computed = self._computed_step(batch, rows)

    def _computed_step(self, batch: Batch, rows: torch.Tensor) -> Computed | None:
        """A step of these inputs; None where it cannot be undone or fails, which changes nothing."""
        shard = self._shard
        if not shard.cache.can_take_back(batch.segments):
            return None
        started = time.perf_counter_ns()
        row, head_row, x, logits = 0, shard.plan.shape.head_row, rows, None
        try:
            batch = shard.batch(batch.kind, batch.segments)
            while row < head_row:
                x, row, logits = shard.advance(row, head_row, x, batch, range(len(rows)))
            if logits is None:
                logits = shard.logits(x)
        except _FAILURES:
            shard.cut_back(batch)
            return None
        return Computed(batch, logits, time.perf_counter_ns() - started)

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
        if rows is not None:
            if self._computed is None:
                self._worth.note_pause((time.perf_counter_ns() - self._answered_ns) / 1e9)
            self._worth.note_guess(is_right=is_right)
        if not is_right and (computed := self.take()) is not None:
            self._shard.cut_back(computed.batch)

    def take(self) -> Computed | None:
        """What was computed of the step that was heard, once."""
        computed, self._computed = self._computed, None
        return computed
