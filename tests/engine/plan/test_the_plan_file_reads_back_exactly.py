"""The plan file of the manual is read as written, and what is written reads back."""

from __future__ import annotations

import tomllib
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given

from engine.errors import PlanError
from engine.plan import presets
from engine.plan.plan import Plan, PlanShape
from engine.plan.plan_file import (
    MAX_FILE_BYTES,
    plan_from_toml,
    plan_to_toml,
    read_plan_file,
    write_plan_file,
)
from tests.engine.plan.strategies import plans

MANUAL = """\
devices = ["this/cpu", "local-1/cpu", "local-2/cpu"]   # local-N: simulated nodes
wire = "float32"
head = [192, 0, 0]
[[layers]]
range = "0-9"                                          # inclusive
attention = [6, 3, 0]
mlp = [34, 14, 0]
[[layers]]
range = "10-29"
attention = [0, 0, 9]
mlp = [0, 0, 48]
"""


def test_the_example_of_the_manual(small_model: PlanShape) -> None:
    plan = plan_from_toml(MANUAL, small_model)
    assert plan.devices == ("this/cpu", "local-1/cpu", "local-2/cpu")
    assert plan.group(0) == plan.group(19) == (0, 1)
    assert plan.group(20) == plan.group(59) == (2,)
    assert plan.group(60) == (0,)
    assert plan.unit_range(1, 1) == (34 * 32, 1536)
    without_comments = [line.partition("#")[0].rstrip() for line in MANUAL.splitlines()]
    assert plan_to_toml(plan).splitlines() == without_comments


@given(plans())
def test_writing_and_reading_gives_the_same_plan(plan: Plan) -> None:
    text = plan_to_toml(plan)
    assert plan_from_toml(text, plan.shape) == plan
    assert tomllib.loads(text)["devices"] == list(plan.devices)


@given(plans())
def test_runs_of_equal_layers_are_merged(plan: Plan) -> None:
    layers = [plan.cells[row : row + 2] for row in range(0, plan.shape.head_row, 2)]
    changes = sum(layer != before for before, layer in pairwise(layers))
    assert plan_to_toml(plan).count("[[layers]]") == changes + 1


def test_ranges_may_come_in_any_order_and_name_one_layer(odd_shape: PlanShape) -> None:
    plan = plan_from_toml(
        """
        head = [3]
        layers = [
          {range = "1-3", mlp = [6], attention = [15]},
          {range = "0", attention = [15], mlp = [6]},
        ]
        devices = ['a "quoted" \\ name']
        """,
        odd_shape,
    )
    assert plan == presets.single(odd_shape, 'a "quoted" \\ name')
    assert plan.wire == "float32", "the wire is float32 where the file does not say"
    assert plan_from_toml(plan_to_toml(plan), odd_shape) == plan


def test_a_file_is_written_and_read(tmp_path: Path, small_model: PlanShape) -> None:
    path = tmp_path / "plan.toml"
    plan = presets.even(small_model, ["this/cpu", "Büro-PC/cuda:0"], "bfloat16")
    write_plan_file(path, plan)
    assert read_plan_file(path, small_model) == plan
    write_plan_file(path, presets.single(small_model, "this/cpu"))
    assert read_plan_file(path, small_model).devices == ("this/cpu",)
    assert list(tmp_path.iterdir()) == [path], "no temporary file is left"


def test_windows_line_ends_and_a_byte_order_mark_are_read(
    tmp_path: Path, small_model: PlanShape
) -> None:
    path = tmp_path / "plan.toml"
    path.write_bytes(b"\xef\xbb\xbf" + MANUAL.replace("\n", "\r\n").encode())
    assert read_plan_file(path, small_model) == plan_from_toml(MANUAL, small_model)


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b'devices = ["a"]\nhead = [\xff]\n', "plan.toml line 2: byte 0xff is not UTF-8"),
        (b"#" * (MAX_FILE_BYTES + 1), "is longer than"),
        (b"\x00\x01", "is not TOML"),
    ],
)
def test_a_file_that_is_no_text_is_refused(
    tmp_path: Path, small_model: PlanShape, content: bytes, part: str
) -> None:
    path = tmp_path / "plan.toml"
    path.write_bytes(content)
    with pytest.raises(PlanError) as caught:
        read_plan_file(path, small_model)
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there_is_named(tmp_path: Path, small_model: PlanShape) -> None:
    with pytest.raises(PlanError, match="cannot be read: No such file"):
        read_plan_file(tmp_path / "plan.toml", small_model)
    with pytest.raises(PlanError, match="cannot be written"):
        write_plan_file(tmp_path / "none" / "plan.toml", presets.single(small_model, "a"))
