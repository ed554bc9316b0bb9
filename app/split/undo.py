"""Steps of undo for the draft."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from PySide6.QtGui import QUndoCommand

from engine.plan.plan import Plan

_MERGE_ID = 1


@dataclass(frozen=True, slots=True)
class DraftState:
    """What undo goes back to."""

    plan: Plan
    left_out: frozenset[str]


class StateOwner(Protocol):
    """Who shows a state."""

    def take_state(self, state: DraftState, asked: tuple[str, float] | None = None) -> None:
        """Make this state the draft."""
        ...


class DraftCommand(QUndoCommand):
    """One edit of the draft; the steps of one gesture merge into one."""

    def __init__(
        self,
        owner: StateOwner,
        before: DraftState,
        after: DraftState,
        text: str,
        gesture: int,
        asked: tuple[str, float] | None,
    ) -> None:
        """Args: gesture: equal for steps that merge; 0 for a step of its own."""
        super().__init__(text)
        self._owner = owner
        self._before = before
        self._after = after
        self._gesture = gesture
        self._asked = asked

    def redo(self) -> None:
        """Make the edit."""
        self._owner.take_state(self._after, self._asked)

    def undo(self) -> None:
        """Take it back."""
        self._owner.take_state(self._before)

    def id(self) -> int:
        """Commands of a gesture can merge."""
        return _MERGE_ID if self._gesture else -1

    def mergeWith(self, other: QUndoCommand) -> bool:  # noqa: N802
        """Take over the later step of the same gesture."""
        if not isinstance(other, DraftCommand) or other._gesture != self._gesture:
            return False
        self._after, self._asked = other._after, other._asked
        self.setText(other.text())
        return True
