"""Weights by key: from slices in file format to what computes.

In: descriptions of the checkpoint's tensors, and slices in file format. Out: packed weights. It
opens no file and no socket: the slices come from whoever holds the checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.errors import ProtocolError
from engine.kernels.matrices import (
    BFloat16Matrix,
    Float32Matrix,
    GroupedMatrix,
    Int4Matrix,
    Int8Matrix,
    Matrix,
)
from engine.kernels.native_library import native_library
from engine.kernels.native_matrices import repack
from engine.model.batch import ComputeDtype
from engine.model.share_keys import SliceKey, WeightKey
from engine.model.weight_formats import (
    GroupedDtype,
    is_symmetric,
    takes_over,
    weight_format,
)
from engine.weights.formats import TensorInfo, dequantize, format_named, num_bytes

RawBytes = NDArray[np.uint8]

# Values that are turned from file into compute format at a time.
PIECE_ELEMENTS = 1 << 20

_TAKE_OVER: Mapping[str, Callable[[RawBytes, int, int, int], GroupedMatrix]] = {
    "Q4_0": Int4Matrix.from_q4_0,
    "Q4_1": Int4Matrix.from_q4_1,
    "Q8_0": Int8Matrix.from_q8_0,
}


class WeightStore:
    """Packed weights by key, so that a new plan keeps what it shares with the old one."""

    def __init__(
        self,
        tensors: Mapping[str, TensorInfo],
        dtype: ComputeDtype,
        device: torch.device,
        previous: Mapping[WeightKey, Matrix | Tensor],
    ) -> None:
        """Args: tensors: format and shape of every tensor in the engine host's checkpoint."""
        self._tensors = tensors
        self._dtype: ComputeDtype = dtype
        self._device = device
        self._previous = previous
        self.packed: dict[WeightKey, Matrix | Tensor] = {}

    def stored_slice(self, key: SliceKey) -> SliceKey:
        """The slice widened to whole blocks of the file's format."""
        info = self._info(key.name)
        if key.axis == 0 and len(info.shape) > 1:
            return key
        block = format_named(info.format).block_size
        end = min(-(-key.end // block) * block, info.shape[key.axis])
        return key._replace(start=key.start // block * block, end=end)

    def stored_bytes(self, key: SliceKey) -> int:
        """Bytes of a widened slice in file format."""
        return num_bytes(self._info(key.name).format, self.stored_shape(key))

    def stored_shape(self, key: SliceKey) -> tuple[int, ...]:
        """Shape of a widened slice."""
        shape = list(self._info(key.name).shape)
        shape[key.axis] = key.end - key.start
        return tuple(shape)

    def missing(self, keys: list[WeightKey]) -> list[WeightKey]:
        """Take over from the previous store; returns what must be fetched."""
        for key in keys:
            if key in self._previous:
                self.packed[key] = self._previous[key]
        # What only the old plan needed is freed before new weights come.
        self._previous = dict[WeightKey, Matrix | Tensor]()
        return [key for key in keys if key not in self.packed]

    def pack(self, key: WeightKey, raw: list[RawBytes]) -> None:
        """Turn slices in file format into a weight in compute format.

        Args:
            raw: for each slice of the key, the bytes of its widened slice.
        """
        wides = [self.stored_slice(s) for s in key.slices]
        if key.is_plain:
            self.packed[key] = self._plain(key, wides, raw).to(self._device)
        else:
            self.packed[key] = repack(self._matrix(key, wides, raw), native_library())

    def _matrix(self, key: WeightKey, wides: list[SliceKey], raw: list[RawBytes]) -> Matrix:
        """Slices stacked along rows, in the weight's compute format, on the device."""
        format = weight_format(key, self._tensors, self._dtype)
        rows = sum(self.stored_shape(part)[0] for part in key.slices)
        columns = self.stored_shape(key.slices[0])[1]
        if format == "int8" or format == "int4":
            return self._grouped(key, format, rows, columns, wides, raw).to(self._device)
        dtype = torch.float32 if format == "float32" else torch.bfloat16
        values = torch.empty(rows, columns, dtype=dtype)
        start = 0
        for narrow, wide, data in zip(key.slices, wides, raw, strict=True):
            for piece in self._value_pieces(narrow, wide, data):
                values[start : start + len(piece)] = piece
                start += len(piece)
        values = values.to(self._device)
        return Float32Matrix(values) if format == "float32" else BFloat16Matrix(values)

    def _grouped(
        self,
        key: WeightKey,
        format: GroupedDtype,
        rows: int,
        columns: int,
        wides: list[SliceKey],
        raw: list[RawBytes],
    ) -> Int8Matrix | Int4Matrix:
        """A quantised matrix, its slices each as near to the file as it can be."""
        kind = Int8Matrix if format == "int8" else Int4Matrix
        block = key.column_block or columns
        if format == "int8":
            matrix: Int8Matrix | Int4Matrix = Int8Matrix.empty(rows, columns, block)
        else:
            symmetric = is_symmetric(key, self._tensors)
            matrix = Int4Matrix.empty(rows, columns, block, symmetric)
        start = 0
        for narrow, wide, data in zip(key.slices, wides, raw, strict=True):
            info = self._info(narrow.name)
            if takes_over(narrow, info, format, key.column_block):
                parts = (
                    _TAKE_OVER[info.format](piece, len(piece), columns, block)
                    for piece in self._byte_pieces(wide, data)
                )
            else:
                pieces = self._value_pieces(narrow, wide, data)
                parts = (kind.from_values(piece, block) for piece in pieces)
            for part in parts:
                matrix.put_rows(start, part)
                start += len(part.scales)
        return matrix

    def _byte_pieces(self, wide: SliceKey, data: RawBytes) -> Iterator[RawBytes]:
        """A few rows at a time, so that what lies between file and compute format stays small."""
        rows, columns = self.stored_shape(wide)
        by_row = data.reshape(rows, -1)
        step = max(1, PIECE_ELEMENTS // columns)
        for start in range(0, rows, step):
            yield by_row[start : start + step]

    def _value_pieces(self, narrow: SliceKey, wide: SliceKey, data: RawBytes) -> Iterator[Tensor]:
        """Float32 values of a slice, a few rows at a time."""
        columns = self.stored_shape(wide)[1]
        for piece in self._byte_pieces(wide, data):
            values = dequantize(self._info(wide.name).format, piece, (len(piece), columns))
            if narrow.axis == 1:
                values = values[:, narrow.start - wide.start : narrow.end - wide.start]
            yield torch.as_tensor(values)

    def _plain(self, key: WeightKey, wides: list[SliceKey], raw: list[RawBytes]) -> Tensor:
        """Float32 values of slices that are stacked but not packed."""
        parts: list[Tensor] = []
        for narrow, wide, data in zip(key.slices, wides, raw, strict=True):
            values = dequantize(self._info(wide.name).format, data, self.stored_shape(wide))
            offset = narrow.start - wide.start
            parts.append(torch.as_tensor(values)[offset : offset + narrow.end - narrow.start])
        # A copy: the values may lie in a buffer that is used again.
        return torch.cat(parts).clone()

    def _info(self, name: str) -> TensorInfo:
        try:
            return self._tensors[name]
        except KeyError:
            raise ProtocolError(f"the model has no tensor {name!r}") from None


def fetch_weights(
    store: WeightStore,
    keys: list[WeightKey],
    fetch: Callable[[SliceKey], RawBytes],
) -> None:
    """Fill a store from a function that has every slice at hand; for tests and one process."""
    for key in store.missing(keys):
        store.pack(key, [fetch(store.stored_slice(s)) for s in key.slices])
