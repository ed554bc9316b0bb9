"""Rotary position embeddings in both pair layouts.

T new tokens, H heads, D head width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine.model.config import RopeLayout


class RopeTable:
    """Cosines and sines of every position used so far; grows by doubling."""

    def __init__(self, head_width: int, theta: float, device: torch.device) -> None:
        """Args: head_width: even. theta: base of the geometric series of wavelengths."""
        exponents = torch.arange(0, head_width, 2, dtype=torch.int64).float() / head_width
        self._inverse_frequencies = (1.0 / (theta**exponents)).to(device)
        self._cos = torch.empty(0, head_width // 2, device=device)
        self._sin = torch.empty(0, head_width // 2, device=device)

    def rows(self, positions_T: Tensor, end_position: int) -> tuple[Tensor, Tensor]:
        """Cosine and sine of each position.

        Args:
            positions_T: int64 [T], each in [0, end_position).
        Returns: two float32 [T, D / 2].
        """
        if end_position > self._cos.shape[0]:
            self._grow(end_position)
        return self._cos[positions_T], self._sin[positions_T]

    def _grow(self, end_position: int) -> None:
        size = max(1024, 2 * self._cos.shape[0], end_position)
        device = self._inverse_frequencies.device
        positions = torch.arange(size, dtype=torch.float32, device=device)
        angles = torch.outer(positions, self._inverse_frequencies)
        self._cos, self._sin = angles.cos(), angles.sin()


def apply_rope(x_THD: Tensor, cos: Tensor, sin: Tensor, layout: RopeLayout) -> Tensor:
    """Rotate each pair of a head by its position's angle.

    Args:
        x_THD: float32 [T, H, D].
        cos, sin: float32 [T, D / 2].
        layout: "half" pairs (i, i + D/2), as Hugging Face Llama; "adjacent" pairs (2i, 2i + 1),
            as Meta and GGUF llama files.
    Returns: float32 [T, H, D] in the same layout.
    Source: arXiv 2104.09864.
    """
    cos, sin = cos[:, None, :], sin[:, None, :]
    if layout == "half":
        first, second = x_THD.chunk(2, dim=-1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    first, second = x_THD[..., 0::2], x_THD[..., 1::2]
    return torch.stack((first * cos - second * sin, second * cos + first * sin), dim=-1).flatten(-2)
