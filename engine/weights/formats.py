"""The one table of tensor formats.

In: a format's name, a shape, raw bytes. Out: byte sizes as unbounded integers, and float32 values.
It does not open files and does not quantise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
from numpy.typing import NDArray

from engine.errors import CheckpointError
from engine.weights.block_values import block_values


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorFormat:
    """How one block of consecutive elements of a row is stored.

    Attributes:
        name: as GGUF spells it; safetensors names agree for F32, F16 and BF16.
        ggml_type: number in a GGUF file, or None where GGUF does not have the format.
        block_size: elements a block; a row holds whole blocks.
        block_bytes: bytes a block.
        is_weight: can be turned into float32 here, so a model may be made of it.
    """

    name: str
    ggml_type: int | None
    block_size: int
    block_bytes: int
    is_weight: bool = True


class TensorInfo(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What is known of a tensor without reading it.

    Attributes:
        name: ours, such as "layers.3.q".
        format: a name of FORMATS.
        shape: torch order: (rows = outputs, columns = inputs), or (width,).
    """

    name: str
    format: str
    shape: tuple[int, ...]


def _table() -> dict[str, TensorFormat]:
    weights = [
        ("F32", 0, 1, 4),
        ("F16", 1, 1, 2),
        ("BF16", 30, 1, 2),
        ("Q4_0", 2, 32, 18),
        ("Q4_1", 3, 32, 20),
        ("Q5_0", 6, 32, 22),
        ("Q5_1", 7, 32, 24),
        ("Q8_0", 8, 32, 34),
        ("Q2_K", 10, 256, 84),
        ("Q3_K", 11, 256, 110),
        ("Q4_K", 12, 256, 144),
        ("Q5_K", 13, 256, 176),
        ("Q6_K", 14, 256, 210),
        ("IQ2_XXS", 16, 256, 66),
        ("IQ2_XS", 17, 256, 74),
        ("IQ3_XXS", 18, 256, 98),
        ("IQ1_S", 19, 256, 50),
        ("IQ4_NL", 20, 32, 18),
        ("IQ3_S", 21, 256, 110),
        ("IQ2_S", 22, 256, 82),
        ("IQ4_XS", 23, 256, 136),
        ("IQ1_M", 29, 256, 56),
        ("TQ1_0", 34, 256, 54),
        ("TQ2_0", 35, 256, 66),
        ("MXFP4", 39, 32, 17),
    ]
    # A file may carry these beside its weights; their size must be known to check the file.
    others = [
        ("I8", 24, 1),
        ("I16", 25, 2),
        ("I32", 26, 4),
        ("I64", 27, 8),
        ("F64", 28, 8),
        ("U8", None, 1),
        ("U16", None, 2),
        ("U32", None, 4),
        ("U64", None, 8),
        ("BOOL", None, 1),
        ("F8_E4M3", None, 1),
        ("F8_E5M2", None, 1),
    ]
    formats = [
        TensorFormat(name=name, ggml_type=number, block_size=elements, block_bytes=size)
        for name, number, elements, size in weights
    ]
    formats += [
        TensorFormat(name=name, ggml_type=number, block_size=1, block_bytes=size, is_weight=False)
        for name, number, size in others
    ]
    return {entry.name: entry for entry in formats}


FORMATS = _table()
FORMAT_OF_GGML_TYPE = {
    entry.ggml_type: entry for entry in FORMATS.values() if entry.ggml_type is not None
}


def weight_format_names() -> str:
    """The formats a model may be made of, for messages."""
    return ", ".join(entry.name for entry in FORMATS.values() if entry.is_weight)


def format_named(name: str) -> TensorFormat:
    """Look a format up.

    Raises: CheckpointError: the name is not in the table.
    """
    found = FORMATS.get(name)
    if found is None:
        raise CheckpointError(
            f"tensor format {name!r} is not supported; use one of {weight_format_names()}"
        )
    return found


def num_bytes(format: str, shape: Sequence[int]) -> int:
    """Bytes of a dense tensor; the only place where a tensor's size is computed.

    Args:
        format: a name of the table.
        shape: torch order, the last dimension contiguous; () is one element.
    Returns: an unbounded Python integer, so that no product can wrap.
    Raises: CheckpointError: unknown format, negative dimension, or a row that is not whole blocks.
    """
    entry = format_named(format)
    elements = 1
    for dimension in shape:
        if dimension < 0:
            raise CheckpointError(f"a tensor of shape {list(shape)} has a negative dimension")
        elements *= int(dimension)
    row = int(shape[-1]) if shape else 1
    if row % entry.block_size:
        raise CheckpointError(
            f"a row of {row:,} elements is not whole {format} blocks: "
            f"not a multiple of {entry.block_size}"
        )
    return elements // entry.block_size * entry.block_bytes


def dequantize(format: str, raw: NDArray[np.uint8], shape: Sequence[int]) -> NDArray[np.float32]:
    """The values of raw blocks, bit for bit as `gguf.quants.dequantize` gives them.

    Args:
        format: a weight format of the table.
        raw: uint8, any shape, `num_bytes(format, shape)` bytes in row order.
        shape: torch order.
    Returns: float32 of `shape`; it may share memory with `raw` when the format is F32.
    Raises: CheckpointError: the format is not a weight format, or the sizes disagree.
    """
    entry = format_named(format)
    wanted = num_bytes(format, shape)
    if not entry.is_weight:
        raise CheckpointError(
            f"tensor format {format} holds no weights; use one of {weight_format_names()}"
        )
    if raw.nbytes != wanted:
        raise CheckpointError(
            f"{format}{list(shape)} is {wanted:,} bytes, the data has {raw.nbytes:,}"
        )
    if wanted == 0:
        return np.zeros(tuple(shape), dtype=np.float32)
    assert entry.ggml_type is not None, "every weight format has a number in GGUF"
    blocks = np.ascontiguousarray(raw, dtype=np.uint8).reshape(-1, entry.block_bytes)
    return block_values(entry.name, entry.ggml_type, blocks, entry.block_size).reshape(tuple(shape))
