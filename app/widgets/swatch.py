"""A small square in a device's colour."""

from __future__ import annotations

from PySide6.QtCore import QSize
from PySide6.QtGui import QPainter, QPaintEvent, QPixmap
from PySide6.QtWidgets import QWidget

from app.look import Look
from app.theme import Theme, translucent

SIDE_PX = 12


class Swatch(QWidget):
    """The colour that a device has everywhere; hatched from the ninth device on."""

    def __init__(self, look: Look, index: int = 0, parent: QWidget | None = None) -> None:
        """Args: index: the device's place in the order of joining."""
        super().__init__(parent)
        self._look = look
        self._index = index
        self.setFixedSize(QSize(SIDE_PX, SIDE_PX))

    def show_device(self, index: int) -> None:
        """Change to another device."""
        self._index = index
        self.update()

    def paintEvent(self, event: QPaintEvent) -> None:  # noqa: N802
        """Draw the square."""
        del event
        painter = QPainter(self)
        paint_swatch(painter, self._look.theme, self._index, SIDE_PX)


def paint_swatch(painter: QPainter, theme: Theme, index: int, side: int) -> None:
    """Draw a device's square at the origin."""
    if theme.is_hatched(index):
        painter.fillRect(0, 0, side, side, translucent(theme.device_fill(index), 0.4))
    painter.fillRect(0, 0, side, side, theme.device_brush(index))


def swatch_pixmap(theme: Theme, index: int, ratio: float) -> QPixmap:
    """A device's square as a picture, for item views.

    Args:
        ratio: device pixels per logical pixel.
    """
    pixmap = QPixmap(round(SIDE_PX * ratio), round(SIDE_PX * ratio))
    pixmap.setDevicePixelRatio(ratio)
    pixmap.fill(translucent(theme.device_fill(index), 0))
    painter = QPainter(pixmap)
    paint_swatch(painter, theme, index, SIDE_PX)
    painter.end()
    return pixmap
