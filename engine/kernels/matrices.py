"""Weight matrices in the formats that compute: float32, bfloat16, int8 in groups of 32.

In: float32 values or a file's raw blocks. Out: an object that multiplies activations by itself.
It knows nothing of layers. N rows (outputs), K columns (inputs), T tokens, G groups.
"""

from __future__ import annotations

from functools import cache
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import linear

from engine.model.batch import INT8_GROUP as GROUP
from engine.model.batch import ComputeDtype, StepKind

# Rows of an int8 matrix that are dequantised at a time: a scratch buffer that stays in cache.
SCRATCH_ELEMENTS = 1 << 19


@cache
def has_bfloat16_units(device_type: str) -> bool:
    """Whether large bfloat16 products are fast here, so that prompts need no float32 copy."""
    if device_type != "cpu":
        return True
    probes: Any = torch.cpu
    return bool(probes._is_avx512_bf16_supported() or probes._is_amx_tile_supported())


class Matrix(Protocol):
    """A weight that multiplies."""

    @property
    def num_bytes(self) -> int:
        """Memory held."""
        ...

    def multiply(self, x_TK: Tensor, kind: StepKind) -> Tensor:
        """x @ W.T.

        Args:
            x_TK: float32 [T, K].
            kind: prompts come in large batches, generated tokens one or a few at a time.
        Returns: float32 [T, N].
        """
        ...


class Float32Matrix:
    """Exact weights."""

    def __init__(self, values_NK: Tensor) -> None:
        """Args: values_NK: float32 [N, K]."""
        self._values = values_NK.contiguous()

    @property
    def num_bytes(self) -> int:
        """Memory held."""
        return self._values.nbytes

    def multiply(self, x_TK: Tensor, kind: StepKind) -> Tensor:
        """x @ W.T in float32."""
        return linear(x_TK, self._values)


class BFloat16Matrix:
    """Weights rounded to bfloat16; the activations too, where the product is in bfloat16."""

    def __init__(self, values_NK: Tensor) -> None:
        """Args: values_NK: float32 or bfloat16 [N, K]."""
        self._values = values_NK.to(torch.bfloat16).contiguous()

    @property
    def num_bytes(self) -> int:
        """Memory held."""
        return self._values.nbytes

    def multiply(self, x_TK: Tensor, kind: StepKind) -> Tensor:
        """x @ W.T; prompts in float32 where this machine has no bfloat16 units."""
        if kind == "prompt" and not has_bfloat16_units(x_TK.device.type):
            return linear(x_TK, self._values.float())
        return linear(x_TK.to(torch.bfloat16), self._values).float()


class Int8Matrix:
    """Weights as int8 with one float16 scale per group of 32 columns.

    Columns are cut into blocks (a head's width, for an attention output), and each block is padded
    to whole groups, so that no group spans two heads and no split of the heads changes a rounding.
    """

    def __init__(self, quants_NG: Tensor, scales_NG: Tensor, num_columns: int, block: int) -> None:
        """Made by `from_values` or `from_q8_0`.

        Args:
            quants_NG: int8 [N, G, 32].
            scales_NG: float16 [N, G].
            num_columns: K, a multiple of `block`.
            block: columns that are padded together.
        """
        self._quants = quants_NG
        self._scales = scales_NG
        self._num_columns = num_columns
        self._block = block

    @classmethod
    def from_values(cls, values_NK: Tensor, block: int) -> Int8Matrix:
        """Quantise to nearest, with the largest magnitude of a group at 127."""
        rows, columns = values_NK.shape
        padded = -(-block // GROUP) * GROUP
        blocks = values_NK.reshape(rows, columns // block, block)
        blocks = torch.nn.functional.pad(blocks, (0, padded - block))
        groups = blocks.reshape(rows, -1, GROUP)
        scales = (groups.abs().amax(dim=-1) / 127).to(torch.float16)
        divisors = torch.where(scales == 0, 1.0, scales.float())
        quants = (groups / divisors[..., None]).round().clamp(-127, 127).to(torch.int8)
        return cls(quants, scales, columns, block)

    @classmethod
    def from_q8_0(cls, raw: NDArray[np.uint8], rows: int, columns: int) -> Int8Matrix:
        """Take over the blocks of a Q8_0 file without a second rounding.

        Args:
            raw: uint8, rows * columns / 32 blocks of 34 bytes: float16 scale, then 32 int8.
        """
        blocks = raw.reshape(rows, columns // GROUP, 2 + GROUP)
        scales = np.ascontiguousarray(blocks[..., :2]).view(np.float16)[..., 0]
        quants = np.ascontiguousarray(blocks[..., 2:]).view(np.int8)
        return cls(torch.as_tensor(quants), torch.as_tensor(scales), columns, columns)

    @property
    def num_bytes(self) -> int:
        """Memory held."""
        return self._quants.nbytes + self._scales.nbytes

    def to(self, device: torch.device) -> Int8Matrix:
        """A copy on another device."""
        return Int8Matrix(
            self._quants.to(device), self._scales.to(device), self._num_columns, self._block
        )

    def multiply(self, x_TK: Tensor, kind: StepKind) -> Tensor:
        """x @ W.T, dequantising a few rows at a time."""
        is_bfloat16 = kind == "generated" or has_bfloat16_units(x_TK.device.type)
        dtype = torch.bfloat16 if is_bfloat16 else torch.float32
        rows, groups, _ = self._quants.shape
        step = max(1, SCRATCH_ELEMENTS // (groups * GROUP))
        x = x_TK.to(dtype)
        output = x_TK.new_empty(x_TK.shape[0], rows)
        for start in range(0, rows, step):
            end = min(start + step, rows)
            output[:, start:end] = linear(x, self.dequantize(start, end).to(dtype))
        return output

    def dequantize(self, start: int, end: int) -> Tensor:
        """Rows [start, end) as float32 [rows, K]."""
        values = self._quants[start:end] * self._scales[start:end, :, None].float()
        padded = -(-self._block // GROUP) * GROUP
        values = values.reshape(end - start, -1, padded)[..., : self._block]
        return values.reshape(end - start, self._num_columns)


def make_matrix(
    values_NK: Tensor, dtype: ComputeDtype, device: torch.device, column_block: int
) -> Matrix:
    """Put values into a compute format on a device.

    Args:
        values_NK: float32 [N, K] on the CPU, or bfloat16 where that is the format.
        column_block: columns that int8 groups may not leave; K for most matrices.
    """
    if dtype == "float32":
        return Float32Matrix(values_NK.to(device))
    if dtype == "bfloat16":
        return BFloat16Matrix(values_NK.to(device))
    return Int8Matrix.from_values(values_NK, column_block).to(device)
