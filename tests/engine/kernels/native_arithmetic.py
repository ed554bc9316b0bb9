"""The arithmetic of the native kernels in numpy: what their results are measured by."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.kernels.matrices import BFloat16Matrix, Int4Matrix, Int8Matrix

FORMATS = ("int4", "symmetric int4", "int8", "bfloat16")
# Rounding of float32 sums, relative to the sum of the terms' magnitudes.
SUM_TOLERANCE = 2e-6

Packable = Int4Matrix | Int8Matrix | BFloat16Matrix


def random_matrix(format: str, rows: int, columns: int, block: int, seed: int) -> Packable:
    """Random weights; every quantised number occurs, -128 of int8 too."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, columns, generator=generator)
    if format == "bfloat16":
        return BFloat16Matrix(values)
    groups = columns // block * -(-block // 32)
    scales = (torch.rand(rows, groups, generator=generator) * 0.1).half()
    if format == "int8":
        quants = torch.randint(-128, 128, (rows, groups, 32), generator=generator)
        return Int8Matrix(quants.to(torch.int8), scales, columns, block)
    pairs = torch.randint(0, 256, (rows, groups, 16), generator=generator).to(torch.uint8)
    if format == "symmetric int4":
        return Int4Matrix(pairs, scales, None, columns, block)
    minimums = torch.randn(rows, groups, generator=generator).half()
    return Int4Matrix(pairs, scales, minimums, columns, block)


def exact_values(matrix: Packable) -> NDArray[np.float64]:
    """The weights [N, K]."""
    if isinstance(matrix, BFloat16Matrix):
        return matrix.values.double().numpy()
    return matrix.dequantize(0, matrix.quants.shape[0]).double().numpy()


def quantized(x_TK: Tensor, block: int) -> NDArray[np.float64]:
    """Activations as int8 per group of 32 columns of a block, turned back into values [T, K].

    Where one value has more than 25 of 32 parts of a group's squares, what rounding left is rounded
    to int8 too, in 254 steps for one.
    """
    x = x_TK.numpy()
    tokens, columns = x.shape
    padded = -(-block // 32) * 32
    blocks = np.zeros((tokens, columns // block, padded), np.float32)
    blocks[..., :block] = x.reshape(tokens, -1, block)
    groups = blocks.reshape(tokens, -1, 32)
    largest = np.abs(groups).max(-1, keepdims=True)
    is_zero = largest < np.float32(1e-30)
    inverse = np.where(is_zero, np.float32(0), np.float32(127) / np.where(is_zero, 1, largest))
    exact = groups * inverse.astype(np.float32)
    numbers, scales = np.rint(exact), largest / np.float32(127)
    rests = np.rint((exact - numbers) * np.float32(254))
    is_uneven = (numbers.astype(np.float64) ** 2).sum(-1, keepdims=True) < 127**2 * 32 / 25
    values = numbers.astype(np.float64) * scales
    values += np.where(is_uneven & ~is_zero, rests * (scales / np.float32(254)), 0.0)
    return values.reshape(tokens, -1, padded)[..., :block].reshape(tokens, columns)


def product(matrix: Packable, x_TK: Tensor) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The product of the arithmetic that the native kernels promise, and the room of its rounding.

    Returns: [T, N], and the largest allowed difference of each.
    """
    weights = exact_values(matrix)
    if isinstance(matrix, BFloat16Matrix):
        x = x_TK.double().numpy()
        magnitudes = np.abs(x) @ np.abs(weights).T
    else:
        x = quantized(x_TK, matrix.block)
        # Scale and minimum are added apart, so their magnitudes count apart.
        minimums = matrix.minimums if isinstance(matrix, Int4Matrix) else None
        offset = 0.0 if minimums is None else minimums.abs().max().item()
        magnitudes = np.abs(x) @ (np.abs(weights) + 2 * offset).T
    return x @ weights.T, magnitudes * SUM_TOLERANCE + 1e-12
