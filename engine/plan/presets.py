"""Ways to make a plan, and to change one: even, by percentages, pipeline, single device, faders.

In: a shape, device names, and what a person asked for. Out: a validated Plan whose rows sum exactly,
in quanta; no function here can return a row that does not. What is fast or fits in memory is decided
elsewhere.

The output head: `even` cuts it evenly, `from_percentages` as the last layer unless told otherwise,
`pipeline` gives it to the last device that has layers, so that the last hand-over stays at home.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from fractions import Fraction

import msgspec

from engine.errors import PlanError
from engine.plan.plan import Plan, PlanShape, WireFormat, check_devices, is_whole, shown
from engine.plan.rounding import (
    keeps_shares,
    largest_remainder,
    proportional,
    round_half_up,
    split_heads,
)

# Typed percentages are rounded: three thirds read 33.3 + 33.3 + 33.3.
PERCENT_SUM_TOLERANCE = 1.0
_MAX_WEIGHT = 10**12


def even(
    shape: PlanShape,
    devices: Sequence[str],
    wire: WireFormat = "float32",
    *,
    snap_to_kv_heads: bool = True,
) -> Plan:
    """Every row, the output head too, cut into equal parts as nearly as quanta allow."""
    check_devices(devices)
    percentages = [100 / len(devices)] * len(devices)
    return from_percentages(
        shape, devices, percentages, wire=wire, snap_to_kv_heads=snap_to_kv_heads
    )


def from_percentages(
    shape: PlanShape,
    devices: Sequence[str],
    percentages: Sequence[float] | Sequence[Sequence[float]],
    *,
    wire: WireFormat = "float32",
    head_percentages: Sequence[float] | None = None,
    snap_to_kv_heads: bool = True,
) -> Plan:
    """Cut every row by percentages, with the largest remainder.

    Args:
        percentages: one per device for all layers, or one such list per layer; each >= 0, and they
            sum to 100 within PERCENT_SUM_TOLERANCE (what is asked is then scaled to 100).
        head_percentages: of the output head; as the last layer where absent.
        snap_to_kv_heads: cut attention between KV heads where that is near (see `rounding.split_heads`).
    Raises: PlanError: a wrong count, a negative, NaN or infinite number, or a wrong sum.
    """
    shape.validate()
    check_devices(devices)
    per_layer = _per_layer_percentages(shape, percentages)
    rows: list[tuple[int, ...]] = []
    cache: dict[tuple[tuple[float, ...], int], tuple[tuple[int, ...], tuple[int, ...]]] = {}
    for layer, layer_percentages in enumerate(per_layer):
        mlp_quanta = shape.num_quanta(shape.mlp_row(layer))
        key = layer_percentages, mlp_quanta
        if key not in cache:
            weights = _weights(layer_percentages, len(devices), f"layer {layer}")
            cache[key] = (
                split_heads(shape, weights, snap_to_kv_heads=snap_to_kv_heads),
                largest_remainder(weights, mlp_quanta),
            )
        rows.extend(cache[key])
    head = per_layer[-1] if head_percentages is None else tuple(head_percentages)
    head_weights = _weights(head, len(devices), "output head")
    rows.append(largest_remainder(head_weights, shape.num_quanta(shape.head_row)))
    return Plan(shape, tuple(devices), tuple(rows), wire).validate()


def pipeline(
    shape: PlanShape,
    devices: Sequence[str],
    layers_per_device: Sequence[int] | None = None,
    *,
    weights: Sequence[float] | None = None,
    wire: WireFormat = "float32",
) -> Plan:
    """Whole layers in runs, one run per device, in column order.

    The output head goes to the last device that has layers. With more devices than layers, some
    have none.

    Args:
        layers_per_device: number of layers of each device; sums to the model's layers.
        weights: instead of it, relative speeds (finite, >= 0, one above 0); equal where absent.
    Raises: PlanError: a wrong count, sum or number; or both are given.
    """
    shape.validate()
    check_devices(devices)
    if layers_per_device is not None and weights is not None:
        raise PlanError("a pipeline takes layers per device or weights, not both. Leave one out.")
    if layers_per_device is None:
        if weights is None:
            weights = [1.0] * len(devices)
        counts = largest_remainder(
            _checked_weights(weights, len(devices), "pipeline"), shape.num_layers
        )
    else:
        counts = _checked_layer_counts(shape, devices, layers_per_device)
    owners = [device for device, count in enumerate(counts) for _ in range(count)]
    rows: list[tuple[int, ...]] = []
    for layer, owner in enumerate(owners):
        rows.append(_all_on(owner, len(devices), shape.num_heads))
        rows.append(_all_on(owner, len(devices), shape.num_quanta(shape.mlp_row(layer))))
    rows.append(_all_on(owners[-1], len(devices), shape.num_quanta(shape.head_row)))
    return Plan(shape, tuple(devices), tuple(rows), wire).validate()


def single(
    shape: PlanShape,
    device: str,
    devices: Sequence[str] | None = None,
    wire: WireFormat = "float32",
) -> Plan:
    """Everything on one device.

    Args:
        devices: all columns of the plan, `device` among them; only `device` where absent.
    Raises: PlanError: `device` is not one of `devices`.
    """
    columns = (device,) if devices is None else tuple(devices)
    check_devices(columns)
    if device not in columns:
        raise PlanError(
            f"{shown(device)} is not one of the plan's devices ({', '.join(columns)}). Add it."
        )
    shape.validate()
    owner = columns.index(device)
    rows = tuple(
        _all_on(owner, len(columns), shape.num_quanta(row)) for row in range(shape.num_rows)
    )
    return Plan(shape, columns, rows, wire).validate()


def layer_rows(shape: PlanShape, first_layer: int, end_layer: int) -> range:
    """The attention and mlp rows of a run of layers, half open.

    Raises: PlanError: the run is empty or not inside the model.
    """
    if not 0 <= first_layer < end_layer <= shape.num_layers:
        raise PlanError(
            f"layers {first_layer} to {end_layer - 1} are not a run inside the model, whose layers "
            f"are 0 to {shape.num_layers - 1}. Choose another run."
        )
    return range(2 * first_layer, 2 * end_layer)


def set_layers(
    plan: Plan,
    first_layer: int,
    end_layer: int,
    percentages: Sequence[float],
    *,
    snap_to_kv_heads: bool = True,
) -> Plan:
    """A plan with the layers of a half-open run cut anew by percentages; the head stays as it is.

    Args:
        percentages: as in `from_percentages`, one per device.
    Raises: PlanError: a wrong run, count, number or sum.
    """
    rows = layer_rows(plan.shape, first_layer, end_layer)
    weights = _weights(percentages, len(plan.devices), f"layers {first_layer}-{end_layer - 1}")
    attention = split_heads(plan.shape, weights, snap_to_kv_heads=snap_to_kv_heads)

    def cells(row: int) -> tuple[int, ...]:
        if plan.shape.row_kind(row) == "attention":
            return attention
        return largest_remainder(weights, plan.shape.num_quanta(row))

    return with_rows(plan, {row: cells(row) for row in rows})


def set_share(
    plan: Plan,
    rows: Iterable[int],
    device_index: int,
    fraction: float,
    locked: Collection[int] = (),
    *,
    snap_to_kv_heads: bool = False,
) -> Plan:
    """Move one device's fader; the others give or take in proportion to what they have.

    The fader goes as near to `fraction` as quanta and locked devices allow. Where all other unlocked
    devices have nothing, they share equally; where there are none, the fader stays. Proportions that
    reach 0 are forgotten, so while a fader is dragged, start each time from the plan before the drag.

    Args:
        fraction: wanted share of the device, 0 to 1; values outside are clamped.
        locked: indexes of the devices whose cells must not change.
        snap_to_kv_heads: move attention in whole KV groups where nobody loses a share by it.
    Raises: PlanError: no such row or device, a locked device, or NaN.
    """
    _check_index(plan, device_index)
    for index in locked:
        _check_index(plan, index)
    if device_index in locked:
        raise PlanError(f"the share of {plan.devices[device_index]} is locked. Unlock it first.")
    if math.isnan(fraction):
        raise PlanError("the wanted share is not a number. Give a fraction from 0 to 1.")
    fraction = min(max(fraction, 0.0), 1.0)
    changed: dict[int, tuple[int, ...]] = {}
    # Most rows are alike, and a dragged fader asks for all of them at every frame.
    done: dict[tuple[bool, tuple[int, ...]], tuple[int, ...]] = {}
    for row in rows:
        _check_row(plan, row)
        snap = snap_to_kv_heads and plan.shape.row_kind(row) == "attention"
        cells = plan.cells[row]
        if (snap, cells) not in done:
            step = plan.shape.heads_per_kv if snap else 1
            done[snap, cells] = _moved_fader(cells, device_index, fraction, locked, step)
        changed[row] = done[snap, cells]
    return with_rows(plan, changed)


def move_quanta(plan: Plan, rows: Iterable[int], source: int, target: int, count: int) -> Plan:
    """Move up to `count` quanta of each row from one device to another, as far as the source has.

    Between neighbouring columns this drags the divider between them. A negative count moves back.

    Raises: PlanError: no such row or device.
    """
    _check_index(plan, source)
    _check_index(plan, target)
    if count < 0:
        source, target, count = target, source, -count
    changed: dict[int, tuple[int, ...]] = {}
    for row in rows:
        _check_row(plan, row)
        cells = list(plan.cells[row])
        moved = min(count, cells[source])
        cells[source] -= moved
        cells[target] += moved
        changed[row] = tuple(cells)
    return with_rows(plan, changed)


def with_rows(plan: Plan, cells_by_row: Mapping[int, Sequence[int]]) -> Plan:
    """A plan with some rows replaced.

    Raises: PlanError: no such row, or a row that does not sum.
    """
    cells = list(plan.cells)
    for row, new_cells in cells_by_row.items():
        _check_row(plan, row)
        cells[row] = tuple(new_cells)
    return msgspec.structs.replace(plan, cells=tuple(cells)).validate()


def with_devices(plan: Plan, devices: Sequence[str]) -> Plan:
    """A plan with other columns: reordered, added (without a share) or removed.

    The quanta of a removed device go to the others of the row in proportion to what they have, or
    equally where they have nothing.

    Raises: PlanError: the new names are not a valid list of devices.
    """
    check_devices(devices)
    columns = [plan.devices.index(name) if name in plan.devices else None for name in devices]
    cells: list[tuple[int, ...]] = []
    for row, old_cells in enumerate(plan.cells):
        counts = [0 if column is None else old_cells[column] for column in columns]
        total = plan.shape.num_quanta(row)
        cells.append(proportional(counts, total) if sum(counts) != total else tuple(counts))
    return msgspec.structs.replace(plan, devices=tuple(devices), cells=tuple(cells)).validate()


def _moved_fader(
    cells: tuple[int, ...],
    device_index: int,
    fraction: float,
    locked: Collection[int],
    step: int,
) -> tuple[int, ...]:
    """New cells of one row, in multiples of `step` where that is possible and nobody loses all."""
    plain = _redistribute(cells, device_index, fraction, locked, 1)
    if step == 1 or any(cells[index] % step for index in locked):
        return plain
    snapped = _redistribute(cells, device_index, fraction, locked, step)
    return snapped if keeps_shares(plain, snapped) else plain


def _redistribute(
    cells: tuple[int, ...],
    device_index: int,
    fraction: float,
    locked: Collection[int],
    step: int,
) -> tuple[int, ...]:
    """New cells of one row in multiples of `step`; locked cells must be such multiples."""
    total = sum(cells)
    others = [index for index in range(len(cells)) if index != device_index and index not in locked]
    available = (total - sum(cells[index] for index in locked)) // step
    wanted = min(round_half_up(Fraction(fraction) * total / step), available)
    if not others:
        wanted = available
    rest = proportional([cells[index] for index in others], available - wanted)
    new_cells = list(cells)
    new_cells[device_index] = wanted * step
    for index, count in zip(others, rest, strict=True):
        new_cells[index] = count * step
    return tuple(new_cells)


def _all_on(owner: int, num_devices: int, quanta: int) -> tuple[int, ...]:
    return tuple(quanta if index == owner else 0 for index in range(num_devices))


def _per_layer_percentages(
    shape: PlanShape, percentages: Sequence[float] | Sequence[Sequence[float]]
) -> list[tuple[float, ...]]:
    """One tuple of percentages per layer, from either form."""
    flat: list[float] = []
    nested: list[tuple[float, ...]] = []
    for item in percentages:
        if isinstance(item, Sequence):
            nested.append(tuple(item))
        else:
            flat.append(item)
    if not nested:
        return [tuple(flat)] * shape.num_layers
    if flat or len(nested) != shape.num_layers:
        raise PlanError(
            f"percentages are given for {len(nested):,} layers, the model has {shape.num_layers}. "
            "Give one list for all layers, or one per layer."
        )
    return nested


def _weights(percentages: Sequence[float], num_devices: int, name: str) -> list[Fraction]:
    """Percentages as exact weights that sum to 1."""
    weights = _checked_weights(percentages, num_devices, name)
    found = sum(weights)
    if abs(found - 100) > PERCENT_SUM_TOLERANCE:
        raise PlanError(
            f"{name}: the percentages sum to {float(found):g}, they must sum to 100. Change one."
        )
    return [weight / found for weight in weights]


def _checked_weights(numbers: Sequence[float], num_devices: int, name: str) -> list[Fraction]:
    if len(numbers) != num_devices:
        raise PlanError(
            f"{name}: {len(numbers):,} numbers for {num_devices} devices. Give one per device, "
            "0 for none."
        )
    for number in numbers:
        if not 0 <= number <= _MAX_WEIGHT:  # NaN is in no range
            raise PlanError(
                f"{name}: {shown(number)} is not a share. Give numbers from 0 to {_MAX_WEIGHT:,}."
            )
    if not any(numbers):
        raise PlanError(f"{name}: all shares are 0. Give at least one device some.")
    return [Fraction(number) for number in numbers]


def _checked_layer_counts(
    shape: PlanShape, devices: Sequence[str], counts: Sequence[int]
) -> tuple[int, ...]:
    if len(counts) != len(devices):
        raise PlanError(
            f"pipeline: {len(counts):,} numbers of layers for {len(devices)} devices. Give one per "
            "device, 0 for none."
        )
    for count, device in zip(counts, devices, strict=True):
        if not is_whole(count) or not 0 <= count <= shape.num_layers:
            raise PlanError(
                f"pipeline: {shown(count)} layers for {device} is not a whole number from 0 to "
                f"{shape.num_layers}. Change it."
            )
    if sum(counts) != shape.num_layers:
        raise PlanError(
            f"pipeline: the devices have {sum(counts):,} layers, the model has {shape.num_layers}. "
            "Change one."
        )
    return tuple(counts)


def _check_row(plan: Plan, row: int) -> None:
    if not 0 <= row < plan.shape.num_rows:
        raise PlanError(
            f"plan row {shown(row)} is not between 0 and {plan.shape.num_rows - 1}. Choose another."
        )


def _check_index(plan: Plan, device_index: int) -> None:
    if not 0 <= device_index < len(plan.devices):
        raise PlanError(
            f"device index {shown(device_index)} is not between 0 and {len(plan.devices) - 1}. "
            "Choose another."
        )
