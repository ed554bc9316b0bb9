"""Weights by key: from slices in file format to what computes.

In: descriptions of the checkpoint's tensors, and slices in file format. Out: packed weights. It
opens no file and no socket: the slices come from whoever holds the checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.errors import ProtocolError
from engine.kernels.matrices import Int8Matrix, Matrix, make_matrix
from engine.model.batch import ComputeDtype
from engine.model.share_keys import SliceKey, WeightKey
from engine.weights.formats import TensorInfo, dequantize, format_named, num_bytes

RawBytes = NDArray[np.uint8]

# In which values wait to be packed: bfloat16 rounds each once, int8 is quantised from float32.
JOINED_TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.float32}


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
        infos = [self._info(s.name) for s in key.slices]
        wides = [self.stored_slice(s) for s in key.slices]
        if key.is_plain:
            self.packed[key] = self._plain(key, wides, raw).to(self._device)
            return
        is_whole = all(s == w for s, w in zip(key.slices, wides, strict=True))
        is_q8_0 = all(info.format == "Q8_0" for info in infos)
        columns = self.stored_shape(wides[0])[1]
        if self._dtype == "int8" and is_q8_0 and is_whole and key.column_block % 32 == 0:
            rows = sum(self.stored_shape(w)[0] for w in wides)
            joined = np.concatenate([r.reshape(-1) for r in raw])
            self.packed[key] = Int8Matrix.from_q8_0(joined, rows, columns).to(self._device)
            return
        rows = [self.stored_shape(narrow)[0] for narrow in key.slices]
        columns = self.stored_shape(key.slices[0])[1]
        joined_values = torch.empty(sum(rows), columns, dtype=JOINED_TYPES[self._dtype])
        start = 0
        for narrow, wide, info, data in zip(key.slices, wides, infos, raw, strict=True):
            values = dequantize(info.format, data, self.stored_shape(wide))
            if narrow.axis == 1:
                values = values[:, narrow.start - wide.start : narrow.end - wide.start]
            end = start + values.shape[0]
            joined_values[start:end] = torch.as_tensor(values)
            start = end
        block = key.column_block or columns
        self.packed[key] = make_matrix(joined_values, self._dtype, self._device, block)

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
