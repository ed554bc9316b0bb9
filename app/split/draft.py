"""What can be said about and done to a draft of a plan. Pure functions, no Qt.

In: plans, the rows that are selected, what a person asked for. Out: new plans, whose rows always sum
to the whole, and facts in words.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import groupby

import msgspec

from app.figures import DASH, layers_text
from app.plan_facts import weight_share
from engine.plan.plan import Plan, PlanShape
from engine.plan.presets import pipeline, set_share, with_devices, with_rows

UNIT_WORDS = {"attention": "heads", "mlp": "MLP blocks", "head": "vocabulary blocks"}
SPREAD_TOLERANCE = 0.1


class Part(Enum):
    """Which half of a layer an edit is about."""

    BOTH = "Both"
    ATTENTION = "Attention"
    MLP = "MLP"


@dataclass(frozen=True, slots=True)
class Selection:
    """The rows an edit is about.

    Attributes:
        layers: of the model; has_head: whether the output head is among them.
    """

    layers: frozenset[int]
    has_head: bool
    part: Part = Part.BOTH

    @classmethod
    def everything(cls, shape: PlanShape) -> Selection:
        """All layers and the output head."""
        return cls(frozenset(range(shape.num_layers)), True)

    def rows(self, shape: PlanShape) -> list[int]:
        """Plan rows, ascending."""
        rows: list[int] = []
        for layer in sorted(self.layers):
            if self.part is not Part.MLP:
                rows.append(shape.attention_row(layer))
            if self.part is not Part.ATTENTION:
                rows.append(shape.mlp_row(layer))
        if self.has_head and (self.part is Part.BOTH or not self.layers):
            rows.append(shape.head_row)
        return rows

    def is_everything(self, shape: PlanShape) -> bool:
        """Whether no row is missing, but for the chosen part."""
        return len(self.layers) == shape.num_layers and self.has_head

    def describe(self, shape: PlanShape) -> str:
        """Such as "Layers 0-9"."""
        if self.is_everything(shape):
            return "All layers and the output head"
        names = [layers_text(sorted(self.layers))] if self.layers else []
        if self.has_head:
            names.append("output head")
        text = " and ".join(names)
        return text[:1].upper() + text[1:] if text else "Nothing selected"


@dataclass(frozen=True, slots=True)
class ShareFact:
    """A device's share of the selected rows.

    Attributes:
        fraction: of the weights of the rows, 0 to 1; low, high: over single rows.
        quanta: what runs, in words, such as "6 of 9 heads, 34 of 48 MLP blocks".
    """

    fraction: float
    low: float
    high: float
    quanta: str

    @property
    def is_mixed(self) -> bool:
        """Whether the rows differ by more than their quanta explain."""
        return self.high - self.low > SPREAD_TOLERANCE


@dataclass(frozen=True, slots=True)
class Change:
    """Rows that the draft computes elsewhere than the running plan."""

    where: str
    after: str

    def __str__(self) -> str:
        return f"{self.where}: {self.after}"


def share_fact(plan: Plan, rows: Sequence[int], column: int, weights: Sequence[int]) -> ShareFact:
    """A device's share of some rows.

    Args:
        weights: number of weights of every plan row.
    """
    shares = [plan.share(row, column) for row in rows]
    if not shares:
        return ShareFact(0.0, 0.0, 0.0, "")
    fraction = weight_share(plan, column, weights, rows)
    return ShareFact(fraction, min(shares), max(shares), _quanta_text(plan, rows, column))


def tenths_of_percent(fractions: Sequence[float]) -> list[int]:
    """Fractions that sum to 1 as tenths of a percent that sum to exactly 1000."""
    exact = [1000 * fraction for fraction in fractions]
    counts = [math.floor(value) for value in exact]
    missing = 1000 - sum(counts)
    order = sorted(range(len(exact)), key=lambda index: counts[index] - exact[index])
    for index in order[: max(missing, 0)]:
        counts[index] += 1
    return counts


def move_divider(plan: Plan, rows: Iterable[int], left: int, right: int, border: float) -> Plan:
    """Put the border between two devices of some rows at a fraction of the row.

    What lies before the left and behind the right device stays where it is.

    Args:
        left, right: columns; nothing lies between them.
        border: 0 to 1, where the right device begins.
    """
    changed: dict[int, tuple[int, ...]] = {}
    for row in rows:
        cells = list(plan.cells[row])
        first = sum(cells[:left])
        both = cells[left] + cells[right]
        wanted = round(border * plan.shape.num_quanta(row)) - first
        cells[left] = min(max(wanted, 0), both)
        cells[right] = both - cells[left]
        changed[row] = tuple(cells)
    return with_rows(plan, changed)


def set_share_keeping(
    plan: Plan,
    rows: Sequence[int],
    column: int,
    fraction: float,
    locked: Sequence[int],
    touched: Sequence[int],
) -> Plan:
    """Move one fader; what was set by hand before stays, as long as the others can make up for it.

    Args:
        locked: columns that never change.
        touched: columns that were set before, oldest first; the oldest gives way first.
    """
    wanted = set_share(plan, rows, column, fraction, locked, snap_to_kv_heads=True)
    for start in range(len(touched)):
        keep = sorted({*locked, *touched[start:]})
        kept = set_share(plan, rows, column, fraction, keep, snap_to_kv_heads=True)
        if all(
            abs(kept.cells[row][column] - wanted.cells[row][column]) <= _rounding(plan, row)
            for row in rows
        ):
            return kept
    return wanted


def with_fair_shares(plan: Plan, new: Sequence[str], columns: Sequence[str]) -> Plan:
    """The plan with an equal part for each of some devices that had none.

    The others give in proportion to what they have; where whole layers lie on devices, they still
    do afterwards.

    Args:
        new: devices without a share.
        columns: all devices of the result, in order.
    """
    used = {plan.devices[column] for column in plan.used_devices()}
    taking = [device for device in columns if device in used or device in new]
    is_layered = len(used) > 1 and all(sum(map(bool, row)) == 1 for row in plan.cells)
    if is_layered:
        shares = pipeline(plan.shape, taking)
        shares = msgspec.structs.replace(plan, devices=shares.devices, cells=shares.cells)
        return with_devices(shares, columns)
    plan = with_devices(plan, columns)
    rows = range(plan.shape.num_rows)
    for count, device in enumerate(new, start=len(used) + 1):
        column = plan.devices.index(device)
        plan = set_share(plan, rows, column, 1 / count, (), snap_to_kv_heads=True)
    return plan


def same_columns(plan: Plan, devices: Sequence[str]) -> Plan:
    """The plan with these columns; every device with a share must be among them."""
    return plan if plan.devices == tuple(devices) else with_devices(plan, devices)


def row_shares(plan: Plan, row: int) -> dict[str, int]:
    """Quanta by device, without those that have none."""
    return {plan.devices[column]: count for column, count in enumerate(plan.cells[row]) if count}


def changed_rows(running: Plan | None, draft: Plan) -> list[int]:
    """Rows that would be computed otherwise; all of them where nothing runs."""
    rows = range(draft.shape.num_rows)
    if running is None or running.shape != draft.shape:
        return list(rows)
    return [row for row in rows if row_shares(running, row) != row_shares(draft, row)]


def changes(running: Plan | None, draft: Plan, label: Callable[[str], str]) -> list[Change]:
    """The differences in words, one for every run of layers that change alike.

    Args:
        label: of a device, for a person.
    """
    shape = draft.shape
    changed = set(changed_rows(running, draft))

    def key(layer: int) -> tuple[object, ...]:
        pair = (shape.attention_row(layer), shape.mlp_row(layer))
        if changed.isdisjoint(pair):
            return ()
        before = [row_shares(running, row) for row in pair] if running is not None else []
        return (*(row_shares(draft, row) for row in pair), *before)

    found: list[Change] = []
    for differs, run in groupby(range(shape.num_layers), key):
        layers = list(run)
        if differs:
            rows = (shape.attention_row(layers[0]), shape.mlp_row(layers[0]))
            found.append(Change(layers_text(layers), _after_text(draft, rows, label)))
    if shape.head_row in changed:
        found.append(Change("output head", _after_text(draft, (shape.head_row,), label)))
    if talks_otherwise(running, draft):
        found.append(Change("between the devices", _talk_text(draft)))
    return found


def talks_otherwise(running: Plan | None, draft: Plan) -> bool:
    """Whether devices would talk to each other in another way than now."""
    return running is not None and _talk_text(running) != _talk_text(draft)


def parse_layers(text: str, num_layers: int) -> frozenset[int] | None:
    """Layers that a person typed, such as "0-9, 12"; None where it is not a list of layers."""
    layers: set[int] = set()
    for piece in text.replace(DASH, "-").replace(";", ",").split(","):
        first, dash, last = (word.strip() for word in piece.partition("-"))
        if not first.isdecimal() or (dash and not last.isdecimal()):
            return None
        start, end = int(first), int(last) if dash else int(first)
        if not 0 <= start <= end < num_layers:
            return None
        layers.update(range(start, end + 1))
    return frozenset(layers)


def is_uniform(plan: Plan, rows: Collection[int]) -> bool:
    """Whether all rows of one kind are cut alike."""
    kinds: dict[str, set[tuple[int, ...]]] = {}
    for row in rows:
        kinds.setdefault(plan.shape.row_kind(row), set()).add(plan.cells[row])
    return all(len(cells) == 1 for cells in kinds.values())


def _rounding(plan: Plan, row: int) -> int:
    """By how many quanta two ways of snapping may differ."""
    return plan.shape.heads_per_kv if plan.shape.row_kind(row) == "attention" else 1


def _talk_text(plan: Plan) -> str:
    prompts = f", prompts in {plan.prompt_wire}" if plan.prompt_wire else ""
    return f"{plan.wire}{prompts}, over {plan.transport}"


def _after_text(plan: Plan, rows: Sequence[int], label: Callable[[str], str]) -> str:
    parts: list[str] = []
    for column, device in enumerate(plan.devices):
        share = sum(plan.share(row, column) for row in rows) / len(rows)
        if share:
            parts.append(f"{label(device)} {100 * share:.0f} %")
    return ", ".join(parts)


def _quanta_text(plan: Plan, rows: Sequence[int], column: int) -> str:
    """Such as "6 of 9 heads"; a range where rows of one kind differ."""
    counts: dict[str, set[int]] = {}
    totals: dict[str, set[int]] = {}
    for row in rows:
        kind = plan.shape.row_kind(row)
        counts.setdefault(kind, set()).add(plan.cells[row][column])
        totals.setdefault(kind, set()).add(plan.shape.num_quanta(row))
    parts: list[str] = []
    for kind, found in counts.items():
        parts.append(f"{_range_text(found)} of {_range_text(totals[kind])} {UNIT_WORDS[kind]}")
    return ", ".join(parts)


def _range_text(numbers: Collection[int]) -> str:
    low, high = min(numbers), max(numbers)
    return str(low) if low == high else f"{low}{DASH}{high}"
