"""Keys and values of past tokens, per slot and layer, for the KV heads a device holds.

A slot is one sequence's place. Each layer keeps what its view can still see, in a ring that grows
by doubling up to view + longest step, and is dropped when the slot is freed. Positions go on
counting when the oldest leave. H kv heads of this device, S cached tokens, D head width.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.errors import CacheFull, ProtocolError
from engine.model.batch import Segment
from engine.model.config import CacheDtype, ModelConfig
from engine.model.device_memory import free_bytes
from engine.model.view import FIRST_CAPACITY, LONGEST_STEP, View, cache_bytes, can_truncate

# An engine host uses some 70.
MAX_SLOTS = 4096
# Numbers of a layer's place: addresses of its keys and of its values [H, S, D], and S.
PLACE_NUMBERS = 3

CACHE_DTYPES: dict[CacheDtype, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def new_place() -> memoryview[int]:
    """Memory for the numbers of one layer's place."""
    return memoryview(array("q", [0] * PLACE_NUMBERS))


@dataclass(frozen=True, slots=True)
class CachedKeys:
    """What new tokens attend over.

    Attributes:
        keys, values: [H, S, D] views, in the cache's dtype.
        first_position: of the first key, when they lie in order; None in a ring that has wrapped.
        positions: int64 [S] for a wrapped ring, else None.
    """

    keys: Tensor
    values: Tensor
    first_position: int | None
    positions: Tensor | None


class LayerCache:
    """Keys and values of one layer of one slot."""

    def __init__(
        self,
        num_heads: int,
        head_width: int,
        view: View,
        dtype: torch.dtype,
        device: torch.device,
        place: memoryview[int],
    ) -> None:
        """Args:
        num_heads: KV heads held here, at least 1.
        place: where the PLACE_NUMBERS of this layer are always to be read.
        """
        self.view = view
        self._limit = view.ring_capacity
        self._place = place
        shape = (num_heads, 0, head_width)
        self._keys = torch.empty(shape, dtype=dtype, device=device)
        self._values = torch.empty(shape, dtype=dtype, device=device)
        self._hold(self._keys, self._values)

    def append(self, first_position: int, keys_THD: Tensor, values_THD: Tensor) -> CachedKeys:
        """Write new tokens at their positions; whatever was there or later is gone.

        Args:
            keys_THD: at most LONGEST_STEP tokens.
        Returns: everything that they may see, and perhaps more: the mask decides.
        """
        count = keys_THD.shape[0]
        end = first_position + count
        self.reserve(end)
        capacity = self._keys.shape[1]
        start = first_position % capacity
        fits = min(count, capacity - start)
        for held, new in ((self._keys, keys_THD), (self._values, values_THD)):
            held[:, start : start + fits] = new[:fits].transpose(0, 1)
            if fits < count:
                held[:, : count - fits] = new[fits:].transpose(0, 1)
        if end <= capacity:
            first = self.view.first_visible(first_position)
            return CachedKeys(self._keys[:, first:end], self._values[:, first:end], first, None)
        # The slot at index i holds the latest position that is i modulo the capacity. After a cut
        # some are older than that says, and out of every view: see `can_truncate`.
        index = torch.arange(capacity, device=self._keys.device)
        positions = end - 1 - (end - 1 - index) % capacity
        return CachedKeys(self._keys, self._values, None, positions)

    def reserve(self, end_position: int) -> int:
        """Room for all positions before `end_position`, or for as many as the ring ever holds.

        Returns: the position up to which no more room is needed.
        """
        if self._keys.shape[1] < min(end_position, self._limit):
            self._grow(end_position)
        capacity = self._keys.shape[1]
        return capacity if capacity < self._limit else sys.maxsize

    def copied_positions(self, length: int, num_written: int) -> int:
        """Positions that a copy of the first `length` has memory for.

        Args:
            num_written: the most tokens that the slot ever had.
        """
        capacity = self._keys.shape[1]
        # A ring that has wrapped goes whole: in a shorter one each position had another place.
        has_wrapped = capacity == self._limit and num_written > capacity
        return capacity if has_wrapped else min(self.view.held_positions(length), capacity)

    def copied_bytes(self, length: int, num_written: int) -> int:
        """Memory that a copy of the first `length` positions takes."""
        heads, _, width = self._keys.shape
        num_positions = self.copied_positions(length, num_written)
        return 2 * heads * num_positions * width * self._keys.element_size()

    def copy(self, length: int, num_written: int, place: memoryview[int]) -> LayerCache:
        """Another cache that holds the first `length` positions, as after a cut back to them."""
        heads, _, width = self._keys.shape
        twin = LayerCache(heads, width, self.view, self._keys.dtype, self._keys.device, place)
        num_positions = self.copied_positions(length, num_written)
        twin._hold(
            self._keys[:, :num_positions].clone(memory_format=torch.contiguous_format),
            self._values[:, :num_positions].clone(memory_format=torch.contiguous_format),
        )
        return twin

    @property
    def num_bytes(self) -> int:
        """Memory held."""
        return self._keys.nbytes + self._values.nbytes

    def _grow(self, needed: int) -> None:
        # Not a ring yet: position p lies at index p.
        capacity = self.view.held_positions(needed)
        grown: list[Tensor] = []
        for old in (self._keys, self._values):
            new = old.new_empty(old.shape[0], capacity, old.shape[2])
            new[:, : old.shape[1]] = old
            grown.append(new)
        self._hold(*grown)

    def _hold(self, keys: Tensor, values: Tensor) -> None:
        """Keep these from now on, contiguous [H, S, D]."""
        self._keys, self._values = keys, values
        self._place[0], self._place[1] = keys.data_ptr(), values.data_ptr()
        self._place[2] = keys.shape[1]


