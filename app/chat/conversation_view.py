"""Shows a conversation in one text document: a stable beginning and a live tail.

In: the signals of a `Conversation`. Out: what a person reads, and the links they click. Closed
Markdown blocks are written once and never touched again; a flush replaces only the open block and
the line under it, however long the conversation is.
"""

from __future__ import annotations

import time

from PySide6.QtCore import QTimer, QUrl, Signal
from PySide6.QtGui import (
    QAccessible,
    QAccessibleAnnouncementEvent,
    QCursor,
    QGuiApplication,
    QResizeEvent,
    QShowEvent,
    QTextCursor,
)
from PySide6.QtWidgets import QPushButton, QTextBrowser, QToolTip, QWidget

from app.chat.conversation import ChatMessage, Conversation
from app.chat.markdown_blocks import BlockSplitter
from app.chat.markdown_writer import MarkdownWriter, Place
from app.look import Look
from app.session import Session

FLUSH_MS = 33
MAX_FLUSH_MS = 250
HIDDEN_FLUSH_MS = 500
FOLLOW_PX = 24


class ConversationView(QTextBrowser):
    """The messages of one conversation.

    Attributes:
        num_block_writes: closed blocks and tails written so far, for tests of the cost of text.
    """

    load_again_clicked = Signal()
    regenerate_clicked = Signal()

    def __init__(
        self,
        conversation: Conversation,
        session: Session,
        look: Look,
        parent: QWidget | None = None,
    ) -> None:
        """Shows what the conversation holds now."""
        super().__init__(parent)
        self.setObjectName("conversationView")
        self.setAccessibleName("Conversation")
        self.setOpenLinks(False)
        self.setUndoRedoEnabled(False)
        self.document().setDocumentMargin(20)
        self._conversation = conversation
        self._session = session
        self._look = look
        self.num_block_writes = 0
        self._codes: list[str] = []
        self._writer = self._new_writer()
        self._splitter = BlockSplitter()
        self._closed: list[str] = []
        self._tail_place: Place | None = None
        self._written_code: str | None = None
        self._shown = -1
        self._has_text = False
        self._announced_pause = ""
        self._is_following = True
        self._is_scrolling_itself = False
        self._flush_timer = QTimer(self)
        self._flush_timer.setObjectName("flushTimer")
        self._flush_timer.setSingleShot(True)
        self._flush_timer.timeout.connect(self._on_flush_due)
        self._flush_ms = FLUSH_MS
        self._jump_button = QPushButton("Jump to end", self)
        self._jump_button.setObjectName("jumpButton")
        self._jump_button.setAccessibleName("Jump to the end of the conversation")
        self._jump_button.clicked.connect(self.jump_to_end)
        self._jump_button.hide()
        self.anchorClicked.connect(self._on_anchor_clicked)
        bar = self.verticalScrollBar()
        bar.valueChanged.connect(self._on_scrolled)
        bar.rangeChanged.connect(self._on_range_changed)
        conversation.was_reset.connect(self.show_all)
        conversation.message_added.connect(self._on_message_added)
        conversation.text_added.connect(self._on_text_added)
        conversation.message_changed.connect(self._on_message_changed)
        look.theme_changed.connect(self.show_all)
        self.show_all()

    # ---- what is shown -----------------------------------------------------------------------

    def show_all(self) -> None:
        """Write the whole conversation anew, as after a change of theme."""
        self._flush_timer.stop()
        self.clear()
        self.num_block_writes = 0
        self._codes = []
        self._writer = self._new_writer()
        self._tail_place = None
        self._shown = -1
        for index in range(len(self._conversation.messages)):
            self._begin_message(index)
        self._place_jump_button()

    def jump_to_end(self) -> None:
        """Show the newest text, and follow it from now on."""
        self._is_following = True
        self._scroll_to_end()
        self._jump_button.hide()

    def flush(self) -> None:
        """Show the text that has arrived since the last flush."""
        self._flush_timer.stop()
        if self._tail_place is None:
            return
        started = time.perf_counter()
        cursor = self._writer_cursor
        cursor.beginEditBlock()
        self._write_tail()
        cursor.endEditBlock()
        self._follow()
        spent_ms = 1000 * (time.perf_counter() - started)
        self._flush_ms = int(min(max(FLUSH_MS, 2 * spent_ms), MAX_FLUSH_MS))

    def _new_writer(self) -> MarkdownWriter:
        self._writer_cursor = QTextCursor(self.document())
        return MarkdownWriter(self._writer_cursor, self._look.theme)

    def _begin_message(self, index: int) -> None:
        """Write a message at the end; an open answer keeps its tail open."""
        self._settle_previous()
        message = self._conversation.messages[index]
        self._shown = index
        cursor = self._writer_cursor
        cursor.beginEditBlock()
        if message.role == "user":
            self._write_question(message)
            self._tail_place = None
        else:
            self._writer.start_block(top=14, bottom=2)
            self._writer.insert("Answer", self._writer.text_format("text_muted", step=-1))
            self._splitter = BlockSplitter()
            self._tail_place = self._writer.place()
            self._written_code = None
            self._has_text = bool(message.text)
            self._closed = self._splitter.feed(message.text)
            self._write_tail()
        cursor.endEditBlock()
        self._follow()

    def _settle_previous(self) -> None:
        """Give the message before its last form; it is not rewritten after that."""
        if self._tail_place is not None:
            self._write_tail(is_latest=False)
            self._tail_place = None

    def _write_question(self, message: ChatMessage) -> None:
        writer = self._writer
        role = "text_muted" if message.is_left_out else "text"
        writer.start_box(top=18 if self._shown else 0, bottom=12)
        left_out = " · no longer in the context" if message.is_left_out else ""
        writer.insert(f"You{left_out}\n", writer.text_format("text_muted", step=-1))
        writer.insert(message.text, writer.text_format(role))
        writer.end_box()

    def _write_closed(self) -> None:
        """Write the blocks that cannot change any more in the place of the tail."""
        if not self._closed or self._tail_place is None:
            return
        self._writer.rewind(self._tail_place)
        for source in self._closed:
            self._write_block(source)
        self._announce("".join(self._closed))
        self._closed = []
        self._tail_place = self._writer.place()
        self._written_code = None

    def _announce(self, text: str) -> None:
        """Tell a screen reader what was finished, block by block."""
        if QAccessible.isActive():
            QAccessible.updateAccessibility(QAccessibleAnnouncementEvent(self, text))

    def _write_block(self, source: str) -> None:
        self.num_block_writes += 1
        address = None
        if "```" in source or "~~~" in source:
            self._codes.append(source)
            address = f"copy-code:{len(self._codes) - 1}"
        self._writer.write(source, address)

    def _write_tail(self, is_latest: bool = True) -> None:
        """Replace the open block and the line of facts under it."""
        assert self._tail_place is not None, "there is an open message"
        message = self._conversation.messages[self._shown]
        writer = self._writer
        if not message.is_open:
            self._closed += self._splitter.finish()
        self._write_closed()
        # Under code that is still open there is no room for a word about a pause.
        is_flowing = message.is_open and message.pause is None
        code = self._splitter.open_code if is_flowing else None
        if code is not None:
            self._write_open_code(code.language, code.text)
            return
        writer.rewind(self._tail_place)
        self._written_code = None
        if self._splitter.tail.strip():
            self.num_block_writes += 1
            writer.write(self._splitter.tail)
        self._write_facts(message, is_latest)

    def _write_open_code(self, language: str, text: str) -> None:
        """Plain code, to which only the new characters are added."""
        assert self._tail_place is not None, "there is an open message"
        if self._written_code is None or not text.startswith(self._written_code):
            self._writer.rewind(self._tail_place)
            self.num_block_writes += 1
            self._writer.start_code(language, None)
            self._written_code = ""
        self._writer.append_code(text[len(self._written_code) :])
        self._written_code = text

    def _write_facts(self, message: ChatMessage, is_latest: bool) -> None:
        writer = self._writer
        small = writer.text_format("text_muted", step=-1)
        pause = self._conversation.pause_text(message)
        if pause:
            writer.start_block(top=8, bottom=2)
            writer.insert("Paused. ", writer.text_format("warning", bold=True))
            writer.insert(pause, writer.text_format("text_muted"))
        if message.error:
            writer.start_block(top=8, bottom=2)
            writer.insert("The answer ended early. ", writer.text_format("bad", bold=True))
            writer.insert(message.error, writer.text_format())
            if is_latest:
                writer.start_block(top=2, bottom=2)
                if self._session.plan is None:
                    writer.insert_link("Load again", "action:load-again")
                    writer.insert("   ", small)
                writer.insert_link("Ask again", "action:regenerate")
        for note in message.notes:
            writer.start_block(top=4, bottom=0)
            writer.insert(note, small)
        facts = self._conversation.facts(message)
        if facts:
            writer.start_block(top=4, bottom=0)
            writer.insert(facts, small)
            if not message.is_open:
                writer.insert("   ", small)
                writer.insert_link("Copy", f"copy-message:{self._shown}", step=-1)
                if is_latest and not message.error:
                    writer.insert("   ", small)
                    writer.insert_link("Regenerate", "action:regenerate", step=-1)
        if message.shares:
            writer.start_block(top=0, bottom=4)
            for share in message.shares:
                index = self._session.device_index(share.device)
                writer.insert_swatch(self._look.theme.device_fill(index))
                writer.insert(f"{share.label} {100 * share.fraction:.0f} %    ", small)

    # ---- signals -----------------------------------------------------------------------------

    def _on_message_added(self, index: int) -> None:
        self._is_following = True
        self._begin_message(index)

    def _on_text_added(self, index: int, text: str) -> None:
        if index != self._shown or self._tail_place is None:
            return
        is_first = not self._has_text
        self._has_text = True
        self._closed += self._splitter.feed(text)
        if is_first:
            self.flush()
        else:
            self._flush_soon()

    def _on_message_changed(self, index: int) -> None:
        message = self._conversation.messages[index]
        pause = message.pause.reason if message.pause is not None else ""
        if pause and pause != self._announced_pause:
            self._announce(self._conversation.pause_text(message))
        self._announced_pause = pause
        if index != self._shown:
            self.show_all()
        elif message.is_open:
            self._flush_soon()
        else:
            self.flush()

    def _flush_soon(self) -> None:
        if not self._flush_timer.isActive():
            self._flush_timer.start(self._flush_ms if self.isVisible() else HIDDEN_FLUSH_MS)

    def _on_flush_due(self) -> None:
        self.flush()

    def _on_anchor_clicked(self, url: QUrl) -> None:
        kind, _, rest = url.toString().partition(":")
        match kind, rest:
            case "copy-message", index:
                self._copy(self._conversation.messages[int(index)].text)
            case "copy-code", index:
                self._copy(code_of(self._codes[int(index)]))
            case "action", "load-again":
                self.load_again_clicked.emit()
            case "action", "regenerate":
                self.regenerate_clicked.emit()
            case _:
                # A link from a model is copied, never followed.
                self._copy(url.toString())

    def _copy(self, text: str) -> None:
        QGuiApplication.clipboard().setText(text)
        QToolTip.showText(QCursor.pos(), "Copied", self)

    # ---- scrolling ---------------------------------------------------------------------------

    def _follow(self) -> None:
        if self._is_following:
            self._scroll_to_end()

    def _scroll_to_end(self) -> None:
        bar = self.verticalScrollBar()
        self._is_scrolling_itself = True
        bar.setValue(bar.maximum())
        self._is_scrolling_itself = False

    def _on_scrolled(self, value: int) -> None:
        if self._is_scrolling_itself:
            return
        self._is_following = value >= self.verticalScrollBar().maximum() - FOLLOW_PX
        self._jump_button.setVisible(not self._is_following)

    def _on_range_changed(self) -> None:
        self._follow()
        self._place_jump_button()

    def _place_jump_button(self) -> None:
        size = self._jump_button.sizeHint()
        viewport = self.viewport().geometry()
        self._jump_button.setGeometry(
            viewport.center().x() - size.width() // 2,
            viewport.bottom() - size.height() - 8,
            size.width(),
            size.height(),
        )

    # Qt's own names.
    def resizeEvent(self, event: QResizeEvent) -> None:  # noqa: N802
        """Keep the button and the newest text in place."""
        super().resizeEvent(event)
        self._place_jump_button()
        self._follow()

    def showEvent(self, event: QShowEvent) -> None:  # noqa: N802
        """Show what arrived while the page was hidden."""
        super().showEvent(event)
        self.flush()


def code_of(source: str) -> str:
    """The code inside the first fence of a Markdown source."""
    lines = source.strip("\n").split("\n")
    start = next((i for i, line in enumerate(lines) if line.lstrip()[:3] in ("```", "~~~")), -1)
    if start < 0:
        return source
    marks = lines[start].lstrip()[:3]
    body: list[str] = []
    for line in lines[start + 1 :]:
        if line.lstrip().startswith(marks):
            break
        body.append(line)
    return "\n".join(body)
