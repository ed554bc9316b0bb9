"""Who is in the next step, and with how many tokens.

In: the running sequences, and how many tokens a step may have. Out: works, one for each sequence in
the step, and what the step's message says of them. A step reads pieces of prompts, or computes the next
token of every answer, with guesses at those after it, or a few of a single one. It sends nothing.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import Literal

from engine.cluster.coordinator import LoadRequest
from engine.cluster.messages import MAX_LOGITS_BYTES, Array, Draw, LogitsWanted, SlotOperation
from engine.decode.drafting import Draft
from engine.decode.listener import EmbeddingSource
from engine.decode.pace import MIN_PIECE
from engine.decode.sequence import Sequence
from engine.decode.speculation import Offer, StepTimes, choose_lengths
from engine.model.batch import Segment, StepKind
from engine.model.weight_formats import is_head_exact
from engine.sampling.logit_changes import LogitChanges

# Guessed tokens in one step, of all sequences together: with more, arithmetic is the limit anywhere.
MOST_DRAFTED = 64
# Ids whose logits are asked for besides, of all guessed positions together: they share a header.
MOST_ASKED_IDS = 100_000
# Tokens that are computed and shown together, and for how long at most: words then still flow. A step
# costs the computer about a millisecond besides, whatever it computes.
MOST_TOGETHER = 8
TOGETHER_SECONDS = 0.04


@dataclass(slots=True)
class Work:
    """What a step computes of one sequence.

    Attributes:
        count: of its known tokens.
        guess: what may follow them, to be compared with what does.
        passed_over: another guess, which is compared but not verified.
        num_drafted: of the guess, how many tokens the step verifies.
        num_continued: tokens that the device may go on with by itself.
        continued: those with which it did.
        num_right: of drafted or continued tokens, those that were chosen.
        changes: of the logits, for each position that a token is chosen from.
    """

    sequence: Sequence
    count: int
    guess: Draft = field(default_factory=lambda: Draft([], 0))
    passed_over: Draft = field(default_factory=lambda: Draft([], 0))
    num_drafted: int = 0
    num_continued: int = 0
    continued: list[int] = field(default_factory=list[int])
    num_right: int = 0
    changes: list[LogitChanges] = field(default_factory=list[LogitChanges])

    @property
    def drafted(self) -> list[int]:
        """Guessed tokens that the step computes after the known ones."""
        return self.guess.ids[: self.num_drafted]

    @property
    def ids(self) -> list[int]:
        """All tokens that the step computes of this sequence."""
        first = self.sequence.num_computed
        return [*self.sequence.ids[first : first + self.count], *self.drafted]

    def segment(self) -> Segment:
        """The same for a step, with the positions that tokens are chosen from."""
        sequence = self.sequence
        num_tokens = self.count + self.num_drafted
        if sequence.logits_only:
            offsets = range(num_tokens)
        elif sequence.num_computed + self.count == len(sequence.ids):
            offsets = range(self.count - 1, num_tokens)
        else:
            offsets = range(0)
        return Segment(
            slot=sequence.slot,
            first_position=sequence.num_computed,
            token_count=num_tokens,
            logit_offsets=tuple(offsets),
        )


def prompt_works(running: Seq[Sequence], limit: int, logits_limit: int) -> list[Work]:
    """Pieces of all prompts that are being read, in one step.

    Full logits have an answer of their own form, so a sequence that wants them is alone.

    Args:
        limit: tokens in all, at least one.
        logits_limit: tokens of a sequence whose every logit is wanted.
    """
    prompts = [s for s in running if s.next_kind == "prompt"]
    if prompts[0].logits_only:
        return [Work(prompts[0], prompts[0].next_count(logits_limit))]
    prompts = [s for s in prompts if not s.logits_only]
    counts = share_tokens([s.next_count(limit) for s in prompts], limit)
    return [Work(s, count) for s, count in zip(prompts, counts, strict=True) if count]


def share_tokens(wanted: Seq[int], limit: int) -> list[int]:
    """Share a step out: a short prompt does not wait for a long one to end, nor that one for it.

    Args:
        wanted: tokens that each prompt still has, at least 1, in the order of their arrival.
        limit: tokens in all, at least 1.
    Returns: tokens of each; what short ones leave goes to the others. 0 for the last ones where
        the shares would be too small to be worth reading the weights for.
    """
    num_served = max(1, min(len(wanted), limit // MIN_PIECE))
    shares = [0] * len(wanted)
    left = limit
    # The shortest first: what they leave is known when the longer ones get theirs.
    for served, n in enumerate(sorted(range(num_served), key=lambda n: wanted[n])):
        shares[n] = min(wanted[n], left // (num_served - served))
        left -= shares[n]
    return shares


def generated_works(running: Seq[Sequence], limit: int) -> list[Work]:
    """The next token of every answer, or a piece of one that is computed again.

    Args:
        limit: tokens of each that are computed again.
    Returns: works with what prompt lookup guesses; none of it is verified yet.
    """
    works = [Work(s, s.next_count(limit)) for s in running if s.next_kind == "generated"]
    for work in works:
        work.guess = work.sequence.draft()
    return works


def choose_guesses(works: Seq[Work], times: StepTimes, vocab_size: int) -> None:
    """Decide how many guessed tokens of each work the step verifies.

    Args:
        works: of generated tokens.
        times: of earlier steps.
    """
    drafting = [work for work in works if work.guess.ids]
    if not drafting:
        return
    most = min(MOST_DRAFTED, MAX_LOGITS_BYTES // (4 * vocab_size) - len(works))
    for work in drafting:
        if work.sequence.speculation == "on":
            work.num_drafted = max(0, min(_allowed(work, len(drafting)), most))
            most -= work.num_drafted
    # While answers are computed again, steps say nothing of what a plain one takes.
    if any(work.count > 1 for work in works):
        return
    free = [work for work in drafting if work.sequence.speculation == "auto"]
    offers = [
        Offer(
            _allowed(work, len(drafting)), work.sequence.acceptance.probability(work.guess.source)
        )
        for work in free
    ]
    lengths = choose_lengths(offers, len(works), times, max(0, most))
    for work, length in zip(free, lengths, strict=True):
        work.num_drafted = length


def may_continue(load: LoadRequest) -> bool:
    """Whether the device of a plan has the inputs of tokens that it chooses: in its output head."""
    if len(load.plan.used_devices()) > 1 or not load.config.is_head_tied:
        return False
    return is_head_exact({info.name: info for info in load.tensors}, load.dtype)


def choose_continued(work: Work, step_seconds: float | None) -> None:
    """Let a device go on with an answer whose choices it can foresee.

    Args: step_seconds: of a token; None where that is not known.
    """
    if work.num_drafted or work.count != 1 or not step_seconds:
        return
    together = min(MOST_TOGETHER, int(TOGETHER_SECONDS / step_seconds))
    work.num_continued = min(work.sequence.most_continued, max(0, together - 1))


def draw_of(work: Work) -> Draw | None:
    """How the tokens are drawn with which a device may go on; None where the likeliest follow."""
    settings = work.sequence.settings
    if not work.num_continued or not settings.temperature:
        return None
    return Draw(
        temperature=settings.temperature,
        top_k=settings.top_k,
        top_p=settings.top_p,
        min_p=settings.min_p,
        noises=work.sequence.noises(1 + work.num_continued),
    )


def take_continued(work: Work, ids: Seq[int]) -> None:
    """Take note of tokens that a device went on with: each has a position that is answered."""
    work.continued = list(ids)
    work.changes = work.changes * (1 + len(ids))


def take_back(works: Seq[Work]) -> list[SlotOperation]:
    """Let a step that failed be as if it had not been: some devices may have computed it.

    Returns: what cuts its tokens off again where they are.
    """
    for work in works:
        work.sequence.advance(0, work.count + work.num_drafted + work.num_continued)
    return [
        SlotOperation(action="truncate", slot=work.sequence.slot, length=work.sequence.num_computed)
        for work in works
    ]


def find_changes(works: Seq[Work]) -> None:
    """Fill in what each request changes of the logits that its tokens are chosen from."""
    for work in works:
        sequence = work.sequence
        if sequence.logits_only or not work.segment().logit_offsets:
            continue
        guesses = work.drafted
        work.changes = [sequence.changes(guesses[:n]) for n in range(len(guesses) + 1)]


def logits_wanted(works: Seq[Work], form: Literal["top", "full"]) -> LogitsWanted:
    """What a step has to tell of the logits of every position that a token is chosen from."""
    wanted = [(work.sequence, changes) for work in works for changes in work.changes]
    return LogitsWanted(
        form=form,
        ids=tuple(tuple(changes.ids.tolist()) for _, changes in wanted),
        temperatures=tuple(s.settings.temperature for s, _ in wanted),
        raw_sums=tuple(s.num_logprobs is not None for s, _ in wanted),
    )


def input_rows(works: Seq[Work], embeddings: EmbeddingSource) -> Array:
    """Input embeddings of a step, float32 [T, width], with image features in their places."""
    rows = embeddings.embed([i for work in works for i in work.ids])
    if not any(work.sequence.images for work in works):
        return rows
    rows = rows.copy()
    start = 0
    for work in works:
        end = start + len(work.ids)
        if work.sequence.images is not None:
            work.sequence.images.put(rows[start:end], work.sequence.num_computed)
        start = end
    return rows


def step_kind(running: Seq[Sequence], last: StepKind) -> StepKind:
    """Prompts and answers take turns, so that neither waits for the other to end."""
    kinds = {s.next_kind for s in running}
    if "prompt" not in kinds:
        return "generated"
    if "generated" not in kinds:
        return "prompt"
    return "prompt" if last == "generated" else "generated"


def _allowed(work: Work, num_drafting: int) -> int:
    """Guessed tokens of a work whose changes fit into a step's header beside the others'."""
    num_guessed = len(work.guess.ids)
    num_asked = max(1, work.sequence.most_changes(num_guessed))
    return min(num_guessed, MOST_ASKED_IDS // (num_asked * num_drafting))
