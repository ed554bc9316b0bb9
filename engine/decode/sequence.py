"""One request on its way: its known tokens, what of them is computed, and what was said of it.

In: chosen token ids. Out: text that may be shown, and the reason to end. It talks to nobody; the
scheduler moves it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from engine.decode.drafting import MAX_DRAFT, Draft, Drafter, PromptLookup
from engine.decode.image_rows import ImageRows
from engine.decode.speculation import Acceptance
from engine.decode.stopping import IdStopMatcher, StopMatcher
from engine.host.messages import FinishReason, SamplingSettings, Speculation, TokenLogprobs
from engine.model.batch import StepKind
from engine.sampling.choice import Candidates, choose, token_logprobs, uniform
from engine.sampling.logit_changes import NO_CHANGES, LogitChanges, logit_changes


class Detokenizer(Protocol):
    """Turns ids into text that never ends inside a character."""

    def push(self, id: int, /) -> str:
        """The text that one more id completes."""
        ...

    def finish(self) -> str:
        """What is left at the end."""
        ...


class NextToken(NamedTuple):
    """A chosen token, and how likely it was where the request asks for that."""

    token_id: int
    logprobs: TokenLogprobs | None


@dataclass(slots=True)
class DeviceTotals:
    """Nanoseconds and bytes of one device, summed over steps."""

    compute_ns: int = 0
    wait_ns: int = 0
    serialise_ns: int = 0
    sent_bytes: int = 0
    received_bytes: int = 0
    cache_bytes: int = 0


@dataclass(slots=True, kw_only=True)
class Sequence:
    """A prompt and its growing answer.

    Attributes:
        checkpoint_id: of the model that it was prepared for.
        ids: prompt ids, then generated ones.
        num_computed: positions that are in the KV cache of the plan in force.
        eos_ids, stop_ids: each ends the answer; not chosen before it has `min_tokens`.
        num_logprobs: how many of the likeliest tokens to report with each; None reports nothing.
        batch_index: with seed and position it makes the noise.
        logits_only: return the logits of every prompt position, and generate nothing.
        may_reuse: whether what earlier conversations left in the cache may be taken over.
        images: features that stand in for the embeddings of image tokens.
        speculation: whether guesses at its next tokens may be verified with them.
        num_drafted, num_accepted: guessed tokens that were verified, and that came true.
        num_model_drafted, num_model_accepted: of them, those of a draft model.
        num_decode_steps: steps that chose tokens after the first.
        num_told: tokens of the prompt that were told to be read.
        is_broken: an aborted step touched its slot.
        on_text: hears each generated id with the text it completed.
    """

    request_id: int
    checkpoint_id: str
    ids: list[int]
    num_prompt: int
    max_tokens: int
    settings: SamplingSettings
    seed: int
    eos_ids: frozenset[int]
    stops: StopMatcher
    detokenizer: Detokenizer
    on_text: Callable[[int, str], None]
    on_prefill: Callable[[int, int], None]
    stop_ids: frozenset[int] = frozenset()
    id_stops: IdStopMatcher = field(default_factory=lambda: IdStopMatcher(()))
    min_tokens: int = 0
    num_logprobs: int | None = None
    batch_index: int = 0
    logits_only: bool = False
    may_reuse: bool = True
    images: ImageRows | None = None
    speculation: Speculation = "off"
    drafter: Drafter = field(default_factory=PromptLookup)
    acceptance: Acceptance = field(default_factory=Acceptance)
    num_drafted: int = 0
    num_accepted: int = 0
    num_model_drafted: int = 0
    num_model_accepted: int = 0
    num_decode_steps: int = 0
    slot: int = -1
    num_computed: int = 0
    num_written: int = 0
    num_reused: int = 0
    num_told: int = 0
    is_broken: bool = False
    text: list[str] = field(default_factory=list[str])
    logprobs: list[TokenLogprobs] = field(default_factory=list[TokenLogprobs])
    finish_reason: FinishReason | None = None
    arrived: float = field(default_factory=time.perf_counter)
    prefill_started: float = 0.0
    first_token_at: float = 0.0
    last_token_at: float = 0.0
    totals: dict[str, DeviceTotals] = field(default_factory=dict[str, DeviceTotals])

    @property
    def num_generated(self) -> int:
        """Tokens of the answer so far."""
        return len(self.ids) - self.num_prompt

    @property
    def next_kind(self) -> StepKind:
        """Kind of the next token to compute; a replayed answer is generated tokens again."""
        return "prompt" if self.num_computed < self.num_prompt else "generated"

    def next_count(self, limit: int) -> int:
        """Tokens of that kind to compute next, at most `limit`."""
        end = self.num_prompt if self.next_kind == "prompt" else len(self.ids)
        return min(end - self.num_computed, limit)

    def count_step(self, num_drafted: int, num_accepted: int, *, is_first: bool) -> None:
        """Take note of a step that chose tokens."""
        self.num_drafted += num_drafted
        self.num_accepted += num_accepted
        self.num_decode_steps += not is_first

    def take_seat(self, slot: int, num_reused: int, num_written: int) -> None:
        """Begin in a slot that holds the first `num_reused` tokens already."""
        self.slot, self.num_computed, self.num_written = slot, num_reused, num_written
        if not self.num_generated:
            self.num_reused = num_reused

    def leave_seat(self) -> None:
        """The cache is gone; everything is to be computed again."""
        self.slot, self.num_computed, self.num_written, self.num_told = -1, 0, 0, 0
        self.is_broken = False

    def tell_read(self, num_done: int) -> None:
        """Tell how much of the prompt is read; nothing of what is read again after a failed step."""
        num_done = min(num_done, self.num_prompt)
        if num_done >= self.num_told:
            self.num_told = num_done
            self.on_prefill(num_done, self.num_prompt)

    def advance(self, count: int, num_guessed: int = 0) -> None:
        """The next `count` tokens are in the cache, and guesses after them, which do not count."""
        self.num_computed += count
        self.num_written = max(self.num_written, self.num_computed + num_guessed)

    @property
    def most_drafted(self) -> int:
        """Guessed tokens that may be verified after the next one from the cache.

        0 while tokens are replayed, and at the end of the answer.
        """
        is_replaying = self.num_computed + 1 < len(self.ids)
        if self.speculation == "off" or is_replaying:
            return 0
        # The step chooses one token more than it verifies.
        return max(0, min(MAX_DRAFT, self.max_tokens - self.num_generated - 1))

    @property
    def most_continued(self) -> int:
        """Tokens after the next one from the cache that are chosen by their logits and noise alone.

        0 while tokens are replayed, and where the request changes logits.
        """
        is_replaying = self.num_computed + 1 < len(self.ids)
        if is_replaying or self.most_changes(MAX_DRAFT):
            return 0
        return max(0, self.max_tokens - self.num_generated - 1)

    def noises(self, count: int) -> tuple[float, ...]:
        """What decides how the next tokens are drawn."""
        first = len(self.ids)
        return tuple(uniform(self.seed, self.batch_index, first + n) for n in range(count))

    def draft(self) -> Draft:
        """A guess of prompt lookup; may be empty."""
        limit = self.most_drafted
        return self.drafter.draft(self.ids, limit) if limit else Draft([], 0)

    def cache_ids(self, count: int) -> list[int]:
        """What identifies the first tokens in the cache: ids, and for image tokens the image."""
        ids = self.ids[:count]
        return ids if self.images is None else self.images.identify(ids)

    def changes(self, guessed: Seq[int] = ()) -> LogitChanges:
        """What the request changes of the logits of the next token.

        Args:
            guessed: tokens that come before it, if the guess comes true.
        """
        if not self.most_changes(len(guessed)):
            return NO_CHANGES
        is_too_short = self.num_generated + len(guessed) < self.min_tokens
        forbidden = self.eos_ids | self.stop_ids if is_too_short else frozenset[int]()
        return logit_changes(self.settings, [*self.ids, *guessed], self.num_prompt, forbidden)

    def most_changes(self, num_guessed: int) -> int:
        """At least as many as the ids whose logits `changes` may change."""
        settings = self.settings
        penalties = (settings.presence_penalty, settings.frequency_penalty)
        has_penalty = settings.repetition_penalty != 1 or any(penalties)
        num_forbidden = len(self.eos_ids) + len(self.stop_ids) if self.min_tokens else 0
        num_penalised = len(self.ids) + num_guessed if has_penalty else 0
        return len(settings.logit_bias) + num_forbidden + num_penalised

    def choose(self, candidates: Candidates, changes: LogitChanges) -> NextToken | None:
        """The next token from the logits after the last one; None where they do not prove it."""
        noise = uniform(self.seed, self.batch_index, len(self.ids))
        token_id = choose(candidates, self.settings, changes, noise)
        if token_id is None or self.num_logprobs is None:
            return None if token_id is None else NextToken(token_id, None)
        logprobs = token_logprobs(candidates, token_id, self.num_logprobs)
        return None if logprobs is None else NextToken(token_id, logprobs)

    def accept(self, token: NextToken) -> None:
        """Add a chosen token; sets `finish_reason` when the answer ends with it."""
        now = time.perf_counter()
        if not self.num_generated:
            self.first_token_at = now
        self.last_token_at = now
        token_id = token.token_id
        self.ids.append(token_id)
        if token.logprobs is not None:
            self.logprobs.append(token.logprobs)
        if token_id in self.eos_ids or token_id in self.stop_ids:
            self._end("stop", token_id, self._text_of(self.id_stops.finish()))
            return
        may_stop = self.num_generated >= self.min_tokens
        shown = self._text_of(self.id_stops.push(token_id, may_stop=may_stop))
        if self.stops.has_stopped:
            self._say(token_id, shown)
            self.finish_reason = "stop"
        elif self.id_stops.has_stopped:
            self._end("stop", token_id, shown)
        elif self.num_generated >= self.max_tokens:
            self._end("length", token_id, shown + self._text_of(self.id_stops.finish()))
        else:
            self._say(token_id, shown)

    def cancel(self) -> None:
        """End without another token."""
        shown = self._text_of(self.id_stops.finish())
        shown += self.stops.push(self.detokenizer.finish())
        self.text.append(shown + self.stops.finish())
        self.finish_reason = "cancelled"

    def prefill_tps(self) -> float:
        """Prompt tokens per second, 0 when there was no prefill to measure."""
        seconds = self.first_token_at - self.prefill_started
        num_read = self.num_prompt - self.num_reused
        return num_read / seconds if self.first_token_at and seconds > 0 else 0.0

    def decode_tps(self) -> float:
        """Generated tokens per second after the first, 0 when there were fewer than two."""
        seconds = self.last_token_at - self.first_token_at
        return (self.num_generated - 1) / seconds if self.num_generated > 1 and seconds else 0.0

    def _text_of(self, ids: Iterable[int]) -> str:
        """Text of ids that may be shown, up to a stop text."""
        text = "".join(self.detokenizer.push(i) for i in ids)
        return self.stops.push(text) if self.num_generated >= self.min_tokens else text

    def _end(self, reason: FinishReason, token_id: int, shown: str) -> None:
        rest = self.stops.push(self.detokenizer.finish())
        self._say(token_id, shown + rest + self.stops.finish())
        # The last text may have brought a stop text to light.
        self.finish_reason = "stop" if self.stops.has_stopped else reason

    def _say(self, token_id: int, text: str) -> None:
        self.text.append(text)
        self.on_text(token_id, text)
