"""Fractions and percentages as whole quanta, exactly.

In: weights as fractions, or quanta for display. Out: whole numbers that sum to what was given.
Everything is computed in rational numbers, so no sum depends on the rounding of floats.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise

from engine.errors import PlanError
from engine.plan.plan import Plan, PlanShape


def split_heads(
    shape: PlanShape, weights: Sequence[Fraction], *, snap_to_kv_heads: bool = True
) -> tuple[int, ...]:
    """Query heads per device, by weights that sum to 1.

    Every cut goes to the nearest KV-head border, where no K and V is held twice. The row is not
    snapped where a cut is exactly between two borders (one KV head on two devices), or where snapping
    would leave a device without the share it would have had.

    Args:
        weights: >= 0, one per device, sum 1.
    Returns: sums to num_heads; each within one head of its weight, one KV group where snapped.
    """
    plain = largest_remainder(weights, shape.num_heads)
    if not snap_to_kv_heads or shape.heads_per_kv == 1:
        return plain
    group = shape.heads_per_kv
    cuts = [0]
    wanted = Fraction(0)
    for weight in weights[:-1]:
        wanted += weight * shape.num_heads
        border = round_half_up(wanted / group) * group
        if abs(wanted - border) >= Fraction(group, 2):
            return plain
        cuts.append(border)
    cuts.append(shape.num_heads)
    snapped = tuple(end - first for first, end in pairwise(cuts))
    return snapped if keeps_shares(plain, snapped) else plain


def largest_remainder(weights: Sequence[Fraction], total: int) -> tuple[int, ...]:
    """Split a whole number by weights; every part is within one of its exact value.

    Args:
        weights: >= 0, at least one above 0; scaled to sum 1. Ties go to the earlier part.
        total: >= 0.
    Returns: sums to total; 0 where the weight is 0.
    """
    weight_sum = sum(weights)
    assert weight_sum > 0, "the caller checks that one weight is above 0"
    exact = [weight * total / weight_sum for weight in weights]
    counts = [math.floor(value) for value in exact]
    by_remainder = sorted(range(len(exact)), key=lambda index: counts[index] - exact[index])
    for index in by_remainder[: total - sum(counts)]:
        counts[index] += 1
    return tuple(counts)


def whole_percentages(plan: Plan, row: int) -> tuple[int, ...]:
    """Shares of a row as whole percentages that sum to 100, for display."""
    return largest_remainder([Fraction(count) for count in plan.cells[row]], 100)


def quanta_to_percent(shape: PlanShape, row: int, quanta: int) -> float:
    """Percentage of a row that a number of its quanta is."""
    return 100 * quanta / shape.num_quanta(row)


def percent_to_quanta(shape: PlanShape, row: int, percent: float) -> int:
    """Nearest number of quanta of a row; a half rounds up, values outside 0-100 are clamped.

    Raises: PlanError: percent is NaN.
    """
    if math.isnan(percent):
        raise PlanError("the percentage is not a number. Give one from 0 to 100.")
    clamped = min(max(percent, 0.0), 100.0)
    return round_half_up(Fraction(clamped) * shape.num_quanta(row) / 100)


def proportional(counts: Sequence[int], total: int) -> tuple[int, ...]:
    """Split `total` in proportion to counts, or equally where all are 0."""
    if not counts:
        return ()
    equal = not any(counts)
    return largest_remainder([Fraction(1 if equal else count) for count in counts], total)


def keeps_shares(plain: Sequence[int], snapped: Sequence[int]) -> bool:
    """Whether no device that has a share in `plain` has none in `snapped`."""
    return all(new or not old for old, new in zip(plain, snapped, strict=True))


def round_half_up(value: Fraction) -> int:
    """The nearest whole number, the upper one at a half."""
    return math.floor(value + Fraction(1, 2))
