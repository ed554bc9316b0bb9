"""Who sits in which slot of the KV cache, and what finished conversations left there.

In: sequences that begin and end. Out: slot operations for the next step. A slot whose sequence
ended is kept for a while: the next turn of the same chat begins with the same tokens, and only
what is new has to be computed. Pure: it knows what the caches hold and touches none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile

from engine.cluster.messages import SlotOperation

# Conversations kept beside the running ones.
MAX_KEPT = 4
# A shorter common beginning, such as a template's first words, is not worth giving a slot up for.
MIN_REUSED = 8


@dataclass(slots=True)
class _Kept:
    """A slot without a sequence: its tokens, and the most it ever held."""

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
        self._kept: dict[int, _Kept] = {}

    def take(self, ids: Sequence[int], *, may_reuse: bool) -> tuple[Seat, list[SlotOperation]]:
        """Give a sequence a slot, if possible one that holds its beginning.

        Args:
            ids: everything that is known of it; at least the last token stays to be computed.
        Returns: the seat, and what the next step has to do to the slots.
        """
        best = self._best(ids) if may_reuse else None
        if best is None:
            slot = next(
                n for n in range(len(self._taken) + len(self._kept) + 1) if self._is_free(n)
            )
            self._taken.add(slot)
            return Seat(slot, 0, 0), []
        slot, length = best
        kept = self._kept.pop(slot)
        self._taken.add(slot)
        operations: list[SlotOperation] = []
        if length < len(kept.ids):
            operations.append(SlotOperation(action="truncate", slot=slot, length=length))
        return Seat(slot, length, kept.num_written), operations

    def keep(self, slot: int, ids: list[int], num_written: int) -> list[SlotOperation]:
        """A sequence ended well; its slot waits for the next turn.

        Args:
            ids: the tokens whose keys and values are in the slot.
        """
        if not self._max_kept_positions:
            return self.free(slot)
        self._taken.discard(slot)
        self._kept[slot] = _Kept(ids, num_written)
        operations: list[SlotOperation] = []
        while len(self._kept) > MAX_KEPT or self._num_kept_positions() > self._max_kept_positions:
            oldest = next(iter(self._kept))
            del self._kept[oldest]
            operations.append(SlotOperation(action="free", slot=oldest))
        return operations

    def free(self, slot: int) -> list[SlotOperation]:
        """A sequence ended, and what its slot holds is not known."""
        self._taken.discard(slot)
        return [SlotOperation(action="free", slot=slot)]

    def _is_free(self, slot: int) -> bool:
        return slot not in self._taken and slot not in self._kept

    def _num_kept_positions(self) -> int:
        return sum(min(len(k.ids), self._max_kept_positions) for k in self._kept.values())

    def _best(self, ids: Sequence[int]) -> tuple[int, int] | None:
        """The kept slot with the longest common beginning, and its length."""
        found: tuple[int, int] | None = None
        for slot, kept in self._kept.items():
            length = min(common_length(kept.ids, ids), len(ids) - 1)
            if length < MIN_REUSED or (found is not None and length <= found[1]):
                continue
            if length == len(kept.ids) or self._can_truncate(kept.num_written, length):
                found = slot, length
        return found


def common_length(first: Sequence[int], second: Sequence[int]) -> int:
    """Length of the common beginning of two lists."""
    return sum(
        1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False))
    )
