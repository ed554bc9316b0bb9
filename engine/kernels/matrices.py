"""Weight matrices in the formats that compute: float32, bfloat16, groups of int8 or int4.

In: float32 values or a file's raw blocks. Out: an object that multiplies activations by itself.
It knows nothing of layers. N rows (outputs), K columns (inputs), T tokens, G groups.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cache
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import linear

from engine.model.batch import GROUP_COLUMNS as GROUP
from engine.model.batch import StepKind

# Values that are widened at a time: few enough to stay in a cache, enough for an efficient product.
SCRATCH_ELEMENTS = 1 << 20
# Generated tokens at a time from which bfloat16 weights are widened, where a CPU has no units for
# them: torch's products of few rows read them as they are, those of many are slow. Both constants
# were measured with benchmarks/products.py.
WIDEN_FROM_TOKENS = 8


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
        self.values = values_NK.contiguous()

    @property
    def num_bytes(self) -> int:
        """Memory held."""
        return self.values.nbytes

    def multiply(self, x_TK: Tensor, kind: StepKind) -> Tensor:
        """x @ W.T in float32."""
        return linear(x_TK, self.values)


class BFloat16Matrix:
    """Weights rounded to bfloat16; the activations too, where the product is in bfloat16."""

    def __init__(self, values_NK: Tensor) -> None:
        """Args: values_NK: float32 or bfloat16 [N, K]."""
        self.values = values_NK.to(torch.bfloat16).contiguous()

    @property
    def num_bytes(self) -> int:
        """Memory held."""
        return self.values.nbytes

    def multiply(self, x_TK: Tensor, kind: StepKind) -> Tensor:
        """x @ W.T; prompts in float32 where this machine has no bfloat16 units."""
        rounded = x_TK.to(torch.bfloat16)
        if has_bfloat16_units(x_TK.device.type):
            return linear(rounded, self.values).float()
        if kind == "prompt":
            return _multiply_in_pieces(x_TK, self.values.shape, self._widened)
        if len(x_TK) < WIDEN_FROM_TOKENS:
            return linear(rounded, self.values).float()
        # Products of two bfloat16 are exact in float32, so only the order of additions differs.
        output = _multiply_in_pieces(rounded.float(), self.values.shape, self._widened)
        return output.to(torch.bfloat16).float()

    def _widened(self, start: int, end: int) -> Tensor:
        return self.values[start:end].float()


class GroupedMatrix(ABC):
    """Quantised weights in groups of 32 columns: what int8 and int4 share.

    Columns are cut into blocks (a head's width, for an attention output), and each block is padded
    to whole groups, so that no group spans two heads and no split of the heads changes a rounding.
    What the padding holds has no meaning: it is multiplied with nothing.

    Attributes:
        quants: [N, G, ...], one row of numbers a group.
        scales: float16 [N, G].
        num_columns: K, a multiple of `block`.
        block: columns that are padded together.
    """

    def __init__(self, quants: Tensor, scales_NG: Tensor, num_columns: int, block: int) -> None:
        """Made by the `from_...` functions; the arguments are the attributes."""
        assert num_columns % block == 0
        assert scales_NG.shape[1] * GROUP == num_columns // block * padded_columns(block)
        self.quants = quants
        self.scales = scales_NG
        self.num_columns = num_columns
        self.block = block

    @property
    @abstractmethod
    def arrays(self) -> tuple[Tensor, ...]:
        """Everything held, each with a row of the matrix in each of its rows."""

    @property
    def num_bytes(self) -> int:
        """Memory held."""
        return sum(array.nbytes for array in self.arrays)

    def put_rows(self, start: int, rows: GroupedMatrix) -> None:
        """Copy all rows of another matrix of this kind and width to rows [start, ...)."""
        assert type(rows) is type(self)
        assert (rows.num_columns, rows.block) == (self.num_columns, self.block)
        for array, new in zip(self.arrays, rows.arrays, strict=True):
            array[start : start + new.shape[0]] = new

    @abstractmethod
    def grouped_values(self, start: int, end: int) -> Tensor:
        """Rows [start, end) as float32 [rows, G, 32], padding included."""

    def dequantize(self, start: int, end: int) -> Tensor:
        """Rows [start, end) as float32 [rows, K]."""
        values = self.grouped_values(start, end)
        values = values.reshape(end - start, -1, padded_columns(self.block))[..., : self.block]
        return values.reshape(end - start, self.num_columns)

    def multiply(self, x_TK: Tensor, kind: StepKind) -> Tensor:
        """x @ W.T; of either kind in float32 where this machine has no bfloat16 units."""
        return _multiply_in_pieces(x_TK, (len(self.scales), self.num_columns), self.dequantize)


class Int8Matrix(GroupedMatrix):
    """Weights as int8 [N, G, 32] with one float16 scale per group: value = scale * quant."""

    @classmethod
    def empty(cls, rows: int, columns: int, block: int) -> Int8Matrix:
        """Memory for `put_rows`."""
        groups = columns // block * padded_columns(block) // GROUP
        quants = torch.empty(rows, groups, GROUP, dtype=torch.int8)
        scales = torch.empty(rows, groups, dtype=torch.float16)
        return cls(quants, scales, columns, block)

    @classmethod
    def from_values(cls, values_NK: Tensor, block: int) -> Int8Matrix:
        """Quantise to nearest, with the largest magnitude of a group at 127."""
        groups = _in_groups(values_NK, block)
        scales = (groups.abs().amax(dim=-1) / 127).to(torch.float16)
        divisors = torch.where(scales == 0, 1.0, scales.float())
        quants = (groups / divisors[..., None]).round().clamp(-127, 127).to(torch.int8)
        return cls(quants, scales, values_NK.shape[1], block)

    @classmethod
    def from_q8_0(
        cls, raw: NDArray[np.uint8], rows: int, columns: int, block: int | None = None
    ) -> Int8Matrix:
        """Take over the blocks of a Q8_0 file without a second rounding.

        Args:
            raw: uint8, rows * columns / 32 blocks of 34 bytes: float16 scale, then 32 int8.
            block: whole groups of 32 columns; all of them if None.
        """
        blocks = raw.reshape(rows, columns // GROUP, 2 + GROUP)
        scales = np.ascontiguousarray(blocks[..., :2]).view(np.float16)[..., 0]
        quants = np.ascontiguousarray(blocks[..., 2:]).view(np.int8)
        return cls(torch.as_tensor(quants), torch.as_tensor(scales), columns, block or columns)

    @property
    def arrays(self) -> tuple[Tensor, ...]:
        """Everything held."""
        return self.quants, self.scales

    def to(self, device: torch.device) -> Int8Matrix:
        """The same on another device."""
        quants, scales = self.quants.to(device), self.scales.to(device)
        return Int8Matrix(quants, scales, self.num_columns, self.block)

    def grouped_values(self, start: int, end: int) -> Tensor:
        """Rows [start, end) as float32 [rows, G, 32], padding included."""
        return self.quants[start:end] * self.scales[start:end, :, None].float()


class Int4Matrix(GroupedMatrix):
    """Weights as 4-bit numbers, with a scale and a minimum per group: scale * quant + minimum.

    Symmetric ones hold no minimums, which are -8 times the scales: a tenth less memory to read.

    `quants` is uint8 [N, G, 16]: byte j of a group holds column j in its low half and column
    j + 16 in its high half, the order of Q4_0 and Q4_1.

    Attributes:
        minimums: float16 [N, G]; None: symmetric.
    """

    def __init__(
        self,
        quants_NGB: Tensor,
        scales_NG: Tensor,
        minimums_NG: Tensor | None,
        num_columns: int,
        block: int,
    ) -> None:
        """Made by the `from_...` functions; the arguments are the attributes."""
        super().__init__(quants_NGB, scales_NG, num_columns, block)
        self.minimums = minimums_NG

    @classmethod
    def empty(cls, rows: int, columns: int, block: int, is_symmetric: bool = False) -> Int4Matrix:
        """Memory for `put_rows`."""
        groups = columns // block * padded_columns(block) // GROUP
        quants = torch.empty(rows, groups, GROUP // 2, dtype=torch.uint8)
        scales = torch.empty(rows, groups, dtype=torch.float16)
        minimums = None if is_symmetric else torch.empty_like(scales)
        return cls(quants, scales, minimums, columns, block)

    @classmethod
    def from_values(cls, values_NK: Tensor, block: int) -> Int4Matrix:
        """Quantise to nearest, from the least value of a group at 0 to its greatest at 15."""
        groups = _in_groups(values_NK, block)
        least, greatest = groups.aminmax(dim=-1)
        minimums = least.to(torch.float16)
        scales = ((greatest - least) / 15).to(torch.float16)
        divisors = torch.where(scales == 0, 1.0, scales.float())
        numbers = (groups - minimums[..., None].float()) / divisors[..., None]
        numbers = numbers.round().clamp(0, 15).to(torch.uint8)
        half = GROUP // 2
        quants = numbers[..., :half] | (numbers[..., half:] << 4)
        return cls(quants, scales, minimums, values_NK.shape[1], block)

    @classmethod
    def from_q4_0(
        cls, raw: NDArray[np.uint8], rows: int, columns: int, block: int | None = None
    ) -> Int4Matrix:
        """Take over the blocks of a Q4_0 file without a second rounding; symmetric.

        Args:
            raw: uint8, rows * columns / 32 blocks of 18 bytes: float16 scale, then 16 pairs.
            block: whole groups of 32 columns; all of them if None.
        """
        blocks = raw.reshape(rows, columns // GROUP, 2 + GROUP // 2)
        scales = np.ascontiguousarray(blocks[..., :2]).view(np.float16)[..., 0]
        return cls._of_file(blocks[..., 2:], scales, None, columns, block)

    @classmethod
    def from_q4_1(
        cls, raw: NDArray[np.uint8], rows: int, columns: int, block: int | None = None
    ) -> Int4Matrix:
        """Take over the blocks of a Q4_1 file without a second rounding.

        Args:
            raw: uint8, rows * columns / 32 blocks of 20 bytes: float16 scale and minimum, then 16
                pairs.
            block: whole groups of 32 columns; all of them if None.
        """
        blocks = raw.reshape(rows, columns // GROUP, 4 + GROUP // 2)
        halves = np.ascontiguousarray(blocks[..., :4]).view(np.float16)
        return cls._of_file(blocks[..., 4:], halves[..., 0], halves[..., 1], columns, block)

    @classmethod
    def _of_file(
        cls,
        pairs: NDArray[np.uint8],
        scales: NDArray[np.float16],
        minimums: NDArray[np.float16] | None,
        columns: int,
        block: int | None,
    ) -> Int4Matrix:
        return cls(
            torch.as_tensor(np.ascontiguousarray(pairs)),
            torch.as_tensor(np.ascontiguousarray(scales)),
            None if minimums is None else torch.as_tensor(np.ascontiguousarray(minimums)),
            columns,
            block or columns,
        )

    @property
    def arrays(self) -> tuple[Tensor, ...]:
        """Everything held."""
        held = self.quants, self.scales
        return held if self.minimums is None else (*held, self.minimums)

    def put_rows(self, start: int, rows: GroupedMatrix) -> None:
        """Copy all rows of another int4 matrix of this width; a symmetric one takes only such."""
        if self.minimums is not None and isinstance(rows, Int4Matrix) and rows.minimums is None:
            # Exact, unless it overflows: a scale above 8,188, which no weight has.
            rows = Int4Matrix(
                rows.quants, rows.scales, rows.scales * -8, rows.num_columns, rows.block
            )
        super().put_rows(start, rows)

    def to(self, device: torch.device) -> Int4Matrix:
        """The same on another device."""
        quants, scales = self.quants.to(device), self.scales.to(device)
        minimums = None if self.minimums is None else self.minimums.to(device)
        return Int4Matrix(quants, scales, minimums, self.num_columns, self.block)

    def grouped_values(self, start: int, end: int) -> Tensor:
        """Rows [start, end) as float32 [rows, G, 32], padding included."""
        pairs = self.quants[start:end]
        numbers = torch.cat((pairs & 15, pairs >> 4), dim=-1).float()
        if self.minimums is None:
            return (numbers - 8) * self.scales[start:end, :, None].float()
        numbers *= self.scales[start:end, :, None].float()
        numbers += self.minimums[start:end, :, None].float()
        return numbers


def _multiply_in_pieces(
    x_TK: Tensor, shape: tuple[int, ...], values: Callable[[int, int], Tensor]
) -> Tensor:
    """x @ W.T of a matrix whose rows are made when they are needed, a few at a time.

    Args:
        shape: [N, K].
        values: rows [start, end) as float32.
    """
    dtype = torch.bfloat16 if has_bfloat16_units(x_TK.device.type) else torch.float32
    rows, columns = shape
    step = max(1, SCRATCH_ELEMENTS // columns)
    x = x_TK.to(dtype)
    output = x_TK.new_empty(x_TK.shape[0], rows)
    for start in range(0, rows, step):
        end = min(start + step, rows)
        output[:, start:end] = linear(x, values(start, end).to(dtype))
    return output


def padded_columns(block: int) -> int:
    """Columns of a block after padding to whole groups."""
    return -(-block // GROUP) * GROUP


def _in_groups(values_NK: Tensor, block: int) -> Tensor:
    """[N, G, 32]; the padding repeats a block's last value, so that it widens no group's range."""
    rows = values_NK.shape[0]
    blocks = values_NK.reshape(rows, -1, block)
    padding = padded_columns(block) - block
    if padding:
        blocks = torch.nn.functional.pad(blocks, (0, padding), mode="replicate")
    return blocks.reshape(rows, -1, GROUP)
