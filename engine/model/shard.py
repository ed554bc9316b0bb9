"""A device's share of a model under a plan: which slices it needs, and the rows it computes.

In: a plan, a device's column, and the slices in file format. Out: partial sums per plan row. It
opens no file and no socket: the slices come from whoever holds the checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.errors import ProtocolError
from engine.kernels.matrices import Int8Matrix, Matrix, make_matrix
from engine.kernels.torch_kernels import (
    AttentionShare,
    Batch,
    HeadShare,
    MlpShare,
    attention_part,
    head_part,
    mlp_part,
)
from engine.model.attention import kv_groups
from engine.model.batch import ComputeDtype, Segment, StepKind
from engine.model.config import ModelConfig
from engine.model.kv_cache import KVCache
from engine.model.rope import RopeTable
from engine.plan.plan import Plan
from engine.weights.formats import TensorInfo, dequantize, format_named, num_bytes

RawBytes = NDArray[np.uint8]

# In which values wait to be packed: bfloat16 rounds each once, int8 is quantised from float32.
JOINED_TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.float32}


class SliceKey(NamedTuple):
    """Part of a canonical tensor: elements [start, end) along an axis."""

    name: str
    axis: int
    start: int
    end: int


class WeightKey(NamedTuple):
    """A matrix or vector in compute format: slices stacked along rows."""

    slices: tuple[SliceKey, ...]
    column_block: int


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
        self._previous = dict[
            WeightKey, Matrix | Tensor
        ]()  # What only the old plan needed is freed before new weights come.
        return [key for key in keys if key not in self.packed]

    def pack(self, key: WeightKey, raw: list[RawBytes]) -> None:
        """Turn slices in file format into a weight in compute format.

        Args:
            raw: for each slice of the key, the bytes of its widened slice.
        """
        infos = [self._info(s.name) for s in key.slices]
        wides = [self.stored_slice(s) for s in key.slices]
        if len(infos[0].shape) == 1:
            values = dequantize(infos[0].format, raw[0], infos[0].shape)
            self.packed[key] = torch.as_tensor(values).to(self._device)
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

    def _info(self, name: str) -> TensorInfo:
        try:
            return self._tensors[name]
        except KeyError:
            raise ProtocolError(f"the model has no tensor {name!r}") from None


class ModelShard:
    """The rows of a plan that one device computes."""

    def __init__(
        self,
        config: ModelConfig,
        plan: Plan,
        device_index: int,
        dtype: ComputeDtype,
        kv_window: int,
        device: torch.device,
    ) -> None:
        """Args: device_index: this device's column of the plan."""
        self.config = config
        self.plan = plan
        self.dtype: ComputeDtype = dtype
        self._index = device_index
        self._device = device
        self._rope = RopeTable(config.head_width, config.rope_theta, device)
        self._shares: dict[int, AttentionShare | MlpShare | HeadShare] = {}
        kv_heads = {
            layer: end - start
            for layer in range(config.num_layers)
            for start, end in [plan.kv_head_range(plan.shape.attention_row(layer), device_index)]
            if end > start
        }
        cache_dtype = torch.float32 if dtype == "float32" else torch.bfloat16
        self.cache = KVCache(kv_heads, config.head_width, kv_window, cache_dtype, device)

    def weight_keys(self) -> list[WeightKey]:
        """Every weight this share needs, in the order of the rows."""
        return [key for row in self._rows() for key in self._row_keys(row)]

    def take(self, packed: Mapping[WeightKey, Any]) -> None:
        """Build the shares from packed weights; all of `weight_keys` must be there."""
        config, plan = self.config, self.plan
        for row in self._rows():
            weights = [packed[key] for key in self._row_keys(row)]
            start, end = plan.unit_range(row, self._index)
            kind = plan.shape.row_kind(row)
            if kind == "attention":
                kv_start, kv_end = plan.kv_head_range(row, self._index)
                self._shares[row] = AttentionShare(
                    layer=row // 2,
                    norm=weights[0],
                    qkv=weights[1],
                    output=weights[2],
                    num_heads=end - start,
                    num_kv_heads=kv_end - kv_start,
                    groups=list(kv_groups(start, end, config.heads_per_kv)),
                )
            elif kind == "mlp":
                self._shares[row] = MlpShare(norm=weights[0], gate_up=weights[1], down=weights[2])
            else:
                self._shares[row] = HeadShare(norm=weights[0], matrix=weights[1])

    def batch(self, kind: StepKind, segments: tuple[Segment, ...]) -> Batch:
        """Extend the slots by a step's segments and prepare what its rows share.

        Raises:
            ProtocolError: a segment does not follow its slot's tokens.
            CacheFull: a segment passes the window.
        """
        for segment in segments:
            self.cache.extend(segment.slot, segment.first_position, segment.token_count)
        positions = torch.cat(
            [torch.arange(s.first_position, s.first_position + s.token_count) for s in segments]
        ).to(self._device)
        end = max(s.first_position + s.token_count for s in segments)
        cos, sin = self._rope.rows(positions, end)
        return Batch(kind=kind, segments=segments, cos=cos, sin=sin)

    def part(self, row: int, x: Tensor, batch: Batch) -> Tensor:
        """This device's partial sum of an attention or mlp row."""
        share = self._shares[row]
        if isinstance(share, AttentionShare):
            return attention_part(x, share, batch, self.cache, self.config)
        assert isinstance(share, MlpShare)
        return mlp_part(x, share, batch.kind, self.config)

    def logits(self, x_NW: Tensor) -> Tensor:
        """Raw logits [N, rows] of this device's vocabulary rows."""
        share = self._shares[self.plan.shape.head_row]
        assert isinstance(share, HeadShare)
        return head_part(x_NW, share, self.config)

    def _rows(self) -> Iterator[int]:
        plan = self.plan
        return (r for r in range(plan.shape.num_rows) if plan.cells[r][self._index])

    def _row_keys(self, row: int) -> list[WeightKey]:
        plan, width = self.plan, self.config.head_width
        kind = plan.shape.row_kind(row)
        start, end = plan.unit_range(row, self._index)
        if kind == "head":
            return [
                self._vector("final_norm"),
                WeightKey((SliceKey("head", 0, start, end),), 0),
            ]
        prefix = f"layers.{row // 2}."
        if kind == "mlp":
            gate = SliceKey(prefix + "gate", 0, start, end)
            up = SliceKey(prefix + "up", 0, start, end)
            return [
                self._vector(prefix + "mlp_norm"),
                WeightKey((gate, up), 0),
                WeightKey((SliceKey(prefix + "down", 1, start, end),), 0),
            ]
        kv_start, kv_end = (n * width for n in plan.kv_head_range(row, self._index))
        query = SliceKey(prefix + "q", 0, start * width, end * width)
        key = SliceKey(prefix + "k", 0, kv_start, kv_end)
        value = SliceKey(prefix + "v", 0, kv_start, kv_end)
        output = SliceKey(prefix + "o", 1, start * width, end * width)
        return [
            self._vector(prefix + "attention_norm"),
            WeightKey((query, key, value), 0),
            WeightKey((output,), width),
        ]

    def _vector(self, name: str) -> WeightKey:
        return WeightKey((SliceKey(name, 0, 0, self.config.width),), 0)


def fetch_weights(
    store: WeightStore,
    keys: list[WeightKey],
    fetch: Callable[[SliceKey], RawBytes],
) -> None:
    """Fill a store from a function that has every slice at hand; for tests and one process."""
    for key in store.missing(keys):
        store.pack(key, [fetch(store.stored_slice(s)) for s in key.slices])
