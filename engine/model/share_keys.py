"""Which weights a device needs for its share of each plan row.

In: a configuration and a plan. Out: for every row the weights by their role. Pure: no torch.
"""

from __future__ import annotations

from typing import NamedTuple

from engine.model.config import ModelConfig
from engine.plan.plan import Plan


class SliceKey(NamedTuple):
    """Part of a canonical tensor: elements [start, end) along an axis."""

    name: str
    axis: int
    start: int
    end: int


class WeightKey(NamedTuple):
    """A weight in compute format: slices stacked along rows.

    Attributes:
        column_block: columns that groups of int8 and int4 may not leave; 0 for the whole width.
        is_plain: whether it stays float32, as vectors and routers do.
    """

    slices: tuple[SliceKey, ...]
    column_block: int = 0
    is_plain: bool = False


RowKeys = dict[str, WeightKey]


def kv_heads_of(plan: Plan, device_index: int) -> dict[int, int]:
    """KV heads that a device holds, for each layer with any."""
    found: dict[int, int] = {}
    for layer in range(plan.shape.num_layers):
        start, end = plan.kv_head_range(plan.shape.attention_row(layer), device_index)
        if end > start:
            found[layer] = end - start
    return found


def row_keys(config: ModelConfig, plan: Plan, row: int, device_index: int) -> RowKeys:
    """Weights of a device's share of a row; empty without a share."""
    start, end = plan.unit_range(row, device_index)
    if start == end:
        return {}
    kind = plan.shape.row_kind(row)
    if kind == "head":
        return {
            "norm": _vector("final_norm", config.width),
            "head": WeightKey((SliceKey("head", 0, start, end),)),
        }
    layer = row // 2
    if kind == "mlp":
        return _mlp_keys(config, layer, start, end)
    return _attention_keys(config, plan, row, device_index)


def post_norm_key(config: ModelConfig, plan: Plan, row: int, device_index: int) -> WeightKey | None:
    """The norm of a row's sum, where the model has one and the device adds it to the stream."""
    if not config.has_post_norms or row == plan.shape.head_row:
        return None
    if device_index not in {*plan.group(row), *plan.group(row + 1)}:
        return None
    kind = "mlp" if row % 2 else "attention"
    return _vector(f"layers.{row // 2}.{kind}_post_norm", config.width)


def _vector(name: str, width: int) -> WeightKey:
    return WeightKey((SliceKey(name, 0, 0, width),), is_plain=True)


def _attention_keys(config: ModelConfig, plan: Plan, row: int, device_index: int) -> RowKeys:
    width, prefix = config.head_width, f"layers.{row // 2}."
    start, end = (n * width for n in plan.unit_range(row, device_index))
    kv_start, kv_end = (n * width for n in plan.kv_head_range(row, device_index))

    def qkv(suffix: str) -> tuple[SliceKey, ...]:
        return (
            SliceKey(prefix + "q" + suffix, 0, start, end),
            SliceKey(prefix + "k" + suffix, 0, kv_start, kv_end),
            SliceKey(prefix + "v" + suffix, 0, kv_start, kv_end),
        )

    keys = {
        "norm": _vector(prefix + "attention_norm", config.width),
        "qkv": WeightKey(qkv("")),
        "output": WeightKey((SliceKey(prefix + "o", 1, start, end),), width),
    }
    if config.has_qkv_bias:
        keys["qkv_bias"] = WeightKey(qkv("_bias"), is_plain=True)
    # Added once: by the first device of the row.
    if config.has_output_bias and device_index == plan.group(row)[0]:
        keys["output_bias"] = _vector(prefix + "o_bias", config.width)
    if config.qk_norm == "weight":
        keys["q_norm"] = _vector(prefix + "q_norm", width)
        keys["k_norm"] = _vector(prefix + "k_norm", width)
    return keys


def _mlp_keys(config: ModelConfig, layer: int, start: int, end: int) -> RowKeys:
    prefix = f"layers.{layer}."
    keys = {"norm": _vector(prefix + "mlp_norm", config.width)}
    experts = config.experts if config.layers[layer].has_experts else None
    if experts is None:
        keys.update(_columns("dense", prefix, start, end))
        return keys
    router = SliceKey(prefix + "router", 0, 0, experts.count)
    keys["router"] = WeightKey((router,), is_plain=True)
    for expert in range(experts.count):
        keys.update(_columns(f"expert {expert}", f"{prefix}experts.{expert}.", start, end))
    if experts.has_shared:
        keys.update(_columns("dense", prefix + "shared.", start, end))
    return keys


def _columns(role: str, prefix: str, start: int, end: int) -> RowKeys:
    """Columns [start, end) of one gated MLP."""
    gate_up = (SliceKey(prefix + "gate", 0, start, end), SliceKey(prefix + "up", 0, start, end))
    return {
        f"{role} gate_up": WeightKey(gate_up),
        f"{role} down": WeightKey((SliceKey(prefix + "down", 1, start, end),)),
    }
