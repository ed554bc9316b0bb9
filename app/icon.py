"""The window's icon: three faders in the colours of the first devices."""

from __future__ import annotations

from PySide6.QtCore import QRectF, Qt
from PySide6.QtGui import QColor, QIcon, QPainter, QPixmap

from app.theme import DARK, DEVICE_COLOURS

SIDES_PX = (16, 32, 48, 128)
# Where each fader stands, from the top.
_HEIGHTS = (0.3, 0.55, 0.42)


def window_icon() -> QIcon:
    """The icon in all sizes that desktops ask for."""
    icon = QIcon()
    for side in SIDES_PX:
        icon.addPixmap(_draw(side))
    return icon


def _draw(side: int) -> QPixmap:
    pixmap = QPixmap(side, side)
    pixmap.fill(Qt.GlobalColor.transparent)
    painter = QPainter(pixmap)
    painter.setRenderHint(QPainter.RenderHint.Antialiasing)
    painter.setPen(Qt.PenStyle.NoPen)
    painter.setBrush(QColor(DARK.surface))
    painter.drawRoundedRect(QRectF(0, 0, side, side), side * 0.18, side * 0.18)
    for place, (height, colour) in enumerate(zip(_HEIGHTS, DEVICE_COLOURS, strict=False)):
        centre = side * (0.25 + 0.25 * place)
        painter.setBrush(QColor(DARK.line))
        painter.drawRect(QRectF(centre - side * 0.03, side * 0.16, side * 0.06, side * 0.68))
        painter.setBrush(QColor(colour))
        painter.drawRoundedRect(
            QRectF(centre - side * 0.1, side * height, side * 0.2, side * 0.16), 2, 2
        )
    painter.end()
    return pixmap
