"""The plan file: a plan as TOML, both ways.

    devices = ["this/cpu", "local-1/cpu"]
    wire = "float32"            # optional
    prompt_wire = "bfloat16"    # optional: for tokens of prompts
    transport = "zmq"           # optional: or "torch", for networks that are trusted
    head = [192, 0]
    [[layers]]
    range = "0-29"              # inclusive; "7" is one layer
    attention = [6, 3]
    mlp = [34, 14]

In: text and the shape of the model. Out: a validated Plan, or one line that names the place in the
file. Ranges may come in any order, and cover every layer exactly once. Writing merges runs of equal
layers; reading what was written gives the same plan.
"""

from __future__ import annotations

import os
import re
import tempfile
import tomllib
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import cast

from engine.errors import PlanError
from engine.plan.plan import (
    Plan,
    PlanShape,
    Transport,
    WireFormat,
    check_devices,
    check_transport,
    check_wire,
    row_problem,
    shown,
)

MAX_FILE_BYTES = 4 << 20

_TOP_KEYS = ("devices", "wire", "prompt_wire", "transport", "head", "layers")
_LAYER_KEYS = ("range", "attention", "mlp")
_RANGE = re.compile(r"([0-9]{1,6})(?:-([0-9]{1,6}))?")
_HEADER = re.compile(r"\s*\[[^\[\]=,]*\]\s*(?:#|$)")
_LAYERS_HEADER = re.compile(r"\s*\[\[\s*(?:layers|\"layers\"|'layers')\s*\]\]")


def plan_from_toml(text: str, shape: PlanShape, *, name: str = "plan file") -> Plan:
    """Read a plan.

    Args:
        text: the TOML document.
        shape: of the model that the plan is for.
        name: the file's name, for messages.
    Raises: PlanError: one line with the place (line, layers, field), what was found, the limit, and
        what to do.
    """
    shape.validate()
    table = _parse(text, name)
    places = _Places(text, name)
    _check_keys(table, _TOP_KEYS, places, None)
    for key in ("devices", "head", "layers"):
        if key not in table:
            raise PlanError(f"{name}: {key} is missing. Add it.")

    device_items = _items(table["devices"], places.of("devices"))
    wire = table.get("wire", "float32")
    try:
        check_devices(device_items)
    except PlanError as error:
        raise PlanError(f"{places.of('devices')}: {error}") from None
    prompt_wire = table.get("prompt_wire")
    transport = table.get("transport", "zmq")
    for key, value, check in (
        ("wire", wire, check_wire),
        ("prompt_wire", wire if prompt_wire is None else prompt_wire, check_wire),
        ("transport", transport, check_transport),
    ):
        try:
            check(value)
        except PlanError as error:
            raise PlanError(f"{places.of(key)}: {error}") from None
    devices = cast("tuple[str, ...]", tuple(device_items))

    head_place = f"{places.of('head')}, output head"
    head = _row(table["head"], shape, shape.head_row, devices, head_place)
    layers = _read_layers(table["layers"], shape, devices, places)
    cells = (*(row for pair in layers for row in pair), head)
    return Plan(
        shape,
        devices,
        cells,
        cast("WireFormat", wire),
        cast("WireFormat | None", prompt_wire),
        cast("Transport", transport),
    ).validate()


