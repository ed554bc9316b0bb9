"""One request on its way: its known tokens, what of them is computed, and what was said of it.

In: chosen token ids. Out: text that may be shown, and the reason to end. It talks to nobody; the
scheduler moves it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from engine.decode.stopping import StopMatcher
from engine.host.messages import FinishReason, SamplingSettings
from engine.model.batch import StepKind


class Detokenizer(Protocol):
    """Turns ids into text that never ends inside a character."""

    def push(self, id: int, /) -> str:
        """The text that one more id completes."""
        ...

    def finish(self) -> str:
        """What is left at the end."""
        ...


@dataclass(slots=True)
class DeviceTotals:
    """Nanoseconds and bytes of one device, summed over steps."""

    compute_ns: int = 0
    wait_ns: int = 0
    serialise_ns: int = 0
    sent_bytes: int = 0
    received_bytes: int = 0


@dataclass(slots=True, kw_only=True)
class Sequence:
    """A prompt and its growing answer.

    Attributes:
        ids: prompt ids, then generated ones.
        num_computed: positions that are in the KV cache of the plan in force.
        logits_only: return the logits of every prompt position, and generate nothing.
        on_text: hears each generated id with the text it completed.
    """

    request_id: int
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
    logits_only: bool = False
    slot: int = -1
    num_computed: int = 0
    text: list[str] = field(default_factory=list[str])
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

    def repeated_ids(self) -> set[int]:
        """Ids that a repetition penalty lowers."""
        return set(self.ids) if self.settings.repetition_penalty != 1 else set()

    def accept(self, token_id: int) -> None:
        """Add a chosen token; sets `finish_reason` when the answer ends with it."""
        now = time.perf_counter()
        if not self.num_generated:
            self.first_token_at = now
        self.last_token_at = now
        self.ids.append(token_id)
        if token_id in self.eos_ids:
            self._end("stop", token_id, "")
            return
        shown = self.stops.push(self.detokenizer.push(token_id))
        if self.stops.has_stopped:
            self._say(token_id, shown)
            self.finish_reason = "stop"
        elif self.num_generated >= self.max_tokens:
            self._end("length", token_id, shown)
        else:
            self._say(token_id, shown)

    def cancel(self) -> None:
        """End without another token."""
        self.text.append(self.stops.push(self.detokenizer.finish()) + self.stops.finish())
        self.finish_reason = "cancelled"

    def prefill_tps(self) -> float:
        """Prompt tokens per second, 0 when there was no prefill to measure."""
        seconds = self.first_token_at - self.prefill_started
        return self.num_prompt / seconds if self.first_token_at and seconds > 0 else 0.0

    def decode_tps(self) -> float:
        """Generated tokens per second after the first, 0 when there were fewer than two."""
        seconds = self.last_token_at - self.first_token_at
        return (self.num_generated - 1) / seconds if self.num_generated > 1 and seconds else 0.0

    def _end(self, reason: FinishReason, token_id: int, shown: str) -> None:
        rest = self.stops.push(self.detokenizer.finish())
        self._say(token_id, shown + rest + self.stops.finish())
        self.finish_reason = reason

    def _say(self, token_id: int, text: str) -> None:
        self.text.append(text)
        self.on_text(token_id, text)
