"""The canvas turns mouse and keys into selections and edits."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from PySide6.QtCore import QPoint, QPointF, Qt
from pytestqt.qtbot import QtBot

from app.look import Look
from app.session import Session
from app.split.canvas import PlanCanvas
from app.split.canvas_layout import CanvasLayout
from app.split.presenter import SplitPresenter
from engine.plan.plan import Plan, PlanShape

from .conftest import CONFIG

SHAPE = PlanShape.from_config(CONFIG)
LEFT = Qt.MouseButton.LeftButton
SHIFT = Qt.KeyboardModifier.ShiftModifier
CONTROL = Qt.KeyboardModifier.ControlModifier


@pytest.fixture
def presenter(session: Session, make_ready: Callable[..., Plan]) -> SplitPresenter:
    made = SplitPresenter(session)
    make_ready(session, "local-1", "local-2")
    made.use_even()
    return made


@pytest.fixture
def canvas(presenter: SplitPresenter, session: Session, look: Look, qtbot: QtBot) -> PlanCanvas:
    made = PlanCanvas(presenter, session, look)
    qtbot.addWidget(made)
    made.resize(640, 400)
    made.set_unfolded(True)
    made.show()
    return made


def _label(canvas: PlanCanvas, row: int | str) -> QPoint:
    line = canvas.plan_layout().line(row)
    return QPointF(10, line.center().y()).toPoint()


def test_every_row_is_hit_where_it_is_drawn() -> None:
    layout = CanvasLayout(5, 640, 14, True)
    for row in ("all", 0, 4, "head"):
        hit = layout.hit(layout.bars(row)[0].center())
        assert hit is not None
        assert hit.row == row
        assert hit.fraction == pytest.approx(0.5)
        assert layout.bars(row)[-1].bottom() < layout.ghost(row).bottom()
        assert layout.ghost(row).bottom() <= layout.line(row).bottom() + 1
    assert layout.hit(QPointF(10, layout.height + 50)) is None


def test_clicks_select_rows_as_in_a_table(
    canvas: PlanCanvas, presenter: SplitPresenter, qtbot: QtBot
) -> None:
    qtbot.mouseClick(canvas, LEFT, pos=_label(canvas, 1))
    assert presenter.selection.layers == {1}
    qtbot.mouseClick(canvas, LEFT, SHIFT, _label(canvas, 3))
    assert presenter.selection.layers == {1, 2, 3}
    qtbot.mouseClick(canvas, LEFT, CONTROL, _label(canvas, 2))
    assert presenter.selection.layers == {1, 3}
    qtbot.mouseClick(canvas, LEFT, SHIFT, _label(canvas, "head"))
    assert presenter.selection.has_head
    qtbot.mouseClick(canvas, LEFT, pos=_label(canvas, "all"))
    assert presenter.selection.is_everything(SHAPE)


def test_dragging_over_labels_selects_a_run(
    canvas: PlanCanvas, presenter: SplitPresenter, qtbot: QtBot
) -> None:
    qtbot.mousePress(canvas, LEFT, pos=_label(canvas, 3))
    qtbot.mouseMove(canvas, _label(canvas, 1))
    qtbot.mouseRelease(canvas, LEFT, pos=_label(canvas, 1))
    assert presenter.selection.layers == {1, 2, 3}


def test_dragging_a_divider_moves_it_in_all_selected_rows(
    canvas: PlanCanvas, presenter: SplitPresenter, qtbot: QtBot
) -> None:
    presenter.select(frozenset({1, 2}), False)
    bar = canvas.plan_layout().bars(1)[0]
    third = QPointF(bar.left() + bar.width() / 3, bar.center().y()).toPoint()
    ninth = QPointF(bar.left() + bar.width() / 9, bar.center().y()).toPoint()
    qtbot.mousePress(canvas, LEFT, pos=third)
    qtbot.mouseMove(canvas, ninth)
    qtbot.mouseRelease(canvas, LEFT, pos=ninth)
    assert presenter.draft is not None
    for layer in (1, 2):
        assert presenter.draft.cells[SHAPE.attention_row(layer)] == (1, 5, 3)
    assert presenter.draft.cells[SHAPE.attention_row(0)] == (3, 3, 3)
    presenter.undo_stack.undo()
    assert presenter.draft.cells[SHAPE.attention_row(1)] == (3, 3, 3)


def test_everything_can_be_done_with_keys(
    canvas: PlanCanvas, presenter: SplitPresenter, qtbot: QtBot
) -> None:
    canvas.setFocus()
    qtbot.keyClick(canvas, Qt.Key.Key_Home)
    qtbot.keyClick(canvas, Qt.Key.Key_Down)
    qtbot.keyClick(canvas, Qt.Key.Key_Down, SHIFT)
    assert presenter.selection.layers == {1, 2}
    qtbot.keyClick(canvas, Qt.Key.Key_BracketRight)
    assert presenter.draft is not None
    assert presenter.draft.cells[SHAPE.attention_row(2)] == (4, 2, 3)
    qtbot.keyClick(canvas, Qt.Key.Key_Right)
    qtbot.keyClick(canvas, Qt.Key.Key_BracketLeft)
    assert presenter.draft.cells[SHAPE.attention_row(2)] == (4, 1, 4)
    qtbot.keyClick(canvas, Qt.Key.Key_A, CONTROL)
    assert presenter.selection.is_everything(SHAPE)


def test_it_paints_in_every_state(
    canvas: PlanCanvas, presenter: SplitPresenter, look: Look
) -> None:
    """Empty paint events hide errors: grab() raises them here."""
    for theme in ("light", "dark"):
        look.choose(theme)
        for is_unfolded in (True, False):
            canvas.set_unfolded(is_unfolded)
            assert not canvas.grab().isNull()
    presenter.revert()
    assert not canvas.grab().isNull()
