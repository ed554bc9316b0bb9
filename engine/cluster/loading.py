"""A runner's side of loading: finds every weight where it is nearest, packs each when it is whole.

In: a plan's share, and what the engine host sends. Out: requests to the engine host, and packed
weights. Weights are looked for in this order: packed in memory (by `WeightStore`), a copy of the
model on this computer, the node's disk cache, the engine host. Whatever is not proven to be the
model's own file is checked by content hash, unit by unit.

Requests under way are bounded, so a fast engine host cannot flood a slow runner, and so is the work
of one call, so that the runner goes on listening.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise
from types import TracebackType
from typing import Self

import numpy as np
import torch
from torch import Tensor

from engine.cluster import messages as m
from engine.cluster.load_pieces import Assembly, Fetch, HashesKey, PartSlice, Piece
from engine.cluster.local_copies import open_local_copy
from engine.cluster.slice_cache import SliceCache
from engine.cluster.weight_transfer import CHUNK_BYTES
from engine.errors import ProtocolError
from engine.kernels.matrices import Matrix
from engine.model.content_units import SUM_BYTES, content_sum, units_of
from engine.model.shard import ModelShard
from engine.model.share_keys import SliceKey, WeightKey
from engine.model.weight_store import WeightStore
from engine.weights.formats import format_named, num_bytes

REQUESTS_UNDER_WAY = 32
BYTES_UNDER_WAY = 4 * CHUNK_BYTES
# Units are looked for in pieces of this size: some milliseconds of reading and hashing.
PIECE_BYTES = 4 << 20
HASHES_AHEAD = 16
PROGRESS_SECONDS = 0.1


class Loader:
    """Brings in what a shard needs and the previous load did not have.

    Attributes:
        total_bytes: what must be brought in, in file format; `done_bytes` is at hand.
        received_bytes, cached_bytes, local_bytes: of that, by where it came from.
    """

    def __init__(
        self,
        load: m.Load,
        shard: ModelShard,
        previous: Mapping[WeightKey, Matrix | Tensor],
        device: torch.device,
        open_cache: Callable[[], SliceCache],
        is_host_here: bool = False,
    ) -> None:
        """Look for a copy of the model on this computer.

        Args:
            previous: packed weights of the same checkpoint and dtype.
            open_cache: called when the cache is needed; `close` closes it.
            is_host_here: whether the engine host is this computer's own.
        """
        self._epoch = load.epoch
        self._tensors = {info.name: info for info in load.tensors}
        self._head_width, self._shape = load.config.head_width, load.plan.shape
        self.store = WeightStore(self._tensors, load.dtype, device, previous)
        missing = self.store.missing(list(dict.fromkeys(shard.weight_keys())))
        self.total_bytes = sum(
            self.store.stored_bytes(self.store.stored_slice(s))
            for key in missing
            for s in key.slices
        )
        self.done_bytes = self.received_bytes = self.cached_bytes = self.local_bytes = 0
        self._reported_at = 0.0
        self._num_missing = len(missing)
        self._pieces = self._cut(missing)
        self._looking: deque[Piece] = deque()
        self._asked: dict[HashesKey, Piece] = {}
        self._requests: deque[tuple[SliceKey, int, Fetch]] = deque()
        self._under_way: dict[SliceKey, tuple[int, Fetch]] = {}
        self._bytes_under_way = 0
        self._copy = open_local_copy(load, is_host_here) if missing else None
        self._cache: SliceCache | None = None
        if missing and (self._copy is None or not self._copy.is_proven):
            self._cache = open_cache()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def is_complete(self) -> bool:
        """Whether every weight is packed."""
        return not self._num_missing

    @property
    def packed_bytes(self) -> int:
        """Memory of all packed weights."""
        return sum(
            w.nbytes if isinstance(w, Tensor) else w.num_bytes for w in self.store.packed.values()
        )

    def close(self) -> None:
        """Commit the cache and release all files; a second call does nothing."""
        self._drop_copy()
        if self._cache is not None:
            self._cache.close()
            self._cache = None

    def work(self) -> bool:
        """Look for some bytes on this computer; False when only messages bring this on.

        Raises: CheckpointError: the copy on this computer cannot be read.
        """
        is_fed = len(self._under_way) >= REQUESTS_UNDER_WAY or (
            self._bytes_under_way >= BYTES_UNDER_WAY
        )
        if is_fed or self._requests or not self._looking:
            return False
        if self._looking[0].sums is None and not self._reads_unchecked:
            return False
        self._look_for(self._looking.popleft())
        return True

    def rest(self) -> None:
        """Nothing comes at the moment: make what came safe from a sudden end."""
        if self._cache is not None:
            self._cache.commit()

    def messages(self) -> list[m.Message]:
        """What to send now: requests, progress."""
        found: list[m.Message] = []
        while len(self._looking) < HASHES_AHEAD:
            piece = next(self._pieces, None)
            if piece is None:
                break
            self._looking.append(piece)
            if not self._reads_unchecked:
                found.append(self._hashes_request(piece))
        while self._requests and len(self._under_way) < REQUESTS_UNDER_WAY:
            key, size, fetch = self._requests[0]
            if self._under_way and self._bytes_under_way + size > BYTES_UNDER_WAY:
                break
            self._requests.popleft()
            self._under_way[key] = (size, fetch)
            self._bytes_under_way += size
            found.append(
                m.WeightRequest(
                    epoch=self._epoch, name=key.name, axis=key.axis, start=key.start, end=key.end
                )
            )
        now = time.monotonic()
        is_due = now - self._reported_at > PROGRESS_SECONDS or self.is_complete
        if self.total_bytes and is_due:
            self._reported_at = now
            found.append(
                m.LoadProgress(
                    epoch=self._epoch, done_bytes=self.done_bytes, total_bytes=self.total_bytes
                )
            )
        return found

    def take(self, message: m.WeightSlice | m.SliceHashes, tensors: list[m.Array]) -> None:
        """Use an answer of the engine host.

        Raises: ProtocolError: it was not asked for, has another size, or other bytes than its hash.
        """
        if message.epoch != self._epoch:
            return
        if isinstance(message, m.SliceHashes):
            self._take_sums(message, tensors)
        else:
            self._take_slice(message, tensors)

    # ---- cutting -----------------------------------------------------------------------------

    def _cut(self, keys: list[WeightKey]) -> Iterator[Piece]:
        for key in keys:
            assembly = Assembly(key, [self._slice(s) for s in key.slices])
            for part in assembly.slices:
                step = max(1, PIECE_BYTES // part.units.unit_bytes)
                for first in range(part.first_unit, part.end_unit, step):
                    yield Piece(assembly, part, first, min(first + step, part.end_unit))

    def _slice(self, narrow: SliceKey) -> PartSlice:
        wide = self.store.stored_slice(narrow)
        shape = self.store.stored_shape(wide)
        units = units_of(self._tensors[wide.name], self._head_width, self._shape)
        return PartSlice(wide, units, self.store.stored_bytes(wide), shape[0] if shape[1:] else 1)

    def _hashes_request(self, piece: Piece) -> m.HashesRequest:
        wide, unit = piece.part.wide, piece.part.units.size
        key = HashesKey(wide.name, wide.axis, unit, piece.first, piece.end)
        self._asked[key] = piece
        return m.HashesRequest(
            epoch=self._epoch,
            name=key.name,
            axis=key.axis,
            unit=key.unit,
            start=key.start,
            end=key.end,
        )

    # ---- looking on this computer ------------------------------------------------------------

    @property
    def _reads_unchecked(self) -> bool:
        return self._copy is not None and self._copy.is_proven

    def _look_for(self, piece: Piece) -> None:
        if self._reads_unchecked:
            self._read_copy(piece)
            self._took(piece.assembly, piece.part.view(piece.first, piece.end).nbytes, "local")
            return
        missing = list(range(piece.first, piece.end))
        if self._copy is not None:
            missing = self._check_copy(piece)
        missing = self._read_cache(piece, missing)
        for first, end in _runs(missing):
            self._fetch(piece, first, end)

    def _read_copy(self, piece: Piece) -> None:
        assert self._copy is not None
        view = piece.part.view(piece.first, piece.end)
        view[...] = self._copy.read(*piece.part.key(piece.first, piece.end)).reshape(view.shape)

    def _check_copy(self, piece: Piece) -> list[int]:
        """Read units whose content is right; returns the others, and drops a copy that has any."""
        assert piece.sums is not None
        self._read_copy(piece)
        for unit in range(piece.first, piece.end):
            view = piece.part.view(unit, unit + 1)
            if content_sum(view) != piece.sums[unit - piece.first]:
                self._drop_copy()
                return list(range(unit, piece.end))
            self._took(piece.assembly, view.nbytes, "local")
        return []

    def _read_cache(self, piece: Piece, wanted: list[int]) -> list[int]:
        """Take units from the cache; returns those that are not there."""
        assert piece.sums is not None
        if self._cache is None or not wanted:
            return wanted
        sums = {unit: piece.sums[unit - piece.first] for unit in wanted}
        found = self._cache.read(list(sums.values()))
        missing: list[int] = []
        for unit, content in sums.items():
            data = found.get(content)
            view = piece.part.view(unit, unit + 1)
            if data is None or data.nbytes != view.nbytes:
                missing.append(unit)
                continue
            view[...] = np.frombuffer(data, np.uint8).reshape(view.shape)
            self._took(piece.assembly, view.nbytes, "cached")
        return missing

    def _drop_copy(self) -> None:
        if self._copy is not None:
            self._copy.close()
            self._copy = None

    # ---- fetching from the engine host -------------------------------------------------------

    def _fetch(self, piece: Piece, first: int, end: int) -> None:
        """Queue requests for consecutive units, each of bounded size."""
        units = piece.part.units
        per_fetch = max(1, CHUNK_BYTES // units.unit_bytes)
        for start in range(first, end, per_fetch):
            fetch = Fetch(piece, start, min(start + per_fetch, end))
            wide = piece.part.key(fetch.first, fetch.end)
            length = wide.end - wide.start
            step = length
            if units.unit_bytes > CHUNK_BYTES:
                info = self._tensors[wide.name]
                block = 1 if units.is_rows else format_named(info.format).block_size
                per_element = max(1, units.unit_bytes // units.size)
                step = max(block, CHUNK_BYTES // per_element // block * block)
            for bound in range(wide.start, wide.end, step):
                key = wide._replace(start=bound, end=min(bound + step, wide.end))
                self._requests.append((key, self.store.stored_bytes(key), fetch))
                fetch.num_open += 1

    def _take_sums(self, message: m.SliceHashes, tensors: list[m.Array]) -> None:
        key = HashesKey(message.name, message.axis, message.unit, message.start, message.end)
        piece = self._asked.pop(key, None)
        if piece is None or len(tensors) != 1:
            raise ProtocolError(f"hashes of {key.name} {key.start}-{key.end} were not asked for")
        shape = (key.end - key.start, SUM_BYTES)
        sums = m.expect_tensor(tensors[0], "uint8", shape, f"hashes of {key.name}")
        piece.sums = [row.tobytes() for row in sums]

    def _take_slice(self, message: m.WeightSlice, tensors: list[m.Array]) -> None:
        key = SliceKey(message.name, message.axis, message.start, message.end)
        if key not in self._under_way or len(tensors) != 1:
            raise ProtocolError(f"weight slice {key} was not asked for")
        size, fetch = self._under_way.pop(key)
        self._bytes_under_way -= size
        m.expect_tensor(tensors[0], "uint8", (size,), f"weight slice {key.name}")
        self._write(fetch.piece.part, key, tensors[0])
        fetch.num_open -= 1
        if not fetch.num_open:
            self._verify(fetch)

    def _write(self, part: PartSlice, key: SliceKey, data: m.Array) -> None:
        start, end = key.start - part.wide.start, key.end - part.wide.start
        if part.units.is_rows:
            part.grid[start:end] = data.reshape(end - start, -1)
            return
        entry = self._tensors[key.name].format
        first_byte, end_byte = num_bytes(entry, (start,)), num_bytes(entry, (end,))
        part.grid[:, first_byte:end_byte] = data.reshape(part.grid.shape[0], -1)

    def _verify(self, fetch: Fetch) -> None:
        """Check units that are whole now, and keep them."""
        piece = fetch.piece
        assert piece.sums is not None
        for unit in range(fetch.first, fetch.end):
            data = np.ascontiguousarray(piece.part.view(unit, unit + 1))
            wanted = piece.sums[unit - piece.first]
            if content_sum(data) != wanted:
                wrong = piece.part.key(unit, unit + 1)
                raise ProtocolError(
                    f"elements {wrong.start}-{wrong.end} along axis {wrong.axis} of {wrong.name} "
                    "arrived with other bytes than their content hash says. Open the model again "
                    "if its file was changed"
                )
            if self._cache is not None:
                self._cache.put(wanted, data.tobytes())
            self._took(piece.assembly, data.nbytes, "received")

    def _took(self, assembly: Assembly, num_bytes: int, source: str) -> None:
        """Count bytes that are in their place; pack the weight when it is whole."""
        self.done_bytes += num_bytes
        if source == "local":
            self.local_bytes += num_bytes
        elif source == "cached":
            self.cached_bytes += num_bytes
        else:
            self.received_bytes += num_bytes
        assembly.missing_bytes -= num_bytes
        if not assembly.missing_bytes:
            self.store.pack(assembly.key, [part.grid for part in assembly.slices])
            self._num_missing -= 1


def _runs(units: list[int]) -> Iterator[tuple[int, int]]:
    """Half-open ranges of consecutive numbers in an ascending list."""
    if not units:
        return
    first = units[0]
    for before, unit in pairwise(units):
        if unit != before + 1:
            yield first, before + 1
            first = unit
    yield first, units[-1] + 1
