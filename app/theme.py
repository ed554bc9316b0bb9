"""Colours, fonts and the style sheet, all from typed roles.

In: whether the window is light or dark, and the base text size. Out: a `Theme` of plain values,
Qt's palette and one style sheet. Widgets that paint themselves take colours from a `Theme`.
"""

from __future__ import annotations

import colorsys
from dataclasses import dataclass, fields
from functools import cache
from typing import Literal

from PySide6.QtCore import Qt
from PySide6.QtGui import QBrush, QColor, QFont, QFontDatabase, QPalette

ThemeChoice = Literal["system", "light", "dark"]

UNIT = 8
BASE_FONT_PX = 13
MIN_TEXT_CONTRAST = 4.5
MIN_FILL_CONTRAST = 3.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Roles:
    """What colours are for; every value is "#rrggbb".

    Attributes:
        window: behind everything; surface: pages and fields; raised: cards and hovered items.
        on_accent: text on the accent colour.
    """

    window: str
    surface: str
    raised: str
    line: str
    text: str
    text_muted: str
    accent: str
    on_accent: str
    good: str
    warning: str
    bad: str


LIGHT = Roles(
    window="#f3f4f6",
    surface="#ffffff",
    raised="#eceef2",
    line="#d3d8df",
    text="#1b1f24",
    text_muted="#57606a",
    accent="#0b63a5",
    on_accent="#ffffff",
    good="#1a6b37",
    warning="#805100",
    bad="#b3261e",
)
DARK = Roles(
    window="#15171a",
    surface="#1c1f23",
    raised="#282c32",
    line="#393f47",
    text="#e7e9ec",
    text_muted="#a3abb5",
    accent="#6cb8ee",
    on_accent="#0c1a26",
    good="#63cc90",
    warning="#e5b84a",
    bad="#ff8f85",
)
TEXT_ROLES = ("text", "text_muted", "accent", "good", "warning", "bad")
BACKGROUND_ROLES = ("window", "surface", "raised")

# Okabe and Ito's colour-blind-safe set, in the order in which devices join.
DEVICE_COLOURS = (
    "#56b4e9",
    "#e69f00",
    "#009e73",
    "#cc79a7",
    "#0072b2",
    "#d55e00",
    "#f0e442",
    "#999999",
)


@dataclass(frozen=True, slots=True)
class Theme:
    """Everything a view needs to know about looks."""

    roles: Roles
    is_dark: bool
    base_px: int = BASE_FONT_PX

    def colour(self, role: str) -> QColor:
        """The colour of a role, such as "text_muted"."""
        return QColor(getattr(self.roles, role))

    def font_px(self, step: int) -> int:
        """Text size of a step: -1 small, 0 body, 1 title, 2 large figures (11/13/16/22)."""
        return round(self.base_px * {-1: 11, 0: 13, 1: 16, 2: 22}[step] / BASE_FONT_PX)

    def device_fill(self, index: int) -> QColor:
        """A device's colour, light or dark enough to be seen on the surface.

        Args:
            index: order of joining, from 0.
        """
        return QColor(
            _adapted(DEVICE_COLOURS[index % len(DEVICE_COLOURS)], self.roles.surface, self.is_dark)
        )

    def device_brush(self, index: int) -> QBrush:
        """A device's fill; from the ninth on the same colours with a hatch."""
        brush = QBrush(self.device_fill(index))
        if self.is_hatched(index):
            brush.setStyle(Qt.BrushStyle.DiagCrossPattern)
        return brush

    @staticmethod
    def is_hatched(index: int) -> bool:
        """Whether a device needs more than its colour to be told apart."""
        return index >= len(DEVICE_COLOURS)


def make_theme(is_dark: bool, base_px: int = BASE_FONT_PX) -> Theme:
    """The light or the dark theme."""
    return Theme(DARK if is_dark else LIGHT, is_dark, base_px)


def contrast(first: str, second: str) -> float:
    """Contrast ratio of two colours, 1 to 21. Source: WCAG 2.2, relative luminance."""
    bright, dim = sorted((_luminance(first), _luminance(second)), reverse=True)
    return (bright + 0.05) / (dim + 0.05)


def readable_on(colour: QColor) -> QColor:
    """Black or white, whichever reads better on a fill."""
    name = colour.name()
    return QColor(
        "#000000" if contrast(name, "#000000") >= contrast(name, "#ffffff") else "#ffffff"
    )


def translucent(colour: QColor, alpha: float) -> QColor:
    """The same colour with an opacity from 0 to 1."""
    faint = QColor(colour)
    faint.setAlphaF(alpha)
    return faint


def monospace_font(pixel_size: int) -> QFont:
    """The system's font for code."""
    font = QFontDatabase.systemFont(QFontDatabase.SystemFont.FixedFont)
    font.setPixelSize(pixel_size)
    return font


