"""Who sits in which slot of the KV cache, and which beginnings can be had without computing them.

In: sequences that begin and end. Out: slot operations for the next step. A slot whose sequence
ended is kept for a while: the next turn of the same chat begins with the same tokens, and goes on
in it. A conversation that shares only a beginning, such as a system prompt, gets a copy of that,
from a kept slot or from one in use. Pure: it knows what the caches hold and touches none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import NamedTuple

from engine.cluster.messages import SlotOperation

# Conversations kept beside the running ones.
MAX_KEPT = 4
# A shorter common beginning, such as a template's first words, is not worth an operation.
MIN_REUSED = 8


class Held(NamedTuple):
    """What a slot holds: its tokens, and the most that it ever held."""

    slot: int
    ids: list[int]
    num_written: int


@dataclass(frozen=True, slots=True)
class Seat:
    """Where a sequence goes on.

    Attributes:
        num_reused: tokens of it that are in the slot already.
        num_written: the most tokens that the slot ever held.
    """

    slot: int
    num_reused: int
    num_written: int


class Slots:
    """See the module; belongs to the scheduler's thread."""

    def __init__(self, max_kept_positions: int, can_truncate: Callable[[int, int], bool]) -> None:
        """All slots are free.

        Args:
            max_kept_positions: that slots without a sequence may hold together: the KV window,
                past which no slot grows, or 0 to keep none.
            can_truncate: whether a slot that held so many tokens may be cut back to so many.
        """
        self._max_kept_positions = max_kept_positions
        self._can_truncate = can_truncate
        self._taken: set[int] = set()
        # In the order of last use.
        self._kept: dict[int, Held] = {}

    def take(
        self, ids: Sequence[int], *, may_reuse: bool, in_use: Iterable[Held] = ()
    ) -> tuple[Seat, list[SlotOperation]]:
        """Give a sequence a slot, if possible with its beginning in it.

        Args:
            ids: everything that is known of it; at least the last token stays to be computed.
            in_use: what the slots of running sequences hold once the operations so far are done.
        Returns: the seat, and what the next step has to do to the slots.
        """
        best = self._best(ids, [*self._kept.values(), *in_use]) if may_reuse else None
        if best is None:
            return Seat(self._new_slot(), 0, 0), []
        held, length = best
        lost = len(held.ids) - length
        # A kept conversation gives way to one that has most of it, such as its own next turn.
        if held.slot in self._kept and lost <= length:
            del self._kept[held.slot]
            self._taken.add(held.slot)
            cut = SlotOperation(action="truncate", slot=held.slot, length=length)
            return Seat(held.slot, length, held.num_written), [cut] if lost else []
        if held.slot in self._kept:
            self._kept[held.slot] = self._kept.pop(held.slot)  # The last to be let go.
        slot = self._new_slot()
        copy = SlotOperation(action="copy", slot=slot, length=length, source=held.slot)
        return Seat(slot, length, held.num_written), [copy]

    def keep(self, slot: int, ids: list[int], num_written: int) -> list[SlotOperation]:
        """A sequence ended well; its slot waits for the next turn.

        Args:
            ids: the tokens whose keys and values are in the slot.
        """
        if not self._max_kept_positions:
            return self.free(slot)
        self._taken.discard(slot)
        self._kept[slot] = Held(slot, ids, num_written)
        operations: list[SlotOperation] = []
        while len(self._kept) > MAX_KEPT or self._num_kept_positions() > self._max_kept_positions:
            oldest = next(iter(self._kept))
            del self._kept[oldest]
            operations.append(SlotOperation(action="free", slot=oldest))
        return operations

    def drop_kept(self) -> list[SlotOperation]:
        """Their memory is needed: forget the conversations whose sequences have ended."""
        dropped = [SlotOperation(action="free", slot=slot) for slot in self._kept]
        self._kept.clear()
        return dropped

    def free(self, slot: int) -> list[SlotOperation]:
        """A sequence ended, and what its slot holds is not known."""
        self._taken.discard(slot)
        return [SlotOperation(action="free", slot=slot)]

    def _new_slot(self) -> int:
        num_slots = len(self._taken) + len(self._kept)
        slot = next(n for n in range(num_slots + 1) if n not in self._taken and n not in self._kept)
        self._taken.add(slot)
        return slot

    def _num_kept_positions(self) -> int:
        return sum(min(len(k.ids), self._max_kept_positions) for k in self._kept.values())

    def _best(self, ids: Sequence[int], candidates: Iterable[Held]) -> tuple[Held, int] | None:
        """What has the longest common beginning that can be had, and its length."""
        found: tuple[Held, int] | None = None
        for held in candidates:
            length = min(common_length(held.ids, ids), len(ids) - 1)
            if length < MIN_REUSED or (found is not None and length <= found[1]):
                continue
            if length == len(held.ids) or self._can_truncate(held.num_written, length):
                found = held, length
        return found


def without_copies(operations: Sequence[SlotOperation]) -> list[SlotOperation]:
    """What to ask again after a step that may have done its operations, or not, or not everywhere.

    To free or cut a slot twice does no harm. A copy that failed once would fail again, and with it
    every later step: its slot is to begin empty.
    """
    return [
        SlotOperation(action="free", slot=o.slot) if o.action == "copy" else o for o in operations
    ]


def common_length(first: Sequence[int], second: Sequence[int]) -> int:
    """Length of the common beginning of two lists."""
    return sum(
        1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False))
    )
