"""Charts: tokens per second over time, and how each device's time went.

In: a `History`. Out: pyqtgraph plots whose curves are made once and only get new numbers.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyqtgraph as pg
from PySide6.QtCore import QPointF, QRectF, QSize, Qt
from PySide6.QtGui import QBrush, QColor, QPainter, QPaintEvent, QPen, QPolygonF
from PySide6.QtWidgets import QSizePolicy, QWidget

from app.look import Look
from app.monitor.history import History
from app.theme import translucent

NUM_BINS = 120
MIN_SPEED_AXIS = 10.0
WAIT_ALPHA = 0.35


class TimePlot(pg.PlotWidget):
    """A plot whose x axis is seconds before now; nobody can drag or zoom it by mistake."""

    def __init__(self, look: Look, name: str, title: str, parent: QWidget | None = None) -> None:
        """An empty plot."""
        super().__init__(parent)
        self.setObjectName(name)
        self.setAccessibleName(title)
        self.look = look
        self.background_role = "surface"
        # pyqtgraph makes half of a plot item's methods at run time, where no type checker sees them.
        self.item: Any = self.getPlotItem()
        item = self.item
        item.setMouseEnabled(False, False)
        item.hideButtons()
        item.setMenuEnabled(False)
        item.getAxis("left").setWidth(48)
        item.getAxis("bottom").setStyle(showValues=False)
        self.getViewBox().setDefaultPadding(0)
        self.setMinimumHeight(60)
        look.theme_changed.connect(self._on_theme_changed)

    def set_window(self, seconds: float) -> None:
        """Show the last `seconds`."""
        self.item.setXRange(-seconds, 0, padding=0)
        axis = self.item.getAxis("bottom")
        step = seconds / 4
        ticks = [(-step * index, _ago(step * index)) for index in range(5)]
        axis.setTicks([ticks])

    def show_time_axis(self) -> None:
        """Print how long ago the ticks are."""
        self.item.getAxis("bottom").setStyle(showValues=True)

    def colour(self) -> None:
        """Take the theme's colours."""
        theme = self.look.theme
        self.setBackground(theme.colour(self.background_role))
        for side in ("left", "bottom"):
            axis = self.item.getAxis(side)
            axis.setPen(QPen(theme.colour("line")))
            axis.setTextPen(QPen(theme.colour("text_muted")))

    def _on_theme_changed(self) -> None:
        self.colour()


class SpeedPlot(TimePlot):
    """Generated tokens per second."""

    def __init__(
        self, history: History, look: Look, name: str, parent: QWidget | None = None
    ) -> None:
        """Args: history: shared with the other charts."""
        super().__init__(look, name, "Tokens per second over time", parent)
        self._history = history
        self._curve = self.item.plot(connect="finite")
        self._top = 0.0
        self.item.showGrid(y=True, alpha=0.15)
        self.colour()

    def colour(self) -> None:
        """Take the theme's colours."""
        super().colour()
        pen = QPen(self.look.theme.colour("accent"))
        pen.setWidthF(2)
        pen.setCosmetic(True)
        self._curve.setPen(pen)

    def refresh(self, now: float, window: float) -> None:
        """Draw the last `window` seconds."""
        x, y = self._history.rate_series(now, window)
        if len(x) == 1:
            # One sample has no line; give it a short one.
            x, y = np.array([x[0] - 0.1, x[0]]), np.array([y[0], y[0]])
        self._curve.setData(x, y)
        finite = y[np.isfinite(y)]
        top = _nice_top(float(finite.max()) if len(finite) else 0.0)
        if top != self._top:
            self._top = top
            self.item.setYRange(0, top, padding=0)


class DevicePlot(TimePlot):
    """How one device's time went: compute solid, waiting light, network striped, idle empty."""

    def __init__(
        self, device: str, history: History, look: Look, index: int, parent: QWidget | None = None
    ) -> None:
        """Args: index: the device's place in the order of joining."""
        super().__init__(look, f"devicePlot {device}", f"How the time of {device} went", parent)
        self._device = device
        self._history = history
        self._index = index
        self._bars = [pg.BarGraphItem(x0=[], x1=[], y0=[], y1=[]) for _ in range(3)]
        for bar in self._bars:
            self.item.addItem(bar)
        self.item.getAxis("left").setTicks([[(0, "0"), (0.5, "50 %"), (1, "100 %")]])
        self.item.setYRange(0, 1, padding=0.09)
        self.colour()

    def colour(self) -> None:
        """Take the theme's colours."""
        super().colour()
        fill = self.look.theme.device_fill(self._index)
        none = QPen(Qt.PenStyle.NoPen)
        for bar, brush in zip(self._bars, time_brushes(fill), strict=True):
            bar.setOpts(brush=brush, pen=none)

    def refresh(self, now: float, window: float) -> None:
        """Draw the last `window` seconds."""
        fractions = self._history.device_bins(self._device, now, window, NUM_BINS)
        width = window / NUM_BINS
        offset = (np.floor(now / width) - NUM_BINS + 1) * width - now
        left = offset + width * np.arange(NUM_BINS)
        busy = fractions.sum(axis=1) > 0
        base = np.zeros(int(busy.sum()))
        for kind, bar in enumerate(self._bars):
            top = base + fractions[busy, kind]
            bar.setOpts(x0=left[busy], x1=left[busy] + width, y0=base, y1=top)
            base = top


