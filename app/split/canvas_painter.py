"""Paints the split canvas from the presenter's state. It changes nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from PySide6.QtCore import QRectF, Qt
from PySide6.QtGui import QBrush, QFont, QPainter, QPen

from app.look import Look
from app.session import Session
from app.split.canvas_layout import CanvasLayout
from app.split.presenter import SplitPresenter
from app.theme import readable_on, tabular, translucent
from engine.plan.plan import Plan

DRAFT_ALPHA = 0.45
CORNER = 3.0
TEXT_PADDING = 6.0

Parts = Sequence[tuple[str, float]]


@dataclass(frozen=True, slots=True)
class CanvasState:
    """What the canvas itself knows.

    Attributes:
        active_divider: devices left and right of the border that the keys move.
    """

    layout: CanvasLayout
    has_focus: bool
    current: int
    active_divider: tuple[str, str] | None


class CanvasPainter:
    """Draws rows, dividers, selection and the ghost of the running plan."""

    def __init__(self, presenter: SplitPresenter, session: Session, look: Look) -> None:
        """Reads all three at every paint."""
        self._presenter = presenter
        self._session = session
        self._look = look

    def paint(self, painter: QPainter, state: CanvasState, clip: QRectF) -> None:
        """Draw the part of the canvas inside `clip`."""
        plan = self._presenter.draft
        if plan is None:
            return
        layout = state.layout
        changed = set(self._presenter.changed_rows) if self._presenter.running else set()
        small = QFont(painter.font())
        small.setPixelSize(self._look.theme.font_px(-1))
        painter.setFont(tabular(small))
        self._paint_scale(painter, layout)
        self._paint_all(painter, state, plan, bool(changed))
        if not layout.is_unfolded:
            return
        for layer in range(layout.num_layers):
            if layout.line(layer).intersects(clip):
                rows = [plan.shape.attention_row(layer), plan.shape.mlp_row(layer)]
                self._paint_row(painter, state, layer, str(layer), plan, rows, changed)
        if layout.line("head").intersects(clip):
            rows = [plan.shape.head_row]
            self._paint_row(painter, state, "head", "head", plan, rows, changed)

    def _paint_scale(self, painter: QPainter, layout: CanvasLayout) -> None:
        painter.setPen(self._look.theme.colour("text_muted"))
        for percent in (0, 25, 50, 75, 100):
            x = layout.bar_left + layout.bar_width * percent / 100
            width = 44.0
            left = min(max(x - width / 2, 0), layout.width - width)
            align = Qt.AlignmentFlag.AlignHCenter
            if percent == 100:
                align = Qt.AlignmentFlag.AlignRight
                left = layout.bar_left + layout.bar_width - width
            if percent == 0:
                align = Qt.AlignmentFlag.AlignLeft
                left = x
            text = f"{percent} %" if percent == 100 else str(percent)
            painter.drawText(QRectF(left, 0, width, 16), align, text)

    def _paint_all(
        self, painter: QPainter, state: CanvasState, plan: Plan, is_changed: bool
    ) -> None:
        presenter, layout = self._presenter, state.layout
        rows = list(range(plan.shape.num_rows))
        is_selected = presenter.selection.is_everything(plan.shape)
        self._paint_selection(painter, layout.line("all"), is_selected, False)
        self._paint_label(painter, layout, "all", "all", is_selected)
        parts = presenter.row_fractions(plan, rows)
        bar = layout.bars("all")[0]
        self._paint_bar(painter, bar, parts, is_changed)
        self._paint_texts(painter, bar, parts, is_changed)
        if is_changed and presenter.running is not None:
            running = presenter.row_fractions(presenter.running, rows)
            self._paint_ghost(painter, layout.ghost("all"), running)
        if is_selected:
            self._paint_divider(painter, bar, parts, state)

    def _paint_row(
        self,
        painter: QPainter,
        state: CanvasState,
        row: int | str,
        label: str,
        plan: Plan,
        plan_rows: list[int],
        changed: set[int],
    ) -> None:
        presenter, layout = self._presenter, state.layout
        selected = presenter.selection
        is_selected = selected.has_head if row == "head" else row in selected.layers
        place = layout.num_layers if row == "head" else row
        is_current = state.has_focus and state.current == place
        self._paint_selection(painter, layout.line(row), is_selected, is_current)
        self._paint_label(painter, layout, row, label, is_selected)
        for bar, plan_row in zip(layout.bars(row), plan_rows, strict=True):
            parts = _parts(plan, plan_row)
            self._paint_bar(painter, bar, parts, plan_row in changed)
            if is_selected:
                self._paint_divider(painter, bar, parts, state)
        if presenter.running is not None and not changed.isdisjoint(plan_rows):
            running = presenter.row_fractions(presenter.running, plan_rows)
            self._paint_ghost(painter, layout.ghost(row), running)

    def _paint_selection(
        self, painter: QPainter, line: QRectF, is_selected: bool, is_current: bool
    ) -> None:
        theme = self._look.theme
        if is_selected:
            painter.fillRect(line, theme.colour("raised"))
            painter.fillRect(QRectF(0, line.top(), 3, line.height()), theme.colour("accent"))
        if is_current:
            painter.setPen(QPen(theme.colour("accent"), 1))
            painter.setBrush(Qt.BrushStyle.NoBrush)
            painter.drawRect(line.adjusted(0.5, 0.5, -0.5, -0.5))

    def _paint_label(
        self,
        painter: QPainter,
        layout: CanvasLayout,
        row: int | str,
        label: str,
        is_selected: bool,
    ) -> None:
        painter.setPen(self._look.theme.colour("text" if is_selected else "text_muted"))
        bars = layout.bars(row)
        box = QRectF(6, bars[0].top(), layout.label_width - 14, bars[-1].bottom() - bars[0].top())
        align = Qt.AlignmentFlag.AlignRight | Qt.AlignmentFlag.AlignVCenter
        painter.drawText(box.adjusted(0, -2, 0, 2), align, label)

    def _paint_bar(self, painter: QPainter, bar: QRectF, parts: Parts, is_draft: bool) -> None:
        """Running solid, draft outlined."""
        theme = self._look.theme
        painter.fillRect(bar, theme.colour("raised"))
        for device, box in _boxes(bar, parts):
            index = self._session.device_index(device)
            fill = theme.device_fill(index)
            inner = box.adjusted(0, 0, -1, 0) if box.width() > 3 else box
            if theme.is_hatched(index):
                painter.fillRect(inner, translucent(fill, 0.4))
                painter.fillRect(inner, theme.device_brush(index))
            elif is_draft:
                painter.fillRect(inner, translucent(fill, DRAFT_ALPHA))
            else:
                painter.fillRect(inner, fill)
            if is_draft:
                painter.setPen(QPen(fill, 1.5))
                painter.setBrush(Qt.BrushStyle.NoBrush)
                painter.drawRect(inner.adjusted(0.75, 0.75, -0.75, -0.75))

    def _paint_ghost(self, painter: QPainter, line: QRectF, parts: Parts) -> None:
        theme = self._look.theme
        for device, box in _boxes(line, parts):
            painter.fillRect(box, QBrush(theme.device_fill(self._session.device_index(device))))

    def _paint_texts(self, painter: QPainter, bar: QRectF, parts: Parts, is_draft: bool) -> None:
        theme = self._look.theme
        metrics = painter.fontMetrics()
        for device, box in _boxes(bar, parts):
            fraction = dict(parts)[device]
            texts = (
                f"{self._session.device_label(device)}  {100 * fraction:.0f} %",
                f"{100 * fraction:.0f} %",
            )
            room = box.width() - 2 * TEXT_PADDING
            text = next((t for t in texts if metrics.horizontalAdvance(t) <= room), "")
            index = self._session.device_index(device)
            place = box.adjusted(TEXT_PADDING, 0, 0, 0)
            align = Qt.AlignmentFlag.AlignLeft | Qt.AlignmentFlag.AlignVCenter
            painter.setPen(theme.colour("text"))
            if theme.is_hatched(index):
                # Nobody reads text on a hatch.
                behind = painter.boundingRect(place, align, text).adjusted(-3, -1, 3, 1)
                painter.fillRect(behind, theme.colour("surface"))
            elif not is_draft:
                painter.setPen(readable_on(theme.device_fill(index)))
            painter.drawText(place, align, text)

    def _paint_divider(
        self, painter: QPainter, bar: QRectF, parts: Parts, state: CanvasState
    ) -> None:
        """A small grip where the keys or the mouse move the border."""
        if state.active_divider is None or not state.has_focus:
            return
        left = state.active_divider[0]
        edge = bar.left()
        for device, fraction in parts:
            edge += fraction * bar.width()
            if device == left and bar.left() < edge < bar.right() - 0.5:
                grip = QRectF(edge - 2, bar.top() - 1, 3, bar.height() + 2)
                painter.fillRect(grip, self._look.theme.colour("accent"))
                return


def _parts(plan: Plan, row: int) -> list[tuple[str, float]]:
    return [(device, plan.share(row, column)) for column, device in enumerate(plan.devices)]


def _boxes(bar: QRectF, parts: Parts) -> list[tuple[str, QRectF]]:
    """One rectangle per device with a share."""
    boxes: list[tuple[str, QRectF]] = []
    left = bar.left()
    for device, fraction in parts:
        width = fraction * bar.width()
        if width > 0:
            boxes.append((device, QRectF(left, bar.top(), width, bar.height())))
        left += width
    return boxes
