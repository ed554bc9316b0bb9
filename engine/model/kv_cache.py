"""Keys and values of past tokens, per slot and layer, for the KV heads a device holds.

A slot is one sequence's place. Its tensors grow by doubling up to the window and are dropped when
the slot is freed. H kv heads of this device, S cached tokens, D head width.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from engine.errors import CacheFull, ProtocolError

FIRST_CAPACITY = 256


class LayerCache:
    """Keys and values of one layer of one slot."""

    def __init__(self, num_heads: int, head_width: int, dtype: torch.dtype, device: torch.device):
        """Args: num_heads: KV heads held here, at least 1."""
        self._shape = (num_heads, 0, head_width)
        self._keys = torch.empty(self._shape, dtype=dtype, device=device)
        self._values = torch.empty(self._shape, dtype=dtype, device=device)

    def append(
        self, first_position: int, keys_THD: Tensor, values_THD: Tensor, window: int
    ) -> tuple[Tensor, Tensor]:
        """Write new tokens at their positions; whatever was there or later is gone.

        Returns: keys and values [H, S, D] of positions 0 up to the last new one, as views.
        """
        end = first_position + keys_THD.shape[0]
        if end > self._keys.shape[1]:
            self._grow(end, first_position, window)
        self._keys[:, first_position:end] = keys_THD.transpose(0, 1)
        self._values[:, first_position:end] = values_THD.transpose(0, 1)
        return self._keys[:, :end], self._values[:, :end]

    @property
    def num_bytes(self) -> int:
        """Memory held."""
        return self._keys.nbytes + self._values.nbytes

    def _grow(self, needed: int, kept: int, window: int) -> None:
        capacity = max(FIRST_CAPACITY, 2 * self._keys.shape[1], needed)
        capacity = max(min(capacity, window), needed)
        for name in ("_keys", "_values"):
            old: Tensor = getattr(self, name)
            new = old.new_empty(old.shape[0], capacity, old.shape[2])
            new[:, :kept] = old[:, :kept]
            setattr(self, name, new)


class KVCache:
    """All slots of one device."""

    def __init__(
        self,
        kv_heads_by_layer: Mapping[int, int],
        head_width: int,
        window: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Args: kv_heads_by_layer: KV heads held here, for each layer with any."""
        self.window = window
        self._kv_heads_by_layer = dict(kv_heads_by_layer)
        self._head_width = head_width
        self._dtype = dtype
        self._device = device
        self._lengths: dict[int, int] = {}
        self._layers: dict[int, dict[int, LayerCache]] = {}

    def extend(self, slot: int, first_position: int, token_count: int) -> None:
        """Announce new tokens of a slot; a slot begins to exist with position 0.

        Raises:
            ProtocolError: the tokens do not follow those already there.
            CacheFull: they pass the window.
        """
        length = self._lengths.get(slot, 0)
        if first_position != length:
            raise ProtocolError(f"slot {slot}: expected position {length}, got {first_position}")
        if first_position + token_count > self.window:
            raise CacheFull(
                f"slot {slot} needs {first_position + token_count:,} positions, its window has "
                f"{self.window:,}. Shorten the prompt, or raise --kv-window"
            )
        self._lengths[slot] = first_position + token_count

    def layer(self, slot: int, layer: int) -> LayerCache:
        """The cache of one layer of a slot, made at first use."""
        layers = self._layers.setdefault(slot, {})
        if layer not in layers:
            layers[layer] = LayerCache(
                self._kv_heads_by_layer[layer], self._head_width, self._dtype, self._device
            )
        return layers[layer]

    def truncate(self, slot: int, length: int) -> None:
        """Forget positions from `length` on; a shorter slot stays as it is."""
        if slot in self._lengths:
            self._lengths[slot] = min(length, self._lengths[slot])

    def free(self, slot: int) -> None:
        """Drop a slot and its memory; an unknown slot is already free."""
        self._lengths.pop(slot, None)
        self._layers.pop(slot, None)

    @property
    def num_slots(self) -> int:
        """Slots that hold tokens."""
        return len(self._lengths)

    @property
    def num_bytes(self) -> int:
        """Memory held by all slots."""
        return sum(c.num_bytes for layers in self._layers.values() for c in layers.values())