def plan_to_toml(plan: Plan) -> str:
    """Write a plan, with runs of equal layers merged.

    Raises: PlanError: the plan is not valid.
    """
    plan.validate()
    shape = plan.shape
    lines = [
        f"devices = [{', '.join(_quoted(device) for device in plan.devices)}]",
        f'wire = "{plan.wire}"',
        *([f'prompt_wire = "{plan.prompt_wire}"'] if plan.prompt_wire else []),
        *([f'transport = "{plan.transport}"'] if plan.transport != "zmq" else []),
        f"head = {list(plan.cells[shape.head_row])}",
    ]

    def layer_cells(layer: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return plan.cells[shape.attention_row(layer)], plan.cells[shape.mlp_row(layer)]

    for (attention, mlp), run in groupby(range(shape.num_layers), layer_cells):
        layers = list(run)
        lines += [
            "[[layers]]",
            f'range = "{layers[0]}-{layers[-1]}"',
            f"attention = {list(attention)}",
            f"mlp = {list(mlp)}",
        ]
    return "\n".join(lines) + "\n"


def read_plan_file(path: Path, shape: PlanShape) -> Plan:
    """Read a plan file.

    Raises: PlanError: as `plan_from_toml`; also where the file cannot be read, is longer than
        MAX_FILE_BYTES or is not UTF-8.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise PlanError(f"plan file {path} cannot be read: {reason}. Check the path.") from None
    if len(data) > MAX_FILE_BYTES:
        raise PlanError(
            f"plan file {path} is longer than {MAX_FILE_BYTES:,} bytes. Choose a plan file."
        )
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise PlanError(
            f"{path.name} line {line}: byte {data[error.start]:#04x} is not UTF-8. "
            "Save the file as UTF-8."
        ) from None
    return plan_from_toml(text, shape, name=path.name)


def write_plan_file(path: Path, plan: Plan) -> None:
    """Write a plan file; an interrupted write leaves the old file.

    Raises: PlanError: the plan is not valid, or the file cannot be written.
    """
    text = plan_to_toml(plan)
    temporary: str | None = None
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
        Path(temporary).replace(path)
    except OSError as error:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        reason = error.strerror or type(error).__name__
        raise PlanError(
            f"plan file {path} cannot be written: {reason}. Choose another place."
        ) from None


class _Places:
    """Where keys stand in the text, for messages; tomllib does not keep that."""

    def __init__(self, text: str, name: str) -> None:
        self.name = name
        self._top: list[tuple[int, str]] = []
        self._blocks: list[list[tuple[int, str]]] = []
        current: list[tuple[int, str]] | None = self._top
        for number, line in enumerate(text.split("\n"), start=1):
            if _LAYERS_HEADER.match(line):
                current = [(number, line)]
                self._blocks.append(current)
            elif _HEADER.match(line):
                current = None
            elif current is not None:
                current.append((number, line))

    def of(self, key: str, block: int | None = None) -> str:
        """Such as "plan.toml line 7"; without a line where the key is not found.

        Args:
            block: index of the [[layers]] block; None for the top of the file.
        """
        if block is None:
            lines = self._top
        else:
            lines = self._blocks[block] if block < len(self._blocks) else []
        pattern = re.compile(rf"\s*[\"']?{re.escape(key)}[\"']?\s*(?:[=.]|$)")
        for number, line in lines:
            if pattern.match(line):
                return f"{self.name} line {number}"
        if block is not None:
            return self.of_block(block)
        return self.name

    def of_block(self, block: int) -> str:
        """The header of a [[layers]] block."""
        if block < len(self._blocks):
            return f"{self.name} line {self._blocks[block][0][0]}"
        return f"{self.name} layers block {block + 1}"


def _parse(text: str, name: str) -> dict[str, object]:
    if len(text) > MAX_FILE_BYTES:
        raise PlanError(f"{name} is longer than {MAX_FILE_BYTES:,} characters. Choose a plan file.")
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        reason = " ".join(str(error).split())
        raise PlanError(f"{name} is not TOML: {reason}. Correct it there.") from None
    except RecursionError:
        raise PlanError(f"{name} is not a plan: it is nested too deeply. Correct it.") from None
    except ValueError as error:  # such as a number of thousands of digits
        reason = " ".join(str(error).split(";")[0].split())
        raise PlanError(f"{name} has a value that cannot be read: {reason}. Correct it.") from None


def _read_layers(
    value: object, shape: PlanShape, devices: tuple[str, ...], places: _Places
) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """The attention and mlp cells of every layer."""
    where = places.of("layers")
    blocks = _items(value, where)
    cells: list[tuple[tuple[int, ...], tuple[int, ...]] | None] = [None] * shape.num_layers
    for index, block in enumerate(blocks):
        if not isinstance(block, dict):
            raise PlanError(
                f"{where}: layers holds {shown(block)}. Write a [[layers]] block instead."
            )
        table = cast("dict[str, object]", block)
        _check_keys(table, _LAYER_KEYS, places, index)
        for key in _LAYER_KEYS:
            if key not in table:
                raise PlanError(f"{places.of_block(index)}: {key} is missing. Add it.")
        first, last = _range(table["range"], shape, places.of("range", index))
        for layer in range(first, last + 1):
            if cells[layer] is not None:
                raise PlanError(
                    f"{places.of('range', index)}: layer {layer} is in an earlier range too, each "
                    "layer may be given once. Change one range."
                )
        run = f"layer {first}" if first == last else f"layers {first}-{last}"
        place = f"{places.of('attention', index)}, {run} attention"
        attention = _row(table["attention"], shape, shape.attention_row(first), devices, place)
        for layer in range(first, last + 1):
            # Layers may differ in width, so that one row of cells need not fit a whole range.
            width = shape.units(shape.mlp_row(layer))
            is_other = layer > first and width != shape.units(shape.mlp_row(first))
            place = f"{places.of('mlp', index)}, {f'layer {layer}' if is_other else run} mlp"
            mlp = _row(table["mlp"], shape, shape.mlp_row(layer), devices, place)
            cells[layer] = attention, mlp
    complete = [pair for pair in cells if pair is not None]
    if len(complete) != shape.num_layers:
        missing = cells.index(None)
        raise PlanError(
            f"{places.name}: layer {missing} is in no range, the model has layers 0 to "
            f"{shape.num_layers - 1}. Add a [[layers]] block for it."
        )
    return complete


def _range(value: object, shape: PlanShape, place: str) -> tuple[int, int]:
    """First and last layer, both inclusive."""
    match = _RANGE.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        raise PlanError(
            f'{place}: range is {shown(value)}. Write the first and last layer, such as "0-9".'
        )
    first = int(match[1])
    last = first if match[2] is None else int(match[2])
    if first > last:
        raise PlanError(f'{place}: range {first}-{last} runs backwards. Write "{last}-{first}".')
    if last >= shape.num_layers:
        raise PlanError(
            f"{place}: range {first}-{last} passes the last layer of the model, which is "
            f"{shape.num_layers - 1}. Shorten it."
        )
    return first, last


def _row(
    value: object, shape: PlanShape, row: int, devices: Sequence[str], place: str
) -> tuple[int, ...]:
    cells = _items(value, place)
    problem = row_problem(shape, row, cells, devices)
    if problem is not None:
        raise PlanError(f"{place}: {problem}")
    return cast("tuple[int, ...]", tuple(cells))


def _items(value: object, place: str) -> list[object]:
    if not isinstance(value, list):
        raise PlanError(f"{place}: {shown(value)} is not a list. Write it in square brackets.")
    return cast("list[object]", value)


def _check_keys(
    table: Mapping[str, object], known: Sequence[str], places: _Places, block: int | None
) -> None:
    for key in table:
        if key not in known:
            raise PlanError(
                f"{places.of(key, block)}: {shown(key)} is not a field of a plan, the fields here "
                f"are {', '.join(known)}. Remove or rename it."
            )


def _quoted(name: str) -> str:
    """A TOML basic string; device names are printable, so only two characters need an escape."""
    escaped = name.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'
