"""The plan: a table that says which device computes how much of every plan row.

In: the sizes of a model and the names of devices. Out: for every plan row and device the half-open
range of heads, columns or vocabulary rows. Rows are, in this order: layer 0 attention, layer 0 mlp,
layer 1 attention, ..., output head. A cell counts quanta; the range of a device is the running sum
of the cells before it, in column order.

Pure: no torch, no sockets, no files. Ways to make a plan are in `presets`, the file in `plan_file`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Literal, TypeGuard, get_args

import msgspec

from engine.errors import PlanError
from engine.model.config import MAX_LAYERS, MAX_WIDTH, ModelConfig

RowKind = Literal["attention", "mlp", "head"]
WireFormat = Literal["float32", "bfloat16", "float16"]

WIRE_FORMATS: tuple[WireFormat, ...] = get_args(WireFormat)
Transport = Literal["zmq", "torch"]
TRANSPORTS: tuple[Transport, ...] = get_args(Transport)
MAX_DEVICES = 256
MAX_DEVICE_NAME = 128
_MAX_HEADS = 4096
_MAX_VOCABULARY = 1 << 22
_UNIT_NAMES: dict[RowKind, str] = {
    "attention": "head",
    "mlp": "column",
    "head": "vocabulary row",
}


class PlanShape(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What a plan needs to know of a model.

    Attributes:
        mlp_width: intermediate columns of every layer, or one number per layer where they differ.
            In a layer with experts they are the columns of each expert, the shared one included.
        mlp_quantum: intermediate columns in one quantum of an mlp row.
        head_quantum: vocabulary rows in one quantum of the output head.
            The quantum of an attention row is one query head.
    """

    num_layers: int
    num_heads: int
    num_kv_heads: int
    mlp_width: int | tuple[int, ...]
    vocab_size: int
    mlp_quantum: int = 32
    head_quantum: int = 256

    @classmethod
    def from_config(cls, config: ModelConfig) -> PlanShape:
        """The plan shape of a model, with the default quanta."""
        return cls(
            num_layers=config.num_layers,
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            mlp_width=_one_if_equal([layer.mlp_width for layer in config.layers]),
            vocab_size=config.vocab_size,
        ).validate()

    def validate(self) -> PlanShape:
        """Return self, or raise.

        Raises: PlanError: names the field, its value and the rule it breaks.
        """
        limits = {
            "num_layers": MAX_LAYERS,
            "num_heads": _MAX_HEADS,
            "num_kv_heads": _MAX_HEADS,
            "vocab_size": _MAX_VOCABULARY,
            "mlp_quantum": MAX_WIDTH,
            "head_quantum": _MAX_VOCABULARY,
        }
        for field, limit in limits.items():
            value: object = getattr(self, field)
            if not is_whole(value) or not 1 <= value <= limit:
                raise PlanError(
                    f"plan shape: {field} is {shown(value)}, it must be a whole number from 1 to "
                    f"{limit:,}. Take the shape from the model."
                )
        widths = self.mlp_width if isinstance(self.mlp_width, tuple) else (self.mlp_width,)
        if len(widths) != self.num_layers and isinstance(self.mlp_width, tuple):
            raise PlanError(
                f"plan shape: mlp_width has {len(widths):,} numbers, it must have one for each of "
                f"the {self.num_layers} layers. Take the shape from the model."
            )
        for width in widths:
            if not is_whole(width) or not 1 <= width <= MAX_WIDTH:
                raise PlanError(
                    f"plan shape: mlp_width is {shown(width)}, it must be a whole number from 1 to "
                    f"{MAX_WIDTH:,}. Take the shape from the model."
                )
        if self.num_heads % self.num_kv_heads:
            raise PlanError(
                f"plan shape: num_heads {self.num_heads} is not a multiple of num_kv_heads "
                f"{self.num_kv_heads}. Take the shape from the model."
            )
        return self

    @property
    def num_rows(self) -> int:
        """Plan rows: attention and mlp of every layer, and the output head."""
        return 2 * self.num_layers + 1

    @property
    def heads_per_kv(self) -> int:
        """Query heads that share one KV head."""
        return self.num_heads // self.num_kv_heads

    @property
    def head_row(self) -> int:
        """Index of the output head, the last row."""
        return 2 * self.num_layers

    def attention_row(self, layer: int) -> int:
        """Index of a layer's attention row."""
        return 2 * layer

    def mlp_row(self, layer: int) -> int:
        """Index of a layer's mlp row."""
        return 2 * layer + 1

    def row_kind(self, row: int) -> RowKind:
        """What a row computes.

        Raises: IndexError: there is no such row.
        """
        if not 0 <= row <= 2 * self.num_layers:
            raise IndexError(f"plan row {row} is not between 0 and {2 * self.num_layers}")
        if row == 2 * self.num_layers:
            return "head"
        return "mlp" if row % 2 else "attention"

    def row_layer(self, row: int) -> int | None:
        """The layer a row belongs to; None for the output head."""
        return None if self.row_kind(row) == "head" else row // 2

    def row_name(self, row: int) -> str:
        """The row's name for a person, such as "layer 3 attention" or "output head"."""
        kind = self.row_kind(row)
        return "output head" if kind == "head" else f"layer {row // 2} {kind}"

    def units(self, row: int) -> int:
        """Query heads, mlp columns or vocabulary rows of a plan row."""
        kind = self.row_kind(row)
        if kind == "attention":
            return self.num_heads
        if kind == "head":
            return self.vocab_size
        return self.mlp_width[row // 2] if isinstance(self.mlp_width, tuple) else self.mlp_width

    def quantum_size(self, row: int) -> int:
        """Units in one quantum of a row; the row's last quantum may hold fewer."""
        kind = self.row_kind(row)
        if kind == "attention":
            return 1
        return self.mlp_quantum if kind == "mlp" else self.head_quantum

    def num_quanta(self, row: int) -> int:
        """Quanta of a row, which is what its cells must sum to."""
        return -(-self.units(row) // self.quantum_size(row))


class Plan(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, dict=True):
    """Which device computes how many quanta of every plan row.

    Attributes:
        devices: names, one per column, such as "local-1/cpu"; column order is the order of ranges
            and of addition.
        cells: one tuple per plan row, one number of quanta per device.
        wire: dtype of the activations that devices exchange.
        prompt_wire: the same for tokens of prompts; None is as `wire`.
        transport: how devices exchange: encrypted sockets, or torch.distributed.
    """

    shape: PlanShape
    devices: tuple[str, ...]
    cells: tuple[tuple[int, ...], ...]
    wire: WireFormat = "float32"
    prompt_wire: WireFormat | None = None
    transport: Transport = "zmq"

    def validate(self) -> Plan:
        """Return self if every row is covered exactly once, else raise.

        Raises: PlanError: one line that names the row or field, what was found, what is needed.
        """
        self.shape.validate()
        check_devices(self.devices)
        check_wire(self.wire)
        check_wire(self.wire_of("prompt"))
        check_transport(self.transport)
        if len(self.cells) != self.shape.num_rows:
            raise PlanError(
                f"the plan has {len(self.cells):,} rows, a model of {self.shape.num_layers} layers "
                f"needs {self.shape.num_rows:,} (attention and mlp of each layer, and the output "
                "head). Make the plan for this model."
            )
        for row, cells in enumerate(self.cells):
            problem = row_problem(self.shape, row, cells, self.devices)
            if problem is not None:
                raise PlanError(f"{self.shape.row_name(row)}: {problem}")
        return self

    def wire_of(self, kind: Literal["prompt", "generated"]) -> WireFormat:
        """The wire format for tokens of a kind."""
        return self.prompt_wire or self.wire if kind == "prompt" else self.wire

    def group(self, row: int) -> tuple[int, ...]:
        """Indexes of the devices with a share in a row, ascending."""
        return tuple(index for index, count in enumerate(self.cells[row]) if count)

    def quantum_range(self, row: int, device_index: int) -> tuple[int, int]:
        """Half-open range of the quanta of a row that a device computes; empty is (n, n)."""
        cells = self.cells[row]
        first = sum(cells[:device_index])
        return first, first + cells[device_index]

    def unit_range(self, row: int, device_index: int) -> tuple[int, int]:
        """Half-open range of query heads, mlp columns or vocabulary rows of a device."""
        first, end = self.quantum_range(row, device_index)
        size, units = self.shape.quantum_size(row), self.shape.units(row)
        # The end of the row's last quantum, which may be cut short, bounds empty ranges as well.
        return min(first * size, units), min(end * size, units)

    def kv_head_range(self, row: int, device_index: int) -> tuple[int, int]:
        """Half-open range of the KV heads that a device's query heads read.

        Neighbours both hold the KV head of a group that is cut between them.

        Args:
            row: an attention row.
        Returns: (0, 0) where the device has no share.
        Raises: IndexError: the row is not an attention row.
        """
        if self.shape.row_kind(row) != "attention":
            raise IndexError(f"{self.shape.row_name(row)} has no KV heads")
        first, end = self.unit_range(row, device_index)
        if first == end:
            return 0, 0
        heads_per_kv = self.shape.heads_per_kv
        return first // heads_per_kv, -(-end // heads_per_kv)

    def used_devices(self) -> tuple[int, ...]:
        """Indexes of the devices with a share in any row, ascending."""
        return self._used_devices

    def share(self, row: int, device_index: int) -> float:
        """Fraction of a row's quanta that a device computes, 0 to 1."""
        return self.cells[row][device_index] / self.shape.num_quanta(row)

    def rows_of(self, device_index: int) -> list[int]:
        """Rows in which a device has a share, ascending."""
        return [row for row, cells in enumerate(self.cells) if cells[device_index]]

    @cached_property
    def _used_devices(self) -> tuple[int, ...]:
        return tuple(
            index for index, column in enumerate(zip(*self.cells, strict=True)) if any(column)
        )


def _one_if_equal(widths: list[int]) -> int | tuple[int, ...]:
    """The common width, or all of them."""
    return widths[0] if len(set(widths)) == 1 else tuple(widths)


def check_devices(devices: Sequence[object]) -> None:
    """Check the names of a plan's columns.

    Raises: PlanError: no device, too many, a name twice, or a name that is not printable text.
    """
    if not devices:
        raise PlanError("the plan names no device, it needs at least one. Add this computer.")
    if len(devices) > MAX_DEVICES:
        raise PlanError(
            f"the plan names {len(devices):,} devices, at most {MAX_DEVICES} are possible. "
            "Leave some out."
        )
    first_column: dict[str, int] = {}
    for column, name in enumerate(devices, start=1):
        if (
            not isinstance(name, str)
            or not name.isprintable()
            or name != name.strip()
            or not 1 <= len(name) <= MAX_DEVICE_NAME
        ):
            raise PlanError(
                f"device {column} is named {shown(name)}, a name has 1 to {MAX_DEVICE_NAME} "
                'printable characters. Write a name such as "this/cpu".'
            )
        if name in first_column:
            raise PlanError(
                f"devices {first_column[name]} and {column} are both named {shown(name)}, each may "
                "appear once. Remove one."
            )
        first_column[name] = column


def check_wire(wire: object) -> None:
    """Check a wire format.

    Raises: PlanError: it is none of WIRE_FORMATS.
    """
    if wire not in WIRE_FORMATS:
        raise PlanError(f"wire is {shown(wire)}, it must be one of {', '.join(WIRE_FORMATS)}.")


def check_transport(transport: object) -> None:
    """Check a transport.

    Raises: PlanError: it is not one of TRANSPORTS.
    """
    if transport not in TRANSPORTS:
        raise PlanError(
            f"transport is {shown(transport)}, it must be one of {', '.join(TRANSPORTS)}."
        )


def row_problem(
    shape: PlanShape, row: int, cells: Sequence[object], devices: Sequence[str]
) -> str | None:
    """What is wrong with the cells of one row, without the row's name; None if nothing.

    Args:
        row: 0 to shape.num_rows - 1.
        cells: anything, as a file or a peer gave it.
    """
    if len(cells) != len(devices):
        return (
            f"{len(cells):,} numbers for {len(devices)} devices. Give one number per device, "
            "0 for none."
        )
    total = shape.num_quanta(row)
    counts: list[int] = []
    for cell, device in zip(cells, devices, strict=True):
        if not is_whole(cell):
            return f"{shown(cell)} for {device} is not a whole number. Write a number of quanta."
        if not 0 <= cell <= total:
            return f"{shown(cell)} quanta for {device} is not between 0 and {total:,}. Change it."
        counts.append(cell)
    found = sum(counts)
    if found == total:
        return None
    sum_text = f"{' + '.join(map(str, counts))} = {found:,}" if len(counts) <= 8 else f"{found:,}"
    size = shape.quantum_size(row)
    unit = _UNIT_NAMES[shape.row_kind(row)]
    change = f"Add {total - found:,}." if found < total else f"Take away {found - total:,}."
    return (
        f"{sum_text} quanta, the row has {total:,} of {size} {unit}{'' if size == 1 else 's'} "
        f"each. {change}"
    )


def is_whole(value: object) -> TypeGuard[int]:
    """Whether a value is an int and not a bool."""
    return isinstance(value, int) and not isinstance(value, bool)


def shown(value: object) -> str:
    """A value from outside as short text on one line; a huge number is not written out."""
    # str() of an int with more than 4300 digits raises.
    if is_whole(value) and abs(value) >= 10**15:
        return "a number of more than 15 digits"
    text = (
        repr(value) if isinstance(value, (str, bool, int, float)) else f"a {type(value).__name__}"
    )
    return text if len(text) <= 60 else f"{text[:57]}..."