class ShareBar(QWidget):
    """One thin bar: how a device's last moments went."""

    def __init__(self, look: Look, parent: QWidget | None = None) -> None:
        """Idle."""
        super().__init__(parent)
        self._look = look
        self._index = 0
        self._fractions = (0.0, 0.0, 0.0)
        self.setSizePolicy(QSizePolicy.Policy.Expanding, QSizePolicy.Policy.Fixed)
        self.setFixedHeight(8)

    def show_time(self, index: int, fractions: tuple[float, float, float]) -> None:
        """Args: fractions: compute, wait, network."""
        self._index = index
        self._fractions = fractions
        self.update()

    def paintEvent(self, event: QPaintEvent) -> None:  # noqa: N802
        """Draw the three parts."""
        del event
        painter = QPainter(self)
        theme = self._look.theme
        painter.fillRect(self.rect(), theme.colour("raised"))
        left = 0.0
        for fraction, brush in zip(
            self._fractions, time_brushes(theme.device_fill(self._index)), strict=True
        ):
            width = self.width() * min(fraction, 1.0)
            painter.fillRect(QRectF(left, 0, width, self.height()), brush)
            left += width


class Sparkline(QWidget):
    """Tokens per second as a bare line, for the status strip."""

    def __init__(self, history: History, look: Look, parent: QWidget | None = None) -> None:
        """Nothing to draw yet."""
        super().__init__(parent)
        self.setObjectName("speedSparkline")
        self.setAccessibleName("Tokens per second in the last 30 seconds")
        self.setToolTip("Tokens per second in the last 30 seconds, as the engine counted them")
        self._history = history
        self._look = look
        self._lines: list[QPolygonF] = []
        self.setFixedSize(QSize(96, 18))

    def refresh(self, now: float, window: float = 30.0) -> None:
        """Draw the last `window` seconds."""
        x, y = self._history.rate_series(now, window)
        self._lines = [QPolygonF()]
        finite = y[np.isfinite(y)]
        top = max(float(finite.max()), 1.0) if len(finite) else 1.0
        for when, rate in zip(x, y, strict=True):
            if not np.isfinite(rate):
                self._lines.append(QPolygonF())
            else:
                y_px = (1 - rate / top) * (self.height() - 4) + 1
                self._lines[-1].append(QPointF((1 + when / window) * self.width(), y_px))
        self.update()

    def paintEvent(self, event: QPaintEvent) -> None:  # noqa: N802
        """Draw the line over a hairline."""
        del event
        painter = QPainter(self)
        painter.setRenderHint(QPainter.RenderHint.Antialiasing)
        theme = self._look.theme
        painter.setPen(theme.colour("line"))
        painter.drawLine(0, self.height() - 1, self.width(), self.height() - 1)
        painter.setPen(QPen(theme.colour("accent"), 1.5))
        for line in self._lines:
            painter.drawPolyline(line)


def time_brushes(fill: QColor) -> tuple[QBrush, QBrush, QBrush]:
    """Compute solid, waiting light, network striped."""
    return (
        QBrush(fill),
        QBrush(translucent(fill, WAIT_ALPHA)),
        QBrush(fill, Qt.BrushStyle.BDiagPattern),
    )


def _nice_top(value: float) -> float:
    """The next round number above, so that the axis moves rarely."""
    if value <= MIN_SPEED_AXIS:
        return MIN_SPEED_AXIS
    magnitude = 10.0 ** np.floor(np.log10(value))
    for step in (1, 1.5, 2, 3, 4, 5, 6, 8, 10):
        if value <= 0.95 * step * magnitude:
            return float(step * magnitude)
    return float(12 * magnitude)


def _ago(seconds: float) -> str:
    if seconds == 0:
        return "now"
    if seconds < 120:
        return f"-{seconds:g} s"
    return f"-{seconds / 60:g} min"
