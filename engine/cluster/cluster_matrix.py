"""A matrix cut by percentages over devices: the primitive to try ways of splitting with.

In: a matrix, percentages, a dimension. Out: products, sums and the whole, equal to those of one
tensor. Everything happens in this process; models are split by plans (`engine.plan`), not by this.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise
from typing import Self

import torch
from torch import Tensor

from engine.errors import ConfigError
from engine.plan.rounding import largest_remainder

# Typed numbers are rounded: three thirds read 33.3 + 33.3 + 33.3, or 0.33 + 0.33 + 0.33.
_TOLERANCE = Fraction(1, 100)


def share_fractions(percentages: Sequence[float]) -> list[Fraction]:
    """Percentages that sum to 100, or fractions that sum to 1, as exact fractions of 1.

    Args:
        percentages: each >= 0; the sum may be off by a hundredth of the whole.
    Raises: ConfigError: none, a negative or infinite number, or another sum.
    """
    numbers = list(percentages)
    shown = ", ".join(f"{number:g}" for number in numbers[:8]) + (", ..." if numbers[8:] else "")
    if not numbers or not all(math.isfinite(n) and n >= 0 for n in numbers):
        raise ConfigError(
            f"percentages [{shown}] are not numbers >= 0. Give one for each device, 0 for no share"
        )
    exact = [Fraction(number) for number in numbers]
    total = sum(exact, start=Fraction(0))
    for whole in (1, 100):
        if abs(total - whole) <= whole * _TOLERANCE:
            return [number / total for number in exact]
    raise ConfigError(
        f"percentages [{shown}] sum to {float(total):g}, they must sum to 100 (or, as fractions, "
        "to 1). Change them"
    )


def torch_device(name: str | torch.device) -> torch.device:
    """A device of this computer by name, such as "cpu" or "cuda:0".

    Raises: ConfigError: no such kind of device, or this computer has it not.
    """
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f'device {str(name)[:60]!r} is unknown; use "cpu" or "cuda:0"') from None
    num_gpus = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= num_gpus:
        raise ConfigError(
            f"device {name} was asked for, this computer has {num_gpus} GPUs that torch can use. "
            'Use "cpu"'
        )
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f'device {name} is not supported; use "cpu" or "cuda:0"')
    return device


class ClusterMatrix:
    """Shares of one matrix, side by side along a dimension; a share may be empty.

    Attributes:
        shards: the shares in order, each on its device.
        split_dim: 0 where rows are shared out, 1 where columns are.
    """

    def __init__(
        self,
        matrix: Tensor,
        percentages: Sequence[float],
        *,
        devices: Sequence[str | torch.device] | None = None,
        split_dim: int = 0,
    ) -> None:
        """Cut a matrix.

        Args:
            matrix: [R, C], any dtype, which is kept.
            percentages: one for each share, with the largest remainder (see `share_fractions`).
            devices: one for each share, repeats allowed; the CPU for all if None.
            split_dim: 0 cuts between rows, 1 between columns.
        Raises: ConfigError: no matrix, wrong percentages, devices or dimension.
        """
        _check_dim(split_dim)
        if matrix.ndim != 2:
            raise ConfigError(
                f"a tensor of shape {list(matrix.shape)} is no matrix of rows and columns. "
                "Reshape it"
            )
        fractions = share_fractions(percentages)
        names = ["cpu"] * len(fractions) if devices is None else list(devices)
        if len(names) != len(fractions):
            raise ConfigError(
                f"{len(fractions)} percentages for {len(names)} devices; give one for each"
            )
        targets = [torch_device(name) for name in names]
        sizes = largest_remainder(fractions, matrix.shape[split_dim])
        parts = torch.split(matrix, list(sizes), dim=split_dim)
        self.split_dim = split_dim
        self.shards: tuple[Tensor, ...] = tuple(
            part.to(target) for part, target in zip(parts, targets, strict=True)
        )

    @classmethod
    def from_shards(cls, shards: Sequence[Tensor], split_dim: int = 0) -> Self:
        """Take over shares where they lie.

        Raises: ConfigError: none, or shares that do not fit side by side.
        """
        _check_dim(split_dim)
        other = 1 - split_dim
        kinds = {(s.dtype, s.shape[other] if s.ndim == 2 else -1) for s in shards}
        if len(kinds) != 1 or any(s.ndim != 2 for s in shards):
            found = ", ".join(f"{s.dtype} {list(s.shape)}" for s in shards) or "none"
            raise ConfigError(
                f"shares {found[:200]} do not make one matrix along dimension {split_dim}; give "
                f"matrices of one dtype with equal dimension {other}"
            )
        matrix = cls.__new__(cls)
        matrix.split_dim = split_dim
        matrix.shards = tuple(shards)
        return matrix

    @property
    def sizes(self) -> tuple[int, ...]:
        """Rows or columns of each share."""
        return tuple(shard.shape[self.split_dim] for shard in self.shards)

    @property
    def shape(self) -> torch.Size:
        """Shape of the whole."""
        other = self.shards[0].shape[1 - self.split_dim]
        total = sum(self.sizes)
        return torch.Size((total, other) if self.split_dim == 0 else (other, total))

    @property
    def dtype(self) -> torch.dtype:
        """Of every share."""
        return self.shards[0].dtype

    @property
    def devices(self) -> tuple[torch.device, ...]:
        """Where the shares lie."""
        return tuple(shard.device for shard in self.shards)

    @property
    def T(self) -> ClusterMatrix:  # noqa: N802 - torch's word
        """The transposed matrix; nothing is copied or moved."""
        return ClusterMatrix.from_shards([s.T for s in self.shards], 1 - self.split_dim)

    def gather(self, device: str | torch.device = "cpu") -> Tensor:
        """The whole matrix on one device."""
        target = torch_device(device)
        return torch.cat([shard.to(target) for shard in self.shards], dim=self.split_dim)

    def __rmatmul__(self, x: Tensor) -> Tensor:
        """x @ W: each device multiplies with its share.

        Args:
            x: [..., R] in the dtype of the matrix.
        Returns: [..., C] on the device of x. Cut columns are put side by side; of cut rows each
            gives a partial sum, and these are added in the order of the shares.
        Raises: ConfigError: another width or dtype.
        """
        rows = self.shape[0]
        if x.ndim == 0 or x.shape[-1] != rows or x.dtype != self.dtype:
            raise ConfigError(
                f"{x.dtype} {list(x.shape)} cannot be multiplied with a matrix {self.dtype} "
                f"{list(self.shape)}; the last dimension must be {rows}, the dtype equal"
            )
        if self.split_dim == 1:
            products = [(x.to(shard.device) @ shard).to(x.device) for shard in self.shards]
            return torch.cat(products, dim=-1)
        pieces = torch.split(x, list(self.sizes), dim=-1)
        total = x.new_zeros((*x.shape[:-1], self.shape[1]))
        for piece, shard in zip(pieces, self.shards, strict=True):
            if shard.shape[0]:
                total = total + (piece.to(shard.device) @ shard).to(x.device)
        return total

    def __matmul__(self, x: Tensor) -> Tensor:
        """W @ x for a matrix x [C, N]: [R, N], as `x.T @ W.T` turned back."""
        if x.ndim != 2:
            raise ConfigError(
                f"W @ x takes a matrix, x is {list(x.shape)}. Write x @ W.T for rows of vectors"
            )
        return (x.T @ self.T).T

    def __add__(self, other: Tensor | ClusterMatrix) -> ClusterMatrix:
        """Element by element; the result is cut as this matrix, and lies where it lies.

        Args:
            other: a matrix of the same shape, whatever its cuts; or a tensor that broadcasts to it.
        Raises: ConfigError: another shape or dtype.
        """
        shape = self.shape
        fits = other.shape == shape
        if isinstance(other, Tensor):
            fits = other.ndim <= 2 and all(
                found in (1, wanted)
                for found, wanted in zip(reversed(other.shape), reversed(shape), strict=False)
            )
        if not fits or other.dtype != self.dtype:
            raise ConfigError(
                f"{other.dtype} {list(other.shape)} cannot be added to a matrix {self.dtype} "
                f"{list(shape)}; shape and dtype must be equal"
            )
        if isinstance(other, Tensor):
            other = ClusterMatrix.from_shards([other.expand(shape)], self.split_dim)
        sums = [
            shard + other.piece(self.split_dim, start, end, shard.device)
            for shard, (start, end) in zip(self.shards, self._ranges(), strict=True)
        ]
        return ClusterMatrix.from_shards(sums, self.split_dim)

    def __radd__(self, other: Tensor) -> ClusterMatrix:
        """As `matrix + other`."""
        return self + other

    def piece(self, dim: int, start: int, end: int, device: torch.device) -> Tensor:
        """Rows or columns [start, end) on a device; only what they need is moved.

        Args:
            dim: 0 for rows, 1 for columns.
        """
        if dim != self.split_dim:
            parts = [shard.narrow(dim, start, end - start) for shard in self.shards]
        else:
            parts: list[Tensor] = []
            for shard, (first, last) in zip(self.shards, self._ranges(), strict=True):
                low, high = max(start, first), min(end, last)
                if low < high:
                    parts.append(shard.narrow(dim, low - first, high - low))
            if not parts:  # an empty piece keeps its other dimension
                parts = [self.shards[0].narrow(dim, 0, 0)]
        return torch.cat([part.to(device) for part in parts], dim=self.split_dim)

    def _ranges(self) -> list[tuple[int, int]]:
        ends = [sum(self.sizes[:n]) for n in range(len(self.sizes) + 1)]
        return list(pairwise(ends))


def _check_dim(split_dim: int) -> None:
    if split_dim not in (0, 1):
        raise ConfigError(f"split_dim {split_dim!r} is not 0 (rows) or 1 (columns). Choose one")
