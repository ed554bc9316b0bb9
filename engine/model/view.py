"""What a layer can see of the past, and the memory that takes, in plain numbers.

A `View` is a layer's rule under a KV window. Each layer keeps what its view can still see, in a
ring. Pure: no torch, so that the engine host can state memory before anything is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from engine.model.config import CacheDtype, Layer, ModelConfig

# Positions a conversation remembers where nobody says otherwise; fewer where a model has fewer.
DEFAULT_WINDOW = 8192
FIRST_CAPACITY = 256
# Tokens of one slot in one step: what a ring holds beyond its view, so that a step's first query
# still sees all of it. The same room lets a slot be cut back.
LONGEST_STEP = 1024
CACHE_DTYPE_BYTES: dict[CacheDtype, int] = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, slots=True)
class View:
    """How far back a layer sees.

    Attributes:
        reach: the last `reach` positions, the query's own included, can be seen.
        chunk: and of these only those in the same chunk of so many positions; 0 for no chunks.
    """

    reach: int
    chunk: int = 0

    @classmethod
    def of_layer(cls, layer: Layer, kv_window: int) -> View:
        """A layer's rule, as far as the KV window lets it see."""
        if layer.reach == "sliding":
            return cls(min(layer.span, kv_window))
        if layer.reach == "chunked":
            return cls(min(layer.span, kv_window), layer.span)
        return cls(kv_window)

    def first_visible(self, position: int) -> int:
        """The earliest position that a query at `position` sees."""
        first = max(0, position - self.reach + 1)
        return max(first, position // self.chunk * self.chunk) if self.chunk else first

    @property
    def ring_capacity(self) -> int:
        """Positions that a layer's ring holds when it is full."""
        return self.reach + LONGEST_STEP

    def held_positions(self, num_positions: int) -> int:
        """Positions for which a layer has memory after so many tokens."""
        capacity = FIRST_CAPACITY
        while capacity < num_positions:
            capacity *= 2
        return min(capacity, self.ring_capacity)


def can_truncate(config: ModelConfig, kv_window: int, num_written: int, length: int) -> bool:
    """Whether a slot may be cut back to `length`.

    What a query at `length` must see has to be there still: always while nothing has left any
    ring, else within the room of one step.

    Args:
        num_written: the most tokens that the slot ever had, before earlier cuts too.
    """
    reaches = [View.of_layer(layer, kv_window).reach for layer in config.layers]
    return num_written <= min(reaches) + LONGEST_STEP or num_written - length <= LONGEST_STEP


def cache_bytes(
    config: ModelConfig,
    kv_heads_by_layer: Mapping[int, int],
    kv_window: int,
    dtype: CacheDtype,
    num_positions: int,
) -> int:
    """Memory of one slot after so many tokens, in bytes, before it is used."""
    per_position = 2 * config.head_width * CACHE_DTYPE_BYTES[dtype]
    return per_position * sum(
        heads * View.of_layer(config.layers[n], kv_window).held_positions(num_positions)
        for n, heads in kv_heads_by_layer.items()
    )
