"""How the weights of a model are cut into units that have a content hash of their own.

In: a tensor's name, format and shape, and the sizes of a plan. Out: the axis it is cut along and
the elements of one unit, so that whatever share a plan gives to a device is whole units. Pure: no
torch, no files.

A unit is a quantum of the plan row that the tensor belongs to; where the blocks of the file's
format do not divide a quantum, it is a block. Slices are widened to whole blocks, so they are whole
units either way. What is not cut between devices is one unit.
"""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from engine.plan.plan import PlanShape
from engine.weights.formats import TensorInfo, format_named, num_bytes

SUM_BYTES = 32

_HEAD_ROWS = frozenset({"q", "k", "v", "q_bias", "k_bias", "v_bias"})
_MLP_ROWS = frozenset({"gate", "up"})


class Units(NamedTuple):
    """How one tensor is cut.

    Attributes:
        axis: 0 for rows, or for the elements of a vector; 1 for columns.
        length: elements along the axis.
        size: elements of a unit; the last may hold fewer.
        is_rows: whether a unit is whole rows of a matrix, else a range of every row.
        step: rows of a unit in the file, or bytes that a unit has of each row.
        unit_bytes: of a whole unit, in the file's format.
    """

    axis: int
    length: int
    size: int
    is_rows: bool
    step: int
    unit_bytes: int

    @property
    def num_units(self) -> int:
        """Units of the tensor."""
        return -(-self.length // self.size)

    def view(self, grid: NDArray[np.uint8], first: int, end: int) -> NDArray[np.uint8]:
        """Units [first, end) of a buffer that begins with a unit.

        Args:
            grid: uint8 [rows, bytes a row]; a vector is one row.
            first: counted from the buffer's first unit.
        Returns: uint8 [rows, bytes], not copied.
        """
        if self.is_rows:
            return grid[first * self.step : end * self.step]
        return grid[:, first * self.step : end * self.step]


def units_of(info: TensorInfo, head_width: int, shape: PlanShape) -> Units:
    """How a tensor is cut into units.

    Args:
        info: of one of our names, such as "layers.3.q".
        head_width: elements of one attention head.
        shape: of the plan, for its quanta.
    """
    role = info.name.rpartition(".")[2]
    axis = 1 if role in ("o", "down") else 0
    length = info.shape[axis]
    if role in _HEAD_ROWS or role == "o":
        quantum = head_width
    elif role in _MLP_ROWS or role == "down":
        quantum = shape.mlp_quantum
    elif role == "head":
        quantum = shape.head_quantum
    else:
        quantum = length
    entry = format_named(info.format)
    is_rows = axis == 0 and len(info.shape) > 1
    if is_rows:
        size = max(1, min(quantum, length))
        row_bytes = num_bytes(info.format, info.shape[1:])
        return Units(axis, length, size, True, size, size * row_bytes)
    block = entry.block_size
    size = quantum if quantum % block == 0 else block
    size = max(block, min(size, length))
    step = num_bytes(info.format, (size,))
    rows = info.shape[0] if len(info.shape) > 1 else 1
    return Units(axis, length, size, False, step, step * rows)


def content_sum(data: NDArray[np.uint8]) -> bytes:
    """SHA-256 of an array's bytes in row order."""
    return hashlib.sha256(np.ascontiguousarray(data).reshape(-1).data).digest()
