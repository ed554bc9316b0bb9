"""A file mapped read-only into memory, and the raw tensors that lie in it.

In: a path; offsets and sizes that a format's reader has checked against the file's length.
Out: uint8 copies of whole tensors, of rows and of columns. It knows no file format.
"""

from __future__ import annotations

import mmap
import os
from dataclasses import dataclass
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
    """One dense tensor inside a mapped file.

    Attributes:
        name: as the file has it.
        format: a name of `formats.FORMATS`.
        shape: torch order.
        offset: bytes from the start of the file; the reader has checked that it all lies inside.
    """

    file: MappedFile
    name: str
    format: str
    shape: tuple[int, ...]
    offset: int

    @property
    def size_bytes(self) -> int:
        """Bytes the tensor occupies."""
        return num_bytes(self.format, self.shape)

    def read(self, axis: int, start: int, end: int) -> NDArray[np.uint8]:
        """Copy a range of rows (axis 0) or columns (axis 1).

        Args:
            axis: 0, or 1 for a matrix.
            start: first row or column, 0 <= start <= end.
            end: one past the last; columns must be whole blocks of the format.
        Returns: uint8 [num_bytes(format, sliced shape)], contiguous and owned by the caller.
        Raises: CheckpointError: the range leaves the tensor or cuts a block.
        """
        if axis not in range(min(len(self.shape), 2)):
            raise CheckpointError(f"{self.name} {list(self.shape)} has no axis {axis} to slice")
        limit = self.shape[axis]
        if not 0 <= start <= end <= limit:
            raise CheckpointError(f"{self.name}: {start}..{end} leaves axis {axis} of {limit}")
        entry = format_named(self.format)
        last = len(self.shape) - 1
        if axis == last and (start % entry.block_size or end % entry.block_size):
            raise CheckpointError(
                f"{self.name}: range {start}..{end} cuts a {self.format} block; "
                f"use multiples of {entry.block_size}"
            )
        if axis == 0:
            row = num_bytes(self.format, self.shape[1:]) if last else 0
            first = start * row if last else num_bytes(self.format, (start,))
            size = num_bytes(self.format, (end - start, *self.shape[1:]))
            return self.file.view(self.offset + first, size).copy()
        rows = self.shape[0]
        grid = self.file.view(self.offset, self.size_bytes).reshape(rows, -1)
        columns = slice(num_bytes(self.format, (start,)), num_bytes(self.format, (end,)))
        return np.array(grid[:, columns], order="C").reshape(-1)

    def read_rows(self, row_ids: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Copy single rows of a matrix.

        Args:
            row_ids: int64 [n], each inside the matrix.
        Returns: uint8 [n, bytes a row].
        """
        grid = self.file.view(self.offset, self.size_bytes).reshape(self.shape[0], -1)
        return grid[row_ids]
