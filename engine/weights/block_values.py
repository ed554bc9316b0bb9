"""float32 values of raw blocks, bit for bit those of the gguf package, faster where it matters.

In: blocks as uint8. Out: float32. The package works in groups of 16 rows of a matrix, so that a
narrow one spends most of its time between groups; here a group is as large as a cache likes, and
the commonest formats have code of their own. It knows no shapes and checks none.

Source: the block layouts are those of ggml-common.h in ggml; the order of float operations is that
of quants.py in the gguf package.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Values = NDArray[np.float32]

# Elements at a time: their values and what lies between fit the second-level cache.
_CHUNK = 1 << 17
# Elements of one row where the gguf package does the work, 16 rows at a time.
_ROW = 1 << 13


def _half(blocks: Bytes) -> Values:
    return blocks.view("<f2").astype(np.float32)


def _bf16(blocks: Bytes, values: Values) -> None:
    np.left_shift(blocks.view("<u2"), np.uint32(16), out=values.view(np.uint32), dtype=np.uint32)


def _q4_0(blocks: Bytes, values: Values) -> None:
    scale, pairs = _half(blocks[:, :2]), blocks[:, 2:]
    for half, numbers in enumerate((pairs & 15, pairs >> 4)):
        signed = numbers.view(np.int8)
        signed -= 8
        np.multiply(signed, scale, out=values[:, 16 * half : 16 * half + 16])


def _q4_1(blocks: Bytes, values: Values) -> None:
    scale, least, pairs = _half(blocks[:, :2]), _half(blocks[:, 2:4]), blocks[:, 4:]
    np.multiply(pairs & 15, scale, out=values[:, :16])
    np.multiply(pairs >> 4, scale, out=values[:, 16:])
    values += least


def _q8_0(blocks: Bytes, values: Values) -> None:
    np.multiply(blocks[:, 2:].view(np.int8), _half(blocks[:, :2]), out=values)


def _q4_k(blocks: Bytes, values: Values) -> None:
    count = len(blocks)
    scale, least = _half(blocks[:, 0:2]), _half(blocks[:, 2:4])
    # 6-bit factors: the first four of each kind lie whole, the others' high bits above those.
    first, second, third = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scales = np.concatenate([first & 63, (third & 15) | ((first >> 2) & 48)], axis=1)
    leasts = np.concatenate([second & 63, (third >> 4) | ((second >> 2) & 48)], axis=1)
    scale_of_half = (scale * scales).reshape(count, 4, 2, 1)
    pairs = blocks[:, 16:].reshape(count, 4, 32)
    halves = values.reshape(count, 4, 2, 32)
    np.multiply(pairs & 15, scale_of_half[:, :, 0], out=halves[:, :, 0])
    np.multiply(pairs >> 4, scale_of_half[:, :, 1], out=halves[:, :, 1])
    groups = values.reshape(count, 8, 32)
    groups -= (least * leasts).reshape(count, 8, 1)


def _q6_k(blocks: Bytes, values: Values) -> None:
    count = len(blocks)
    low = blocks[:, :128].reshape(count, 2, 2, 32)
    high = blocks[:, 128:192].reshape(count, 2, 1, 32)
    scales = _half(blocks[:, 208:210]) * blocks[:, 192:208].view(np.int8)
    numbers = np.empty((count, 2, 4, 32), np.uint8)
    np.bitwise_and(low, 15, out=numbers[:, :, :2])
    np.right_shift(low, 4, out=numbers[:, :, 2:])
    shifts = np.array([0, 2, 4, 6], np.uint8).reshape(4, 1)
    numbers |= ((high >> shifts) & 3) << 4
    signed = numbers.view(np.int8)
    signed -= 32
    np.multiply(
        signed.reshape(count, 16, 16), scales.reshape(count, 16, 1), out=values.reshape(-1, 16, 16)
    )


_OWN: dict[str, Callable[[Bytes, Values], None]] = {
    "BF16": _bf16,
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q8_0": _q8_0,
    "Q4_K": _q4_k,
    "Q6_K": _q6_k,
}


def block_values(name: str, ggml_type: int, blocks: Bytes, block_size: int) -> Values:
    """The values of blocks.

    Args:
        name: of a weight format with a number in GGUF.
        ggml_type: that number.
        blocks: uint8 [n, bytes a block], contiguous, n >= 1.
        block_size: elements a block.
    Returns: float32 [n * block_size]; it may share memory with `blocks` when the format is F32.
    """
    own = _OWN.get(name)
    with np.errstate(all="ignore"):  # damaged scales may be inf or nan; that is the file's value
        if own is None:
            return _by_package(ggml_type, blocks, block_size)
        values = np.empty((len(blocks), block_size), np.float32)
        step = _CHUNK // block_size
        for start in range(0, len(blocks), step):
            own(blocks[start : start + step], values[start : start + step])
        return values.reshape(-1)


def _by_package(ggml_type: int, blocks: Bytes, block_size: int) -> Values:
    # Imported here: the package costs a quarter of a second, and only some processes need it.
    import gguf

    quants: Any = gguf.quants
    kind = gguf.GGMLQuantizationType(ggml_type)
    per_row = _ROW // block_size
    num_whole = len(blocks) // per_row * per_row
    parts: list[Values] = []
    for part, width in ((blocks[:num_whole], per_row), (blocks[num_whole:], len(blocks) % per_row)):
        if len(part):
            rows = part.reshape(-1, width * part.shape[1])
            parts.append(quants.dequantize(rows, kind).reshape(-1))
    return parts[0] if len(parts) == 1 else np.concatenate(parts)
