"""Small helpers that make and mark widgets."""

from __future__ import annotations

from PySide6.QtCore import Qt
from PySide6.QtWidgets import QFrame, QLabel, QPushButton, QSizePolicy, QToolButton, QWidget

from app.look import Look


def set_property(widget: QWidget, name: str, value: object) -> None:
    """Set a property that the style sheet looks at, and restyle where it changed."""
    if widget.property(name) == value:
        return
    widget.setProperty(name, value)
    style = widget.style()
    style.unpolish(widget)
    style.polish(widget)


def keep_width(*widgets: QWidget) -> None:
    """Let the layout neither stretch nor squeeze the widgets."""
    for widget in widgets:
        widget.setSizePolicy(QSizePolicy.Policy.Fixed, QSizePolicy.Policy.Fixed)


def mark_page(widget: QWidget, name: str) -> None:
    """Give a plain widget its name and the background of a page."""
    widget.setObjectName(name)
    widget.setAttribute(Qt.WidgetAttribute.WA_StyledBackground)
    widget.setProperty("page", True)


def make_label(text: str, name: str, role: str = "", *, wraps: bool = False) -> QLabel:
    """A label; role is one the style sheet knows: title, large, muted, small, bad."""
    label = QLabel(text)
    label.setObjectName(name)
    label.setWordWrap(wraps)
    if role:
        label.setProperty("role", role)
    return label


def make_button(text: str, name: str, tip: str = "", *, kind: str = "") -> QPushButton:
    """A push button; kind is "", "primary" or "quiet"."""
    button = QPushButton(text)
    button.setObjectName(name)
    button.setAccessibleName(tip or text)
    button.setToolTip(tip)
    if kind:
        button.setProperty(kind, True)
    return button


def make_tool_button(look: Look, icon: str, name: str, tip: str) -> QToolButton:
    """A quiet button with only an icon."""
    button = QToolButton()
    button.setObjectName(name)
    button.setIcon(look.icon(icon))
    button.setToolTip(tip)
    button.setAccessibleName(tip)
    button.setProperty("quiet", True)
    return button


def make_card(name: str, kind: str = "card") -> QFrame:
    """A frame; kind is "card", "bar", "side" or "trouble"."""
    frame = QFrame()
    frame.setObjectName(name)
    frame.setProperty(kind, True)
    return frame