def tabular(font: QFont) -> QFont:
    """The font with figures of one width, so that changing numbers do not jitter."""
    steady = QFont(font)
    steady.setFeature(QFont.Tag("tnum"), 1)
    return steady


def make_palette(theme: Theme) -> QPalette:
    """Qt's palette of a theme."""
    palette = QPalette()
    role = QPalette.ColorRole
    named = {
        role.Window: "window",
        role.WindowText: "text",
        role.Base: "surface",
        role.AlternateBase: "raised",
        role.Text: "text",
        role.PlaceholderText: "text_muted",
        role.Button: "raised",
        role.ButtonText: "text",
        role.BrightText: "bad",
        role.Highlight: "accent",
        role.HighlightedText: "on_accent",
        role.Link: "accent",
        role.LinkVisited: "accent",
        role.ToolTipBase: "raised",
        role.ToolTipText: "text",
        role.Mid: "line",
        role.Midlight: "line",
        role.Dark: "line",
        role.Light: "raised",
        role.Accent: "accent",
    }
    for palette_role, name in named.items():
        palette.setColor(palette_role, theme.colour(name))
    disabled = QPalette.ColorGroup.Disabled
    for palette_role in (role.WindowText, role.Text, role.ButtonText):
        palette.setColor(disabled, palette_role, translucent(theme.colour("text_muted"), 0.7))
    return palette


def make_style_sheet(theme: Theme) -> str:
    """The application's one style sheet."""
    values = {field.name: getattr(theme.roles, field.name) for field in fields(Roles)}
    sizes = {
        "small": theme.font_px(-1),
        "body": theme.font_px(0),
        "title": theme.font_px(1),
        "large": theme.font_px(2),
    }
    text = _STYLE_SHEET
    for name, value in {**values, **sizes}.items():
        text = text.replace(f"@{name};", f"{value}{'px' if name in sizes else ''};")
    return text


def _luminance(colour: str) -> float:
    channels = (int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5))
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@cache
def _adapted(colour: str, background: str, is_dark: bool) -> str:
    """The colour, moved in lightness until it stands out from the background."""
    red, green, blue = (int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5))
    hue, lightness, saturation = colorsys.rgb_to_hls(red, green, blue)
    while contrast(colour, background) < MIN_FILL_CONTRAST:
        lightness += 0.01 if is_dark else -0.01
        channels = colorsys.hls_to_rgb(hue, lightness, saturation)
        colour = "#" + "".join(f"{round(255 * channel):02x}" for channel in channels)
    return colour


