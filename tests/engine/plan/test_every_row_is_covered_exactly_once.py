"""Whatever makes a plan, each head, column and vocabulary row is computed exactly once."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import PlanError
from engine.model.config import Layer, ModelConfig, Rope
from engine.plan import presets
from engine.plan.plan import Plan, PlanShape
from tests.engine.plan.strategies import DEVICES, as_percentages, plans, shapes, weight_lists


def assert_covered_once(plan: Plan) -> None:
    """Count every unit of every row, by the ranges that a runner would load."""
    shape = plan.shape
    for row in range(shape.num_rows):
        seen = [0] * shape.units(row)
        for device in range(len(plan.devices)):
            first, end = plan.unit_range(row, device)
            for unit in range(first, end):
                seen[unit] += 1
            is_in_group = device in plan.group(row)
            assert is_in_group == (end > first) == (plan.share(row, device) > 0)
        assert seen == [1] * shape.units(row), shape.row_name(row)


@given(plans())
def test_any_valid_plan_covers_every_unit_once(plan: Plan) -> None:
    assert_covered_once(plan)


@given(plans())
def test_ranges_tile_in_column_order(plan: Plan) -> None:
    for row in range(plan.shape.num_rows):
        quantum_end = unit_end = 0
        for device in range(len(plan.devices)):
            first, end = plan.quantum_range(row, device)
            assert first == quantum_end
            quantum_end = end
            first, end = plan.unit_range(row, device)
            assert first == unit_end
            unit_end = end
        assert quantum_end == plan.shape.num_quanta(row)
        assert unit_end == plan.shape.units(row)


@given(plans())
def test_a_device_holds_the_kv_heads_of_its_query_heads_and_no_others(plan: Plan) -> None:
    heads_per_kv = plan.shape.heads_per_kv
    for row in range(0, plan.shape.head_row, 2):
        for device in range(len(plan.devices)):
            first, end = plan.unit_range(row, device)
            needed = sorted({head // heads_per_kv for head in range(first, end)})
            assert list(range(*plan.kv_head_range(row, device))) == needed
            if first == end:
                assert plan.kv_head_range(row, device) == (0, 0)


@given(plans())
def test_used_devices_and_rows_of_agree_with_the_cells(plan: Plan) -> None:
    for device in range(len(plan.devices)):
        rows = [row for row, cells in enumerate(plan.cells) if cells[device] > 0]
        assert plan.rows_of(device) == rows
        assert (device in plan.used_devices()) == bool(rows)


@given(shapes(), DEVICES, st.booleans())
def test_even_covers_with_more_or_fewer_devices_than_parts(
    shape: PlanShape, devices: list[str], snap: bool
) -> None:
    assert_covered_once(presets.even(shape, devices, snap_to_kv_heads=snap))


@given(st.data(), shapes(), DEVICES)
def test_percentages_cover(data: st.DataObject, shape: PlanShape, devices: list[str]) -> None:
    weights = data.draw(weight_lists(len(devices)))
    assert_covered_once(presets.from_percentages(shape, devices, as_percentages(weights)))


@given(st.data(), shapes(), DEVICES)
def test_percentages_per_layer_cover(
    data: st.DataObject, shape: PlanShape, devices: list[str]
) -> None:
    lists = [as_percentages(data.draw(weight_lists(len(devices)))) for _ in range(shape.num_layers)]
    plan = presets.from_percentages(shape, devices, lists)
    assert_covered_once(plan)
    last = presets.from_percentages(shape, devices, lists[-1])
    assert plan.cells[-3:] == last.cells[-3:], "the head follows the last layer"


@given(st.data(), shapes(), DEVICES)
def test_a_pipeline_covers_and_cuts_no_row(
    data: st.DataObject, shape: PlanShape, devices: list[str]
) -> None:
    weights = data.draw(st.none() | weight_lists(len(devices)))
    plan = presets.pipeline(shape, devices, weights=weights)
    assert_covered_once(plan)
    owners = [plan.group(row) for row in range(shape.num_rows)]
    assert all(len(group) == 1 for group in owners)
    assert owners == sorted(owners), "runs are in column order"
    assert owners[0::2] == [*owners[1::2], owners[-1]], "a layer is not cut, the head is at the end"


@pytest.mark.parametrize(("num_layers", "num_devices"), [(61, 2), (32, 3), (10, 4), (30, 7)])
def test_layers_that_do_not_divide_are_all_given_out(num_layers: int, num_devices: int) -> None:
    """Bug of others: each machine computed its first layer from its own count, and some layers
    belonged to nobody (61 on 2, 32 on 3, 10 on 4)."""
    shape = PlanShape(num_layers, 4, 2, 64, 512)
    plan = presets.pipeline(shape, [f"node-{index}/cpu" for index in range(num_devices)])
    assert_covered_once(plan)
    counts = [len(plan.rows_of(device)) // 2 for device in range(num_devices)]
    assert sum(counts) == num_layers
    assert max(counts) - min(counts) <= 1


def test_more_devices_than_layers_leaves_some_without_work() -> None:
    shape = PlanShape(2, 4, 2, 64, 512)
    plan = presets.pipeline(shape, ["a", "b", "c", "d", "e"])
    assert_covered_once(plan)
    assert plan.used_devices() == (0, 1)


def test_a_pipeline_takes_layer_counts(small_model: PlanShape) -> None:
    plan = presets.pipeline(small_model, ["a", "b", "c"], [10, 20, 0])
    assert plan.rows_of(0) == list(range(20))
    assert plan.rows_of(1) == list(range(20, 61))
    assert plan.used_devices() == (0, 1)


def test_single_puts_everything_on_one_device(small_model: PlanShape) -> None:
    plan = presets.single(small_model, "b", ["a", "b", "c"])
    assert plan.used_devices() == (1,)
    assert plan.rows_of(1) == list(range(small_model.num_rows))
    assert presets.single(small_model, "b").devices == ("b",)


def test_rows_are_attention_and_mlp_of_each_layer_and_then_the_head(odd_shape: PlanShape) -> None:
    names = [odd_shape.row_name(row) for row in range(odd_shape.num_rows)]
    assert names[:3] == ["layer 0 attention", "layer 0 mlp", "layer 1 attention"]
    assert names[-2:] == ["layer 3 mlp", "output head"]
    assert [odd_shape.row_layer(row) for row in (0, 1, 7, 8)] == [0, 0, 3, None]
    assert [odd_shape.units(row) for row in (0, 1, 8)] == [15, 170, 599]
    assert [odd_shape.quantum_size(row) for row in (0, 1, 8)] == [1, 32, 256]
    assert [odd_shape.num_quanta(row) for row in (0, 1, 8)] == [15, 6, 3]
    assert odd_shape.row_kind(odd_shape.attention_row(2)) == "attention"
    assert odd_shape.row_kind(odd_shape.mlp_row(2)) == "mlp"
    for row in (-1, odd_shape.num_rows):
        with pytest.raises(IndexError):
            odd_shape.row_kind(row)


@pytest.mark.parametrize(
    ("widths", "expected"), [((1536,) * 30, 1536), ((75, 37) * 15, (75, 37) * 15)]
)
def test_the_shape_comes_from_the_model_config(widths: tuple[int, ...], expected: object) -> None:
    config = ModelConfig(
        family="llama",
        width=576,
        layers=tuple(Layer(mlp_width=width) for width in widths),
        num_heads=9,
        num_kv_heads=3,
        head_width=64,
        vocab_size=49152,
        norm_epsilon=1e-5,
        ropes=(Rope(theta=1e5),),
        rope_layout="half",
        max_positions=8192,
        is_head_tied=True,
    )
    assert PlanShape.from_config(config) == PlanShape(30, 9, 3, expected, 49152)


@given(plans())
def test_a_plan_travels_on_the_wire(plan: Plan) -> None:
    sent = msgspec.msgpack.encode(plan)
    assert msgspec.msgpack.decode(sent, type=Plan).validate() == plan


def test_a_wire_plan_with_one_field_more_is_refused(small_model: PlanShape) -> None:
    fields = msgspec.msgpack.decode(msgspec.msgpack.encode(presets.even(small_model, ["a"])))
    for broken in ([*fields, 1], fields[:2]):
        with pytest.raises(msgspec.ValidationError):
            msgspec.msgpack.decode(msgspec.msgpack.encode(broken), type=Plan)


def test_kv_heads_are_asked_of_attention_rows_only(small_model: PlanShape) -> None:
    plan = presets.even(small_model, ["a", "b"])
    with pytest.raises(IndexError, match="layer 0 mlp has no KV heads"):
        plan.kv_head_range(1, 0)


def test_a_row_given_twice_as_much_is_refused(small_model: PlanShape) -> None:
    plan = presets.even(small_model, ["a", "b"])
    with pytest.raises(PlanError, match="layer 3 attention: 9 \\+ 9 = 18 quanta, the row has 9"):
        presets.with_rows(plan, {6: (9, 9)})
