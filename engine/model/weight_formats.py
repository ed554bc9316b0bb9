"""In which format each weight of a model computes, and what `--dtype auto` stands for.

In: the formats that a file holds its tensors in. Out: a compute format, and whether the file's own
blocks are taken over. Pure: no torch, no files.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

from engine.model.batch import GROUP_COLUMNS, ComputeDtype
from engine.model.share_keys import SliceKey, WeightKey
from engine.weights.formats import TensorInfo, format_named

GroupedDtype = Literal["int8", "int4"]

# File formats whose blocks are groups of a compute format as they are.
TAKEN_OVER: Mapping[str, GroupedDtype] = {"Q4_0": "int4", "Q4_1": "int4", "Q8_0": "int8"}
# What whoever made a quantised file found worth more than four bits stays so.
_WIDE = frozenset({"Q5_0", "Q5_1", "Q5_K", "Q6_K", "Q8_0"})
_FLOATS = frozenset({"F32", "F16", "BF16"})


def weight_format(
    key: WeightKey, tensors: Mapping[str, TensorInfo], dtype: ComputeDtype
) -> ComputeDtype:
    """The format one weight computes in.

    Everything is in `dtype`, but that int4 leaves in int8 what its file holds wider than four bits,
    and an output head that is not in four bits yet: that is where four bits cost most.

    Args:
        key: of a matrix, not of what stays plain.
        tensors: with all tensors of the key.
    """
    if dtype != "int4":
        return dtype
    formats = {tensors[part.name].format for part in key.slices}
    if all(TAKEN_OVER.get(name) == "int4" for name in formats):
        return "int4"
    is_head = any(part.name == "head" for part in key.slices)
    return "int8" if is_head or formats & _WIDE else "int4"


def takes_over(part: SliceKey, info: TensorInfo, format: GroupedDtype, column_block: int) -> bool:
    """Whether a slice's blocks in the file are the groups of its compute format.

    Args:
        part: not widened.
        column_block: of its weight.
    """
    if TAKEN_OVER.get(info.format) != format or column_block % GROUP_COLUMNS:
        return False
    is_rows = part.axis == 0
    entry = format_named(info.format)
    return is_rows or (part.start % entry.block_size == 0 and part.end % entry.block_size == 0)


def is_symmetric(key: WeightKey, tensors: Mapping[str, TensorInfo]) -> bool:
    """Whether the groups of a matrix in int4 need no minimums.

    Args: key, tensors: as of `weight_format`.
    """
    return all(
        tensors[part.name].format == "Q4_0"
        and takes_over(part, tensors[part.name], "int4", key.column_block)
        for part in key.slices
    )


def is_head_exact(tensors: Mapping[str, TensorInfo], dtype: ComputeDtype) -> bool:
    """Whether the output head computes with the very values of the file.

    Args: tensors: of the whole model.
    """
    info = tensors["head"]
    part = SliceKey("head", 0, 0, info.shape[0])
    format = weight_format(WeightKey((part,)), tensors, dtype)
    if format == "float32":
        return True
    if format == "bfloat16":
        return info.format == "BF16"
    return takes_over(part, info, format, 0)


def auto_dtype(tensors: Iterable[TensorInfo], has_native_kernels: bool) -> ComputeDtype:
    """What `auto` stands for: the fastest that costs at most a hundredth of perplexity.

    Args:
        tensors: of the whole model.
        has_native_kernels: whether products with int8 and int4 are fast; those of torch are not.
    """
    matrices = [info for info in tensors if len(info.shape) > 1]
    if {info.format for info in matrices} == {"F32"}:
        return "float32"
    # Routers compute in float64, and the embedding is looked up, not multiplied.
    formats = {
        info.format
        for info in matrices
        if info.name.startswith("layers.") and not info.name.endswith(".router")
    }
    if not has_native_kernels or formats & _FLOATS:
        return "bfloat16"
    is_kept = all(name in TAKEN_OVER or name in _WIDE for name in formats)
    has_int4 = any(TAKEN_OVER.get(name) == "int4" for name in formats)
    return "int4" if is_kept and has_int4 else "int8"
