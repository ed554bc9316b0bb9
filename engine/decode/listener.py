"""What the scheduler needs from its surroundings, and what it tells them."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import Protocol

from engine.cluster import messages as m
from engine.cluster.coordinator import LoadRequest, PlanLoaded
from engine.decode.sequence import DeviceTotals, Sequence
from engine.errors import EngineError, WorkerLost
from engine.plan.plan import Plan


class EmbeddingSource(Protocol):
    """Whoever holds the embeddings."""

    def embed(self, ids: Seq[int]) -> m.Array:
        """float32 [n, width], as the first layer takes them."""
        ...


class Listener(Protocol):
    """Hears what happens to requests and plans; called from the scheduler's thread."""

    def on_finished(self, sequence: Sequence, plan: Plan) -> None:
        """A request ended well."""

    def on_failed(self, request_id: int, error: EngineError) -> None:
        """A request ended with an error."""

    def on_logits(self, request_id: int, first_position: int, rows: m.Array) -> None:
        """Logits of some prompt positions, float32 [n, vocab]."""

    def on_plan(self, request_id: int, load: LoadRequest, loaded: PlanLoaded) -> None:
        """A plan is in force."""

    def on_plan_interrupted(self, error: WorkerLost, epoch: int) -> None:
        """A device of an epoch was lost, also of one that was being loaded; requests wait.

        `put_plan` or `drop_plan` must follow.
        """

    def on_step_sent(self) -> None:
        """The devices compute the next step; tokens of the one before may be passed on meanwhile."""

    def on_links(self, links: Mapping[tuple[str, str], m.LinkFigures]) -> None:
        """What devices measured of their links in use; the first of each pair measured."""

    def on_plan_lost(self, error: EngineError) -> None:
        """The plan in force can no longer run."""

    def on_draft_lost(self, error: EngineError) -> None:
        """The draft model cannot guess any more; answers go on without it."""

    def on_load_progress(self, request_id: int, device: str, done: int, total: int) -> None:
        """Weights on their way."""

    def on_measured(self, measured: Measured) -> None:
        """What the steps since the last call did."""


@dataclass(slots=True)
class Measured:
    """What the steps of a stretch of time did."""

    seconds: float = 0.0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    devices: dict[str, DeviceTotals] = field(default_factory=dict[str, DeviceTotals])
