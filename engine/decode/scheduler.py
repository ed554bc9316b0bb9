"""The thread that turns waiting requests into steps, and answers into tokens.

In: plans, requests, cancels, from any thread. Out: calls of a request's listeners, and a sink for
what the steps measured. It owns the coordinator. A step is either one piece of one prompt or one
token of every running answer; pieces are as long as 150 ms of measured speed allow, so a cancel is
heard in time.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from engine.cluster import messages as m
from engine.cluster.coordinator import (
    Coordinator,
    DeviceAnswer,
    LoadRequest,
    StepAborted,
    StepFailed,
)
from engine.cluster.runner_links import RunnerAddress
from engine.decode.gather import gather_candidates, join_full_logits
from engine.decode.listener import EmbeddingSource, Listener
from engine.decode.logit_changes import LogitChanges
from engine.decode.pace import Pace
from engine.decode.sampling import all_candidates
from engine.decode.sequence import Sequence
from engine.decode.slots import Slots
from engine.errors import EngineError, PlanError, WorkerLost
from engine.model.batch import Segment, StepKind
from engine.model.view import can_truncate
from engine.plan.plan import Plan

logger = logging.getLogger(__name__)


# Conversations computed at once; each has keys and values of its own. Others wait.
MAX_RUNNING = 64


@dataclass(frozen=True, slots=True)
class _PutPlan:
    request_id: int
    load: LoadRequest
    runners: tuple[RunnerAddress, ...]
    embeddings: EmbeddingSource


@dataclass(frozen=True, slots=True)
class _Submit:
    sequence: Sequence


@dataclass(frozen=True, slots=True)
class _DropPlan:
    reason: EngineError
    done: threading.Event


class Scheduler:
    """Runs requests on the plan in force."""

    def __init__(self, make_coordinator: Callable[[], Coordinator], listener: Listener) -> None:
        """Start the thread.

        Args:
            make_coordinator: called in the scheduler's thread, which then owns the result.
        """
        self._commands: queue.SimpleQueue[_PutPlan | _Submit | _DropPlan | None] = (
            queue.SimpleQueue()
        )
        self._cancelled: set[int] = set()
        self._listener = listener
        self._should_end = False
        self._load: LoadRequest | None = None
        # The last one in force: what finished requests are told they were computed with.
        self._plan: Plan | None = None
        # Between the loss of a device and the plan that goes on without it.
        self._is_interrupted = False
        self._embeddings: EmbeddingSource | None = None
        self._waiting: list[Sequence] = []
        self._running: list[Sequence] = []
        self._operations: list[m.SlotOperation] = []
        self._step_id = 0
        self._slots = Slots(0, lambda _written, _length: False)
        self._pace = Pace()
        self._last_kind: StepKind = "generated"
        self._started = threading.Event()
        self._coordinator: Coordinator
        self._thread = threading.Thread(
            target=self._main, args=(make_coordinator,), name="scheduler", daemon=True
        )
        self._thread.start()
        self._started.wait()

    # ---- any thread --------------------------------------------------------------------------

    def put_plan(
        self,
        request_id: int,
        load: LoadRequest,
        runners: tuple[RunnerAddress, ...],
        embeddings: EmbeddingSource,
    ) -> None:
        """Put a plan in force; running requests pause and go on under it."""
        self._commands.put(_PutPlan(request_id, load, runners, embeddings))

    def drop_plan(self, reason: EngineError) -> threading.Event:
        """Forget the plan; running requests end with `reason`. The event says when it is done."""
        done = threading.Event()
        self._commands.put(_DropPlan(reason, done))
        return done

    def submit(self, sequence: Sequence) -> None:
        """Queue a request."""
        self._commands.put(_Submit(sequence))

    def cancel(self, request_id: int) -> None:
        """End a request, in the middle of a step if nobody else is in it; unknown ids are ignored.

        Only the host's main thread.
        """
        self._cancelled.add(request_id)
        self._coordinator.wake()
        self._commands.put(None)

    def runner_lost(self, public_key: bytes, cause: str) -> None:
        """A worker says that the runner with a key ended. Only the host's main thread."""
        self._coordinator.report_lost(public_key, cause)
        self._commands.put(None)

    def close(self) -> None:
        """End the thread."""
        self._should_end = True
        self._commands.put(None)
        self._thread.join(5)

    # ---- the thread --------------------------------------------------------------------------

    def _main(self, make_coordinator: Callable[[], Coordinator]) -> None:
        self._coordinator = make_coordinator()
        self._started.set()
        try:
            while not self._should_end:
                self._take_commands()
                self._drop_cancelled()
                try:
                    self._work()
                except WorkerLost as error:
                    self._interrupt()
                    self._listener.on_plan_interrupted(error)
                except EngineError as error:
                    self._coordinator.abort()
                    self._plan_lost(error)
                except Exception as error:
                    logger.exception("while computing a step")
                    self._coordinator.abort()
                    self._plan_lost(EngineError(f"a step failed: {type(error).__name__}: {error}"))
        finally:
            self._coordinator.close()

    def _take_commands(self) -> None:
        is_idle = not (self._waiting or self._running or self._operations)
        timeout = 0.25 if is_idle or self._load is None else None
        while True:
            try:
                if timeout is not None:
                    command = self._commands.get(timeout=timeout)
                    timeout = None
                else:
                    command = self._commands.get_nowait()
            except queue.Empty:
                return
            if isinstance(command, _PutPlan):
                self._put_plan(command)
            elif isinstance(command, _Submit):
                self._waiting.append(command.sequence)
            elif isinstance(command, _DropPlan):
                self._coordinator.abort()
                self._load = None
                self._is_interrupted = False
                self._fail_all(command.reason)
                command.done.set()

    def _interrupt(self) -> None:
        """No plan is in force for now. Tokens stay; their KV will be computed anew."""
        self._load = None
        self._is_interrupted = True
        self._waiting = self._running + self._waiting
        self._running = []
        self._operations = []
        for sequence in self._waiting:
            sequence.leave_seat()

    def _put_plan(self, command: _PutPlan) -> None:
        listener = self._listener
        self._interrupt()

        def on_progress(device: str, done: int, total: int) -> None:
            listener.on_load_progress(command.request_id, device, done, total)

        def should_stop() -> bool:
            return self._should_end or command.request_id in self._cancelled

        try:
            loaded = self._coordinator.load(command.load, command.runners, on_progress, should_stop)
        except WorkerLost as error:
            listener.on_plan_interrupted(error)
            return
        except EngineError as error:
            self._is_interrupted = False
            listener.on_failed(command.request_id, error)
            self._fail_all(error)
            return
        self._load, self._plan = command.load, command.load.plan
        self._is_interrupted = False
        self._embeddings = command.embeddings
        self._step_id = 0
        self._pace.forget()
        config, window = command.load.config, command.load.kv_window
        self._slots = Slots(
            command.load.kept_positions,
            lambda written, length: can_truncate(config, window, written, length),
        )
        listener.on_plan(command.request_id, command.load, loaded)

    def _drop_cancelled(self) -> None:
        if not self._cancelled:
            return
        cancelled = set(self._cancelled)
        for sequence in [*self._running, *self._waiting]:
            if sequence.request_id in cancelled:
                sequence.cancel()
                self._finish(sequence)
        self._cancelled -= cancelled  # Not clear(): another thread may have added one meanwhile.

    def _plan_lost(self, error: EngineError) -> None:
        self._load = None
        self._operations = []
        self._listener.on_plan_lost(error)
        self._fail_all(error)

    def _fail_all(self, error: EngineError) -> None:
        for sequence in [*self._running, *self._waiting]:
            self._listener.on_failed(sequence.request_id, error)
        self._running, self._waiting = [], []

    def _work(self) -> None:
        """One step, if there is anything to do."""
        if self._load is None:
            if self._waiting and not self._is_interrupted:
                self._fail_all(PlanError("no plan is in force; open a model and apply a plan"))
            return
        self._coordinator.check()
        self._admit()
        kind = self._choose_kind()
        if kind == "prompt":
            prompt = next(s for s in self._running if s.next_kind == "prompt")
            limit = self._piece(kind, 1, has_logits=prompt.logits_only)
            batch = [(prompt, prompt.next_count(limit))]
        else:
            running = [s for s in self._running if s.next_kind == "generated"]
            limit = self._piece(kind, max(1, len(running)), has_logits=False)
            batch = [(s, s.next_count(limit)) for s in running]
        if batch or self._operations:
            self._step(kind, batch)
        self._pace.report(self._listener)

    def _admit(self) -> None:
        """Begin with waiting requests, in their order, as long as there is room."""
        room = max(0, MAX_RUNNING - len(self._running))
        begun, self._waiting = self._waiting[:room], self._waiting[room:]
        assert self._load is not None
        for sequence in begun:
            if sequence.checkpoint_id != self._load.checkpoint_id:
                # It was prepared while another model took this one's place.
                error = PlanError("another model was opened; ask again")
                self._listener.on_failed(sequence.request_id, error)
                continue
            self._running.append(sequence)
            seat, operations = self._slots.take(
                sequence.cache_ids(len(sequence.ids)), may_reuse=sequence.may_reuse
            )
            sequence.take_seat(seat.slot, seat.num_reused, seat.num_written)
            self._operations += operations
            if not sequence.prefill_started:
                sequence.prefill_started = time.perf_counter()

    def _choose_kind(self) -> StepKind:
        """Prompts and answers take turns, so that neither waits for the other to end."""
        kinds = {s.next_kind for s in self._running}
        if "prompt" not in kinds:
            return "generated"
        if "generated" not in kinds:
            return "prompt"
        return "prompt" if self._last_kind == "generated" else "generated"

    def _piece(self, kind: StepKind, num_together: int, *, has_logits: bool) -> int:
        is_alone = len(self._running) == 1
        return self._pace.piece(kind, num_together, is_alone=is_alone, has_logits=has_logits)

    def _step(self, kind: StepKind, batch: list[tuple[Sequence, int]]) -> None:
        load, embeddings = self._load, self._embeddings
        assert load is not None
        assert embeddings is not None
        started = time.perf_counter()
        self._step_id += 1
        segments = tuple(_segment(sequence, count) for sequence, count in batch)
        wanted = [
            sequence
            for (sequence, _), segment in zip(batch, segments, strict=True)
            if segment.logit_offsets and not sequence.logits_only
        ]
        changes = [sequence.changes() for sequence in wanted]
        is_full = any(sequence.logits_only for sequence, _ in batch)
        step = m.Step(
            epoch=load.epoch,
            step_id=self._step_id,
            kind=kind,
            segments=segments,
            operations=tuple(self._operations),
            logits=m.LogitsWanted(
                form="full" if is_full else "top",
                ids=tuple(tuple(c.ids.tolist()) for c in changes),
                temperatures=tuple(s.settings.temperature for s in wanted),
                raw_sums=tuple(s.num_logprobs is not None for s in wanted),
            ),
        )
        self._operations = []
        ids = [i for s, n in batch for i in s.ids[s.num_computed : s.num_computed + n]]
        rows = embeddings.embed(ids) if ids else None
        if rows is not None and any(sequence.images for sequence, _ in batch):
            rows = _with_images(rows, batch)
        self._last_kind = kind
        everyone = {sequence.request_id for sequence, _ in batch}

        def nobody_wants_it() -> bool:
            return self._should_end or (bool(everyone) and everyone <= self._cancelled)

        try:
            answers = self._coordinator.step(step, rows, nobody_wants_it)
        except StepAborted:
            for sequence, _ in batch:
                sequence.is_broken = True
            return
        except StepFailed as failed:
            # It may not have been sent. To free or cut a slot twice does no harm.
            self._operations = list(step.operations)
            for sequence, _ in batch:
                self._fail(sequence, failed.error)
            return
        for sequence, count in batch:
            sequence.advance(count)
        if is_full:
            self._send_logits(batch[0], answers)
        else:
            self._take_tokens(wanted, changes, answers)
        seconds = time.perf_counter() - started
        totals = [sequence.totals for sequence, _ in batch]
        self._pace.measure(kind, len(ids), seconds, load.plan, answers, totals)
        for sequence, _ in batch:
            if kind == "prompt":
                sequence.on_prefill(
                    min(sequence.num_computed, sequence.num_prompt), sequence.num_prompt
                )
            if sequence.finish_reason is not None:
                self._finish(sequence)

    def _send_logits(self, piece: tuple[Sequence, int], answers: list[DeviceAnswer]) -> None:
        sequence, count = piece
        assert self._load is not None
        logits = join_full_logits(self._load.plan, answers, count)
        first = sequence.num_computed - count
        self._listener.on_logits(sequence.request_id, first, logits)
        if sequence.num_computed == sequence.num_prompt:
            sequence.first_token_at = time.perf_counter()
            sequence.finish_reason = "length"

    def _take_tokens(
        self, wanted: list[Sequence], changes: list[LogitChanges], answers: list[DeviceAnswer]
    ) -> None:
        if not wanted:
            return
        assert self._load is not None
        plan = self._load.plan
        full: m.Array | None = None
        candidates = gather_candidates(plan, answers, [c.ids.tolist() for c in changes])
        for n, sequence in enumerate(wanted):
            token = sequence.choose(candidates[n], changes[n])
            if token is None:
                if full is None:
                    fetched = self._coordinator.fetch_logits(self._step_id)
                    full = join_full_logits(plan, fetched, len(wanted))
                token = sequence.choose(all_candidates(full[n]), changes[n])
            if token is None:
                error = EngineError(
                    "the logits are not numbers: the weights are damaged, or the numbers too large "
                    "for this dtype. Try --dtype float32, or another file"
                )
                self._fail(sequence, error)
            else:
                sequence.accept(token)

    def _fail(self, sequence: Sequence, error: EngineError) -> None:
        """End one request with an error; what it left in its slot is not to be used."""
        sequence.is_broken = True
        self._drop(sequence)
        self._listener.on_failed(sequence.request_id, error)

    def _finish(self, sequence: Sequence) -> None:
        assert sequence.finish_reason is not None
        self._drop(sequence)
        if self._plan is not None:
            self._listener.on_finished(sequence, self._plan)
        else:
            self._listener.on_failed(sequence.request_id, PlanError("no plan is in force"))

    def _drop(self, sequence: Sequence) -> None:
        if sequence in self._running:
            self._running.remove(sequence)
            # What an aborted step left in a slot is not known.
            if sequence.is_broken or not sequence.may_reuse:
                self._operations += self._slots.free(sequence.slot)
            else:
                held = sequence.cache_ids(sequence.num_computed)
                self._operations += self._slots.keep(sequence.slot, held, sequence.num_written)
        else:
            self._waiting.remove(sequence)


def _with_images(rows: m.Array, batch: list[tuple[Sequence, int]]) -> m.Array:
    """Input embeddings with image features in their places."""
    rows = rows.copy()
    start = 0
    for sequence, count in batch:
        if sequence.images is not None:
            sequence.images.put(rows[start : start + count], sequence.num_computed)
        start += count
    return rows


def _segment(sequence: Sequence, count: int) -> Segment:
    """The next `count` tokens of a sequence."""
    if sequence.logits_only:
        offsets = tuple(range(count))
    elif sequence.num_computed + count == len(sequence.ids):
        offsets = (count - 1,)
    else:
        offsets = ()
    return Segment(
        slot=sequence.slot,
        first_position=sequence.num_computed,
        token_count=count,
        logit_offsets=offsets,
    )
