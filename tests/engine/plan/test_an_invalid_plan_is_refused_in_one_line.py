"""Plans that others let through (bad-inputs table D6), and what each is told."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from engine.errors import PlanError
from engine.plan import presets
from engine.plan.plan import MAX_DEVICES, Plan, PlanShape

SHAPE = PlanShape(num_layers=4, num_heads=15, num_kv_heads=5, mlp_width=170, vocab_size=599)
PLAN = presets.even(SHAPE, ["a", "b", "c"])


def refusal(make: Callable[[], object]) -> str:
    """The message of the PlanError that a call must raise; one line that ends in advice."""
    with pytest.raises(PlanError) as caught:
        make()
    message = str(caught.value)
    assert "\n" not in message
    assert message.endswith(".")
    assert len(message) < 400
    return message


def broken(**changes: Any) -> Callable[[], Plan]:
    """A call that validates PLAN with some fields replaced."""
    return lambda: msgspec.structs.replace(PLAN, **changes).validate()


def with_row(row: int, *cells: Any) -> Callable[[], Plan]:
    """A call that validates PLAN with one row replaced."""
    return broken(cells=(*PLAN.cells[:row], cells, *PLAN.cells[row + 1 :]))


@pytest.mark.parametrize(
    ("make", "parts"),
    [
        (with_row(0, 5, 5, 4), ["layer 0 attention", "5 + 5 + 4 = 14", "15 of 1 head", "Add 1."]),
        (with_row(3, 2, 2, 3), ["layer 1 mlp", "= 7 quanta", "6 of 32 columns", "Take away 1."]),
        (with_row(8, 1, 1, 0), ["output head", "= 2 quanta", "3 of 256 vocabulary rows"]),
        (with_row(2, 16, -1, 0), ["layer 1 attention", "16 quanta for a", "0 and 15"]),
        (with_row(2, 15, 1, -1), ["layer 1 attention", "-1 quanta for c", "0 and 15"]),
        (with_row(2, 15, 0), ["layer 1 attention", "2 numbers for 3 devices"]),
        (with_row(2), ["layer 1 attention", "0 numbers for 3 devices"]),
        (with_row(2, True, 14, 0), ["layer 1 attention", "True for a is not a whole number"]),
        (with_row(2, 15.0, 0, 0), ["layer 1 attention", "15.0 for a is not a whole number"]),
        (with_row(2, 10**5000, 0, 0), ["a number of more than 15 digits quanta for a"]),
        (broken(cells=PLAN.cells[:-1]), ["8 rows", "4 layers needs 9"]),
        (broken(cells=()), ["0 rows", "needs 9"]),
        (broken(devices=()), ["names no device"]),
        (broken(devices=("a", "b", "a")), ["devices 1 and 3 are both named 'a'"]),
        (broken(devices=("a", "b")), ["layer 0 attention", "3 numbers for 2 devices"]),
        (broken(devices=("a", "", "c")), ["device 2 is named ''"]),
        (broken(devices=("a", "b\nc", "c")), ["device 2 is named 'b\\nc'"]),
        (broken(devices=("a", "b" * 129, "c")), ["device 2", "1 to 128"]),
        (broken(devices=("a", 7, "c")), ["device 2 is named 7"]),
        (broken(devices=tuple(map(str, range(MAX_DEVICES + 1)))), ["257 devices", "256"]),
        (broken(wire="float8"), ["wire is 'float8'", "float32, bfloat16, float16"]),
        (broken(wire=["float32"]), ["wire is a list"]),
        (broken(shape=msgspec.structs.replace(SHAPE, num_layers=5)), ["9 rows", "needs 11"]),
    ],
)
def test_a_broken_plan(make: Callable[[], object], parts: list[str]) -> None:
    message = refusal(make)
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    ("field", "value", "part"),
    [
        ("num_layers", 0, "num_layers is 0"),
        ("num_layers", 1025, "from 1 to 1,024"),
        ("num_heads", -3, "num_heads is -3"),
        ("num_kv_heads", 0, "num_kv_heads is 0"),
        ("num_kv_heads", 4, "num_heads 15 is not a multiple of num_kv_heads 4"),
        ("mlp_width", 2**63, "mlp_width is a number of more than 15 digits"),
        ("vocab_size", 1.5, "vocab_size is 1.5"),
        ("mlp_quantum", 0, "mlp_quantum is 0"),
        ("head_quantum", True, "head_quantum is True"),
    ],
)
def test_a_broken_shape(field: str, value: object, part: str) -> None:
    """A zero quantum from a peer would be a division by zero later."""
    shape = msgspec.structs.replace(SHAPE, **{field: value})
    assert part in refusal(shape.validate)
    assert part in refusal(msgspec.structs.replace(PLAN, shape=shape).validate)


NAN = float("nan")


@pytest.mark.parametrize(
    ("make", "part"),
    [
        (lambda: presets.even(SHAPE, []), "names no device"),
        (lambda: presets.even(SHAPE, ["a", "a"]), "both named 'a'"),
        (lambda: presets.even(SHAPE, ["a"], "int8"), "wire is 'int8'"),  # type: ignore[arg-type]
        (lambda: presets.from_percentages(SHAPE, ["a", "b"], [100]), "1 numbers for 2 devices"),
        (lambda: presets.from_percentages(SHAPE, ["a", "b"], []), "0 numbers for 2 devices"),
        (lambda: presets.from_percentages(SHAPE, ["a", "b"], [60, 60]), "sum to 120"),
        (lambda: presets.from_percentages(SHAPE, ["a", "b"], [0, 0]), "all shares are 0"),
        (lambda: presets.from_percentages(SHAPE, ["a", "b"], [NAN, 50]), "nan is not a share"),
        (lambda: presets.from_percentages(SHAPE, ["a", "b"], [150, -50]), "-50 is not a share"),
        (lambda: presets.from_percentages(SHAPE, ["a", "b"], [[50, 50]]), "given for 1 layers"),
        (lambda: presets.from_percentages(SHAPE, ["a"], [100], head_percentages=[0]), "head"),
        (lambda: presets.pipeline(SHAPE, ["a", "b"], [2, 1]), "have 3 layers, the model has 4"),
        (lambda: presets.pipeline(SHAPE, ["a", "b"], [5, -1]), "5 layers for a"),
        (lambda: presets.pipeline(SHAPE, ["a", "b"], [4]), "1 numbers of layers for 2 devices"),
        (lambda: presets.pipeline(SHAPE, ["a", "b"], weights=[NAN, 1]), "nan is not a share"),
        (lambda: presets.pipeline(SHAPE, ["a", "b"], weights=[10**400, 1]), "more than 15 digits"),
        (lambda: presets.pipeline(SHAPE, ["a", "b"], weights=[float("inf"), 1]), "inf is not"),
        (lambda: presets.pipeline(SHAPE, ["a"], [4], weights=[1]), "not both"),
        (lambda: presets.single(SHAPE, "d", ["a"]), "'d' is not one of the plan's devices"),
        (lambda: presets.with_rows(PLAN, {9: (1, 1, 1)}), "plan row 9"),
        (lambda: presets.with_devices(PLAN, []), "names no device"),
    ],
)
def test_a_preset_that_cannot_be(make: Callable[[], object], part: str) -> None:
    assert part in refusal(make)
