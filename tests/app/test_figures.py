"""Numbers have a unit, three significant digits, and a dash where unknown."""

from __future__ import annotations

import math

import pytest

from app.figures import (
    UNKNOWN,
    figure,
    figure_bytes,
    figure_percent,
    figure_seconds,
    layers_text,
    plural,
)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0 x"),
        (0.0123456, "0.0123 x"),
        (0.9996, "1.00 x"),
        (9.996, "10.0 x"),
        (41.23, "41.2 x"),
        (99.96, "100 x"),
        (235.4, "235 x"),
        (12345, "12,345 x"),
        (-4.567, "-4.57 x"),
        (None, UNKNOWN),
        (math.nan, UNKNOWN),
    ],
)
def test_figures_have_three_significant_digits(value: float | None, text: str) -> None:
    assert figure(value, "x") == text


def test_bytes_change_their_unit_before_a_fourth_digit_appears() -> None:
    assert figure_bytes(999) == "999 B"
    assert figure_bytes(999_600) == "1.00 MB"
    assert figure_bytes(98_362_432) == "98.4 MB"
    assert figure_bytes(None) == UNKNOWN


def test_seconds_read_as_a_person_says_them() -> None:
    assert figure_seconds(0.0421) == "42.1 ms"
    assert figure_seconds(1.236) == "1.24 s"
    assert figure_seconds(125) == "2 min 05 s"


def test_percent_shows_tenths_only_where_there_are_any() -> None:
    assert figure_percent(0.3) == "30 %"
    assert figure_percent(1 / 3) == "33.3 %"


def test_layers_are_named_in_runs() -> None:
    assert layers_text([0, 1, 2, 3, 7, 9, 10]) == "layers 0\u20133, 7, 9\u201310"
    assert layers_text([4]) == "layer 4"
    assert layers_text([]) == ""


def test_plurals() -> None:
    assert [plural(n, w) for n, w in ((1, "node"), (2, "node"), (3, "process"))] == [
        "1 node",
        "2 nodes",
        "3 processes",
    ]
