"""A runner's side of loading: ask for slices a few at a time, pack each weight when it is whole.

In: weight slices in file format. Out: the next requests, and packed weights. The number of
requests under way is bounded, so a fast engine host cannot flood a slow runner.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import Tensor

from engine.cluster import messages as m
from engine.errors import ProtocolError
from engine.kernels.matrices import Matrix
from engine.model.shard import ModelShard
from engine.model.share_keys import SliceKey, WeightKey
from engine.model.weight_store import RawBytes, WeightStore
from engine.weights.formats import format_named, num_bytes

# Small enough that a link of some Mbit/s carries one within the time of a few heartbeats.
REQUESTS_UNDER_WAY = 4
CHUNK_BYTES = 512 << 10
PROGRESS_SECONDS = 0.1


class _Assembly:
    """A weight whose slices are coming in."""

    def __init__(self, key: WeightKey, store: WeightStore) -> None:
        self.key = key
        self.wide = [store.stored_slice(s) for s in key.slices]
        self.raw: list[RawBytes] = []
        self.missing_bytes = 0
        for wide in self.wide:
            size = store.stored_bytes(wide)
            self.missing_bytes += size
            shape = store.stored_shape(wide)
            rows = shape[0] if len(shape) > 1 else 1
            self.raw.append(np.empty((rows, size // rows), dtype=np.uint8))


class Loader:
    """Fetches what a shard needs and the previous load did not have."""

    def __init__(
        self,
        load: m.Load,
        shard: ModelShard,
        previous: Mapping[WeightKey, Matrix | Tensor],
        device: torch.device,
    ) -> None:
        """Args: previous: packed weights of the same checkpoint and dtype."""
        self._epoch = load.epoch
        self._tensors = {info.name: info for info in load.tensors}
        self.store = WeightStore(self._tensors, load.dtype, device, previous)
        keys = list(dict.fromkeys(shard.weight_keys()))
        self._waiting = deque(self.store.missing(keys))
        self._requests: deque[tuple[SliceKey, _Assembly, int]] = deque()
        self._under_way: dict[SliceKey, tuple[_Assembly, int]] = {}
        self._num_open = 0
        self.total_bytes = sum(
            self.store.stored_bytes(self.store.stored_slice(s))
            for key in self._waiting
            for s in key.slices
        )
        self.done_bytes = 0
        self._reported_at = 0.0

    @property
    def is_complete(self) -> bool:
        """Whether every weight is packed."""
        return not (self._waiting or self._requests or self._under_way or self._num_open)

    @property
    def packed_bytes(self) -> int:
        """Memory of all packed weights."""
        return sum(
            w.nbytes if isinstance(w, Tensor) else w.num_bytes for w in self.store.packed.values()
        )

    def first_requests(self) -> list[m.Message]:
        """What to send to begin with."""
        return self._next_requests()

    def take_slice(self, message: m.WeightSlice, tensors: list[m.Array]) -> list[m.Message]:
        """Put a slice where it belongs.

        Returns: what to send now: further requests, progress.
        Raises: ProtocolError: the slice was not asked for, or has another size.
        """
        if message.epoch != self._epoch:
            return []
        chunk = SliceKey(message.name, message.axis, message.start, message.end)
        if chunk not in self._under_way or len(tensors) != 1:
            raise ProtocolError(f"weight slice {chunk} was not asked for")
        assembly, index = self._under_way.pop(chunk)
        size = self.store.stored_bytes(chunk)
        m.expect_tensor(tensors[0], "uint8", (size,), f"weight slice {chunk.name}")
        self._write(assembly, index, chunk, tensors[0])
        self.done_bytes += size
        assembly.missing_bytes -= size
        if not assembly.missing_bytes:
            self.store.pack(assembly.key, assembly.raw)
            self._num_open -= 1
        replies = self._next_requests()
        now = time.monotonic()
        if now - self._reported_at > PROGRESS_SECONDS or self.is_complete:
            self._reported_at = now
            replies.append(
                m.LoadProgress(
                    epoch=self._epoch, done_bytes=self.done_bytes, total_bytes=self.total_bytes
                )
            )
        return replies

    def _write(self, assembly: _Assembly, index: int, chunk: SliceKey, data: m.Array) -> None:
        wide, raw = assembly.wide[index], assembly.raw[index]
        if len(self._tensors[chunk.name].shape) == 1:
            raw[0] = data
        elif chunk.axis == 0:
            raw[chunk.start - wide.start : chunk.end - wide.start] = data.reshape(-1, raw.shape[1])
        else:
            format_name = self._tensors[chunk.name].format
            start = num_bytes(format_name, (chunk.start - wide.start,))
            end = num_bytes(format_name, (chunk.end - wide.start,))
            raw[:, start:end] = data.reshape(raw.shape[0], -1)

    def _next_requests(self) -> list[m.Message]:
        requests: list[m.Message] = []
        while len(self._under_way) < REQUESTS_UNDER_WAY:
            if not self._requests:
                if not self._waiting:
                    break
                assembly = _Assembly(self._waiting.popleft(), self.store)
                self._num_open += 1
                for index, wide in enumerate(assembly.wide):
                    self._requests.extend((c, assembly, index) for c in self._chunks(wide))
                continue
            chunk, assembly, index = self._requests.popleft()
            self._under_way[chunk] = (assembly, index)
            requests.append(
                m.WeightRequest(
                    epoch=self._epoch,
                    name=chunk.name,
                    axis=chunk.axis,
                    start=chunk.start,
                    end=chunk.end,
                )
            )
        return requests

    def _chunks(self, wide: SliceKey) -> Iterator[SliceKey]:
        """Cut a slice into requests of bounded size."""
        info = self._tensors[wide.name]
        length = wide.end - wide.start
        if len(info.shape) == 1:
            yield wide
            return
        block = format_named(info.format).block_size if wide.axis == 1 else 1
        per_unit = max(1, self.store.stored_bytes(wide) // length)
        step = max(block, CHUNK_BYTES // per_unit // block * block)
        for start in range(wide.start, wide.end, step):
            yield wide._replace(start=start, end=min(start + step, wide.end))