# `@role;` and `@size;` are replaced by the theme's values.
_STYLE_SHEET = """
QWidget { font-size: @body; }
QToolTip { background: @raised; color: @text; border: 1px solid @line; padding: 4px; }
QMenuBar { background: @window; color: @text; border-bottom: 1px solid @line; }
QMenuBar::item { padding: 4px 10px; background: transparent; border-radius: 4px; }
QMenuBar::item:selected { background: @raised; }
QMenu { background: @surface; color: @text; border: 1px solid @line; padding: 4px; }
QMenu::item { padding: 5px 24px 5px 24px; border-radius: 4px; }
QMenu::item:selected { background: @raised; color: @text; }
QMenu::item:disabled { color: @text_muted; }
QMenu::separator { height: 1px; background: @line; margin: 4px 8px; }

QFrame#rail { background: @window; border-right: 1px solid @line; }
QFrame#rail QToolButton { color: @text_muted; background: transparent; border: 1px solid transparent;
    border-radius: 6px; padding: 6px 2px; font-size: @small; }
QFrame#rail QToolButton:hover { background: @raised; color: @text; }
QFrame#rail QToolButton:checked { background: @raised; color: @accent; font-weight: 600; }
QFrame#rail QToolButton:focus { border: 1px solid @accent; }

QFrame#statusStrip { background: @window; border-top: 1px solid @line; }
QFrame#statusStrip QLabel { color: @text_muted; font-size: @small; }
QFrame#statusStrip QLabel#stripSpeed { color: @text; }

QWidget[page="true"] { background: @surface; }
QFrame[card="true"] { background: @surface; border: 1px solid @line; border-radius: 6px; }
QFrame[bar="true"] { background: @raised; border: 1px solid @line; border-radius: 6px; }
QFrame[side="true"] { background: @window; border-left: 1px solid @line; }
QFrame[trouble="true"] { background: @surface; border: 1px solid @bad; border-radius: 6px; }
QLabel[role="title"] { font-size: @title; font-weight: 600; }
QLabel[role="large"] { font-size: @large; font-weight: 600; }
QLabel[role="muted"] { color: @text_muted; }
QLabel[role="small"] { color: @text_muted; font-size: @small; }
QLabel[role="warning"] { color: @warning; }
QLabel[role="bad"] { color: @bad; font-weight: 600; }

QPushButton { background: @raised; color: @text; border: 1px solid @line; border-radius: 6px;
    padding: 5px 12px; }
QPushButton:hover { border: 1px solid @text_muted; }
QPushButton:pressed { background: @line; }
QPushButton:focus { border: 1px solid @accent; }
QPushButton:disabled { color: @text_muted; border: 1px solid @line; background: @window; }
QPushButton:checked { border: 1px solid @accent; color: @accent; }
QPushButton[primary="true"] { background: @accent; color: @on_accent; border: 1px solid @accent;
    font-weight: 600; }
QPushButton[primary="true"]:hover { border: 1px solid @text; }
QPushButton[primary="true"]:focus { border: 1px solid @text; }
QPushButton[primary="true"]:disabled { background: @raised; color: @text_muted;
    border: 1px solid @line; }
QPushButton[quiet="true"] { background: transparent; border: 1px solid transparent; }
QPushButton[quiet="true"]:hover { background: @raised; }
QPushButton[quiet="true"]:focus { border: 1px solid @accent; }
QPushButton[quiet="true"]:checked { background: @raised; border: 1px solid @line; color: @accent; }
QToolButton[quiet="true"] { background: transparent; border: 1px solid transparent;
    border-radius: 4px; padding: 3px; }
QToolButton[quiet="true"]:hover { background: @raised; }
QToolButton[quiet="true"]:focus { border: 1px solid @accent; }
QToolButton[quiet="true"]:checked { background: @raised; border: 1px solid @line; }

QLineEdit, QPlainTextEdit, QSpinBox, QDoubleSpinBox, QComboBox {
    background: @surface; color: @text; border: 1px solid @line; border-radius: 6px;
    padding: 4px 6px; selection-background-color: @accent; selection-color: @on_accent; }
QLineEdit:focus, QPlainTextEdit:focus, QSpinBox:focus, QDoubleSpinBox:focus, QComboBox:focus {
    border: 1px solid @accent; }
QSpinBox::up-button, QSpinBox::down-button, QDoubleSpinBox::up-button,
QDoubleSpinBox::down-button { width: 0; height: 0; border: none; }
QLineEdit:disabled, QPlainTextEdit:disabled, QSpinBox:disabled, QDoubleSpinBox:disabled {
    color: @text_muted; background: @window; }
QFrame#composer { background: @surface; border: 1px solid @line; border-radius: 6px; }
QFrame#composer[active="true"] { border: 1px solid @accent; }
QFrame#composer QPlainTextEdit { border: none; background: transparent; }
QTextBrowser { background: @surface; color: @text; border: none;
    selection-background-color: @accent; selection-color: @on_accent; }

QTreeView { background: @surface; alternate-background-color: @surface; border: 1px solid @line;
    border-radius: 6px; outline: none; }
QTreeView::item { padding: 4px 4px; border: none; }
QTreeView::item:selected { background: @raised; color: @text; }
QTreeView:focus { border: 1px solid @accent; }
QHeaderView { background: @window; }
QHeaderView::section { background: @window; color: @text_muted; border: none;
    border-bottom: 1px solid @line; padding: 5px 6px; font-size: @small; }

QProgressBar { background: @raised; border: none; border-radius: 3px; max-height: 6px;
    min-height: 6px; }
QProgressBar::chunk { background: @accent; border-radius: 3px; }
QSlider::groove:horizontal { background: @raised; border: 1px solid @line; height: 6px;
    border-radius: 4px; }
QSlider::sub-page:horizontal { background: @accent; border: 1px solid @line; border-radius: 4px; }
QSlider::handle:horizontal { background: @surface; border: 1px solid @text_muted; width: 14px;
    height: 14px; margin: -5px 0; border-radius: 8px; }
QSlider::handle:horizontal:focus { border: 2px solid @accent; }
QSlider::handle:horizontal:disabled { background: @raised; border: 1px solid @line; }
QSlider::sub-page:horizontal:disabled { background: @line; }
QLineEdit[wrong="true"] { border: 1px solid @bad; }
QScrollArea { border: none; background: transparent; }
QScrollBar:vertical { background: transparent; width: 10px; margin: 0; }
QScrollBar::handle:vertical { background: @line; border-radius: 4px; min-height: 24px; margin: 1px; }
QScrollBar::handle:vertical:hover { background: @text_muted; }
QScrollBar:horizontal { background: transparent; height: 10px; margin: 0; }
QScrollBar::handle:horizontal { background: @line; border-radius: 4px; min-width: 24px; margin: 1px; }
QScrollBar::add-line, QScrollBar::sub-line { width: 0; height: 0; }
QScrollBar::add-page, QScrollBar::sub-page { background: transparent; }
QSplitter::handle { background: @line; }
"""
