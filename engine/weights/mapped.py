"""A file mapped read-only into memory, and the raw tensors that lie in it.

In: a path; offsets and sizes that a format's reader has checked against the file's length.
Out: uint8 copies of rows and columns of tensors and of their parts: one expert of a stack, a range
of rows or columns, a matrix turned over. It knows no file format.
"""

from __future__ import annotations

import mmap
import os
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from engine.errors import CheckpointError
from engine.weights.formats import format_named, num_bytes


def one_line(value: object, limit: int = 80) -> str:
    """A name or value from a foreign file, printable, on one line and cut to `limit` characters."""
    text = value if isinstance(value, str) else repr(value)
    text = "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text[: limit + 1])
    return text if len(text) <= limit else text[: limit - 1] + "…"


class MappedFile:
    """Read-only bytes of a file; nothing is read before it is asked for."""

    def __init__(self, path: Path) -> None:
        """Map the file.

        Raises: CheckpointError: the file cannot be opened, is empty or is no regular file.
        """
        self.path = path
        try:
            if not path.is_file():
                raise CheckpointError(f"{path}: no such file; give a .gguf file or a model folder")
            with path.open("rb") as stream:
                self.size = os.fstat(stream.fileno()).st_size
                if self.size == 0:
                    raise CheckpointError(f"{path}: the file is empty; fetch it again")
                self.bytes = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            shown = one_line(str(path), 300)
            raise CheckpointError(f"{shown}: cannot be opened: {error}") from error

    def view(self, offset: int, size: int) -> NDArray[np.uint8]:
        """uint8 [size] over the mapping; it must be dropped before `close`."""
        return np.frombuffer(self.bytes, dtype=np.uint8, count=size, offset=offset)

    def close(self) -> None:
        """Unmap the file; reading afterwards fails."""
        self.bytes.close()


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor inside a mapped file, or a part of one; nothing is copied before it is asked for.

    Attributes:
        name: as the file has it.
        format: a name of `formats.FORMATS`.
        shape: torch order.
        offset: bytes from the start of the file; the reader has checked that it all lies inside.
        strides: of a vector or matrix, bytes from row to row and from block to block of a row;
            None where the tensor is dense, as every reader makes it.
    """

    file: MappedFile
    name: str
    format: str
    shape: tuple[int, ...]
    offset: int
    strides: tuple[int, int] | None = None

    @property
    def size_bytes(self) -> int:
        """Bytes of the tensor when it is dense."""
        return num_bytes(self.format, self.shape)

    def expert(self, number: int, count: int) -> StoredTensor:
        """One matrix of a stack of `count`, which may be stored as one tall matrix.

        Raises: CheckpointError: the tensor is no stack of `count` matrices.
        """
        shape = self.shape
        if len(shape) == 2 and shape[0] % count == 0:
            shape = (count, shape[0] // count, shape[1])
        if len(shape) != 3 or shape[0] != count or self.strides is not None:
            raise self._refusal(f"is no stack of {count} matrices")
        size = num_bytes(self.format, shape[1:])
        return replace(self, shape=shape[1:], offset=self.offset + number * size)

    def piece(self, axis: int, start: int, end: int) -> StoredTensor:
        """A range of rows (axis 0, or the elements of a vector) or of columns (axis 1).

        Raises: CheckpointError: the range leaves the tensor or cuts a block.
        """
        self._check_range(axis, start, end)
        row_stride, block_stride = self._strides()
        entry = format_named(self.format)
        is_last = axis == len(self.shape) - 1
        skipped = start // entry.block_size * block_stride if is_last else start * row_stride
        shape = tuple(end - start if k == axis else n for k, n in enumerate(self.shape))
        return replace(
            self, shape=shape, offset=self.offset + skipped, strides=(row_stride, block_stride)
        )

    def transposed(self) -> StoredTensor:
        """The matrix with its axes exchanged.

        Raises: CheckpointError: it is no matrix, or its blocks hold several elements of a row.
        """
        if len(self.shape) != 2:
            raise self._refusal("is no matrix")
        if format_named(self.format).block_size != 1:
            raise self._refusal(f"is stored as {self.format} with inputs as rows, which cannot be")
        row_stride, block_stride = self._strides()
        rows, columns = self.shape
        return replace(self, shape=(columns, rows), strides=(block_stride, row_stride))

    def read(self, axis: int, start: int, end: int) -> NDArray[np.uint8]:
        """Copy a range of rows (axis 0) or columns (axis 1).

        Args:
            axis: 0, or 1 for a matrix.
            start: first row or column, 0 <= start <= end.
            end: one past the last; columns must be whole blocks of the format.
        Returns: uint8 [num_bytes(format, sliced shape)], contiguous and owned by the caller.
        Raises: CheckpointError: the range leaves the tensor or cuts a block.
        """
        return np.array(self.piece(axis, start, end)._grid(), order="C").reshape(-1)

    def read_rows(self, row_ids: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Copy single rows of a matrix.

        Args:
            row_ids: int64 [n], each inside the matrix.
        Returns: uint8 [n, bytes a row].
        """
        rows = self._grid()[row_ids]
        return rows.reshape(len(row_ids), rows.shape[1] * rows.shape[2])

    def _strides(self) -> tuple[int, int]:
        if self.strides is not None:
            return self.strides
        row = num_bytes(self.format, self.shape[1:]) if len(self.shape) > 1 else self.size_bytes
        return row, format_named(self.format).block_bytes

    def _grid(self) -> NDArray[np.uint8]:
        """uint8 [rows, blocks a row, bytes a block] over the mapping; a vector is one row."""
        entry = format_named(self.format)
        rows = self.shape[0] if len(self.shape) > 1 else 1
        elements = 1
        for size in self.shape:
            elements *= size
        blocks = elements // entry.block_size // rows if rows else 0
        return np.ndarray(
            (rows, blocks, entry.block_bytes),
            np.uint8,
            buffer=self.file.bytes,
            offset=self.offset if elements else 0,
            strides=(*self._strides(), 1),
        )

    def _check_range(self, axis: int, start: int, end: int) -> None:
        if axis not in range(min(len(self.shape), 2)):
            raise CheckpointError(f"{self.name} {list(self.shape)} has no axis {axis} to slice")
        limit = self.shape[axis]
        if not 0 <= start <= end <= limit:
            raise CheckpointError(f"{self.name}: {start}..{end} leaves axis {axis} of {limit}")
        block = format_named(self.format).block_size
        if axis == len(self.shape) - 1 and (start % block or end % block):
            raise CheckpointError(
                f"{self.name}: range {start}..{end} cuts a {self.format} block; "
                f"use multiples of {block}"
            )

    def _refusal(self, reason: str) -> CheckpointError:
        return CheckpointError(
            f"{self.file.path}: {one_line(self.name)} {list(self.shape)} {reason}; "
            "the file is damaged or of another kind"
        )
