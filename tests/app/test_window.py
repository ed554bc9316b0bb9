"""The window as a whole, without an engine: its parts, its names, its shortcuts, its independence."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from PySide6.QtCore import QSize, Qt, QTimer
from PySide6.QtGui import QKeySequence
from PySide6.QtWidgets import (
    QAbstractButton,
    QAbstractSlider,
    QAbstractSpinBox,
    QApplication,
    QLabel,
    QLineEdit,
    QPlainTextEdit,
    QPushButton,
    QScrollBar,
    QTreeView,
    QWidget,
)
from pytestqt.qtbot import QtBot

from app.actions import ACTIONS
from app.application import make_application
from app.look import Look
from app.session import Session
from app.settings import Settings
from app.window import MainWindow
from engine.host import messages as api
from engine.plan.plan import Plan

from .conftest import Recorder, finished, home_plan

ROOT = Path(__file__).resolve().parents[2]
TOUCHABLE = (
    QAbstractButton,
    QAbstractSlider,
    QAbstractSpinBox,
    QLineEdit,
    QPlainTextEdit,
    QTreeView,
)


@pytest.fixture
def window(session: Session, look: Look, settings: Settings, qtbot: QtBot) -> Iterator[MainWindow]:
    made = MainWindow(session, look, settings)
    qtbot.addWidget(made)
    made.show()
    yield made
    made.close()


def _ready(window: MainWindow, session: Session, make_ready: Callable[..., Plan]) -> None:
    make_ready(session, "local-1", "local-2")


def test_the_window_process_imports_no_torch() -> None:
    """Nor what would bring it: the engine lives in other processes."""
    code = (
        "import sys, app.application, app.__main__\n"
        "heavy = {'torch', 'transformers', 'tokenizers', 'gguf'} & set(sys.modules)\n"
        "sys.exit(', '.join(sorted(heavy)) or 0)\n"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_all_four_pages_open(
    window: MainWindow, session: Session, make_ready: Callable[..., Plan], qtbot: QtBot
) -> None:
    _ready(window, session, make_ready)
    for index in range(4):
        window.show_page(index)
        window._on_tick()
        assert window.pages.currentIndex() == index
        assert not window.grab().isNull()


def test_everything_a_person_can_touch_has_a_name(
    window: MainWindow, session: Session, make_ready: Callable[..., Plan]
) -> None:
    """An object name for tests and style, an accessible name for screen readers."""
    _ready(window, session, make_ready)
    nameless: list[str] = []
    for widget in window.findChildren(QWidget):
        if not isinstance(widget, TOUCHABLE) or isinstance(widget, QScrollBar):
            continue
        if widget.objectName().startswith("qt_") or _is_inside_qt(widget):
            continue
        spoken = widget.accessibleName() or getattr(widget, "text", str)()
        if not widget.objectName() or not spoken:
            nameless.append(f"{type(widget).__name__} {widget.objectName()!r} in {widget.parent()}")
    assert not nameless


def _is_inside_qt(widget: QWidget) -> bool:
    """Parts of Qt's own composite widgets, such as the field of a spin box."""
    parent = widget.parent()
    return isinstance(parent, QAbstractSpinBox | QTreeView) or (
        parent is not None and parent.objectName().startswith("qt_")
    )


@pytest.mark.parametrize("base_px", [13, 18])
@pytest.mark.parametrize("size", [(1024, 640), (760, 480), (1600, 1000)])
def test_no_button_or_title_is_clipped(
    window: MainWindow,
    session: Session,
    look: Look,
    make_ready: Callable[..., Plan],
    size: tuple[int, int],
    base_px: int,
    qtbot: QtBot,
) -> None:
    _ready(window, session, make_ready)
    look.change_text_size(base_px - look.theme.base_px)
    if base_px > 13 and size == (760, 480):
        pytest.skip("large text in the smallest window scrolls")
    window.resize(QSize(*size))
    window.split.use_even()
    for index in range(4):
        window.show_page(index)
        qtbot.wait(20)
        for button in window.findChildren(QPushButton):
            if button.isVisible() and button.text():
                needed = button.fontMetrics().horizontalAdvance(button.text())
                assert button.width() >= needed, f"{button.objectName()} on page {index}"
        for label in window.findChildren(QLabel):
            if label.isVisible() and not label.wordWrap() and label.property("role") == "title":
                needed = label.fontMetrics().horizontalAdvance(label.text())
                assert label.width() >= needed - 1 or "Eliding" in type(label).__name__


def test_shortcuts_are_unique_and_their_handlers_exist(window: MainWindow) -> None:
    shortcuts = [spec.shortcut for spec in ACTIONS if spec.shortcut]
    assert len(set(shortcuts)) == len(shortcuts)
    for spec in ACTIONS:
        assert callable(getattr(window, spec.handler))
        assert not spec.shortcut or not QKeySequence(spec.shortcut).isEmpty()


