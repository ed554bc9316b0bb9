"""The shape of a model: plain numbers, no torch, so that every process can hold one.

Built by `engine.weights` from a file's metadata, sent to runners, read by the plan and the window.
"""

from __future__ import annotations

import math
from typing import Literal

import msgspec

from engine.errors import ConfigError

RopeLayout = Literal["half", "adjacent"]

MAX_LAYERS = 1024
MAX_WIDTH = 1 << 20


class ModelConfig(
    msgspec.Struct, frozen=True, kw_only=True, array_like=True, forbid_unknown_fields=True
):
    """Sizes and constants of a LLaMA-style decoder.

    Attributes:
        rope_layout: "half" rotates pairs (i, i + D/2), as Hugging Face Llama does; "adjacent"
            rotates (2i, 2i + 1), as Meta and the GGUF llama family do.
        max_positions: the trained context length, in tokens.
    """

    family: str
    width: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_width: int
    mlp_width: int
    vocab_size: int
    norm_epsilon: float
    rope_theta: float
    rope_layout: RopeLayout
    max_positions: int
    is_head_tied: bool

    @property
    def heads_per_kv(self) -> int:
        """Query heads that share one KV head."""
        return self.num_heads // self.num_kv_heads

    def validate(self) -> ModelConfig:
        """Return self, or raise.

        Raises: ConfigError: names the field, its value and the rule it breaks.
        """
        bounds = {
            "width": MAX_WIDTH,
            "num_layers": MAX_LAYERS,
            "num_heads": 4096,
            "num_kv_heads": 4096,
            "head_width": 4096,
            "mlp_width": MAX_WIDTH,
            "vocab_size": 1 << 22,
            "max_positions": 1 << 30,
        }
        for field, limit in bounds.items():
            value = getattr(self, field)
            if not 1 <= value <= limit:
                raise ConfigError(f"{field} {value} is not between 1 and {limit:,}")
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"num_kv_heads {self.num_kv_heads} does not divide num_heads {self.num_heads}"
            )
        if self.head_width % 2:
            raise ConfigError(f"head_width {self.head_width} is odd; RoPE rotates pairs")
        for field in ("norm_epsilon", "rope_theta"):
            value = getattr(self, field)
            if not (math.isfinite(value) and value > 0):
                raise ConfigError(f"{field} {value} is not a positive number")
        return self
