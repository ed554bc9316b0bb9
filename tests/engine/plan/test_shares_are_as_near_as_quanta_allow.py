"""Percentages become quanta with the largest remainder; attention snaps to KV heads."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import PlanError
from engine.plan import presets, rounding
from engine.plan.plan import Plan, PlanShape
from tests.engine.plan.strategies import DEVICES, as_percentages, plans, shapes, weight_lists

ROUNDING = 1e-9  # of percentages that were computed in float64


@given(st.data(), st.integers(0, 10_000), st.integers(1, 9))
def test_largest_remainder_is_within_one_and_sums(
    data: st.DataObject, total: int, count: int
) -> None:
    weights = [Fraction(weight) for weight in data.draw(weight_lists(count))]
    parts = rounding.largest_remainder(weights, total)
    assert sum(parts) == total
    for part, weight in zip(parts, weights, strict=True):
        assert abs(part - weight * total / sum(weights)) < 1
        assert weight or part == 0


@given(st.data(), shapes(), DEVICES, st.booleans())
def test_a_share_is_within_one_quantum_or_one_kv_group_of_what_was_asked(
    data: st.DataObject, shape: PlanShape, devices: list[str], snap: bool
) -> None:
    percentages = as_percentages(data.draw(weight_lists(len(devices))))
    plan = presets.from_percentages(shape, devices, percentages, snap_to_kv_heads=snap)
    for row in range(shape.num_rows):
        step = shape.heads_per_kv if snap and shape.row_kind(row) == "attention" else 1
        for count, percentage in zip(plan.cells[row], percentages, strict=True):
            wanted = percentage / 100 * shape.num_quanta(row)
            assert abs(count - wanted) <= step + ROUNDING, shape.row_name(row)


@given(st.data(), shapes(), DEVICES)
def test_snapping_replicates_nothing_or_is_not_done(
    data: st.DataObject, shape: PlanShape, devices: list[str]
) -> None:
    percentages = as_percentages(data.draw(weight_lists(len(devices))))
    snapped = presets.from_percentages(shape, devices, percentages)
    plain = presets.from_percentages(shape, devices, percentages, snap_to_kv_heads=False)
    heads = [snapped.kv_head_range(0, device) for device in range(len(devices))]
    held = sum(end - first for first, end in heads)
    assert held == shape.num_kv_heads or snapped.cells[0] == plain.cells[0]
    assert set(plain.group(0)) <= set(snapped.group(0)), "nobody loses a share by snapping"
    assert snapped.cells[1] == plain.cells[1]


@pytest.mark.parametrize(
    ("percentages", "attention", "mlp"),
    [
        ([70, 30, 0], (6, 3, 0), (34, 14, 0)),
        ([0, 0, 100], (0, 0, 9), (0, 0, 48)),
        ([33.3, 33.3, 33.3], (3, 3, 3), (16, 16, 16)),
        ([90, 10, 0], (8, 1, 0), (43, 5, 0)),  # snapped, the second would have nothing
        ([50, 50, 0], (5, 4, 0), (24, 24, 0)),  # the cut is as far from 3 as from 6
    ],
)
def test_percentages_of_nine_heads_on_three_kv_heads(
    small_model: PlanShape,
    percentages: list[float],
    attention: tuple[int, ...],
    mlp: tuple[int, ...],
) -> None:
    plan = presets.from_percentages(small_model, ["a", "b", "c"], percentages)
    assert (plan.cells[0], plan.cells[1]) == (attention, mlp)


def test_snapping_can_be_left_off(small_model: PlanShape) -> None:
    plan = presets.from_percentages(small_model, ["a", "b"], [60, 40], snap_to_kv_heads=False)
    assert plan.cells[0] == (5, 4)
    assert [plan.kv_head_range(0, device) for device in (0, 1)] == [(0, 2), (1, 3)]


def test_the_head_takes_its_own_percentages(small_model: PlanShape) -> None:
    plan = presets.from_percentages(
        small_model, ["a", "b"], [50, 50], head_percentages=[100, 0], wire="bfloat16"
    )
    assert plan.cells[small_model.head_row] == (192, 0)
    assert plan.wire == "bfloat16"


@given(plans(), st.data())
def test_shown_percentages_sum_to_a_hundred(plan: Plan, data: st.DataObject) -> None:
    row = data.draw(st.integers(0, plan.shape.num_rows - 1))
    shown = rounding.whole_percentages(plan, row)
    assert sum(shown) == 100
    for device, percentage in enumerate(shown):
        assert abs(percentage - 100 * plan.share(row, device)) < 1


@given(shapes(), st.data())
def test_percent_and_quanta_are_each_other_s_inverse(shape: PlanShape, data: st.DataObject) -> None:
    row = data.draw(st.integers(0, shape.num_rows - 1))
    quanta = data.draw(st.integers(0, shape.num_quanta(row)))
    percent = rounding.quanta_to_percent(shape, row, quanta)
    assert rounding.percent_to_quanta(shape, row, percent) == quanta


def test_a_percentage_outside_is_clamped_and_nan_is_refused(small_model: PlanShape) -> None:
    assert rounding.percent_to_quanta(small_model, 1, -5) == 0
    assert rounding.percent_to_quanta(small_model, 1, float("inf")) == 48
    with pytest.raises(PlanError, match="not a number"):
        rounding.percent_to_quanta(small_model, 1, float("nan"))
