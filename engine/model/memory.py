"""How much memory a device's share takes, said before anything is loaded.

In: a configuration, a plan, the shapes of the tensors. Out: bytes of weights in compute format and
of one conversation's keys and values. Scratch memory of a step is not counted. Pure: no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from engine.errors import PlanError
from engine.model.batch import GROUP_COLUMNS, ComputeDtype
from engine.model.config import CacheDtype, ModelConfig
from engine.model.share_keys import WeightKey, kv_heads_of, post_norm_key, row_keys
from engine.model.view import cache_bytes
from engine.model.weight_formats import is_symmetric, weight_format
from engine.plan.plan import Plan, PlanShape
from engine.weights.formats import TensorInfo

# int8 has a float16 scale per group, int4 two numbers a byte.
_GROUP_BYTES = {"int8": GROUP_COLUMNS + 2, "int4": GROUP_COLUMNS // 2 + 2}
_MINIMUM_BYTES = 2


@dataclass(frozen=True, slots=True)
class ShareMemory:
    """Bytes that a device needs.

    Attributes:
        weights: in compute format.
        cache: keys and values of one conversation that fills the KV window.
    """

    weights: int
    cache: int

    @property
    def total(self) -> int:
        """Both."""
        return self.weights + self.cache


def share_memory(
    config: ModelConfig,
    plan: Plan,
    device_index: int,
    tensors: Mapping[str, TensorInfo],
    dtype: ComputeDtype,
    kv_window: int,
    kv_dtype: CacheDtype,
) -> ShareMemory:
    """What a device needs for its share of a plan."""
    keys: set[WeightKey] = set()
    for row in range(plan.shape.num_rows):
        keys.update(row_keys(config, plan, row, device_index).values())
        post_norm = post_norm_key(config, plan, row, device_index)
        if post_norm is not None:
            keys.add(post_norm)
    weights = sum(_weight_bytes(key, tensors, dtype) for key in keys)
    heads = kv_heads_of(plan, device_index)
    return ShareMemory(weights, cache_bytes(config, heads, kv_window, kv_dtype, kv_window))


def _weight_bytes(key: WeightKey, tensors: Mapping[str, TensorInfo], dtype: ComputeDtype) -> int:
    rows = columns = 0
    for part in key.slices:
        shape = list(tensors[part.name].shape)
        shape[part.axis] = part.end - part.start
        rows += shape[0]
        columns = shape[1] if len(shape) > 1 else 1
    if key.is_plain:
        return 4 * rows * columns
    format = weight_format(key, tensors, dtype)
    if format == "float32":
        return 4 * rows * columns
    if format == "bfloat16":
        return 2 * rows * columns
    block = key.column_block or columns
    # Each block of columns is padded to whole groups.
    groups = rows * (columns // block) * -(-block // GROUP_COLUMNS)
    if format == "int4" and not is_symmetric(key, tensors):
        return groups * (_GROUP_BYTES[format] + _MINIMUM_BYTES)
    return groups * _GROUP_BYTES[format]


def plan_memory(
    config: ModelConfig,
    plan: Plan,
    tensors: Mapping[str, TensorInfo],
    dtype: ComputeDtype,
    kv_window: int,
    kv_dtype: CacheDtype,
) -> dict[str, ShareMemory]:
    """What every device with a share in a plan needs, by its name."""
    return {
        plan.devices[index]: share_memory(config, plan, index, tensors, dtype, kv_window, kv_dtype)
        for index in plan.used_devices()
    }


def row_memory(
    config: ModelConfig,
    shape: PlanShape,
    tensors: Mapping[str, TensorInfo],
    dtype: ComputeDtype,
    kv_window: int,
    kv_dtype: CacheDtype,
) -> list[int]:
    """Bytes of each whole plan row: weights, and keys and values of one conversation."""
    alone = Plan(shape, ("all",), tuple((shape.num_quanta(row),) for row in range(shape.num_rows)))
    heads = kv_heads_of(alone, 0)
    sizes: list[int] = []
    for row in range(shape.num_rows):
        keys = row_keys(config, alone, row, 0).values()
        size = sum(_weight_bytes(key, tensors, dtype) for key in keys)
        layer = shape.row_layer(row)
        if shape.row_kind(row) == "attention" and layer is not None and layer in heads:
            size += cache_bytes(config, {layer: heads[layer]}, kv_window, kv_dtype, kv_window)
        sizes.append(size)
    return sizes


def check_memory(
    needs: Mapping[str, ShareMemory], pools: Mapping[str, tuple[str, int]], kv_window: int
) -> None:
    """Refuse a plan whose devices do not have what it needs.

    Args:
        pools: for each device the memory it draws on, by name, and its bytes; CPUs of simulated
            nodes share one.
        kv_window: for the message.
    Raises: PlanError: names the device, what it needs, and what there is.
    """
    left = {name: size for name, size in pools.values()}
    for device, need in needs.items():
        pool, size = pools[device]
        left[pool] -= need.total
        if left[pool] < 0:
            others = " beside the other devices of its computer" * (
                sum(1 for other in needs if pools[other][0] == pool) > 1
            )
            raise PlanError(
                f"{device} needs {gibibytes(need.weights)} for its weights and "
                f"{gibibytes(need.cache)} for one conversation of {kv_window:,} positions; of "
                f"{gibibytes(size)}{others} that is {gibibytes(-left[pool])} too much. Give it a "
                "smaller share, choose a narrower --dtype, or lower --kv-window"
            )


def has_room_for_more(
    needs: Mapping[str, ShareMemory], pools: Mapping[str, tuple[str, int]]
) -> bool:
    """Whether every device could hold a second conversation as long as the first."""
    left = {name: size for name, size in pools.values()}
    for device, need in needs.items():
        left[pools[device][0]] -= need.total + need.cache
    return all(size >= 0 for size in left.values())


def gibibytes(num_bytes: int) -> str:
    """Bytes for a person."""
    return f"{num_bytes / 2**30:,.2f} GiB"
