"""Rotary position embeddings: frequencies with every kind of scaling, both pair layouts.

A row of a table is a function of its position alone, so that any cut of a text into pieces gives
the same rotation. T new tokens, H heads, D head width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from engine.model.config import Rope, RopeLayout


def inverse_frequencies(rope: Rope, head_width: int) -> Tensor:
    """Angle per position of every pair, before anything that depends on the position.

    Args:
        head_width: even.
    Returns: float32 [D / 2].
    Source: arXiv 2104.09864; linear: arXiv 2306.15595; yarn: arXiv 2309.00071; llama3: the rule
        that Llama 3.1 was published with.
    """
    exponents = torch.arange(0, head_width, 2, dtype=torch.int64).float() / head_width
    frequencies = 1.0 / (rope.theta**exponents)
    if rope.kind == "linear":
        return frequencies / rope.factor
    if rope.kind == "factors":
        return frequencies / torch.tensor(rope.factors, dtype=torch.float32)
    if rope.kind == "llama3":
        return _llama3(rope, frequencies)
    if rope.kind == "yarn":
        return _yarn(rope, rope.theta**exponents)
    return frequencies


def _llama3(rope: Rope, frequencies: Tensor) -> Tensor:
    """Long waves are stretched by the factor, short ones kept, those between blended."""
    waves = 2 * math.pi / frequencies
    longest_kept = rope.original_positions / rope.high_factor
    shortest_stretched = rope.original_positions / rope.low_factor
    stretched = frequencies / rope.factor
    scaled = torch.where(waves > shortest_stretched, stretched, frequencies)
    if rope.high_factor == rope.low_factor:
        return scaled  # Llama 4 Scout: nothing lies between, and the blend would divide by zero.
    share = (rope.original_positions / waves - rope.low_factor) / (
        rope.high_factor - rope.low_factor
    )
    blended = (1 - share) * scaled / rope.factor + share * scaled
    is_between = (waves >= longest_kept) & (waves <= shortest_stretched)
    return torch.where(is_between, blended, scaled)


def _yarn(rope: Rope, powers: Tensor) -> Tensor:
    """Fast pairs are kept, slow ones stretched, with a linear ramp over the pairs between."""
    num_pairs = powers.shape[0]
    width = 2 * num_pairs

    def pair_of(rotations: float) -> float:
        """The pair, as a real number, that turns so often within the original context."""
        turns = rope.original_positions / (rotations * 2 * math.pi)
        return width * math.log(turns) / (2 * math.log(rope.theta))

    low, high = pair_of(rope.beta_fast), pair_of(rope.beta_slow)
    if rope.is_truncated:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    if low == high:
        high += 0.001  # A step instead of a ramp.
    ramp = ((torch.arange(num_pairs, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    kept = 1 - ramp
    return 1.0 / (rope.factor * powers) * (1 - kept) + 1.0 / powers * kept


class RopeTable:
    """Cosines and sines of every position used so far; grows by doubling."""

    def __init__(self, rope: Rope, head_width: int, device: torch.device) -> None:
        """Args: head_width: even."""
        self._rope = rope
        self._exponents = torch.arange(0, head_width, 2, dtype=torch.int64).float() / head_width
        self._head_width = head_width
        self._frequencies = inverse_frequencies(rope, head_width)
        self._device = device
        self._cos = torch.empty(0, head_width // 2, device=device)
        self._sin = torch.empty(0, head_width // 2, device=device)

    @property
    def num_positions(self) -> int:
        """Positions that are there without more memory."""
        return self._cos.shape[0]

    def run(self, first_position: int, end_position: int) -> tuple[Tensor, Tensor]:
        """Cosine and sine of positions that follow each other, two float32 [T, D / 2] views."""
        if end_position > self._cos.shape[0]:
            self._grow(end_position)
        return self._cos[first_position:end_position], self._sin[first_position:end_position]

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
        positions = torch.arange(size, dtype=torch.float32)
        if self._rope.kind == "dynamic":
            angles = positions[:, None] * self._dynamic_frequencies(positions + 1)
        else:
            angles = torch.outer(positions, self._frequencies)
        scale = self._rope.attention_factor
        self._cos = (angles.cos() * scale).to(self._device)
        self._sin = (angles.sin() * scale).to(self._device)

    def _dynamic_frequencies(self, lengths_T: Tensor) -> Tensor:
        """Frequencies of the text as long as it is at each position, float32 [T, D / 2].

        A key keeps the rotation it got when it came: decoding token by token does the same, and a
        prompt must not depend on how it is cut. Source: NTK-aware scaling, dynamic form.
        """
        rope = self._rope
        length = torch.clamp(lengths_T, min=rope.original_positions)
        growth = rope.factor * length / rope.original_positions - (rope.factor - 1)
        theta = rope.theta * growth ** (self._head_width / (self._head_width - 2))
        return 1.0 / (theta[:, None] ** self._exponents)


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


def temperature_scale(positions_T: Tensor, floor: int, strength: float) -> Tensor:
    """Scale of the queries of layers without RoPE at long range.

    Args:
        positions_T: absolute positions, int64, >= 0.
        floor: positions before the scale first changes (8192 in Llama 4).
        strength: factor of the logarithmic growth (0.1 in Llama 4).
    Returns: float32 [T]; 1 while position + 1 < floor.
    Source: arXiv 2501.19399; transformers models/llama4.
    """
    steps = torch.floor((positions_T.float() + 1.0) / floor)
    return torch.log1p(steps) * strength + 1.0
