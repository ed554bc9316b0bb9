"""Streaming writes closed blocks once, never loses text, and leaves the reader's place alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from PySide6.QtCore import QUrl
from PySide6.QtGui import QGuiApplication, QTextCursor
from pytestqt.qtbot import QtBot

from app.chat.conversation import Conversation
from app.chat.conversation_view import ConversationView
from app.look import Look
from app.session import Session
from engine.host import messages as api
from engine.plan.plan import Plan

from .conftest import Recorder, finished, home_plan

PARAGRAPH = "Some words that make a **paragraph** of the usual length.\n\n"
RICH = """# Title

A paragraph with **bold**, *italic*, `code` and ~~gone~~.

1. first
2. second
   - nested

| a | b |
|---|---|
| 1 | 2 |

> quoted

```python
def f(x):
    return x  # comment
```

---

The end.
"""


@pytest.fixture
def conversation(session: Session, make_ready: Callable[..., Plan]) -> Conversation:
    make_ready(session)
    return Conversation(session)


@pytest.fixture
def view(
    conversation: Conversation, session: Session, look: Look, qtbot: QtBot
) -> ConversationView:
    made = ConversationView(conversation, session, look)
    qtbot.addWidget(made)
    made.resize(600, 300)
    made.show()
    return made


def _ask(conversation: Conversation, recorder: Recorder, text: str = "question") -> int:
    conversation.send(text)
    call = recorder.last(api.Generate)
    assert isinstance(call, api.Generate)
    return call.request_id


def _say(session: Session, request_id: int, text: str) -> None:
    session.hear([api.TokensGenerated(request_id=request_id, token_ids=(1,), text=text)])


def test_two_thousand_tokens_rewrite_only_the_open_block(
    view: ConversationView, conversation: Conversation, session: Session, recorder: Recorder
) -> None:
    """Closed blocks are written once; every flush adds at most its tail."""
    request_id = _ask(conversation, recorder)
    flushes = 0
    for index in range(2000):
        _say(session, request_id, "word\n\n" if index % 10 == 9 else "word ")
        if index % 25 == 0:
            view.flush()
            flushes += 1
    session.hear([finished(request_id, conversation.messages[1].text, home_plan())])
    num_blocks = 200
    assert view.num_block_writes <= num_blocks + flushes + 3
    assert view.toPlainText().count("word") == 2000


def test_a_burst_waits_for_the_flush_and_is_not_lost(
    view: ConversationView,
    conversation: Conversation,
    session: Session,
    recorder: Recorder,
    qtbot: QtBot,
) -> None:
    request_id = _ask(conversation, recorder)
    _say(session, request_id, "first")
    assert "first" in view.toPlainText(), "the first token is shown at once"
    before = view.num_block_writes
    for index in range(500):
        _say(session, request_id, f" {index}")
    assert view.num_block_writes == before
    qtbot.waitUntil(lambda: "499" in view.toPlainText(), timeout=3000)


@pytest.mark.parametrize("size", [1, 3, 17, 1000])
def test_a_streamed_answer_looks_like_one_written_at_once(
    view: ConversationView,
    conversation: Conversation,
    session: Session,
    recorder: Recorder,
    size: int,
) -> None:
    request_id = _ask(conversation, recorder)
    for start in range(0, len(RICH), size):
        _say(session, request_id, RICH[start : start + size])
        view.flush()
    session.hear([finished(request_id, RICH, home_plan())])
    streamed = view.toHtml()
    view.show_all()
    assert streamed == view.toHtml()
    assert "first token after 250 ms" in view.toPlainText()


def test_open_code_only_grows(
    view: ConversationView, conversation: Conversation, session: Session, recorder: Recorder
) -> None:
    request_id = _ask(conversation, recorder)
    _say(session, request_id, "```python\n")
    view.flush()
    before = view.num_block_writes
    for index in range(100):
        _say(session, request_id, f"x = {index}\n")
        view.flush()
    assert view.num_block_writes == before
    assert "x = 99" in view.toPlainText()
    _say(session, request_id, "```\n")
    view.flush()
    assert view.num_block_writes == before + 1


def test_a_selection_survives_streaming(
    view: ConversationView, conversation: Conversation, session: Session, recorder: Recorder
) -> None:
    request_id = _ask(conversation, recorder)
    _say(session, request_id, "Remember this sentence.\n\n")
    _say(session, request_id, "more")
    view.flush()
    cursor = view.document().find("this sentence")
    view.setTextCursor(cursor)
    for _ in range(20):
        _say(session, request_id, PARAGRAPH)
        view.flush()
    assert view.textCursor().selectedText() == "this sentence"


def test_the_view_follows_until_the_reader_scrolls_up(
    view: ConversationView, conversation: Conversation, session: Session, recorder: Recorder
) -> None:
    request_id = _ask(conversation, recorder)
    bar = view.verticalScrollBar()

    def stream() -> None:
        for _ in range(20):
            _say(session, request_id, PARAGRAPH)
            view.flush()

    stream()
    assert bar.maximum() > 0
    assert bar.value() == bar.maximum()
    bar.setValue(0)
    stream()
    assert bar.value() == 0
    view.jump_to_end()
    stream()
    assert bar.value() == bar.maximum()


def test_an_error_stands_where_the_answer_would_be(
    view: ConversationView, conversation: Conversation, session: Session, recorder: Recorder
) -> None:
    request_id = _ask(conversation, recorder)
    _say(session, request_id, "half an answer")
    session.hear(
        [
            api.CallFailed(request_id=request_id, error="WorkerLost", message="local-1/cpu lost"),
            api.PlanLost(message="local-1/cpu lost"),
        ]
    )
    view.show_all()
    text = view.toPlainText()
    assert "half an answer" in text
    assert "local-1/cpu lost" in text
    assert "Load again" in text


def test_links_copy_what_they_name(
    view: ConversationView, conversation: Conversation, session: Session, recorder: Recorder
) -> None:
    request_id = _ask(conversation, recorder)
    session.hear([finished(request_id, "Say:\n\n```py\nprint(1)\n```\n", home_plan())])
    clipboard = QGuiApplication.clipboard()
    view.anchorClicked.emit(QUrl("copy-message:1"))
    assert clipboard.text().startswith("Say:")
    view.anchorClicked.emit(QUrl("copy-code:0"))
    assert clipboard.text() == "print(1)"


def test_only_the_newest_answer_offers_to_be_made_again(
    view: ConversationView, conversation: Conversation, session: Session, recorder: Recorder
) -> None:
    for text in ("one", "two"):
        request_id = _ask(conversation, recorder, text)
        session.hear([finished(request_id, f"answer {text}", home_plan())])
    assert view.toPlainText().count("Regenerate") == 1
    assert view.toPlainText().count("Copy") == 2


def test_a_model_cannot_put_markup_or_pictures_into_the_window(
    view: ConversationView, conversation: Conversation, session: Session, recorder: Recorder
) -> None:
    request_id = _ask(conversation, recorder)
    evil = "<img src='http://x/y.png'><script>1</script> ![p](http://x/z.png)\n"
    session.hear([finished(request_id, evil, home_plan())])
    assert "<img src=" in view.toPlainText()
    assert "[image: p]" in view.toPlainText()
    cursor = QTextCursor(view.document())
    while not cursor.atEnd():
        cursor.movePosition(QTextCursor.MoveOperation.NextCharacter)
        assert not cursor.charFormat().isImageFormat()
