"""When devices are lost, the rest keep what they have, every row is covered again, and nobody gets
more than there is room for."""

from __future__ import annotations

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from engine.errors import PlanError
from engine.plan.plan import Plan, PlanShape
from engine.plan.presets import even, pipeline
from engine.plan.repair import give_to_neighbours, give_to_room
from tests.engine.plan.strategies import plans

SHAPE = PlanShape(num_layers=4, num_heads=8, num_kv_heads=4, mlp_width=320, vocab_size=1024)


@st.composite
def plans_with_losses(draw: st.DrawFn) -> tuple[Plan, frozenset[int]]:
    plan = draw(plans())
    columns = st.integers(0, len(plan.devices) - 1)
    return plan, frozenset(draw(st.sets(columns, min_size=1)))


@given(plans_with_losses())
def test_neighbours_extend_their_ranges_and_nobody_loses_any(
    case: tuple[Plan, frozenset[int]],
) -> None:
    plan, lost = case
    repaired = give_to_neighbours(plan, lost)
    kept = set(plan.used_devices()) - lost
    if not kept:
        assert repaired is None
        return
    assert repaired is not None
    repaired.validate()
    assert set(repaired.used_devices()) <= kept
    for row, cells in enumerate(plan.cells):
        survivors = [column for column in range(len(cells)) if cells[column] and column not in lost]
        for column in survivors:
            first, end = plan.quantum_range(row, column)
            new_first, new_end = repaired.quantum_range(row, column)
            assert new_first <= first and end <= new_end
        if survivors:
            assert set(repaired.group(row)) == set(survivors)


def test_a_row_that_only_the_lost_device_had_is_cut_as_its_nearest_neighbour() -> None:
    plan = pipeline(SHAPE, ["a", "b", "c"], [1, 2, 1])
    repaired = give_to_neighbours(plan, frozenset({1}))
    assert repaired is not None
    owners = [repaired.group(SHAPE.attention_row(layer)) for layer in range(4)]
    assert owners == [(0,), (0,), (2,), (2,)]


@given(plans_with_losses(), st.data())
def test_room_is_never_exceeded(case: tuple[Plan, frozenset[int]], data: st.DataObject) -> None:
    plan, lost = case
    left = [column for column in range(len(plan.devices)) if column not in lost]
    assume(left)
    row_bytes = [
        data.draw(st.integers(0, 1000)) * plan.shape.num_quanta(row)
        for row in range(plan.shape.num_rows)
    ]
    names = st.sampled_from(["here", "there"])
    pools = {column: data.draw(names) for column in left}
    room = {pool: data.draw(st.integers(0, 20_000)) for pool in {*pools.values()}}
    missing = sum(
        max(1, row_bytes[row] // plan.shape.num_quanta(row)) * sum(cells[column] for column in lost)
        for row, cells in enumerate(plan.cells)
    )
    try:
        repaired = give_to_room(plan, lost, row_bytes, pools, room)
    except PlanError as error:
        assert "needs" in str(error) and "MiB" in str(error)
        # One pool whose room exceeds all that is missing takes everything.
        assert max(room.values()) < missing
        return
    repaired.validate()
    assert not set(repaired.used_devices()) & lost
    for pool, size in room.items():
        gained = sum(
            (repaired.cells[row][column] - plan.cells[row][column])
            * max(1, row_bytes[row] // plan.shape.num_quanta(row))
            for row in range(plan.shape.num_rows)
            for column in left
            if pools[column] == pool
        )
        assert gained <= size


def test_the_error_names_row_need_and_capacities() -> None:
    plan = even(SHAPE, ["desk", "attic"])
    row_bytes = [64 << 20] * SHAPE.num_rows
    with pytest.raises(PlanError) as caught:
        give_to_room(plan, frozenset({1}), row_bytes, {0: "desk"}, {"desk": 40 << 20})
    text = str(caught.value)
    assert "layer 0 mlp needs 32 MiB" in text
    assert "desk has 8 MiB" in text
