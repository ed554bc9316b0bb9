"""The split canvas: one row for the whole model, one per layer below it, painted in one widget.

In: mouse and keys. Out: selections and edits of the presenter.
"""

from __future__ import annotations

from itertools import pairwise

from PySide6.QtCore import QEvent, QPointF, QRectF, QSize, Qt
from PySide6.QtGui import (
    QFocusEvent,
    QHelpEvent,
    QKeyEvent,
    QMouseEvent,
    QPainter,
    QPaintEvent,
    QResizeEvent,
)
from PySide6.QtWidgets import QSizePolicy, QToolTip, QWidget

from app.look import Look
from app.session import Session
from app.split.canvas_layout import DIVIDER_REACH, CanvasLayout, Hit
from app.split.canvas_painter import CanvasPainter, CanvasState
from app.split.draft import is_uniform
from app.split.presenter import SplitPresenter

PAGE_LAYERS = 10
BIG_STEP = 5


class PlanCanvas(QWidget):
    """Draws and edits the draft; every row sums to 100 % at any moment."""

    def __init__(
        self, presenter: SplitPresenter, session: Session, look: Look, parent: QWidget | None = None
    ) -> None:
        """Folded: only the row for all layers."""
        super().__init__(parent)
        self.setObjectName("planCanvas")
        self.setAccessibleName("Split of every layer")
        self.setAccessibleDescription(
            "Up and down choose a layer, Shift extends, left and right choose a divider, "
            "the bracket keys move it"
        )
        self.setFocusPolicy(Qt.FocusPolicy.StrongFocus)
        self.setMouseTracking(True)
        self.setSizePolicy(QSizePolicy.Policy.Expanding, QSizePolicy.Policy.Fixed)
        self._presenter = presenter
        self._session = session
        self._look = look
        self._painter = CanvasPainter(presenter, session, look)
        self._is_unfolded = False
        self._anchor = 0
        self._current = 0
        self._divider: tuple[str, str] | None = None
        self._drag: str = ""
        presenter.draft_changed.connect(self._on_draft_changed)
        presenter.selection_changed.connect(self._on_selection_changed)
        look.theme_changed.connect(self._on_draft_changed)
        self._on_draft_changed()

    @property
    def is_unfolded(self) -> bool:
        """Whether every layer has its row."""
        return self._is_unfolded

    def set_unfolded(self, is_unfolded: bool) -> None:
        """Show a row per layer, or only the one for all."""
        self._is_unfolded = is_unfolded
        if not is_unfolded:
            self._presenter.select_everything()
        self._on_draft_changed()

    def plan_layout(self) -> CanvasLayout:
        """Where the rows lie now."""
        shape = self._presenter.shape
        return CanvasLayout(
            0 if shape is None else shape.num_layers,
            self.width(),
            float(self._look.theme.font_px(-1) + 3),
            self._is_unfolded,
        )

    def sizeHint(self) -> QSize:  # noqa: N802
        """As high as its rows."""
        return QSize(480, round(self.plan_layout().height))

    def paintEvent(self, event: QPaintEvent) -> None:  # noqa: N802
        """Draw what is visible."""
        painter = QPainter(self)
        state = CanvasState(self.plan_layout(), self.hasFocus(), self._current, self._divider)
        self._painter.paint(painter, state, QRectF(event.rect()))

    # ---- mouse -------------------------------------------------------------------------------

    def mousePressEvent(self, event: QMouseEvent) -> None:  # noqa: N802
        """Take a divider, or begin a selection."""
        if event.button() != Qt.MouseButton.LeftButton:
            return
        hit = self.plan_layout().hit(event.position())
        if hit is None:
            return
        divider = self._divider_at(hit, event.position())
        if divider is not None:
            self._select_for_divider(hit)
            self._divider = divider
            self._drag = "divider"
            self._presenter.begin_gesture()
            self.update()
            return
        self._drag = "selection"
        self._select_hit(hit, event.modifiers())

    def mouseMoveEvent(self, event: QMouseEvent) -> None:  # noqa: N802
        """Drag, or show that a divider can be taken."""
        layout = self.plan_layout()
        if self._drag == "divider" and self._divider is not None:
            border = (event.position().x() - layout.bar_left) / layout.bar_width
            self._presenter.set_divider(*self._divider, min(max(border, 0.0), 1.0))
            return
        if self._drag == "selection" and self._is_unfolded:
            if event.position().y() >= layout.line(0).top():
                self._current = layout.nearest_layer(event.position().y())
                self._select_range(self._anchor, self._current)
            return
        hit = layout.hit(event.position())
        is_divider = hit is not None and self._divider_at(hit, event.position()) is not None
        shape = Qt.CursorShape.SplitHCursor if is_divider else Qt.CursorShape.ArrowCursor
        self.setCursor(shape)

    def mouseReleaseEvent(self, event: QMouseEvent) -> None:  # noqa: N802
        """End of the gesture."""
        del event
        if self._drag == "divider":
            self._presenter.end_gesture()
        self._drag = ""

    def event(self, event: QEvent) -> bool:
        """Tool tips that say what a row holds."""
        if event.type() == QEvent.Type.ToolTip and isinstance(event, QHelpEvent):
            hit = self.plan_layout().hit(QPointF(event.pos()))
            QToolTip.showText(event.globalPos(), "" if hit is None else self._tip(hit), self)
            return True
        return super().event(event)

    # ---- keys --------------------------------------------------------------------------------

    def keyPressEvent(self, event: QKeyEvent) -> None:  # noqa: N802
        """Choose rows and dividers, move dividers by quanta."""
        extend = bool(event.modifiers() & Qt.KeyboardModifier.ShiftModifier)
        last = self.plan_layout().num_layers
        match event.key():
            case Qt.Key.Key_Up:
                self._move_current(self._current - 1, extend)
            case Qt.Key.Key_Down:
                self._move_current(self._current + 1, extend)
            case Qt.Key.Key_PageUp:
                self._move_current(self._current - PAGE_LAYERS, extend)
            case Qt.Key.Key_PageDown:
                self._move_current(self._current + PAGE_LAYERS, extend)
            case Qt.Key.Key_Home:
                self._move_current(0, extend)
            case Qt.Key.Key_End:
                self._move_current(last, extend)
            case Qt.Key.Key_Left:
                self._choose_divider(-1)
            case Qt.Key.Key_Right:
                self._choose_divider(1)
            case Qt.Key.Key_BracketLeft:
                self._step_divider(-1)
            case Qt.Key.Key_BracketRight:
                self._step_divider(1)
            case Qt.Key.Key_BraceLeft:
                self._step_divider(-BIG_STEP)
            case Qt.Key.Key_BraceRight:
                self._step_divider(BIG_STEP)
            case Qt.Key.Key_A if event.modifiers() & Qt.KeyboardModifier.ControlModifier:
                self._presenter.select_everything()
            case _:
                super().keyPressEvent(event)

    def focusInEvent(self, event: QFocusEvent) -> None:  # noqa: N802
        """The divider that the keys move becomes visible."""
        super().focusInEvent(event)
        if self._divider is None:
            self._choose_divider(1)
        self.update()

    def focusOutEvent(self, event: QFocusEvent) -> None:  # noqa: N802
        """And hides again."""
        super().focusOutEvent(event)
        self.update()

    def resizeEvent(self, event: QResizeEvent) -> None:  # noqa: N802
        """The bars follow the width."""
        super().resizeEvent(event)
        self.update()

    # ---- inside ------------------------------------------------------------------------------

    def _on_draft_changed(self) -> None:
        self.setFixedHeight(round(self.plan_layout().height))
        self.update()

    def _on_selection_changed(self) -> None:
        layers = self._presenter.selection.layers
        if layers and self._current not in layers and self._drag != "selection":
            self._current = self._anchor = min(layers)
        self.update()

    def _select_hit(self, hit: Hit, modifiers: Qt.KeyboardModifier) -> None:
        shape = self._presenter.shape
        if shape is None:
            return
        if hit.row == "all":
            self._presenter.select_everything()
            return
        place = shape.num_layers if hit.row == "head" else int(hit.row)
        self._current = place
        if modifiers & Qt.KeyboardModifier.ShiftModifier:
            self._select_range(self._anchor, place)
            return
        self._anchor = place
        selected = self._presenter.selection
        if modifiers & Qt.KeyboardModifier.ControlModifier:
            if hit.row == "head":
                self._presenter.select(selected.layers, not selected.has_head)
            else:
                self._presenter.select(selected.layers ^ {place}, selected.has_head)
            return
        self._select_range(place, place)

    def _select_range(self, first: int, last: int) -> None:
        """Select places; the output head is the place behind the last layer."""
        shape = self._presenter.shape
        if shape is None:
            return
        low, high = min(first, last), max(first, last)
        layers = frozenset(range(low, min(high + 1, shape.num_layers)))
        self._presenter.select(layers, high == shape.num_layers)

    def _move_current(self, place: int, extend: bool) -> None:
        if not self._is_unfolded:
            return
        self._current = min(max(place, 0), self.plan_layout().num_layers)
        if not extend:
            self._anchor = self._current
        self._select_range(self._anchor, self._current)

    def _select_for_divider(self, hit: Hit) -> None:
        """A divider moves the whole selection it belongs to, else only its own row."""
        selected = self._presenter.selection
        is_inside = selected.has_head if hit.row == "head" else hit.row in selected.layers
        if hit.row == "all" or not is_inside:
            self._select_hit(hit, Qt.KeyboardModifier.NoModifier)

    def _divider_at(self, hit: Hit, point: QPointF) -> tuple[str, str] | None:
        """The devices on both sides of the border under a point."""
        plan, shape = self._presenter.draft, self._presenter.shape
        if plan is None or shape is None or not hit.is_on_bar:
            return None
        layout = self.plan_layout()
        if hit.row == "all":
            rows = list(range(shape.num_rows))
            if not is_uniform(plan, rows):
                return None
        elif hit.row == "head":
            rows = [shape.head_row]
        else:
            layer = int(hit.row)
            is_attention = point.y() < layout.bars(layer)[0].bottom() + 0.5
            rows = [shape.attention_row(layer) if is_attention else shape.mlp_row(layer)]
        used = [
            (device, part) for device, part in self._presenter.row_fractions(plan, rows) if part
        ]
        edge = layout.bar_left
        for (left, part), (right, _) in pairwise(used):
            edge += part * layout.bar_width
            if abs(edge - point.x()) <= DIVIDER_REACH:
                return left, right
        return None

    def _choose_divider(self, step: int) -> None:
        """Choose among the borders between neighbours of the selected rows."""
        plan = self._presenter.draft
        if plan is None or len(plan.devices) < 2:
            self._divider = None
            return
        pairs = list(pairwise(plan.devices))
        place = pairs.index(self._divider) if self._divider in pairs else -1 if step > 0 else 1
        self._divider = pairs[min(max(place + step, 0), len(pairs) - 1)]
        self.update()

    def _step_divider(self, quanta: int) -> None:
        plan = self._presenter.draft
        if plan is None or self._divider is None or not set(self._divider) <= set(plan.devices):
            self._choose_divider(1)
        if self._divider is not None:
            self._presenter.step_divider(*self._divider, quanta)

    def _tip(self, hit: Hit) -> str:
        plan, shape = self._presenter.draft, self._presenter.shape
        if plan is None or shape is None or hit.row == "all":
            return ""
        if hit.row == "head":
            rows = [shape.head_row]
        else:
            rows = [shape.attention_row(int(hit.row)), shape.mlp_row(int(hit.row))]
        lines: list[str] = []
        for row in rows:
            parts = [
                f"{self._session.device_label(device)} {count} of {shape.num_quanta(row)}"
                for device, count in zip(plan.devices, plan.cells[row], strict=True)
                if count
            ]
            lines.append(f"{shape.row_name(row)}: {', '.join(parts)}")
        return "\n".join(lines)
