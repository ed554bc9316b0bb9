"""One step on one device: its share of every plan row, and the hand-overs between them.

In: a step, with input embeddings where this device has a share of the first row. Out: the tensors
of its answer. It checks what the engine host sent; it opens no socket.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
import torch

from engine.cluster import messages as m
from engine.cluster.ahead import Ahead
from engine.cluster.collective import Collective
from engine.cluster.foresight import check_draw, foresee
from engine.cluster.pieces import Piece, cut_step, num_pieces
from engine.cluster.short_logits import check_wanted, short_form
from engine.errors import ProtocolError
from engine.kernels.torch_kernels import Batch
from engine.model.batch import StepKind
from engine.model.kv_cache import MAX_SLOTS
from engine.model.shard import ModelShard
from engine.model.view import LONGEST_STEP
from engine.plan.plan import Plan

MAX_STEP_TOKENS = 1 << 16
# Tokens that a step goes on with by itself, at most, and for how long: they come all at once, and
# meanwhile nobody is heard.
MOST_CONTINUED = 15
MOST_CONTINUED_SECONDS = 0.05
# A slot needs two at most in one step.
MAX_OPERATIONS = 2 * MAX_SLOTS


class Stepping:
    """Computes the steps of one epoch.

    Attributes:
        continued: tokens that the last step went on with.
    """

    def __init__(
        self,
        shard: ModelShard,
        exchange: Collective,
        device: torch.device,
        between_rows: Callable[[int, StepKind], None],
        *,
        may_go_ahead: bool = True,
    ) -> None:
        """Begin an epoch.

        Args:
            between_rows: called before each row with its index; raises to give the step up.
            may_go_ahead: whether a step may be computed before it is asked for.
        """
        self.shard = shard
        self.exchange = exchange
        self._device = device
        self._between_rows = between_rows
        self._last_logits: torch.Tensor | None = None
        self._last_batch: Batch | None = None
        self._stages = stages(shard.plan, exchange.device_index)
        # What every step asks of the plan.
        plan, index = shard.plan, exchange.device_index
        self._head_row = plan.shape.head_row
        self._has_first, self._has_head = (index in plan.group(n) for n in (0, self._head_row))
        self._first_id, self._end_id = plan.unit_range(self._head_row, index)
        is_alone = plan.used_devices() == (index,) and shard.is_native
        self._ahead = Ahead(shard) if is_alone and may_go_ahead else None
        self._following: list[int] = []  # what most likely comes next, of each slot
        self.continued: list[int] = []

    def compute(self, step: m.Step, tensors: list[m.Array]) -> list[m.Array]:
        """The tensors of a StepAnswer.

        Raises: ProtocolError: the step breaks a rule.
        """
        self._last_logits = self._last_batch = None
        self._following, self.continued = [], []
        if not step.segments:
            return []
        shard, exchange = self.shard, self.exchange
        num_logits = sum([len(s.logit_offsets) for s in step.segments])
        check_wanted(step.logits, num_logits)
        self._check_answer(num_logits + step.continued)
        _check_foreseen(step)
        computed = self._ahead.take() if self._ahead is not None else None
        if computed is not None:  # Its segments and inputs are those of this step.
            self._last_logits, self._last_batch = computed.logits, computed.batch
            exchange.counters.compute_ns += computed.compute_ns
            return self._go_on(step, computed.logits)
        num_tokens = _check_segments(step)
        x = self._embeddings(tensors, num_tokens)
        shard.cache.check(step.segments)
        pieces = cut_step(step.segments, num_pieces(shard.plan, step.kind, num_tokens))
        batches = [shard.batch(step.kind, piece.segments) for piece in pieces]
        streams: list[torch.Tensor | None] = [x]
        if len(pieces) > 1 and x is not None:
            streams = [x[p.first_token : p.end_token] for p in pieces]
        elif len(pieces) > 1:
            streams = [None] * len(pieces)
        for first_row, end_row in self._stages:
            self._enter(first_row, pieces)
            for n, piece in enumerate(pieces):
                self._receive(first_row, n, piece, streams)
                stream = streams[n]
                assert stream is not None
                # Where there are several, their logits are computed together.
                rows = piece.logit_rows if len(pieces) == 1 else ()
                streams[n] = self._work(first_row, end_row, n, piece, stream, batches[n], rows)
        self._last_batch = batches[-1]
        if not self._has_head:
            return []
        self._enter(self._head_row, pieces)
        for n, piece in enumerate(pieces):
            self._receive(self._head_row, n, piece, streams)
        heads = [stream for stream in streams if stream is not None]
        if not heads:
            return []
        # The last rows may have brought them.
        if self._last_logits is None:
            started = time.perf_counter_ns()
            self._last_logits = shard.logits(heads[0] if len(heads) == 1 else torch.cat(heads))
            exchange.counters.compute_ns += time.perf_counter_ns() - started
        return self._go_on(step, self._last_logits)

    def _go_on(self, step: m.Step, logits_NV: torch.Tensor) -> list[m.Array]:
        """The answer, after as many tokens that follow as the step wants and can be undone."""
        answer = self._answer_tensors(step.logits, logits_NV)
        batch = self._last_batch
        if self._ahead is None or batch is None or step.logits.form == "full":
            return answer
        if not step.continued and step.draw is None:
            self._following = answer[0][:, 0].tolist()
            return answer
        found, answers = [logits_NV], [answer]
        end = time.perf_counter() + MOST_CONTINUED_SECONDS
        num_rows = logits_NV.shape[1]
        while True:
            started = time.perf_counter_ns()
            token = foresee(answers[-1], step, len(self.continued), num_rows)
            self.exchange.counters.compute_ns += time.perf_counter_ns() - started
            self._following = [] if token is None else [token]
            is_enough = len(self.continued) == step.continued or time.perf_counter() > end
            if token is None or is_enough:
                break
            following = self._ahead.follow(batch, [token])
            if following is None:
                break
            self.continued.append(token)
            batch = following.batch
            self.exchange.counters.compute_ns += following.compute_ns
            found.append(following.logits)
            answers.append(self._answer_tensors(step.logits, following.logits))
        if not self.continued:
            return answer
        self._last_logits, self._last_batch = torch.cat(found), batch
        return [np.concatenate(tensors) for tensors in zip(*answers, strict=True)]

    def hear(self, step: m.Step, tensors: list[m.Array]) -> None:
        """Before the slots of a step are changed: see whether it was guessed."""
        if self._ahead is not None:
            self._ahead.hear(step, tensors)

    def prepare_next(self) -> None:
        """After an answer: get ready for the tokens that follow those of the last step."""
        if self._last_batch is None:
            return
        following = self.shard.prepare_next(self._last_batch)
        if self._ahead is None or following is None:
            return
        if len(self._following) == len(following.segments):
            self._ahead.guess(following, self._following)

    @property
    def is_ahead(self) -> bool:
        """Whether a step is computed that nobody has asked for yet."""
        return self._ahead is not None and self._ahead.is_done

    def go_ahead(self) -> None:
        """While nobody asks for anything: compute what most likely will be asked for."""
        if self._ahead is not None:
            num_steps = 1 + len(self.continued)
            self._ahead.compute(self.exchange.counters.compute_ns // num_steps)

    def change_slots(self, operations: Sequence[m.SlotOperation]) -> None:
        """Free slots, cut them back, and copy their beginnings, before a step computes.

        Raises:
            ProtocolError: too many at once, or what was cut away has left the ring.
            CacheFull: there is no memory for a copy.
        """
        if len(operations) > MAX_OPERATIONS:
            raise ProtocolError(
                f"a step has {len(operations):,} slot operations, at most {MAX_OPERATIONS:,} fit"
            )
        cache = self.shard.cache
        for operation in operations:
            if operation.action == "free":
                cache.free(operation.slot)
            elif operation.action == "copy":
                cache.copy(operation.source, operation.slot, operation.length)
            else:
                cache.truncate(operation.slot, operation.length)

    def full_logits(self) -> m.Array | None:
        """All logits of the last step, float32 [N, shard rows]; None where there are none."""
        return None if self._last_logits is None else self._last_logits.float().cpu().numpy()

    def _check_answer(self, num_logits: int) -> None:
        """Refuse logits that no answer could carry, before they are computed."""
        num_bytes = num_logits * (self._end_id - self._first_id) * 4
        if num_bytes > m.MAX_LOGITS_BYTES:
            raise ProtocolError(
                f"logits of {num_logits:,} positions are {num_bytes:,} bytes, at most "
                f"{m.MAX_LOGITS_BYTES:,} are computed in one step"
            )

    def _embeddings(self, tensors: list[m.Array], num_tokens: int) -> torch.Tensor | None:
        """The input of the first row, for a device that has a share of it."""
        if not self._has_first:
            return None
        if len(tensors) != 1:
            raise ProtocolError("a step for the first row needs its input embeddings")
        shape = (num_tokens, self.shard.config.width)
        m.expect_tensor(tensors[0], "float32", shape, "input embeddings")
        return to_tensor(tensors[0], self._device)

    def _enter(self, row: int, pieces: list[Piece]) -> None:
        """Where this device joins at a row, get ready for all pieces of the stream."""
        if row == 0 or self.exchange.row(row - 1).contributes:
            return
        for n, piece in enumerate(pieces):
            if count := self._num_crossing(row - 1, piece):
                self.exchange.start(row - 1, n, None, None, count)

    def _receive(self, row: int, n: int, piece: Piece, streams: list[torch.Tensor | None]) -> None:
        """Put a piece's stream at the entry of a row, unless it is there already."""
        if row == 0 or self.exchange.row(row - 1).is_local:
            return
        handed = None
        if self._num_crossing(row - 1, piece):
            handed = self.exchange.finish(row - 1, n)
        streams[n] = None if handed is None else to_tensor(handed, self._device)

    def _num_crossing(self, row: int, piece: Piece) -> int:
        """Tokens of a piece that go on after a row: past the last layer only some are wanted."""
        if row == self._head_row - 1:
            return len(piece.logit_rows)
        return piece.end_token - piece.first_token

    def _work(
        self,
        first_row: int,
        end_row: int,
        n: int,
        piece: Piece,
        x: torch.Tensor,
        batch: Batch,
        logit_rows: Sequence[int],
    ) -> torch.Tensor | None:
        """This device's share of a stage's rows, for one piece; what leaves the stage is sent.

        Args: logit_rows: of the piece, whose logits may come with its last row.
        Returns: the stream after the last row where nothing is sent there; None without tokens.
        """
        shard, exchange = self.shard, self.exchange
        last_row = self._head_row - 1
        row = first_row
        while row < end_row:
            self._between_rows(row, batch.kind)
            if row == last_row and not piece.logit_rows:
                return None  # Nobody asks for what the last MLP makes of these tokens.
            started = time.perf_counter_ns()
            if exchange.row(row).is_local:
                # Only after the last row of a stage may something be handed over.
                alone = end_row if exchange.row(end_row - 1).is_local else end_row - 1
                end = alone if piece.logit_rows else min(alone, last_row)
                x, row, self._last_logits = shard.advance(row, end, x, batch, logit_rows)
                if row > last_row and len(piece.logit_rows) < x.shape[0]:
                    x = x[list(piece.logit_rows)]
                exchange.counters.compute_ns += time.perf_counter_ns() - started
                continue
            partial = shard.part(row, x, batch)
            if row == last_row and len(piece.logit_rows) < x.shape[0]:
                rows = list(piece.logit_rows)
                x, partial = x[rows], partial[rows]
            # To the exchange's memory; on a GPU this waits until it has computed.
            x, partial = x.cpu(), partial.cpu()
            exchange.counters.compute_ns += time.perf_counter_ns() - started
            exchange.start(row, n, x.numpy(), partial.numpy(), x.shape[0])
            row += 1
        return x

    def _answer_tensors(self, wanted: m.LogitsWanted, logits_NV: torch.Tensor) -> list[m.Array]:
        started = time.perf_counter_ns()
        if wanted.form == "full":
            answer = [logits_NV.float().cpu().numpy()]
        else:
            answer = short_form(logits_NV, wanted, self._first_id)
        self.exchange.counters.compute_ns += time.perf_counter_ns() - started
        return answer