class _Places:
    """The places of all layers of one slot, in memory that native kernels read."""

    def __init__(self, layers: Sequence[int]) -> None:
        self.numbers = array("q", [0] * PLACE_NUMBERS * len(layers))
        # Positions up to which so many layers need no more room.
        self.reserved: dict[tuple[int, ...], int] = {}
        self._index = {layer: n for n, layer in enumerate(layers)}

    def of_layer(self, layer: int) -> memoryview[int]:
        first = PLACE_NUMBERS * self._index[layer]
        return memoryview(self.numbers)[first : first + PLACE_NUMBERS]


class KVCache:
    """All slots of one device."""

    def __init__(
        self,
        config: ModelConfig,
        kv_heads_by_layer: Mapping[int, int],
        window: int,
        dtype: CacheDtype,
        device: torch.device,
    ) -> None:
        """Args: kv_heads_by_layer: KV heads held here, for each layer with any."""
        self.window = window
        self._head_width = config.head_width
        self._kv_heads_by_layer = dict(kv_heads_by_layer)
        self._views = {n: View.of_layer(config.layers[n], window) for n in kv_heads_by_layer}
        self.dtype: CacheDtype = dtype
        self._torch_dtype = CACHE_DTYPES[dtype]
        self._device = device
        self._config = config
        self._lengths: dict[int, int] = {}
        self._written: dict[int, int] = {}
        self._layers: dict[int, dict[int, LayerCache]] = {}
        self._places: dict[int, _Places] = {}
        # Positions that every ring holds before its oldest leave.
        self._unbroken = (
            min(view.ring_capacity for view in self._views.values()) if self._views else 0
        )
        # Positions up to which a slot takes no more memory than it has.
        self._room: dict[int, int] = {}
        # None: to be counted again.
        self._num_bytes: int | None = None

    def check(self, segments: Sequence[Segment]) -> None:
        """Whether a step's segments follow what is there, and there is memory for them.

        Args: segments: of different slots.
        Raises:
            ProtocolError: a segment leaves a gap, repeats a position, or opens a slot too many.
            CacheFull: the keys and values do not fit into the device's free memory.
        """
        growing: list[tuple[int, int]] = []
        for segment in segments:
            slot, end = segment.slot, segment.first_position + segment.token_count
            length = self._lengths.get(slot, 0)
            if segment.first_position != length:
                raise ProtocolError(
                    f"slot {slot}: expected position {length}, got {segment.first_position}"
                )
            if end > self._room.get(slot, 0):
                growing.append((slot, end))
        if not growing:
            return
        num_slots = len(self._lengths) + sum(slot not in self._lengths for slot, _ in growing)
        if num_slots > MAX_SLOTS:
            raise ProtocolError(f"a step opens {num_slots:,} slots, at most {MAX_SLOTS:,} are kept")
        needed = sum(
            self._bytes(end) - self._bytes(self._room.get(slot, 0)) for slot, end in growing
        )
        free = free_bytes(self._device) if needed > 0 else 0
        if needed > free:
            longest = max(end for _, end in growing)
            raise CacheFull(
                f"{longest:,} positions need {needed / 2**30:.1f} GiB more for keys and values, "
                f"{self._device} has {free / 2**30:.1f} GiB free. Lower --kv-window, or give this "
                "device fewer heads"
            )
        for slot, end in growing:
            self._room[slot] = _room(end)

    def _bytes(self, num_positions: int) -> int:
        """Memory of a slot that had so many positions."""
        if not num_positions:
            return 0
        return cache_bytes(
            self._config, self._kv_heads_by_layer, self.window, self.dtype, num_positions
        )

    def extend(self, slot: int, first_position: int, token_count: int) -> None:
        """Announce new tokens of a slot; a slot begins to exist with position 0.

        Raises: ProtocolError: the tokens do not follow those already there, or are too many.
        """
        length = self._lengths.get(slot, 0)
        if first_position != length:
            raise ProtocolError(f"slot {slot}: expected position {length}, got {first_position}")
        if token_count > LONGEST_STEP:
            raise ProtocolError(
                f"slot {slot}: {token_count:,} tokens in one step, at most {LONGEST_STEP:,} fit"
            )
        end = self._lengths[slot] = first_position + token_count
        self._written[slot] = max(end, self._written.get(slot, 0))

    @property
    def layers(self) -> list[int]:
        """The layers with KV heads here, in the order of their places."""
        return list(self._kv_heads_by_layer)

    def layer(self, slot: int, layer: int) -> LayerCache:
        """The cache of one layer of a slot, made at first use; to grow at once or not at all."""
        self._num_bytes = None
        layers = self._layers.setdefault(slot, {})
        if layer not in layers:
            layers[layer] = LayerCache(
                self._kv_heads_by_layer[layer],
                self._head_width,
                self._views[layer],
                self._torch_dtype,
                self._device,
                self._places_of(slot).of_layer(layer),
            )
        return layers[layer]

    def places(self, slot: int) -> array[int]:
        """Where the layers of a slot lie.

        Returns: PLACE_NUMBERS for each of `layers`, position p at p modulo the capacity; kept up to
            date as long as the slot lives. A layer that was never used has no memory.
        """
        return self._places_of(slot).numbers

    def reserve(self, slot: int, layers: tuple[int, ...], end_position: int) -> None:
        """Room for all positions of a slot before `end_position` in some layers held here."""
        reserved = self._places_of(slot).reserved
        if reserved.get(layers, 0) < end_position:
            held = [self.layer(slot, layer) for layer in layers]
            reserved[layers] = min(layer.reserve(end_position) for layer in held)

    def _places_of(self, slot: int) -> _Places:
        if slot not in self._places:
            self._places[slot] = _Places(self.layers)
        return self._places[slot]

    def can_take_back(self, segments: Sequence[Segment]) -> bool:
        """Whether steps could be computed and cut off again: no memory taken, nothing lost.

        Args: segments: of slots that are in use.
        """
        return all(
            s.first_position + s.token_count <= min(self._room.get(s.slot, 0), self._unbroken)
            for s in segments
        )

    def truncate(self, slot: int, length: int) -> None:
        """Forget positions from `length` on; a shorter slot stays as it is.

        Raises: ProtocolError: what the next token must see has left the ring.
        """
        if length >= self._lengths.get(slot, 0):
            return
        written = self._written[slot]
        if length < 0 or not can_truncate(self._config, self.window, written, length):
            raise ProtocolError(
                f"slot {slot} of {written:,} positions cannot be cut back to {length:,}"
            )
        self._lengths[slot] = length

    def copy(self, source: int, target: int, length: int) -> None:
        """Let a slot begin as another one does; what it held before is gone.

        Args:
            length: positions of the source to copy, at least 1.
        Raises:
            ProtocolError: the source does not hold them, or what the next token must see has left
                its ring; or it would be a slot too many.
            CacheFull: the copy does not fit into the device's free memory.
        """
        held = self._lengths.get(source, 0)
        if source == target or not 1 <= length <= held:
            raise ProtocolError(
                f"slot {target} cannot begin with {length:,} positions of slot {source}, which "
                f"holds {held:,}"
            )
        written = self._written[source]
        if not can_truncate(self._config, self.window, written, length):
            raise ProtocolError(
                f"the first {length:,} of {written:,} positions of slot {source} cannot be copied"
            )
        self.free(target)
        if len(self._lengths) >= MAX_SLOTS:
            raise ProtocolError(f"slot {target} is one too many, at most {MAX_SLOTS:,} are kept")
        layers = self._layers.get(source, {})
        needed = sum(layer.copied_bytes(length, written) for layer in layers.values())
        free = free_bytes(self._device)
        if needed > free:
            raise CacheFull(
                f"{length:,} positions need {needed / 2**30:.1f} GiB more for keys and values, "
                f"{self._device} has {free / 2**30:.1f} GiB free. Lower --kv-window, or give this "
                "device fewer heads"
            )
        places = self._places_of(target)
        self._layers[target] = {
            n: layer.copy(length, written, places.of_layer(n)) for n, layer in layers.items()
        }
        # Where a ring came whole, the copy is cut as its source would be: later cuts go by that.
        self._lengths[target], self._written[target] = length, written
        self._room[target] = _room(length)

    def free(self, slot: int) -> None:
        """Drop a slot and its memory; an unknown slot is already free."""
        self._num_bytes = None
        self._lengths.pop(slot, None)
        self._written.pop(slot, None)
        self._room.pop(slot, None)
        self._layers.pop(slot, None)
        self._places.pop(slot, None)

    @property
    def num_bytes(self) -> int:
        """Memory held by all slots."""
        if self._num_bytes is None:
            held = [c.num_bytes for layers in self._layers.values() for c in layers.values()]
            self._num_bytes = sum(held)
        return self._num_bytes


def _room(num_positions: int) -> int:
    """Positions that a slot with so many has room for, before its views bound it."""
    room = FIRST_CAPACITY
    while room < num_positions:
        room *= 2
    return room
