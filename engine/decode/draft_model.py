"""A second, smaller model that guesses the next tokens of answers.

In: the works of the next step of the big model. Out: guesses in them, as prompt lookup makes them;
they are verified elsewhere, so nothing here can change an answer. It has a coordinator and one
runner of its own, whose cache follows each conversation: tokens that it lacks are read first, a
piece at a time, and what did not come true is cut off. Belongs to the scheduler's thread, but for
`report_lost`. Once its runner is lost it guesses nothing any more.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from itertools import takewhile
from typing import NamedTuple

import numpy as np

from engine.cluster import messages as m
from engine.cluster.coordinator import Coordinator, LoadRequest, StepAborted, StepFailed
from engine.cluster.runner_links import RunnerAddress
from engine.decode.batching import MOST_DRAFTED, Work, share_tokens
from engine.decode.draft_rule import MOST_GUESSED, DraftRule
from engine.decode.drafting import MODEL_SOURCE, Draft
from engine.decode.gather import gather_candidates
from engine.decode.listener import EmbeddingSource
from engine.decode.pace import SHARED, StepCost, next_size
from engine.decode.sequence import Sequence
from engine.decode.slots import Held, Slots, common_length
from engine.decode.speculation import Acceptance, StepTimes
from engine.errors import Cancelled, EngineError
from engine.model.batch import Segment, StepKind
from engine.model.view import LONGEST_STEP, can_truncate

logger = logging.getLogger(__name__)

# Fewer tokens than these are read together with the step that guesses.
MOST_BEHIND = 8
# Neighbours and a cancel wait for a piece of a conversation to be read.
READING = SHARED._replace(first=64)


class DraftPlan(NamedTuple):
    """What a draft model needs to be put to work; the plan of `load` has one device."""

    load: LoadRequest
    runner: RunnerAddress
    embeddings: EmbeddingSource


@dataclass(slots=True)
class _Place:
    """Where a sequence is in the draft model's cache.

    Attributes:
        held: the tokens whose keys and values are in the slot, guesses included.
        num_sure: of them, how many are known to be in the sequence.
        num_written: the most tokens that the slot ever held.
        acceptance: of the sequence, for what it taught.
    """

    slot: int
    held: list[int]
    num_sure: int
    num_written: int
    may_reuse: bool
    acceptance: Acceptance


@dataclass(slots=True)
class _Wish:
    """Guesses for one work, and the tokens that have to be read before them."""

    work: Work
    length: int
    place: _Place
    missing: list[int]


class DraftModel:
    """See the module."""

    def __init__(
        self,
        coordinator: Coordinator,
        should_end: Callable[[], bool],
        on_lost: Callable[[EngineError], None],
        on_step_sent: Callable[[], None],
    ) -> None:
        """Have no model yet.

        Args:
            coordinator: for the draft model's runner alone; closed by `close`.
            should_end: asked now and then; a step is given up when it says so.
            on_lost: called once when the model in use cannot guess any more.
            on_step_sent: called while the draft model computes.
        """
        self._coordinator = coordinator
        self._should_end = should_end
        self._on_lost = on_lost
        self._on_step_sent = on_step_sent
        self._big_vocab_size = 0
        self._plan: DraftPlan | None = None
        self._epoch = 0
        self._forget()

    def report_lost(self, public_key: bytes, cause: str) -> None:
        """The runner with a key ended. Only the host's main thread."""
        self._coordinator.report_lost(public_key, cause)

    def put(
        self,
        plan: DraftPlan | None,
        on_progress: Callable[[str, int, int], None],
        should_stop: Callable[[], bool],
    ) -> None:
        """Use this model from now on, or none; one that is in use already goes on."""
        if plan is None:
            self.drop()
            return
        if self._plan is not None and self._plan.runner == plan.runner:
            return
        self._forget()
        self._epoch += 1
        load = plan.load._replace(epoch=self._epoch)
        config, window = load.config, load.kv_window
        self._slots = Slots(
            load.kept_positions,
            lambda written, length: can_truncate(config, window, written, length),
        )
        try:
            self._coordinator.load(load, [plan.runner], on_progress, should_stop)
            self._plan = plan._replace(load=load)
            self._warm_up()
        except (Cancelled, StepAborted):
            self._plan = None
        except EngineError as error:
            self._give_up(error)
        except StepFailed as failed:
            self._give_up(failed.error)

    def drop(self) -> None:
        """Use no model."""
        self._plan = None
        self._forget()
        self._coordinator.disconnect()

    def close(self) -> None:
        """Close its sockets."""
        self._coordinator.close()

    def note_big_step(self, seconds: float) -> None:
        """The big model computed a step."""
        self._rule.note_big_step(seconds)

    def follow(self, running: Collection[int]) -> None:
        """Let go of the places of sequences that are gone; while idle, see that the runner lives.

        Args:
            running: request ids of all that are not.
        """
        if self._plan is None:
            return
        try:
            self._coordinator.check()
            for request_id in self._places.keys() - running:
                place = self._places.pop(request_id)
                self._rule.note_answer(place.acceptance.probability(MODEL_SOURCE))
                if place.may_reuse:
                    self._operations += self._slots.keep(place.slot, place.held, place.num_written)
                else:
                    self._operations += self._slots.free(place.slot)
            if self._operations:
                self._step("generated", [])
        except StepAborted:
            pass  # So does everything else.
        except EngineError as error:
            self._give_up(error)
        except StepFailed as failed:
            self._give_up(failed.error)

    def add_guesses(
        self, works: Seq[Work], big: StepTimes, vocab_size: int, should_stop: Callable[[], bool]
    ) -> float:
        """Guess where prompt lookup has nothing to say, or is known to be wrong more often.

        Args:
            works: generated tokens of the next step; guesses are put into them.
            big: what steps of the big model take.
            vocab_size: of the big model; no guess has another id.
            should_stop: asked between two steps.
        Returns: the seconds that it took.
        """
        # What is computed again after a fault is not waited for.
        if self._plan is None or any(work.count > 1 for work in works):
            return 0.0
        self._big_vocab_size = vocab_size
        started = time.perf_counter()
        try:
            wishes, is_try = self._wishes(works, big)
            guesses = self._guess(wishes, should_stop)
        except StepAborted:
            return 0.0  # So does everything else.
        except EngineError as error:
            self._give_up(error)
            return time.perf_counter() - started
        except StepFailed as failed:
            self._give_up(failed.error)
            return time.perf_counter() - started
        for wish, ids in zip(wishes, guesses, strict=True):
            known = list(takewhile(lambda i: i < vocab_size, ids))
            if known:
                wish.work.passed_over = wish.work.guess
                wish.work.guess = Draft(known, MODEL_SOURCE)
        seconds = time.perf_counter() - started
        if is_try:
            self._rule.note_try(seconds, sum(map(bool, guesses)))
        return seconds

    # ---- which guesses -----------------------------------------------------------------------

    def _wishes(self, works: Seq[Work], big: StepTimes) -> tuple[list[_Wish], bool]:
        """Whom to guess for, how far, and whether that is only a try."""
        open_works = [work for work in works if self._may_guess(work)]
        room = max(1, MOST_DRAFTED // max(1, len(open_works)))
        always = [work for work in open_works if work.sequence.speculation == "on"]
        wishes = [self._wish(work, min(MOST_GUESSED, room)) for work in always]
        auto = [work for work in open_works if work.sequence.speculation == "auto"]
        if not auto:
            return wishes, False
        probabilities = [self._probability(work.sequence) for work in auto]
        choice = self._rule.choose(probabilities, len(works), big, MOST_DRAFTED)
        is_try = False
        if choice.length:
            ready = [work for work in auto if self._is_worth_it(work.sequence, choice.gain_seconds)]
            wishes += [self._wish(work, choice.length) for work in ready]
        elif self._rule.may_try and self._rule.could_pay(len(auto), len(works), big):
            is_try = True
            wishes += [self._wish(work, 1) for work in auto]
        return wishes, is_try

    def _may_guess(self, work: Work) -> bool:
        sequence = work.sequence
        # It knows no images, and has no row for ids beyond its vocabulary.
        if not sequence.most_drafted or sequence.images is not None:
            return False
        assert self._plan is not None
        vocab_size = self._plan.load.config.vocab_size
        lacks_rows = vocab_size < self._big_vocab_size
        if lacks_rows and any(i >= vocab_size for i in sequence.ids[self._num_held(sequence) :]):
            return False
        if not work.guess.ids:
            return True
        found = sequence.acceptance.probability(work.guess.source)
        return found < self._probability(sequence)

    def _probability(self, sequence: Sequence) -> float:
        """That a guess for a sequence comes true."""
        if sequence.request_id in self._places:
            return sequence.acceptance.probability(MODEL_SOURCE)
        return self._rule.probability

    def _num_held(self, sequence: Sequence) -> int:
        place = self._places.get(sequence.request_id)
        return place.num_sure if place is not None else 0

    def _is_worth_it(self, sequence: Sequence, gain_seconds: float) -> bool:
        behind = len(sequence.ids) - self._num_held(sequence)
        num_left = sequence.max_tokens - sequence.num_generated
        return (
            behind <= MOST_BEHIND
            or self._rule.is_worth_reading(behind, gain_seconds, num_left)
            # How long reading takes is not known before something was read.
            or (self._rule.read_seconds(1) is None and self._rule.may_try)
        )

    def _wish(self, work: Work, length: int) -> _Wish:
        """Bring the slot of a sequence in line with it."""
        sequence = work.sequence
        place = self._places.get(sequence.request_id)
        if place is None:
            place = self._new_place(sequence)
        length_held = place.num_sure + common_length(
            place.held[place.num_sure :], sequence.ids[place.num_sure :]
        )
        # The last token is computed again where a guess of it was: its logits are what is wanted.
        place.num_sure = min(length_held, len(sequence.ids) - 1)
        if place.num_sure < len(place.held):
            del place.held[place.num_sure :]
            self._operations.append(
                m.SlotOperation(action="truncate", slot=place.slot, length=place.num_sure)
            )
        missing = sequence.ids[place.num_sure :]
        return _Wish(work, min(length, sequence.most_drafted), place, missing)

    def _new_place(self, sequence: Sequence) -> _Place:
        in_use = [Held(p.slot, p.held, p.num_written) for p in self._places.values() if p.may_reuse]
        seat, operations = self._slots.take(
            sequence.ids, may_reuse=sequence.may_reuse, in_use=in_use
        )
        self._operations += operations
        sequence.acceptance.expect(MODEL_SOURCE, self._rule.probability)
        place = self._places[sequence.request_id] = _Place(
            seat.slot,
            sequence.ids[: seat.num_reused],
            seat.num_reused,
            seat.num_written,
            sequence.may_reuse,
            sequence.acceptance,
        )
        return place

    # ---- steps -------------------------------------------------------------------------------

    def _guess(self, wishes: Seq[_Wish], should_stop: Callable[[], bool]) -> list[list[int]]:
        """Guesses for each wish; none where more than a piece has to be read first."""
        guesses: list[list[int]] = [[] for _ in wishes]
        feed = {n: w.missing for n, w in enumerate(wishes) if len(w.missing) <= MOST_BEHIND}
        behind = [n for n in range(len(wishes)) if n not in feed]
        if behind:
            wanted = [len(wishes[n].missing) for n in behind]
            counts = share_tokens(wanted, self._piece())
            pieces = {
                n: wishes[n].missing[:count]
                for n, count in zip(behind, counts, strict=True)
                if count
            }
            for n, token in self._feed("prompt", wishes, pieces).items():
                if len(pieces[n]) == len(wishes[n].missing):
                    guesses[n].append(token)
        feed |= _next_feed(wishes, guesses)
        while feed and not should_stop():
            for n, token in self._feed("generated", wishes, feed).items():
                guesses[n].append(token)
            feed = _next_feed(wishes, guesses)
        return guesses

    def _piece(self) -> int:
        """Tokens of conversations to read in one step."""
        return min(max(int(next_size(self._read_cost, READING)), MOST_BEHIND), LONGEST_STEP)

    def _feed(
        self,
        kind: StepKind,
        wishes: Seq[_Wish],
        feed: Mapping[int, list[int]],
    ) -> dict[int, int]:
        """Compute tokens of some wishes. Returns: for each the likeliest token after them."""
        places = [(wishes[n].place, ids) for n, ids in feed.items()]
        started = time.perf_counter()
        tokens = self._step(kind, places)
        seconds = time.perf_counter() - started
        num_tokens = sum(len(ids) for ids in feed.values())
        if kind == "prompt":
            self._rule.note_read(num_tokens, seconds)
            self._read_cost.note(num_tokens, seconds)
        else:
            self._rule.times.note(num_tokens, seconds)
        for n, ids in feed.items():
            place = wishes[n].place
            place.held += ids
            place.num_written = max(place.num_written, len(place.held))
            # What comes after the known ids is guessed.
            place.num_sure = min(len(place.held), len(wishes[n].work.sequence.ids))
        return dict(zip(feed, tokens, strict=True))

    def _step(self, kind: StepKind, places: Seq[tuple[_Place, list[int]]]) -> list[int]:
        """One step of the runner, with whatever is to be done to the slots before."""
        assert self._plan is not None
        load = self._plan.load
        self._step_id += 1
        count = len(places)
        step = m.Step(
            epoch=load.epoch,
            step_id=self._step_id,
            kind=kind,
            segments=tuple(
                Segment(
                    slot=place.slot,
                    first_position=len(place.held),
                    token_count=len(ids),
                    logit_offsets=(len(ids) - 1,),
                )
                for place, ids in places
            ),
            operations=tuple(self._operations),
            logits=m.LogitsWanted(
                form="top",
                ids=((),) * count,
                temperatures=(0.0,) * count,
                raw_sums=(False,) * count,
            ),
        )
        self._operations = []
        all_ids = [i for _, ids in places for i in ids]
        rows = self._plan.embeddings.embed(all_ids) if all_ids else None
        answers = self._coordinator.step(step, rows, self._should_end, self._on_step_sent)
        if not places:
            return []
        candidates = gather_candidates(load.plan, answers, [[] for _ in places])
        return [int(found.ids[np.argmax(found.logits)]) for found in candidates]

    def _warm_up(self) -> None:
        """The first steps touch new memory; what they take says nothing of later ones."""
        place = _Place(0, [], 0, 0, False, Acceptance())
        kinds: tuple[StepKind, ...] = ("prompt", "generated")
        for kind in kinds:
            ids = [0] * (READING.first // 2 if kind == "prompt" else 1)
            self._step(kind, [(place, ids)])
            place.held += ids
        self._operations.append(m.SlotOperation(action="free", slot=place.slot))

    # ---- the end -----------------------------------------------------------------------------

    def _give_up(self, error: EngineError) -> None:
        logger.warning("the draft model is given up: %s", error)
        self.drop()
        self._on_lost(error)

    def _forget(self) -> None:
        self._places: dict[int, _Place] = {}
        self._operations: list[m.SlotOperation] = []
        self._slots = Slots(0, lambda _written, _length: False)
        self._rule = DraftRule()
        self._read_cost = StepCost()
        self._step_id = 0


def _next_feed(wishes: Seq[_Wish], guesses: Seq[list[int]]) -> dict[int, list[int]]:
    """The last guess of each wish that is to have more of them."""
    return {
        n: ids[-1:]
        for n, (wish, ids) in enumerate(zip(wishes, guesses, strict=True))
        if ids and len(ids) < wish.length
    }
