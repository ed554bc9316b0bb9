"""Which plan to go on with when devices were lost.

In: the plan, what is gone, and the memory of what is left. Out: the nearest plan that fits, or the
row that fits nowhere. It asks nobody and moves nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from engine.cluster.coordinator import describe_rows
from engine.errors import PlanError
from engine.host.opened_model import OpenedModel
from engine.model.memory import check_memory, plan_memory, row_memory
from engine.plan.plan import Plan
from engine.plan.presets import with_devices
from engine.plan.repair import give_to_neighbours, give_to_room


def nearest_plan(
    model: OpenedModel,
    plan: Plan,
    pools: Mapping[str, tuple[str, int]],
    spares: Sequence[str] = (),
) -> Plan:
    """The plan nearest to one that lost devices.

    Args:
        pools: for each device that is left the memory it draws on, by name, and its bytes; every
            other device of the plan is lost.
        spares: devices outside the plan that may take a share.
    Returns: a plan in which the lost devices have no share.
    Raises: PlanError: none fits; names the row, what it needs and what there is.
    """
    if spares:
        plan = with_devices(plan, [*plan.devices, *spares])
    columns = frozenset(i for i, device in enumerate(plan.devices) if device not in pools)
    neighbours = give_to_neighbours(plan, columns)
    if neighbours is not None and _fits(model, neighbours, pools):
        return neighbours
    needs = plan_memory(
        model.config,
        plan,
        model.checkpoint.tensors,
        model.dtype,
        model.kv_window,
        model.kv_dtype,
    )
    room = dict(pools.values())
    for device, need in needs.items():
        if device in pools:
            room[pools[device][0]] -= need.total
    rows = row_memory(
        model.config,
        plan.shape,
        model.checkpoint.tensors,
        model.dtype,
        model.kv_window,
        model.kv_dtype,
    )
    left = {i: pools[d][0] for i, d in enumerate(plan.devices) if d in pools}
    filled = give_to_room(plan, columns, rows, left, room)
    _check(model, filled, pools)
    return filled


def what_changed(before: Plan, after: Plan, lost: frozenset[str]) -> str:
    """Who has the lost shares now, for a person."""
    gained = [
        device
        for index, device in enumerate(after.devices)
        if device not in lost and num_quanta(after, device) > num_quanta(before, device)
        if after.rows_of(index)
    ]
    rows = ", ".join(
        describe_rows(before, before.devices.index(device))
        for device in before.devices
        if device in lost
    )
    return f"{rows} went to {', '.join(gained)}"


def num_quanta(plan: Plan, device: str) -> int:
    """Quanta of all rows that a device has; 0 where it is not in the plan."""
    if device not in plan.devices:
        return 0
    column = plan.devices.index(device)
    return sum(cells[column] for cells in plan.cells)


def _fits(model: OpenedModel, plan: Plan, pools: Mapping[str, tuple[str, int]]) -> bool:
    try:
        _check(model, plan, pools)
    except PlanError:
        return False
    return True


def _check(model: OpenedModel, plan: Plan, pools: Mapping[str, tuple[str, int]]) -> None:
    needs = plan_memory(
        model.config,
        plan,
        model.checkpoint.tensors,
        model.dtype,
        model.kv_window,
        model.kv_dtype,
    )
    check_memory(needs, {device: pools[device] for device in needs}, model.kv_window)