def test_enter_sends_shift_enter_breaks_the_line_and_escape_stops(
    window: MainWindow,
    session: Session,
    recorder: Recorder,
    make_ready: Callable[..., Plan],
    qtbot: QtBot,
) -> None:
    _ready(window, session, make_ready)
    edit = window.chat_page.composer.edit
    edit.setFocus()
    qtbot.keyClicks(edit, "first")
    qtbot.keyClick(edit, Qt.Key.Key_Return, Qt.KeyboardModifier.ShiftModifier)
    qtbot.keyClicks(edit, "second")
    qtbot.keyClick(edit, Qt.Key.Key_Return)
    call = recorder.last(api.Generate)
    assert isinstance(call, api.Generate)
    assert call.turns[-1].content == "first\nsecond"
    assert edit.toPlainText() == ""
    window._actions["stop"].trigger()
    assert recorder.calls[-1] == api.Cancel(request_id=call.request_id)


def test_a_question_can_be_written_but_not_sent_while_an_answer_comes(
    window: MainWindow,
    session: Session,
    recorder: Recorder,
    make_ready: Callable[..., Plan],
    qtbot: QtBot,
) -> None:
    _ready(window, session, make_ready)
    window.conversation.send("one")
    call = recorder.last(api.Generate)
    assert isinstance(call, api.Generate)
    edit = window.chat_page.composer.edit
    qtbot.keyClicks(edit, "two")
    qtbot.keyClick(edit, Qt.Key.Key_Return)
    assert edit.toPlainText() == "two"
    session.hear([finished(call.request_id, "answer", home_plan())])
    qtbot.keyClick(edit, Qt.Key.Key_Return)
    assert window.conversation.is_answering


def test_the_start_is_told_step_by_step(
    window: MainWindow, session: Session, recorder: Recorder
) -> None:
    card = window.chat_page.card
    title = card.findChild(QLabel, "progressTitle")
    line = card.findChild(QLabel, "progressLine")
    assert title is not None
    assert line is not None
    assert title.text() == "Starting"
    session.engine_started()
    opening = recorder.last(api.OpenModel)
    assert isinstance(opening, api.OpenModel)
    session.hear(
        [
            api.Progress(
                request_id=opening.request_id,
                phase="fetch",
                subject="model",
                done=49_181_216,
                total=98_362_432,
            )
        ]
    )
    assert line.text().startswith("Fetching the model  50 % · 49.2 MB of 98.4 MB")
    session.hear(
        [
            api.CallFailed(
                request_id=opening.request_id, error="CheckpointError", message="no network"
            )
        ]
    )
    assert line.text() == "no network"
    mend = card.findChild(QPushButton, "mendButton")
    assert mend is not None
    assert mend.isVisibleTo(card)


def test_a_lost_plan_offers_to_load_again(
    window: MainWindow,
    session: Session,
    recorder: Recorder,
    make_ready: Callable[..., Plan],
    qtbot: QtBot,
) -> None:
    _ready(window, session, make_ready)
    window.conversation.send("question")
    message = "local-1/cpu, which computes layers 0-4, was lost"
    call = recorder.last(api.Generate)
    assert isinstance(call, api.Generate)
    session.hear(
        [
            api.PlanLost(message=message),
            api.CallFailed(request_id=call.request_id, error="WorkerLost", message=message),
        ]
    )
    assert message in window.chat_page.view.toPlainText()
    button = window.findChild(QPushButton, "chatBannerButton")
    assert button is not None
    assert button.isVisible()
    qtbot.mouseClick(button, Qt.MouseButton.LeftButton)
    assert isinstance(recorder.calls[-1], api.ApplyPlan)


def test_the_theme_follows_the_menu_and_is_remembered(
    window: MainWindow, look: Look, settings: Settings, qapp: QApplication
) -> None:
    window._actions["themeDark"].trigger()
    assert look.theme.is_dark
    assert qapp.palette().window().color() == look.theme.colour("window")
    window._actions["themeLight"].trigger()
    assert not look.theme.is_dark
    assert settings.theme == "light"


def test_timers_have_names_and_stop_with_the_window(window: MainWindow) -> None:
    timers = [t for t in window.findChildren(QTimer) if t.objectName()]
    assert {"chartTimer", "flushTimer"} <= {timer.objectName() for timer in timers}
    window.close()
    assert not any(timer.isActive() for timer in timers)


def test_the_place_of_the_window_is_remembered(
    window: MainWindow, settings: Settings, session: Session, look: Look, qtbot: QtBot
) -> None:
    window.resize(780, 560)
    window.close()
    again = MainWindow(session, look, settings)
    qtbot.addWidget(again)
    assert again.size() == QSize(780, 560)


def test_a_damaged_settings_file_gives_the_defaults(tmp_path: Path) -> None:
    path = tmp_path / "window.ini"
    path.write_bytes(b"\x00\xff[window\ntheme=purple\nbase_font_px=huge\n")
    settings = Settings(path)
    assert settings.theme == "system"
    assert settings.base_font_px == 13
    assert settings.geometry is None
    assert settings.last_model is None


def test_the_application_is_made_once(qapp: QApplication) -> None:
    assert make_application() is qapp
