"""How far the engine is, what is in its way, and what the command line asked of it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Literal

from engine.host.messages import DtypeChoice


class Stage(Enum):
    """How far the engine is on its way to answering."""

    STARTING = "starting the engine"
    OPENING = "opening the model"
    LOADING = "loading weights"
    READY = "ready"
    RECOVERING = "working around a lost device"
    STOPPED = "no split is running"


@dataclass(frozen=True, slots=True, kw_only=True)
class Trouble:
    """What keeps the engine from answering, for a person.

    Attributes:
        remedy: what the button does: load the last plan again, open the default model, or start
            a new engine.
    """

    title: str
    message: str
    remedy: Literal["load_again", "open_default", "restart"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StartOptions:
    """What the command line asked for."""

    model: str | None = None
    dtype: DtypeChoice = "auto"
    kv_window: int | None = None
    num_threads: int | None = None
    demo_workers: int = 0
    join_tokens: tuple[str, ...] = ()
