"""The real window on the real engine and the real model: ask, split, lose a runner, end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from PySide6.QtCore import Qt
from PySide6.QtWidgets import QApplication, QPushButton
from pytestqt.qtbot import QtBot

from app.application import Desk
from app.chat.conversation import ChatMessage, ChatSettings
from app.settings import Settings
from app.stages import StartOptions
from tests.processes import command_of, has_ended, processes_below

pytestmark = [pytest.mark.slow, pytest.mark.network]

QUESTION = "Name three rivers."
NUM_TOKENS = 32
START_MS = 90_000
ANSWER_MS = 60_000
END_SECONDS = 3.0
# A runner hears of its window's end once its imports are done.
RUNNER_BYTES = 200_000_000
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def desk(
    default_model_path: Path, tmp_path: Path, qapp: QApplication, qtbot: QtBot
) -> Iterator[Desk]:
    """The window with two simulated nodes, the model on this computer alone, float32, greedy."""
    options = StartOptions(model=str(default_model_path), dtype="float32", demo_workers=2)
    made = Desk(options, Settings(tmp_path / "window.ini"))
    made.window.conversation.settings = ChatSettings(temperature=0.0, max_tokens=NUM_TOKENS)
    made.start()
    try:
        qtbot.waitUntil(
            lambda: made.session.is_ready and len(made.session.available_devices()) == 3,
            timeout=START_MS,
        )
        yield made
    finally:
        made.close()
        made.window.deleteLater()
        qapp.setStyleSheet("")


def _ask(desk: Desk, qtbot: QtBot, text: str = QUESTION) -> ChatMessage:
    """Type a question, press Enter, wait for the end of the answer."""
    conversation = desk.window.conversation
    edit = desk.window.chat_page.composer.edit
    qtbot.keyClicks(edit, text)
    qtbot.keyClick(edit, Qt.Key.Key_Return)
    assert conversation.is_answering
    qtbot.waitUntil(lambda: not conversation.is_answering, timeout=ANSWER_MS)
    return conversation.messages[-1]


def _split_between_three(desk: Desk, qtbot: QtBot) -> None:
    """Layers 0-9: 70 % here, 30 % on local-1; layers 10-29 on local-2; then Apply."""
    split = desk.window.split
    assert split.select_text("0-9")
    split.set_share("this/cpu", 0.7)
    split.set_share("local-1/cpu", 0.3)
    assert split.select_text("10-29")
    split.set_share("local-2/cpu", 1.0)
    desk.window.show_page(2)
    button = desk.window.findChild(QPushButton, "applyButton")
    assert button is not None
    assert button.isVisible()
    qtbot.mouseClick(button, Qt.MouseButton.LeftButton)
    _wait_for_plan(desk, qtbot)
    assert not split.has_changes


def _wait_for_plan(desk: Desk, qtbot: QtBot) -> None:
    session = desk.session
    qtbot.waitUntil(lambda: session.is_ready and not session.is_applying, timeout=START_MS)


def _runner(device: str) -> psutil.Process:
    """The runner of a device, found as in a process list."""
    return processes_below(psutil.Process(), "shardmix-runner", device)[0]


def test_a_split_between_three_nodes_gives_the_same_answer(desk: Desk, qtbot: QtBot) -> None:
    pieces: list[str] = []
    desk.window.conversation.text_added.connect(lambda _index, text: pieces.append(text))
    alone = _ask(desk, qtbot)
    assert alone.state == "done"
    assert alone.num_tokens == NUM_TOKENS
    assert len(pieces) > 3, "the answer streams"
    # A list's numbers are drawn, not written.
    words = alone.text.split("\n")[0].partition(". ")[2]
    assert words in desk.window.chat_page.view.toPlainText()
    assert [share.label for share in alone.shares] == ["this computer"]

    _split_between_three(desk, qtbot)
    desk.window.conversation.new_chat()
    desk.window.show_page(0)
    shared = _ask(desk, qtbot)
    assert shared.text == alone.text
    assert [share.label for share in shared.shares] == ["this computer", "local-1", "local-2"]
    assert shared.finished is not None
    assert {usage.device for usage in shared.finished.devices if usage.compute_s > 0} == {
        "this/cpu",
        "local-1/cpu",
        "local-2/cpu",
    }
    assert "3 processes" in desk.window.chat_page.view.toPlainText()

    now = time.time()
    assert set(desk.window.history.devices) == {"this/cpu", "local-1/cpu", "local-2/cpu"}
    assert len(desk.window.history.rate_series(now, 60.0)[0]) > 0
    qtbot.waitUntil(
        lambda: sum("runner" in p.role for n in desk.session.nodes for p in n.processes) == 3,
        timeout=5000,
    )


def test_an_answer_goes_on_in_the_window_without_a_killed_runner(desk: Desk, qtbot: QtBot) -> None:
    _split_between_three(desk, qtbot)
    window = desk.window
    window.conversation.settings = ChatSettings(temperature=0.0, max_tokens=2000)
    window.conversation.send("Write a very long story about a river.")
    answer = window.conversation.messages[1]
    qtbot.waitUntil(lambda: len(answer.text) > 20, timeout=ANSWER_MS)
    _runner("local-1/cpu").kill()
    qtbot.waitUntil(lambda: answer.pause is not None, timeout=ANSWER_MS)
    assert answer.pause is not None
    assert "local-1/cpu" in answer.pause.reason
    assert "layers 0-9" in answer.pause.reason
    qtbot.waitUntil(lambda: bool(answer.notes), timeout=ANSWER_MS)
    assert "without local-1" in answer.notes[0]
    assert not answer.error
    length = len(answer.text)
    qtbot.waitUntil(lambda: len(answer.text) > length + 20, timeout=ANSWER_MS)
    window.conversation.stop()
    qtbot.waitUntil(lambda: not window.conversation.is_answering, timeout=ANSWER_MS)
    window.show_page(0)
    assert answer.notes[0] in window.chat_page.view.toPlainText()
    window.conversation.new_chat()
    window.conversation.settings = ChatSettings(temperature=0.0, max_tokens=NUM_TOKENS)
    assert _ask(desk, qtbot).state == "done"


def test_an_engine_that_dies_can_be_started_again(desk: Desk, qtbot: QtBot) -> None:
    (host,) = processes_below(psutil.Process(), "shardmix-host")
    host.kill()
    qtbot.waitUntil(lambda: desk.session.trouble is not None, timeout=10_000)
    assert desk.session.trouble is not None
    assert desk.session.trouble.remedy == "restart"
    desk.session.mend()
    _wait_for_plan(desk, qtbot)
    assert _ask(desk, qtbot).state == "done"


def test_stop_ends_an_answer_at_once(desk: Desk, qtbot: QtBot) -> None:
    window = desk.window
    window.conversation.settings = ChatSettings(temperature=0.0, max_tokens=2000)
    window.conversation.send("Write a very long story about a river.")
    qtbot.waitUntil(lambda: len(window.conversation.messages[1].text) > 20, timeout=ANSWER_MS)
    window._actions["stop"].trigger()
    qtbot.waitUntil(lambda: not window.conversation.is_answering, timeout=5000)
    answer = window.conversation.messages[1]
    assert answer.state == "stopped"
    assert answer.text
    assert "stopped by you" in window.chat_page.view.toPlainText()


def test_closing_the_window_leaves_no_process(desk: Desk) -> None:
    children = psutil.Process().children(recursive=True)
    assert len(children) >= 5, "a host, three workers, a runner"
    desk.close()
    assert all(has_ended(child) for child in children)


@pytest.fixture
def window_process(
    default_model_path: Path, tmp_path: Path
) -> Iterator[tuple[subprocess.Popen[bytes], list[psutil.Process]]]:
    """A window in a process of its own, and everything it started."""
    command = [sys.executable, "-P", "-m", "app", "--demo-workers", "2"]
    command += ["--model", str(default_model_path), "--settings", str(tmp_path / "window.ini")]
    environment = {**os.environ, "QT_QPA_PLATFORM": "offscreen", "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, cwd=tmp_path, env=environment) as window:
        try:
            yield window, _wait_for_runner(psutil.Process(window.pid))
        finally:
            window.kill()


def _assert_all_end(processes: list[psutil.Process]) -> None:
    deadline = time.monotonic() + END_SECONDS
    while not all(map(has_ended, processes)) and time.monotonic() < deadline:
        time.sleep(0.02)
    left = [process for process in processes if not has_ended(process)]
    for process in left:
        process.kill()
    assert not left


def test_a_killed_window_takes_its_processes_along(
    window_process: tuple[subprocess.Popen[bytes], list[psutil.Process]],
) -> None:
    window, children = window_process
    window.kill()
    window.wait(10)
    _assert_all_end(children)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no signals to send")
@pytest.mark.parametrize(("number", "exit_code"), [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
def test_an_interrupted_window_ends_in_order(
    window_process: tuple[subprocess.Popen[bytes], list[psutil.Process]],
    number: signal.Signals,
    exit_code: int,
) -> None:
    window, children = window_process
    window.send_signal(number)
    assert window.wait(10) == exit_code
    _assert_all_end(children)


def _wait_for_runner(window: psutil.Process) -> list[psutil.Process]:
    """All processes under the window, once a runner is among them."""
    deadline = time.monotonic() + START_MS / 1000
    while time.monotonic() < deadline:
        children = window.children(recursive=True)
        if any(_is_runner(process) for process in children) and len(children) >= 5:
            return children
        time.sleep(0.05)
    raise AssertionError("no runner was started")


def _is_runner(process: psutil.Process) -> bool:
    try:
        has_imports = process.memory_info().rss > RUNNER_BYTES
    except psutil.Error:
        return False
    return has_imports and "shardmix-runner" in command_of(process)
