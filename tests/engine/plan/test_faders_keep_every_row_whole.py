"""Moving a fader redistributes among the others: sums hold, locks hold, proportions hold."""

from __future__ import annotations

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from engine.errors import PlanError
from engine.plan import presets
from engine.plan.plan import Plan, PlanShape
from tests.engine.plan.strategies import DEVICES, as_percentages, plans, weight_lists


@st.composite
def moves(draw: st.DrawFn) -> tuple[Plan, list[int], int, float, frozenset[int]]:
    """A plan, rows, a device, a fraction, and locked other devices."""
    plan = draw(plans())
    rows = draw(st.lists(st.integers(0, plan.shape.num_rows - 1), max_size=6))
    devices = list(range(len(plan.devices)))
    device = draw(st.sampled_from(devices))
    others = [index for index in devices if index != device]
    locked = draw(st.frozensets(st.sampled_from(others))) if others else frozenset[int]()
    return plan, rows, device, draw(st.floats(-0.5, 1.5)), locked


@given(moves(), st.booleans())
def test_sums_and_locks_hold(
    move: tuple[Plan, list[int], int, float, frozenset[int]], snap: bool
) -> None:
    plan, rows, device, fraction, locked = move
    moved = presets.set_share(plan, rows, device, fraction, locked, snap_to_kv_heads=snap)
    assert moved.validate() is moved
    for row in range(plan.shape.num_rows):
        if row not in rows:
            assert moved.cells[row] == plan.cells[row]
        for index in locked:
            assert moved.cells[row][index] == plan.cells[row][index]


@given(moves())
def test_the_fader_lands_as_near_as_quanta_and_locks_allow(
    move: tuple[Plan, list[int], int, float, frozenset[int]],
) -> None:
    plan, rows, device, fraction, locked = move
    assume(len(locked) < len(plan.devices) - 1)
    moved = presets.set_share(plan, rows, device, fraction, locked)
    for row in rows:
        total = plan.shape.num_quanta(row)
        free = total - sum(plan.cells[row][index] for index in locked)
        wanted = min(max(fraction, 0), 1) * total
        if wanted >= free:
            assert moved.cells[row][device] == free
        else:
            assert abs(moved.cells[row][device] - wanted) <= 0.5 + 1e-9


@given(plans(), st.data())
def test_the_others_keep_their_proportions(plan: Plan, data: st.DataObject) -> None:
    device = data.draw(st.integers(0, len(plan.devices) - 1))
    row = data.draw(st.integers(0, plan.shape.num_rows - 1))
    moved = presets.set_share(plan, [row], device, data.draw(st.floats(0, 1)))
    before = plan.shape.num_quanta(row) - plan.cells[row][device]
    after = plan.shape.num_quanta(row) - moved.cells[row][device]
    for index in range(len(plan.devices)):
        if index != device and before:
            wanted = plan.cells[row][index] * after / before
            assert abs(moved.cells[row][index] - wanted) < 1 + 1e-9


@given(plans(), st.data())
def test_pulling_further_never_gives_less(plan: Plan, data: st.DataObject) -> None:
    device = data.draw(st.integers(0, len(plan.devices) - 1))
    low, high = sorted(data.draw(st.tuples(st.floats(0, 1), st.floats(0, 1))))
    snap = data.draw(st.booleans())
    rows = range(plan.shape.num_rows)
    less = presets.set_share(plan, rows, device, low, snap_to_kv_heads=snap)
    more = presets.set_share(plan, rows, device, high, snap_to_kv_heads=snap)
    for row in rows:
        assert less.cells[row][device] <= more.cells[row][device], plan.shape.row_name(row)


def test_a_snapped_fader_moves_whole_kv_groups(small_model: PlanShape) -> None:
    plan = presets.even(small_model, ["a", "b", "c"])
    moved = presets.set_share(plan, [0, 1], 0, 0.6, snap_to_kv_heads=True)
    assert moved.cells[:2] == ((5, 2, 2), (29, 10, 9)), "snapped, b or c would have nothing"
    moved = presets.set_share(plan, [0], 0, 0.6, locked=[2], snap_to_kv_heads=True)
    assert moved.cells[0] == (5, 1, 3), "snapped, b would have nothing"
    two = presets.even(small_model, ["a", "b"])
    assert presets.set_share(two, [0], 0, 0.6, snap_to_kv_heads=True).cells[0] == (6, 3)


