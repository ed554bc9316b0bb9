"""The plan nearest to one that lost devices: their shares go to neighbours.

In: a plan, the columns that are gone, and what rows weigh. Out: a plan in which those columns are
empty. What the others have they keep, so that only what is missing must be loaded. Pure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from engine.errors import PlanError
from engine.plan.plan import Plan
from engine.plan.rounding import proportional


def give_to_neighbours(plan: Plan, lost: frozenset[int]) -> Plan | None:
    """Extend the ranges beside the lost ones, in proportion to what both neighbours have.

    A row that only lost devices had is cut as the nearest row of its kind.

    Args:
        lost: column indexes.
    Returns: the plan, with empty columns for the lost devices; None if nobody has anything left.
    """
    kept = [_survivors(cells, lost) for cells in plan.cells]
    if not any(any(cells) for cells in kept):
        return None
    rows: list[tuple[int, ...]] = []
    for row, cells in enumerate(plan.cells):
        if any(kept[row]):
            rows.append(_extended(cells, lost))
        else:
            rows.append(proportional(_nearest(plan, kept, row), plan.shape.num_quanta(row)))
    return msgspec.structs.replace(plan, cells=tuple(rows)).validate()


def give_to_room(
    plan: Plan,
    lost: frozenset[int],
    row_bytes: Sequence[int],
    pools: Mapping[int, str],
    room: Mapping[str, int],
) -> Plan:
    """Give each lost range to whoever has most room, and split it only where it must be.

    Args:
        lost: column indexes.
        row_bytes: what the whole of each row takes, weights and keys and values.
        pools: the memory that each remaining column draws on, by name.
        room: bytes that are free there once every remaining column has its own shares.
    Raises: PlanError: names the first row without room, what it needs and what there is.
    """
    left = dict(room)
    rows: list[tuple[int, ...]] = []
    for row, cells in enumerate(plan.cells):
        new = list(_survivors(cells, lost))
        missing = sum(cells) - sum(new)
        before, wanted = dict(left), missing
        size = max(1, -(-row_bytes[row] // plan.shape.num_quanta(row)))
        while missing:
            having_room = [column for column in pools if left[pools[column]] >= size]
            if not having_room:
                raise PlanError(_no_room(plan, row, wanted * size, pools, before))
            # Who has a share already stays in the row's group.
            column = max(
                having_room, key=lambda c: (min(left[pools[c]] // size, missing), new[c], -c)
            )
            count = min(missing, left[pools[column]] // size)
            new[column] += count
            left[pools[column]] -= count * size
            missing -= count
        rows.append(tuple(new))
    return msgspec.structs.replace(plan, cells=tuple(rows)).validate()


def _survivors(cells: Sequence[int], lost: frozenset[int]) -> tuple[int, ...]:
    return tuple(0 if column in lost else count for column, count in enumerate(cells))


def _extended(cells: Sequence[int], lost: frozenset[int]) -> tuple[int, ...]:
    """A row whose lost ranges went to the nearest columns with a share."""
    new = list(_survivors(cells, lost))
    having = [column for column, count in enumerate(new) if count]
    for column in sorted(lost):
        count = cells[column]
        before = max((c for c in having if c < column), default=None)
        after = min((c for c in having if c > column), default=None)
        if before is None or after is None:
            nearest = after if before is None else before
            assert nearest is not None
            new[nearest] += count
        else:
            first, second = proportional([cells[before], cells[after]], count)
            new[before] += first
            new[after] += second
    return tuple(new)


def _nearest(plan: Plan, kept: Sequence[tuple[int, ...]], row: int) -> tuple[int, ...]:
    """Shares of the nearest row of the same kind that has any left, else of any row."""
    kind = plan.shape.row_kind(row)
    rows = [other for other, cells in enumerate(kept) if any(cells)]
    alike = [other for other in rows if plan.shape.row_kind(other) == kind]
    return kept[min(alike or rows, key=lambda other: abs(other - row))]


def _no_room(
    plan: Plan, row: int, need: int, pools: Mapping[int, str], left: Mapping[str, int]
) -> str:
    there = ", ".join(
        f"{plan.devices[column]} has {max(0, left[pool]) / 2**20:,.0f} MiB"
        for column, pool in pools.items()
    )
    return (
        f"{plan.shape.row_name(row)} needs {need / 2**20:,.0f} MiB more than there is room for: "
        f"{there or 'no other device is ready'}. Add a node, choose a narrower --dtype, or lower "
        "--kv-window"
    )
