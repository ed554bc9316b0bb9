"""Both themes can be read, and devices can be told apart."""

from __future__ import annotations

import itertools
import re

import pytest
from PySide6.QtCore import Qt
from PySide6.QtWidgets import QApplication

from app.theme import (
    BACKGROUND_ROLES,
    DEVICE_COLOURS,
    MIN_FILL_CONTRAST,
    MIN_TEXT_CONTRAST,
    TEXT_ROLES,
    contrast,
    make_style_sheet,
    make_theme,
    readable_on,
)

THEMES = {"light": make_theme(False), "dark": make_theme(True)}


@pytest.mark.parametrize("name", THEMES)
def test_text_has_enough_contrast_on_every_background(name: str) -> None:
    roles = THEMES[name].roles
    for text, background in itertools.product(TEXT_ROLES, BACKGROUND_ROLES):
        ratio = contrast(getattr(roles, text), getattr(roles, background))
        assert ratio >= MIN_TEXT_CONTRAST, f"{text} on {background} has {ratio:.2f}"
    assert contrast(roles.on_accent, roles.accent) >= MIN_TEXT_CONTRAST


def test_contrast_is_that_of_the_standard() -> None:
    """Black on white is 21; the grey #767676 is the lightest that passes 4.5 on white."""
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#767676", "#ffffff") == pytest.approx(4.54, abs=0.01)
    assert contrast("#777777", "#ffffff") < 4.5


@pytest.mark.parametrize("name", THEMES)
def test_device_colours_stand_out_and_carry_readable_text(name: str, qapp: QApplication) -> None:
    theme = THEMES[name]
    fills = [theme.device_fill(index) for index in range(len(DEVICE_COLOURS))]
    for fill in fills:
        assert contrast(fill.name(), theme.roles.surface) >= MIN_FILL_CONTRAST
        assert contrast(fill.name(), readable_on(fill).name()) >= MIN_TEXT_CONTRAST
    assert len({fill.name() for fill in fills}) == len(fills)


def test_from_the_ninth_device_on_colours_repeat_with_a_hatch(qapp: QApplication) -> None:
    theme = THEMES["light"]
    assert theme.device_fill(8) == theme.device_fill(0)
    assert theme.device_brush(0).style() == Qt.BrushStyle.SolidPattern
    assert theme.device_brush(8).style() != Qt.BrushStyle.SolidPattern


@pytest.mark.parametrize("name", THEMES)
def test_the_style_sheet_has_no_role_left_open(name: str) -> None:
    sheet = make_style_sheet(THEMES[name])
    assert "@" not in sheet
    assert set(re.findall(r"#[0-9a-f]{6}\b", sheet)) <= {
        getattr(THEMES[name].roles, role) for role in THEMES[name].roles.__slots__
    }
