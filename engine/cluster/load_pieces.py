"""A weight on its way into a runner, and the parts of it that are looked for and fetched together.

In: slices in whole units. Out: where the bytes of any units belong. It looks for nothing itself.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from engine.model.content_units import Units
from engine.model.share_keys import SliceKey, WeightKey
from engine.model.weight_store import RawBytes


class PartSlice:
    """One widened slice of a weight: whole units of a tensor."""

    def __init__(self, wide: SliceKey, units: Units, num_bytes: int, rows: int) -> None:
        """Args: rows: of the slice in the file; 1 for a vector."""
        assert wide.axis == units.axis
        assert wide.start % units.size == 0
        self.wide = wide
        self.units = units
        self.first_unit = wide.start // units.size
        self.end_unit = -(-wide.end // units.size)
        self.num_bytes = num_bytes
        self._rows = rows
        self._grid: RawBytes | None = None

    @property
    def grid(self) -> RawBytes:
        """uint8 [rows, bytes a row]; memory is taken when it is first used."""
        if self._grid is None:
            self._grid = np.empty((self._rows, self.num_bytes // self._rows), dtype=np.uint8)
        return self._grid

    def view(self, first: int, end: int) -> RawBytes:
        """The bytes of units [first, end) of the tensor, not copied."""
        return self.units.view(self.grid, first - self.first_unit, end - self.first_unit)

    def key(self, first: int, end: int) -> SliceKey:
        """Units [first, end) of the tensor, in elements."""
        size = self.units.size
        return self.wide._replace(start=first * size, end=min(end * size, self.wide.end))


class Assembly:
    """A weight whose slices are coming in."""

    def __init__(self, key: WeightKey, slices: list[PartSlice]) -> None:
        """Nothing of it is there yet."""
        self.key = key
        self.slices = slices
        self.missing_bytes = sum(part.num_bytes for part in slices)


class Piece:
    """Consecutive units that are looked for together."""

    def __init__(self, assembly: Assembly, part: PartSlice, first: int, end: int) -> None:
        """Args: first, end: half-open range of the tensor's units; `sums` come later."""
        self.assembly = assembly
        self.part = part
        self.first = first
        self.end = end
        self.sums: list[bytes] | None = None


class Fetch:
    """Consecutive units that come from the engine host, in one or several requests."""

    def __init__(self, piece: Piece, first: int, end: int) -> None:
        """Args: first, end: half-open range of the tensor's units."""
        self.piece = piece
        self.first = first
        self.end = end
        self.num_open = 0


class HashesKey(NamedTuple):
    """What identifies an answer to HashesRequest."""

    name: str
    axis: int
    unit: int
    start: int
    end: int