def stages(plan: Plan, device_index: int) -> list[tuple[int, int]]:
    """Runs of rows [first, end) below the head that a device works without hearing from others.

    A piece goes through a whole stage before the next one begins it: so the devices of the next
    stage have work early.
    """
    found: list[tuple[int, int]] = []
    for row in range(plan.shape.head_row):
        if device_index not in plan.group(row):
            continue
        goes_on = found and found[-1][1] == row and plan.group(row) == plan.group(row - 1)
        if goes_on and len(plan.group(row)) == 1:
            found[-1] = (found[-1][0], row + 1)
        else:
            found.append((row, row + 1))
    return found


def to_tensor(array: m.Array, device: torch.device) -> torch.Tensor:
    """A float32 tensor where the shard computes."""
    # A frame is read-only; torch wants memory of its own.
    writable = array if array.flags.writeable else np.array(array, dtype=np.float32)
    tensor = torch.as_tensor(writable)
    return tensor if device.type == "cpu" else tensor.to(device)


def _check_foreseen(step: m.Step) -> None:
    """Refuse to foresee what does not follow the last token of one conversation."""
    if not step.continued and step.draw is None:
        return
    segments = step.segments
    is_one_token = len(segments) == 1 and segments[0].token_count == 1
    if step.kind == "prompt" or step.logits.form == "full" or not is_one_token:
        raise ProtocolError("only a step of one generated token can be gone on with")
    check_draw(step)
    if step.continued > MOST_CONTINUED or not segments[0].logit_offsets:
        raise ProtocolError(
            f"a step is to be gone on with for {step.continued:,} tokens, at most {MOST_CONTINUED} "
            "that have logits fit"
        )


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
        if segment.token_count > LONGEST_STEP:
            raise ProtocolError(
                f"slot {segment.slot}: {segment.token_count:,} tokens in one step, at most "
                f"{LONGEST_STEP:,} fit"
            )
        if any(not 0 <= offset < segment.token_count for offset in segment.logit_offsets):
            raise ProtocolError(f"slot {segment.slot}: a logits offset is outside the segment")
        if any(a >= b for a, b in pairwise(segment.logit_offsets)):
            raise ProtocolError(f"slot {segment.slot}: its logits offsets do not ascend")
    num_tokens = sum(segment.token_count for segment in step.segments)
    if num_tokens > MAX_STEP_TOKENS:
        raise ProtocolError(f"a step of {num_tokens:,} tokens exceeds {MAX_STEP_TOKENS:,}")
    return num_tokens
