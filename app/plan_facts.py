"""Facts about a plan, in words and fractions. Pure functions, no Qt."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec

from app.figures import layers_text
from engine.errors import PlanError
from engine.model.config import ModelConfig
from engine.plan.plan import Plan


def row_weights(config: ModelConfig) -> list[int]:
    """Number of weights in every plan row."""
    heads = 2 * config.num_heads + 2 * config.num_kv_heads
    attention = config.width * heads * config.head_width
    rows: list[int] = []
    for number, layer in enumerate(config.layers):
        rows += [attention, 3 * config.width * layer.mlp_width * config.num_experts(number)]
    return [*rows, config.width * config.vocab_size]


def weight_share(
    plan: Plan, column: int, weights: Sequence[int], rows: Sequence[int] | None = None
) -> float:
    """A device's share of the weights of some rows, 0 to 1.

    Args:
        weights: number of weights of every plan row.
        rows: all rows where absent; 0 where empty.
    """
    chosen = range(plan.shape.num_rows) if rows is None else rows
    total = sum(weights[row] for row in chosen)
    return sum(plan.share(row, column) * weights[row] for row in chosen) / max(total, 1)


def part_text(plan: Plan, column: int) -> str:
    """What a device does in a plan, in words, such as "70 % of layers 0-9, output head"."""
    shape = plan.shape
    groups: dict[int, list[int]] = {}
    for layer in range(shape.num_layers):
        attention = plan.share(shape.attention_row(layer), column)
        mlp = plan.share(shape.mlp_row(layer), column)
        percent = round(50 * (attention + mlp))
        if attention or mlp:
            groups.setdefault(max(percent, 1), []).append(layer)
    parts: list[str] = []
    for percent, layers in groups.items():
        if len(layers) == shape.num_layers:
            where = "all layers" if percent == 100 else "every layer"
        else:
            where = layers_text(layers)
        parts.append(where if percent == 100 else f"{percent} % of {where}")
    head = round(100 * plan.share(shape.head_row, column))
    if head:
        parts.append("output head" if head == 100 else f"{head} % of the output head")
    return ", ".join(parts) or "no part"


def plan_in_words(plan: Plan, label: Callable[[str], str], label_limit: int = 3) -> str:
    """Who computes, in one line.

    Args:
        label: of a device, for a person.
        label_limit: how many devices are named rather than counted.
    """
    used = plan.used_devices()
    names = [label(plan.devices[column]) for column in used]
    if len(used) == 1:
        return f"{names[0]} computes all {plan.shape.num_layers} layers"
    if len(names) > label_limit:
        return f"{len(names)} devices compute {plan.shape.num_layers} layers"
    return f"{', '.join(names[:-1])} and {names[-1]} compute {plan.shape.num_layers} layers"


def without_idle_devices(plan: Plan) -> Plan:
    """The plan with only the columns that have a share."""
    used = plan.used_devices()
    if len(used) == len(plan.devices):
        return plan
    cells = tuple(tuple(row[index] for index in used) for row in plan.cells)
    devices = tuple(plan.devices[index] for index in used)
    try:
        return msgspec.structs.replace(plan, devices=devices, cells=cells).validate()
    except PlanError:
        return plan
