"""Where each run of so many ids came last in a growing list, in few bytes.

In: the list, as it grows. Out: where the latest run like the last one ends. A hash table of places
alone, at most 16 bytes for a run: what a run is says the list itself, which the caller keeps.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import numpy as np

# Places of a table without any run. A power of two, as all sizes.
_FIRST_SIZE = 64
# More new runs than these are taken up together.
_FEW = 64


class RunIndex:
    """Latest ends of all runs of one length."""

    def __init__(self, length: int) -> None:
        """Know no run.

        Args:
            length: ids in a run, at least 1.
        """
        self._length = length
        # Ends of runs at the places of their hashes; 0, where no run ends, is an empty place. A
        # run whose place is taken has one of the next.
        self._take(array("i", bytes(4 * _FIRST_SIZE)))
        self._num_runs = 0
        self._first_end = 0
        # The place of the run looked for last, which is the next to be noted; -1 if not known.
        self._sought_place = -1

    def latest(self, ids: Sequence[int], first_end: int) -> int | None:
        """Where the run that `ids` ends with ended before.

        Args:
            ids: begins with the ids of the call before.
            first_end: number of ids before the end of the first run that is not noted yet; that of
                the call before, where there was one.
        Returns: the number of ids up to the end of its latest other occurrence; None without any.
        """
        num_ids, length, place = len(ids), self._length, self._sought_place
        if place < 0 or first_end != num_ids - 1:
            self._note(ids, max(first_end, length), num_ids - 1)
        else:
            if not self._ends[place]:
                self._num_runs += 1
            self._ends[place] = first_end
        if self._num_runs > self._most_runs:
            self._build(ids, num_ids - 1)
        if num_ids < length:
            return None
        # As `_find`, which would be a call more for every token.
        run, ends, mask = ids[num_ids - length :], self._ends, self._mask
        last = run[-1]
        place = hash(tuple(run)) & mask
        while end := ends[place]:
            if ids[end - 1] == last and ids[end - length : end] == run:
                self._sought_place = place
                return end
            place = (place + 1) & mask
        self._sought_place = place
        return None

    def _note(self, ids: Sequence[int], first: int, last_end: int) -> None:
        """Take up the runs that end there; they are the latest of their kind."""
        if not self._first_end:
            self._first_end = first
        if last_end - first >= _FEW:
            self._build(ids, last_end)
            return
        for end in range(first, last_end + 1):
            place = self._find(ids[end - self._length : end], ids)
            self._num_runs += not self._ends[place]
            self._ends[place] = end

    def _find(self, run: Sequence[int], ids: Sequence[int]) -> int:
        """The place of a run, or the empty one where it would be put."""
        length, ends, mask = self._length, self._ends, self._mask
        place = hash(tuple(run)) & mask
        while (end := ends[place]) and ids[end - length : end] != run:
            place = (place + 1) & mask
        return place

    def _build(self, ids: Sequence[int], last_end: int) -> None:
        """Make the table anew, with room for about as many runs again."""
        first, length = self._first_end, self._length
        count = last_end + 1 - first
        columns = (ids[first - length + n : last_end + 1 - length + n] for n in range(length))
        hashes = np.fromiter(map(hash, zip(*columns, strict=True)), np.int64, count)
        # The first of each kind from behind. Different runs with the same 64 bits would be one
        # here: a guess would be lost, none would be wrong.
        hashes, indexes = np.unique(hashes[::-1], return_index=True)
        ends = (last_end - indexes).astype(np.int32)
        size = _FIRST_SIZE
        while size < 2 * len(ends):
            size *= 2
        table = np.zeros(size, np.int32)
        places = hashes & (size - 1)
        self._num_runs = len(ends)
        while len(ends):
            is_free = table[places] == 0
            table[places[is_free]] = ends[is_free]
            is_left = table[places] != ends
            ends, places = ends[is_left], (places[is_left] + 1) & (size - 1)
        self._take(array("i", table.tobytes()))

    def _take(self, ends: array[int]) -> None:
        self._ends, self._mask = ends, len(ends) - 1
        # A quarter of the places stays empty: where few are, the search for one is long.
        self._most_runs = 3 * len(ends) // 4
