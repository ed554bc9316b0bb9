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
    RunnerAddress,
    StepAborted,
)
from engine.decode.gather import gather_candidates, join_full_logits
from engine.decode.listener import EmbeddingSource, Listener, Measured
from engine.decode.sampling import all_candidates, choose, uniform
from engine.decode.sequence import DeviceTotals, Sequence
from engine.errors import EngineError, PlanError
from engine.model.batch import Segment, StepKind

logger = logging.getLogger(__name__)

# How long a step may take by measured speed: neighbours wait that long for their next token. A
# prompt alone is read in larger pieces, which cost less each; a cancel is heard between two rows.
SHARED_PIECE_SECONDS = 0.15
LONE_PIECE_SECONDS = 0.5
FIRST_PIECE = 32
MIN_PIECE = 8
MAX_PIECE = 1024
# Full logits travel in one message: 16 rows of a vocabulary of 128 k are 8 MB.
MAX_LOGITS_PIECE = 16
REPORT_SECONDS = 0.125


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
        self._embeddings: EmbeddingSource | None = None
        self._waiting: list[Sequence] = []
        self._running: list[Sequence] = []
        self._operations: list[m.SlotOperation] = []
        self._step_id = 0
        self._tokens_per_second: dict[StepKind, float] = {}
        self._last_kind: StepKind = "generated"
        self._measured = Measured()
        self._reported_at = 0.0
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
                except EngineError as error:
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
                self._fail_all(command.reason)
                command.done.set()

    def _put_plan(self, command: _PutPlan) -> None:
        listener = self._listener
        # Tokens stay; their KV is computed anew under the new plan.
        self._waiting = self._running + self._waiting
        self._running = []
        self._operations = []
        for sequence in self._waiting:
            sequence.slot, sequence.num_computed = -1, 0

        def on_progress(device: str, done: int, total: int) -> None:
            listener.on_load_progress(command.request_id, device, done, total)

        def should_stop() -> bool:
            return self._should_end or command.request_id in self._cancelled

        try:
            self._coordinator.load(command.load, command.runners, on_progress, should_stop)
        except EngineError as error:
            self._load = None
            listener.on_failed(command.request_id, error)
            self._fail_all(error)
            return
        self._load = command.load
        self._embeddings = command.embeddings
        self._step_id = 0
        self._tokens_per_second = {}
        listener.on_plan(command.request_id, command.load.epoch, command.load.plan)

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
            if self._waiting:
                self._fail_all(PlanError("no plan is in force; open a model and apply a plan"))
            return
        self._coordinator.check()
        self._admit()
        kind = self._choose_kind()
        if kind == "prompt":
            prompt = next(s for s in self._running if s.next_kind == "prompt")
            batch = [(prompt, prompt.next_count(self._piece(prompt)))]
        else:
            limit = self._piece(None)
            running = [s for s in self._running if s.next_kind == "generated"]
            batch = [(s, s.next_count(limit)) for s in running]
        if batch or self._operations:
            self._step(kind, batch)
        self._report()

    def _admit(self) -> None:
        used = {s.slot for s in self._running}
        for sequence in self._waiting:
            sequence.slot = next(n for n in range(len(used) + 1) if n not in used)
            used.add(sequence.slot)
            if not sequence.prefill_started:
                sequence.prefill_started = time.perf_counter()
        self._running += self._waiting
        self._waiting = []

    def _choose_kind(self) -> StepKind:
        """Prompts and answers take turns, so that neither waits for the other to end."""
        kinds = {s.next_kind for s in self._running}
        if "prompt" not in kinds:
            return "generated"
        if "generated" not in kinds:
            return "prompt"
        return "prompt" if self._last_kind == "generated" else "generated"

    def _piece(self, prompt: Sequence | None) -> int:
        kind: StepKind = "prompt" if prompt is not None else "generated"
        rate = self._tokens_per_second.get(kind)
        seconds = LONE_PIECE_SECONDS if len(self._running) == 1 else SHARED_PIECE_SECONDS
        size = FIRST_PIECE if rate is None else int(rate * seconds)
        limit = MAX_LOGITS_PIECE if prompt is not None and prompt.logits_only else MAX_PIECE
        return min(max(size, MIN_PIECE), limit)

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
        is_full = any(sequence.logits_only for sequence, _ in batch)
        step = m.Step(
            epoch=load.epoch,
            step_id=self._step_id,
            kind=kind,
            segments=segments,
            operations=tuple(self._operations),
            logits=m.LogitsWanted(
                form="full" if is_full else "top",
                ids=tuple(tuple(sorted(s.repeated_ids())) for s in wanted),
                temperatures=tuple(s.settings.temperature for s in wanted),
            ),
        )
        self._operations = []
        ids = [i for s, n in batch for i in s.ids[s.num_computed : s.num_computed + n]]
        rows = embeddings.read_rows("embedding", ids) if ids else None
        self._last_kind = kind
        everyone = {sequence.request_id for sequence, _ in batch}

        def nobody_wants_it() -> bool:
            return self._should_end or (bool(everyone) and everyone <= self._cancelled)

        try:
            answers = self._coordinator.step(step, rows, nobody_wants_it)
        except StepAborted:
            return  # Their slots are freed with the next step.
        for sequence, count in batch:
            sequence.num_computed += count
        if is_full:
            self._send_logits(batch[0], answers)
        else:
            self._take_tokens(wanted, answers)
        seconds = time.perf_counter() - started
        self._measure(kind, [s for s, _ in batch], len(ids), seconds, answers)
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

    def _take_tokens(self, wanted: list[Sequence], answers: list[DeviceAnswer]) -> None:
        if not wanted:
            return
        assert self._load is not None
        plan = self._load.plan
        full: m.Array | None = None
        candidates = gather_candidates(plan, answers, [s.repeated_ids() for s in wanted])
        for n, sequence in enumerate(wanted):
            noise = uniform(sequence.seed, 0, len(sequence.ids))
            repeated = sequence.repeated_ids()
            token_id = choose(candidates[n], sequence.settings, repeated, noise)
            if token_id is None:
                if full is None:
                    fetched = self._coordinator.fetch_logits(self._step_id)
                    full = join_full_logits(plan, fetched, len(wanted))
                token_id = choose(all_candidates(full[n]), sequence.settings, repeated, noise)
            if token_id is None:
                error = EngineError(
                    "the logits are not numbers: the weights are damaged, or the numbers too large "
                    "for this dtype. Try --dtype float32, or another file"
                )
                self._listener.on_failed(sequence.request_id, error)
                self._drop(sequence)
            else:
                sequence.accept(token_id)

    def _finish(self, sequence: Sequence) -> None:
        assert sequence.finish_reason is not None
        self._drop(sequence)
        if self._load is not None:
            self._listener.on_finished(sequence, self._load.plan)
        else:
            self._listener.on_failed(sequence.request_id, PlanError("no plan is in force"))

    def _drop(self, sequence: Sequence) -> None:
        if sequence in self._running:
            self._running.remove(sequence)
            self._operations.append(m.SlotOperation(action="free", slot=sequence.slot))
        else:
            self._waiting.remove(sequence)

    # ---- measuring ---------------------------------------------------------------------------

    def _measure(
        self,
        kind: StepKind,
        sequences: list[Sequence],
        num_tokens: int,
        seconds: float,
        answers: list[DeviceAnswer],
    ) -> None:
        assert self._load is not None
        if num_tokens:
            rate = num_tokens / max(seconds, 1e-6)
            known = self._tokens_per_second.get(kind, rate)
            self._tokens_per_second[kind] = 0.5 * known + 0.5 * rate
        measured = self._measured
        measured.seconds += seconds
        if kind == "prompt":
            measured.prompt_tokens += num_tokens
        else:
            measured.generated_tokens += num_tokens
        for _index, answer, _tensors in answers:
            device = self._load.plan.devices[_index]
            for totals in (measured.devices, *(s.totals for s in sequences)):
                entry = totals.setdefault(device, DeviceTotals())
                entry.compute_ns += answer.compute_ns
                entry.wait_ns += answer.wait_ns
                entry.serialise_ns += answer.serialise_ns
                entry.sent_bytes += answer.sent_bytes
                entry.received_bytes += answer.received_bytes

    def _report(self) -> None:
        now = time.monotonic()
        if self._measured.seconds and now - self._reported_at >= REPORT_SECONDS:
            self._reported_at = now
            self._listener.on_measured(self._measured)
            self._measured = Measured()


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
