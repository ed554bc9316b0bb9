"""Weight matrices packed for the native kernels, on the CPU.

In: a matrix of `engine.kernels.matrices`. Out: one that holds the same weights, to the bit, in the
order in which the kernels read them. Where these are not the fastest for prompts, prompts multiply
through torch, a few dequantised rows at a time.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from ctypes import byref, pointer
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from engine.errors import ProtocolError
from engine.kernels.matrices import (
    SCRATCH_ELEMENTS,
    BFloat16Matrix,
    Int4Matrix,
    Int8Matrix,
    Matrix,
    has_bfloat16_units,
)
from engine.kernels.native_library import (
    BFLOAT16,
    INT4,
    INT8,
    SYMMETRIC_INT4,
    MatrixStruct,
    NativeLibrary,
    check_status,
)
from engine.model.batch import StepKind

PANEL_ROWS = 16
# Tokens that a product takes at a time: their activations then stay in the cache of a core, and a
# longer prompt needs no more memory.
PASS_TOKENS = 128
# Instruction sets whose integer products were measured to be faster for prompts than torch's. Others
# have none, or never ran outside an emulator.
_PROMPT_SETS = ("avx512vnni", "avx2")
# To dequantise weights alone takes as long as to multiply so many tokens by them (measured with
# benchmarks/products.py), however fast the product is that follows.
_SHORT_PROMPT = 64


def most_prompt_tokens(library: NativeLibrary) -> int:
    """Tokens of prompts up to which integer products are fastest here.

    Then torch's of dequantised weights are, with units that multiply whole tiles of bfloat16.
    """
    if library.selected_name not in _PROMPT_SETS:
        return 0
    probes: Any = torch.cpu
    return _SHORT_PROMPT if probes._is_amx_tile_supported() else sys.maxsize


class NativeMatrix:
    """A packed matrix; its memory is all that is left of the weights.

    Attributes:
        library: whose kernels read it.
        format_code: INT4, SYMMETRIC_INT4, INT8 or BFLOAT16.
        struct: what C functions take, as a pointer; valid as long as this object lives.
        shape: rows and columns.
        most_prompt_tokens: up to which these kernels multiply prompts, too.
    """

    def __init__(
        self,
        library: NativeLibrary,
        format_code: int,
        shape: tuple[int, int],
        block: int,
        quants: Tensor,
        scales: Tensor | None,
        minimums: Tensor | None,
    ) -> None:
        """Pack.

        Args:
            format_code: INT4, SYMMETRIC_INT4, INT8 or BFLOAT16.
            shape: N and K.
            block: columns that are padded together to whole groups of 32.
            quants: uint8 [N, G, 16], int8 [N, G, 32], or bfloat16 [N, K]; G is groups of a row.
            scales, minimums: float16 [N, G], where the format has them.
        Raises: ProtocolError: a tensor has another shape or dtype, or is not on the CPU.
        """
        rows, columns = shape
        if rows < 1 or columns < 1 or block < 1 or columns % block:
            raise ProtocolError(
                f"a matrix of {rows} x {columns} in blocks of {block} columns cannot be packed, "
                "whole blocks are needed. Load the model again"
            )
        groups = columns // block * -(-block // 32)
        expected: dict[str, tuple[Tensor | None, torch.dtype, tuple[int, ...]]] = {
            "quants": (quants, *_quants_of(format_code, rows, columns, groups))
        }
        if format_code != BFLOAT16:
            expected["scales"] = (scales, torch.float16, (rows, groups))
        if format_code == INT4:
            expected["minimums"] = (minimums, torch.float16, (rows, groups))
        held = [check_tensor(name, *what).contiguous() for name, what in expected.items()]
        self.library = library
        self.format_code = format_code
        self.shape = shape
        self.most_prompt_tokens = 0 if format_code == BFLOAT16 else most_prompt_tokens(library)
        struct = MatrixStruct(format_code, rows, columns, block, groups, None)
        self._panels = torch.empty(library.packed_bytes(byref(struct)), dtype=torch.uint8)
        struct.panels = self._panels.data_ptr()
        pointers = [tensor.data_ptr() for tensor in held] + [None] * (3 - len(held))
        check_status(library.pack(byref(struct), *pointers, struct.panels))
        self.struct: Any = pointer(struct)
        self._num_bytes = sum(tensor.nbytes for tensor in held)

    @property
    def num_bytes(self) -> int:
        """Memory held, but for the padding of the last rows to a whole panel."""
        return self._num_bytes

    def multiply(self, x_TK: Tensor, kind: StepKind) -> Tensor:
        """x @ W.T.

        Raises: ProtocolError: x is not float32 [T, K] on the CPU.
        """
        rows, columns = self.shape
        x = check_tensor("activations", x_TK, torch.float32, (x_TK.shape[0], columns)).contiguous()
        output = x.new_empty(x.shape[0], rows)
        if not x.shape[0]:
            return output
        if kind == "generated" or x.shape[0] <= self.most_prompt_tokens:
            for start in range(0, x.shape[0], PASS_TOKENS):
                some, out = x[start : start + PASS_TOKENS], output[start : start + PASS_TOKENS]
                counted = (some.data_ptr(), some.shape[0], out.data_ptr())
                check_status(self.library.multiply(self.struct, *counted))
            return output
        dtype = torch.bfloat16 if has_bfloat16_units("cpu") else torch.float32
        x = x.to(dtype)
        step = max(1, SCRATCH_ELEMENTS // (columns * PANEL_ROWS)) * PANEL_ROWS
        scratch = torch.empty(min(step, rows), columns, dtype=dtype)
        for start in range(0, rows, step):
            end = min(start + step, rows)
            weights = self.dequantize(start, end, scratch[: end - start])
            output[:, start:end] = linear(x, weights)
        return output

    def rows(self, ids: Sequence[int]) -> Tensor:
        """Some rows, float32 [n, K].

        Args: ids: each of a row.
        Raises: ProtocolError: one of none.
        """
        rows, columns = self.shape
        found = torch.empty(len(ids), columns)
        panel = torch.empty(PANEL_ROWS, columns)
        for n, row in enumerate(ids):
            start = row // PANEL_ROWS * PANEL_ROWS
            end = min(start + PANEL_ROWS, rows)
            found[n] = self.dequantize(start, end, panel[: end - start])[row - start]
        return found

    def dequantize(self, start: int, end: int, out: Tensor | None = None) -> Tensor:
        """Rows [start, end).

        Args:
            start: a multiple of 16.
            out: contiguous float32 or bfloat16 [rows, K]; a new float32 tensor where None.
        Raises: ProtocolError: a wrong range, or another `out`.
        """
        rows, columns = self.shape
        if not 0 <= start < end <= rows or start % PANEL_ROWS:
            raise ProtocolError(
                f"rows {start} to {end} of {rows} cannot be dequantised, ranges begin at a "
                f"multiple of {PANEL_ROWS}. Ask for such a range"
            )
        target = torch.empty(end - start, columns) if out is None else out
        is_bfloat16 = target.dtype == torch.bfloat16
        dtype = torch.bfloat16 if is_bfloat16 else torch.float32
        check_tensor("dequantised rows", target, dtype, (end - start, columns))
        if not target.is_contiguous():
            raise ProtocolError("dequantised rows are written to contiguous memory only. Copy it")
        status = self.library.dequantize(self.struct, start, end, is_bfloat16, target.data_ptr())
        check_status(status)
        return target


def repack(matrix: Matrix, library: NativeLibrary | None) -> Matrix:
    """A matrix packed for the native kernels; itself where it has no packed form."""
    if library is None or isinstance(matrix, NativeMatrix):
        return matrix
    if isinstance(matrix, BFloat16Matrix) and matrix.values.device.type == "cpu":
        rows, columns = matrix.values.shape
        shape = (rows, columns)
        return NativeMatrix(library, BFLOAT16, shape, columns, matrix.values, None, None)
    if isinstance(matrix, Int4Matrix | Int8Matrix) and matrix.quants.device.type == "cpu":
        shape = (matrix.quants.shape[0], matrix.num_columns)
        code, minimums = INT8, None
        if isinstance(matrix, Int4Matrix):
            minimums = matrix.minimums
            code = SYMMETRIC_INT4 if minimums is None else INT4
        scales = matrix.scales
        return NativeMatrix(library, code, shape, matrix.block, matrix.quants, scales, minimums)
    return matrix


def check_tensor(
    name: str, tensor: Tensor | None, dtype: torch.dtype, shape: tuple[int, ...]
) -> Tensor:
    """The tensor, if it is on the CPU and has this dtype and shape.

    Raises: ProtocolError: it is not.
    """
    if tensor is None:
        raise ProtocolError(f"{name} are missing, {dtype} {list(shape)} is needed. Pass them")
    if tensor.dtype == dtype and tensor.shape == shape and tensor.is_cpu:
        return tensor
    raise ProtocolError(
        f"{name} are {tensor.dtype} {list(tensor.shape)} on {tensor.device}, native kernels take "
        f"{dtype} {list(shape)} on the CPU. Convert them"
    )


def address_of(name: str, tensor: Tensor, shape: tuple[int, ...]) -> int:
    """Of a contiguous float32 tensor on the CPU.

    Raises: ProtocolError: it is none, or has another shape.
    """
    if not check_tensor(name, tensor, torch.float32, shape).is_contiguous():
        raise ProtocolError(f"{name} are not contiguous, native kernels read no others. Copy them")
    return tensor.data_ptr()


def optional_address(name: str, tensor: Tensor | None, shape: tuple[int, ...]) -> int | None:
    """The same; None where there is no tensor."""
    return None if tensor is None else address_of(name, tensor, shape)


def _quants_of(
    format_code: int, rows: int, columns: int, groups: int
) -> tuple[torch.dtype, tuple[int, ...]]:
    if format_code in (INT4, SYMMETRIC_INT4):
        return torch.uint8, (rows, groups, 16)
    if format_code == INT8:
        return torch.int8, (rows, groups, 32)
    return torch.bfloat16, (rows, columns)
