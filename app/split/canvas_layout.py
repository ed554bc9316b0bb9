"""Where the rows of the split canvas lie. Geometry only, no painting.

In: the number of layers, the width, the text height, whether the layers are unfolded. Out:
rectangles of bars, and what lies under a point.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from PySide6.QtCore import QPointF, QRectF

MARGIN = 8.0
ALL_HEIGHT = 34.0
SCALE_HEIGHT = 18.0
GHOST_HEIGHT = 3.0
DIVIDER_REACH = 5.0


class Hit(NamedTuple):
    """What lies under a point.

    Attributes:
        row: "all", "head", or the number of a layer.
        fraction: place along the bar, 0 to 1.
        is_on_bar: or else on the label beside it.
    """

    row: int | str
    fraction: float
    is_on_bar: bool


@dataclass(frozen=True, slots=True)
class CanvasLayout:
    """Rectangles for one width."""

    num_layers: int
    width: float
    text_height: float
    is_unfolded: bool

    @property
    def label_width(self) -> float:
        """Room for "head" and three digits."""
        return 4.2 * self.text_height

    @property
    def pitch(self) -> float:
        """From one layer to the next."""
        return max(19.0, self.text_height + 4)

    @property
    def height(self) -> float:
        """Of the whole canvas."""
        height = SCALE_HEIGHT + ALL_HEIGHT + 2 * MARGIN
        if self.is_unfolded:
            height += MARGIN + self.pitch * (self.num_layers + 1)
        return height

    @property
    def bar_left(self) -> float:
        """Where 0 % is."""
        return self.label_width

    @property
    def bar_width(self) -> float:
        """From 0 % to 100 %."""
        return max(40.0, self.width - self.label_width - MARGIN)

    def line(self, row: int | str) -> QRectF:
        """The whole line of a row, label included."""
        top = SCALE_HEIGHT
        if row == "all":
            return QRectF(0, top, self.width, ALL_HEIGHT + MARGIN / 2)
        place = self.num_layers if row == "head" else int(row)
        top += ALL_HEIGHT + 2 * MARGIN + place * self.pitch
        return QRectF(0, top, self.width, self.pitch)

    def bars(self, row: int | str) -> list[QRectF]:
        """The bars of a row: one, or attention above MLP."""
        line = self.line(row)
        if row == "all":
            return [QRectF(self.bar_left, line.top() + 2, self.bar_width, ALL_HEIGHT - 4)]
        inside = self.pitch - 2 - GHOST_HEIGHT - 1
        if row == "head":
            return [QRectF(self.bar_left, line.top() + 1, self.bar_width, inside)]
        half = (inside - 1) / 2
        return [
            QRectF(self.bar_left, line.top() + 1, self.bar_width, half),
            QRectF(self.bar_left, line.top() + 2 + half, self.bar_width, half),
        ]

    def ghost(self, row: int | str) -> QRectF:
        """The thin line of the running plan under a row."""
        bars = self.bars(row)
        return QRectF(self.bar_left, bars[-1].bottom() + 1, self.bar_width, GHOST_HEIGHT)

    def hit(self, point: QPointF) -> Hit | None:
        """What lies under a point; None between the rows."""
        fraction = min(max((point.x() - self.bar_left) / self.bar_width, 0.0), 1.0)
        is_on_bar = point.x() >= self.bar_left - DIVIDER_REACH
        if self.line("all").contains(point):
            return Hit("all", fraction, is_on_bar)
        if not self.is_unfolded:
            return None
        place = int((point.y() - self.line(0).top()) // self.pitch)
        if not 0 <= place <= self.num_layers:
            return None
        row = "head" if place == self.num_layers else place
        return Hit(row, fraction, is_on_bar)

    def nearest_layer(self, y: float) -> int:
        """The layer at a height, or the first or last one; `num_layers` is the output head."""
        place = int((y - self.line(0).top()) // self.pitch)
        return min(max(place, 0), self.num_layers)
