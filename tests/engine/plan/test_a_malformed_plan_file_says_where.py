"""Every malformed plan file gives one line: place, what was found, the limit, what to do."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import PlanError
from engine.plan.plan import PlanShape
from engine.plan.plan_file import plan_from_toml

SHAPE = PlanShape(num_layers=30, num_heads=9, num_kv_heads=3, mlp_width=1536, vocab_size=49152)
GOOD = """\
devices = ["a", "b"]
wire = "float32"
head = [192, 0]
[[layers]]
range = "0-9"
attention = [6, 3]
mlp = [34, 14]
[[layers]]
range = "10-29"
attention = [0, 9]
mlp = [0, 48]
"""


def refusal(text: str) -> str:
    with pytest.raises(PlanError) as caught:
        plan_from_toml(text, SHAPE, name="p.toml")
    message = str(caught.value)
    assert "\n" not in message
    assert message.endswith(".")
    assert len(message) < 400
    return message


@pytest.mark.parametrize(
    ("old", "new", "parts"),
    [
        ("[34, 14]", "[34, 13]", ["p.toml line 7, layers 0-9 mlp", "34 + 13 = 47", "48", "Add 1"]),
        ("[6, 3]", "[6, 4]", ["p.toml line 6, layers 0-9 attention", "= 10", "9", "Take away 1"]),
        ("[192, 0]", "[190, 0]", ["p.toml line 3, output head", "= 190", "192 of 256", "Add 2"]),
        ("[6, 3]", "[6, 3, 0]", ["line 6, layers 0-9 attention", "3 numbers for 2 devices"]),
        ("[6, 3]", "[]", ["line 6", "0 numbers for 2 devices"]),
        ("[6, 3]", "[10, -1]", ["line 6", "10 quanta for a is not between 0 and 9"]),
        ("[6, 3]", "[6.0, 3]", ["line 6", "6.0 for a is not a whole number"]),
        ("[6, 3]", "[true, 8]", ["line 6", "True for a is not a whole number"]),
        ("[6, 3]", '["6", 3]', ["line 6", "'6' for a is not a whole number"]),
        ("[6, 3]", "[[6], 3]", ["line 6", "a list for a is not a whole number"]),
        ("[6, 3]", f"[{10**30}, 3]", ["line 6", "a number of more than 15 digits"]),
        ("[6, 3]", f"[{'9' * 5000}, 3]", ["p.toml has a value that cannot be read"]),
        ("[6, 3]", "9", ["line 6, layers 0-9 attention", "9 is not a list"]),
        ("[6, 3]", "1979-05-27", ["line 6", "a date is not a list"]),
        ("[6, 3]", "[6, 3", ["p.toml is not TOML", "line 7"]),
        ("attention = [6, 3]\n", "", ["p.toml line 4", "attention is missing"]),
        ("attention = [6", "attn = [6", ["p.toml line 6", "'attn'", "range, attention, mlp"]),
        ("mlp = [34, 14]", "mlp = [34, 14]\nmlp = [34, 14]", ["is not TOML", "line 8"]),
        ('"0-9"', '"9-0"', ["p.toml line 5", "9-0 runs backwards", '"0-9"']),
        ('"0-9"', '"0-10"', ["line 9", "layer 10 is in an earlier range too"]),
        ('"0-9"', '"0-8"', ["p.toml: layer 9 is in no range", "0 to 29"]),
        ('"10-29"', '"10-30"', ["line 9", "passes the last layer", "29"]),
        ('"10-29"', '"10-999999"', ["line 9", "passes the last layer"]),
        ('"0-9"', f'"0-{"9" * 500}"', ["line 5", "first and last layer"]),
        ('"0-9"', '"all"', ["line 5", "range is 'all'"]),
        ('"0-9"', '"-1-9"', ["line 5", "range is '-1-9'"]),
        ('"0-9"', '"\u0660-\u0669"', ["line 5", "first and last layer"]),
        ('"0-9"', "[0, 9]", ["line 5", "range is a list"]),
        ('"0-9"', "0", ["line 5", "range is 0"]),
        ('"float32"', '"int8"', ["p.toml line 2", "wire is 'int8'", "bfloat16"]),
        ('"float32"', "[]", ["p.toml line 2", "wire is a list"]),
        ('["a", "b"]', '["a", "a"]', ["p.toml line 1", "both named 'a'"]),
        ('["a", "b"]', "[]", ["p.toml line 1", "names no device"]),
        ('["a", "b"]', '["a", 1]', ["p.toml line 1", "device 2 is named 1"]),
        ('["a", "b"]', '["a", "b\\n"]', ["p.toml line 1", "device 2"]),
        ('["a", "b"]', '["a"]', ["line 3, output head", "2 numbers for 1 devices"]),
        ('["a", "b"]', '"a"', ["p.toml line 1", "'a' is not a list"]),
        ('devices = ["a", "b"]\n', "", ["p.toml: devices is missing"]),
        ("head = [192, 0]\n", "", ["p.toml: head is missing"]),
        ("wire =", "wires =", ["p.toml line 2", "'wires'", "devices, wire, prompt_wire, transport, head, layers"]),
        ("[[layers]]\nrange = \"0-9\"", "[layers]\nrange = \"0-9\"", ["is not TOML"]),
        ("[[layers]]\nrange = \"0-9\"", "[[layer]]\nrange = \"0-9\"", ["'layer' is not a field"]),
    ],
)  # fmt: skip
def test_one_thing_wrong(old: str, new: str, parts: list[str]) -> None:
    assert GOOD.count(old) >= 1
    message = refusal(GOOD.replace(old, new, 1))
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", "devices is missing"),
        ("{}", "is not TOML"),
        ("a = " + "[" * 100_000, "nested too deeply"),
        ("a = " + "{a=" * 100_000, "nested too deeply"),
        ("layers = 3\ndevices = ['a']\nhead = [192]", "line 1: 3 is not a list"),
        ("layers = [3]\ndevices = ['a']\nhead = [192]", "layers holds 3"),
        ("layers = []\ndevices = ['a']\nhead = [192]", "layer 0 is in no range"),
        ("layers = [{}]\ndevices = ['a']\nhead = [192]", "layers block 1: range is missing"),
        ("x" * (5 << 20), "is longer than"),
    ],
)
def test_all_wrong(text: str, part: str) -> None:
    assert part in refusal(text)


@given(st.text() | st.text(alphabet='[]{}=",.-0123456789 \nlayersdvichpmt#'))
def test_any_text_is_a_plan_or_a_plan_error(text: str) -> None:
    with pytest.raises(PlanError):
        plan_from_toml(text, SHAPE)


@given(st.integers(0, len(GOOD) - 1), st.characters() | st.just(""))
def test_a_changed_character_is_a_plan_or_a_plan_error(position: int, character: str) -> None:
    text = GOOD[:position] + character + GOOD[position + 1 :]
    try:
        plan = plan_from_toml(text, SHAPE)
    except PlanError as error:
        assert "\n" not in str(error)
    else:
        assert plan.validate() is plan