def test_where_the_others_have_nothing_they_share_equally(small_model: PlanShape) -> None:
    plan = presets.single(small_model, "a", ["a", "b", "c"])
    assert presets.set_share(plan, [1], 0, 0.5).cells[1] == (24, 12, 12)
    assert presets.set_share(plan, [1], 0, 0.5, locked=[2]).cells[1] == (24, 24, 0)


def test_where_all_others_are_locked_the_fader_stays(small_model: PlanShape) -> None:
    plan = presets.even(small_model, ["a", "b", "c"])
    assert presets.set_share(plan, range(61), 0, 0.9, locked=[1, 2]) == plan
    alone = presets.single(small_model, "a")
    assert presets.set_share(alone, range(61), 0, 0.1) == alone


@pytest.mark.parametrize(
    ("rows", "device", "fraction", "locked", "message"),
    [
        ([0], 0, 0.5, [0], "the share of a is locked"),
        ([0], 0, float("nan"), [], "not a number"),
        ([0], 2, 0.5, [], "device index 2 is not between 0 and 1"),
        ([0], -1, 0.5, [], "device index -1"),
        ([0], 0, 0.5, [7], "device index 7"),
        ([61], 0, 0.5, [], "plan row 61 is not between 0 and 60"),
        ([-1], 0, 0.5, [], "plan row -1"),
    ],
)
def test_impossible_moves_are_refused(
    small_model: PlanShape,
    rows: list[int],
    device: int,
    fraction: float,
    locked: list[int],
    message: str,
) -> None:
    plan = presets.even(small_model, ["a", "b"])
    with pytest.raises(PlanError, match=message):
        presets.set_share(plan, rows, device, fraction, locked)


@given(plans(), st.data())
def test_a_divider_moves_no_more_than_there_is(plan: Plan, data: st.DataObject) -> None:
    devices = st.integers(0, len(plan.devices) - 1)
    source, target = data.draw(devices), data.draw(devices)
    count = data.draw(st.integers(-20, 20))
    rows = range(plan.shape.num_rows)
    moved = presets.move_quanta(plan, rows, source, target, count)
    for row in rows:
        limit = plan.cells[row][source if count > 0 else target]
        change = moved.cells[row][target] - plan.cells[row][target]
        assert abs(change) == (min(abs(count), limit) if source != target else 0)
        assert change == 0 or (change > 0) == (count > 0)


@given(plans(), st.data())
def test_set_layers_changes_only_its_run(plan: Plan, data: st.DataObject) -> None:
    first = data.draw(st.integers(0, plan.shape.num_layers - 1))
    end = data.draw(st.integers(first + 1, plan.shape.num_layers))
    percentages = as_percentages(data.draw(weight_lists(len(plan.devices))))
    changed = presets.set_layers(plan, first, end, percentages)
    whole = presets.from_percentages(plan.shape, plan.devices, percentages, wire=plan.wire)
    run = presets.layer_rows(plan.shape, first, end)
    for row in range(plan.shape.num_rows):
        expected = whole if row in run else plan
        assert changed.cells[row] == expected.cells[row]


@pytest.mark.parametrize(("first", "end"), [(3, 3), (5, 4), (-1, 2), (0, 31)])
def test_a_run_outside_the_model_is_refused(small_model: PlanShape, first: int, end: int) -> None:
    plan = presets.even(small_model, ["a", "b"])
    with pytest.raises(PlanError, match="not a run inside the model"):
        presets.set_layers(plan, first, end, [50, 50])


@given(plans(), DEVICES)
def test_columns_can_be_added_removed_and_reordered(plan: Plan, devices: list[str]) -> None:
    names = list(dict.fromkeys([*reversed(plan.devices), *devices]))
    wider = presets.with_devices(plan, names)
    for row in range(plan.shape.num_rows):
        for index, name in enumerate(names):
            old = plan.cells[row][plan.devices.index(name)] if name in plan.devices else 0
            assert wider.cells[row][index] == old
    assert presets.with_devices(wider, plan.devices) == plan
    assert presets.with_devices(plan, devices).devices == tuple(devices)


def test_what_a_removed_device_had_goes_to_the_others_in_proportion(small_model: PlanShape) -> None:
    plan = presets.from_percentages(small_model, ["a", "b", "c"], [50, 25, 25])
    assert presets.with_devices(plan, ["a", "b"]).cells[1] == (32, 16)
