"""The thread that turns waiting requests into steps, and answers into tokens.

In: plans, requests, cancels, from any thread. Out: calls of a request's listeners, and a sink for
what the steps measured. It owns the coordinator. A step is either pieces of all prompts or the next
token of every running answer, with guesses where they pay, its own or a draft model's; pieces are
as long as measured speed allows in the time that others can wait (`engine.decode.pace`).
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable, Collection
from collections.abc import Sequence as Seq
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
from engine.decode.batching import (
    Work,
    choose_continued,
    choose_guesses,
    draw_of,
    find_changes,
    generated_works,
    input_rows,
    logits_wanted,
    may_continue,
    prompt_works,
    step_kind,
    take_back,
    take_continued,
)
from engine.decode.draft_model import DraftModel, DraftPlan
from engine.decode.gather import continued_ids, gather_candidates, join_full_logits
from engine.decode.listener import EmbeddingSource, Listener
from engine.decode.pace import Pace
from engine.decode.sequence import Sequence
from engine.decode.slots import Held, Slots, without_copies
from engine.decode.speculation import StepTimes
from engine.decode.verification import take_tokens
from engine.errors import CacheFull, EngineError, PlanError, WorkerLost
from engine.model.batch import StepKind
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
    draft: DraftPlan | None


@dataclass(frozen=True, slots=True)
class _Submit:
    sequence: Sequence


@dataclass(frozen=True, slots=True)
class _DropPlan:
    reason: EngineError
    done: threading.Event


@dataclass(frozen=True, slots=True)
class _Cancel:
    request_id: int


class Scheduler:
    """Runs requests on the plan in force."""

    def __init__(self, make_coordinator: Callable[[], Coordinator], listener: Listener) -> None:
        """Start the thread.

        Args:
            make_coordinator: called in the scheduler's thread, which then owns the result: once
                for the model, once for a draft model. What it raises is raised here.
        """
        self._commands: queue.SimpleQueue[_PutPlan | _Submit | _DropPlan | _Cancel | None] = (
            queue.SimpleQueue()
        )
        # Who is not to be waited for, until its `_Cancel` is taken, which comes after its `_Submit`.
        self._cancelled: set[int] = set()
        self._listener = listener
        self._should_end = False
        self._load: LoadRequest | None = None
        self._may_continue = False
        # The last one in force: what finished requests are told they were computed with.
        self._plan: Plan | None = None
        # Between the loss of a device and the plan that goes on without it.
        self._is_interrupted = False
        self._embeddings: EmbeddingSource | None = None
        self._waiting: list[Sequence] = []
        self._running: list[Sequence] = []
        # Whose step failed with others in it: each has one alone, which shows whose fault it was.
        self._apart: list[Sequence] = []
        self._operations: list[m.SlotOperation] = []
        self._step_id = 0
        self._slots = Slots(0, lambda _written, _length: False)
        self._pace = Pace()
        self._step_times = StepTimes()
        self._drafting_seconds = 0.0
        self._last_kind: StepKind = "generated"
        self._started = threading.Event()
        self._coordinator: Coordinator
        self._draft_model: DraftModel
        self._failure: Exception | None = None
        self._thread = threading.Thread(
            target=self._main, args=(make_coordinator,), name="scheduler", daemon=True
        )
        self._thread.start()
        self._started.wait()
        if self._failure is not None:
            self._thread.join()
            raise self._failure

    # ---- any thread --------------------------------------------------------------------------

    def put_plan(
        self,
        request_id: int,
        load: LoadRequest,
        runners: tuple[RunnerAddress, ...],
        embeddings: EmbeddingSource,
        draft: DraftPlan | None = None,
    ) -> None:
        """Put a plan in force; running requests pause and go on under it.

        Args:
            draft: the model that is to guess; one that does so already goes on.
        """
        self._commands.put(_PutPlan(request_id, load, runners, embeddings, draft))

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
        self._commands.put(_Cancel(request_id))

    def runner_lost(self, public_key: bytes, cause: str) -> None:
        """A worker says that the runner with a key ended. Only the host's main thread."""
        self._coordinator.report_lost(public_key, cause)
        self._draft_model.report_lost(public_key, cause)
        self._commands.put(None)

    def close(self) -> None:
        """End the thread."""
        self._should_end = True
        self._commands.put(None)
        self._thread.join(5)

    # ---- the thread --------------------------------------------------------------------------

    def _main(self, make_coordinator: Callable[[], Coordinator]) -> None:
        try:
            with contextlib.ExitStack() as opened:
                self._coordinator = make_coordinator()
                opened.callback(self._coordinator.close)
                self._draft_model = DraftModel(
                    make_coordinator(),
                    lambda: self._should_end,
                    self._listener.on_draft_lost,
                    self._listener.on_step_sent,
                )
                opened.pop_all()
        except Exception as error:  # noqa: BLE001 - raised where the scheduler is made
            self._failure = error
            return
        finally:
            self._started.set()
        try:
            while not self._should_end:
                try:
                    self._take_commands()
                    self._drop_cancelled()
                    self._work()
                except WorkerLost as error:
                    epoch = self._load.epoch if self._load is not None else 0
                    self._interrupt()
                    self._listener.on_plan_interrupted(error, epoch)
                except EngineError as error:
                    self._coordinator.abort()
                    self._plan_lost(error)
                except Exception as error:
                    logger.exception("while computing a step")
                    self._coordinator.abort()
                    self._plan_lost(EngineError(f"a step failed: {type(error).__name__}: {error}"))
        finally:
            self._coordinator.close()
            self._draft_model.close()

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
            elif isinstance(command, _Cancel):
                self._drop_cancelled()
                self._cancelled.discard(command.request_id)
            elif isinstance(command, _DropPlan):
                self._coordinator.abort()
                self._draft_model.drop()
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
        for sequence in [s for s in self._waiting if s.finish_reason is not None]:
            self._finish(sequence)  # Its last token came with the step that was lost.

    def _put_plan(self, command: _PutPlan) -> None:
        listener = self._listener
        self._interrupt()

        def on_progress(device: str, done: int, total: int) -> None:
            listener.on_load_progress(command.request_id, device, done, total)

        def should_stop() -> bool:
            if self._should_end or command.request_id in self._cancelled:
                return True
            self._drop_cancelled()
            return False

        try:
            loaded = self._coordinator.load(command.load, command.runners, on_progress, should_stop)
        except WorkerLost as error:
            listener.on_plan_interrupted(error, command.load.epoch)
            return
        except Exception as error:
            known = error if isinstance(error, EngineError) else None
            if known is None:
                logger.exception("while loading a plan")
                self._coordinator.abort()
                known = EngineError(f"loading failed: {type(error).__name__}: {error}")
            self._is_interrupted = False
            listener.on_failed(command.request_id, known)
            self._fail_all(known)
            return
        self._draft_model.put(command.draft, on_progress, should_stop)
        self._load, self._plan = command.load, command.load.plan
        self._may_continue = may_continue(command.load)
        self._is_interrupted = False
        self._embeddings = command.embeddings
        self._step_id = 0
        self._pace.forget()
        self._step_times = StepTimes()
        config, window = command.load.config, command.load.kv_window
        self._slots = Slots(
            command.load.kept_positions,
            lambda written, length: can_truncate(config, window, written, length),
        )
        listener.on_plan(command.request_id, command.load, loaded)

    def _drop_cancelled(
        self, in_step: Collection[int] = (), unsure_slots: Collection[int] = ()
    ) -> None:
        """End what was cancelled, as far as it is known yet.

        Args:
            in_step: requests that a step on its way computes; their end waits for its.
            unsure_slots: that hold what they should only if that step succeeds.
        """
        cancelled = self._cancelled.difference(in_step)
        for sequence in [*self._running, *self._waiting]:
            if sequence.request_id in cancelled:
                sequence.is_broken |= sequence.slot in unsure_slots
                sequence.cancel()
                self._finish(sequence)

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
        self._draft_model.follow({s.request_id for s in [*self._running, *self._waiting]})
        self._drafting_seconds = 0.0
        if self._load is None:
            if self._waiting and not self._is_interrupted:
                self._fail_all(PlanError("no plan is in force; open a model and apply a plan"))
            return
        self._coordinator.check()
        self._admit()
        self._apart = [s for s in self._apart if s in self._running]
        running = self._apart[:1] or self._running
        kind = step_kind(running, self._last_kind)
        if kind == "prompt":
            num_logits = self._load.config.vocab_size
            logits_limit = self._piece(kind, 1, num_logits=num_logits)
            works = prompt_works(running, self._piece(kind, 1), logits_limit)
        else:
            num_together = sum(s.next_kind == "generated" for s in running)
            limit = self._piece(kind, max(1, num_together))
            vocab_size = self._load.config.vocab_size
            works = generated_works(running, limit)
            self._drafting_seconds = self._draft_model.add_guesses(
                works,
                self._step_times,
                vocab_size,
                lambda: self._should_end or bool(self._cancelled),
            )
            choose_guesses(works, self._step_times, vocab_size)
            # Nobody else waits for the end of a longer step.
            if self._may_continue and len(self._running) == 1:
                choose_continued(works[0], self._step_times.predict(1))
        if works or self._operations:
            self._step(kind, works)
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
            in_use = [
                Held(s.slot, s.cache_ids(s.num_computed), s.num_written)
                for s in self._running
                if s.may_reuse and not s.is_broken
            ]
            self._running.append(sequence)
            seat, operations = self._slots.take(
                sequence.cache_ids(len(sequence.ids)),
                may_reuse=sequence.may_reuse,
                in_use=in_use,
            )
            sequence.take_seat(seat.slot, seat.num_reused, seat.num_written)
            self._operations += operations
            if not sequence.prefill_started:
                sequence.prefill_started = time.perf_counter()

    def _piece(self, kind: StepKind, num_together: int, num_logits: int = 0) -> int:
        is_alone = len(self._running) == 1
        return self._pace.piece(kind, num_together, is_alone=is_alone, num_logits=num_logits)

    def _step(self, kind: StepKind, works: list[Work]) -> None:
        load, embeddings = self._load, self._embeddings
        assert load is not None
        assert embeddings is not None
        started = time.perf_counter()
        self._step_id += 1
        is_full = any(work.sequence.logits_only for work in works)
        find_changes(works)
        step = m.Step(
            epoch=load.epoch,
            step_id=self._step_id,
            kind=kind,
            segments=tuple(work.segment() for work in works),
            operations=tuple(self._operations),
            logits=logits_wanted(works, "full" if is_full else "top"),
            continued=sum(work.num_continued for work in works),
            draw=draw_of(works[0]) if works else None,
        )
        self._operations = []
        rows = input_rows(works, embeddings) if works else None
        self._last_kind = kind
        everyone = {work.sequence.request_id for work in works}
        copied = {o.slot for o in step.operations if o.action == "copy"}

        def nobody_wants_it() -> bool:
            if self._cancelled:  # A piece of another's prompt may take seconds.
                self._drop_cancelled(everyone, copied)
            return self._should_end or (bool(everyone) and everyone <= self._cancelled)

        num_rows, furthest = load.plan.shape.num_rows, 0

        def tell_progress(row: int) -> None:
            nonlocal furthest
            furthest = max(furthest, row)
            for work in works if kind == "prompt" else ():
                work.sequence.tell_read(
                    work.sequence.num_computed + work.count * furthest // num_rows
                )

        try:
            answers = self._coordinator.step(
                step, rows, nobody_wants_it, self._listener.on_step_sent, tell_progress
            )
        except StepAborted:
            for work in works:
                work.sequence.is_broken = True
            # A device may have failed before it heard of this: then it did not all of them.
            self._ask_again(step.operations)
            return
        except StepFailed as failed:
            self._take_failure(step, works, failed.error)
            return
        self._apart = self._apart[1:]
        self._tell_links(load.plan, answers)
        for work in works:
            if not work.changes:
                work.sequence.advance(work.count)
        if is_full:
            self._send_logits(works[0], answers)
        else:
            self._take_tokens(works, answers)
        seconds = time.perf_counter() - started
        num_continued = sum(len(work.continued) for work in works)
        num_tokens = sum(segment.token_count for segment in step.segments) + num_continued
        num_wasted = sum(w.num_drafted + len(w.continued) - w.num_right for w in works)
        totals = [work.sequence.totals for work in works]
        whole_seconds = seconds + self._drafting_seconds
        self._pace.measure(
            kind, num_tokens, num_continued, num_wasted, whole_seconds, load.plan, answers, totals
        )
        self._draft_model.note_big_step(seconds)
        num_steps = 1 + num_continued
        # What is computed again after a fault says nothing of the next step.
        if works and kind == "generated" and all(work.count == 1 for work in works):
            self._step_times.note(num_tokens // num_steps, seconds / num_steps)
        for work in works:
            sequence = work.sequence
            if kind == "prompt":
                sequence.tell_read(sequence.num_computed)
            if sequence.finish_reason is not None:
                self._finish(sequence)

    def _take_failure(self, step: m.Step, works: list[Work], error: EngineError) -> None:
        """A step was not computed: it may have come to some devices, or to none."""
        self._operations = take_back(works) + self._operations
        self._ask_again(step.operations)
        if isinstance(error, CacheFull) and (dropped := self._slots.drop_kept()):
            self._operations += dropped  # Somebody waits, and nobody may ever ask for these again.
            return
        if any(operation.action == "copy" for operation in step.operations):
            return  # Perhaps there is no memory for a copy: what it holds is computed instead.
        if len(works) == 1:
            self._fail(works[0].sequence, error)
        else:
            self._apart = [work.sequence for work in works]

    def _ask_again(self, operations: Seq[m.SlotOperation]) -> None:
        """Let the next step begin with these; slots that were to begin with a copy begin empty."""
        self._operations = without_copies(operations) + self._operations
        emptied = {o.slot for o in operations if o.action == "copy"}
        for sequence in self._running:
            if sequence.slot in emptied:
                sequence.take_seat(sequence.slot, 0, 0)

    def _tell_links(self, plan: Plan, answers: list[DeviceAnswer]) -> None:
        """Pass on what devices measured of their links in use."""
        links = {
            (plan.devices[index], plan.devices[figures.device_index]): figures
            for index, answer, _tensors in answers
            for figures in answer.figures
            if 0 <= figures.device_index < len(plan.devices)
        }
        if links:
            self._listener.on_links(links)

    def _send_logits(self, work: Work, answers: list[DeviceAnswer]) -> None:
        sequence, count = work.sequence, work.count
        assert self._load is not None
        logits = join_full_logits(self._load.plan, answers, count)
        first = sequence.num_computed - count
        self._listener.on_logits(sequence.request_id, first, logits)
        if sequence.num_computed == sequence.num_prompt:
            sequence.first_token_at = time.perf_counter()
            sequence.finish_reason = "length"

    def _take_tokens(self, works: list[Work], answers: list[DeviceAnswer]) -> None:
        assert self._load is not None
        plan = self._load.plan
        wanted = [work for work in works if work.changes]
        if wanted and (most := wanted[0].num_continued):
            take_continued(wanted[0], continued_ids(plan, answers, most))
        asked = [changes.ids.tolist() for work in wanted for changes in work.changes]
        candidates = gather_candidates(plan, answers, asked) if wanted else []
        full: list[m.Array] = []

        def fetch_full() -> m.Array:
            if not full:
                fetched = self._coordinator.fetch_logits(self._step_id)
                full.append(join_full_logits(plan, fetched, len(asked)))
            return full[0]

        start = 0
        for work in wanted:
            end = start + len(work.changes)
            rows = slice(start, end)
            start = end
            try:
                self._operations += take_tokens(
                    work, candidates[rows], lambda rows=rows: fetch_full()[rows]
                )
            except StepFailed as failed:
                self._fail(work.sequence, failed.error)
            except WorkerLost:
                raise
            except EngineError as error:
                if not self._coordinator.has_plan:
                    raise  # Not the request's fault: a device broke the rules.
                self._fail(work.sequence, error)

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
