"""The field in which a person writes, with its Send and Stop button."""

from __future__ import annotations

from PySide6.QtCore import QSize, Qt, Signal
from PySide6.QtGui import QFocusEvent, QKeyEvent
from PySide6.QtWidgets import QFrame, QHBoxLayout, QPlainTextEdit, QPushButton, QWidget

from app.look import Look
from app.widgets.making import set_property

MAX_LINES = 8


class MessageEdit(QPlainTextEdit):
    """Grows with its text; Enter sends, Shift+Enter begins a new line."""

    submitted = Signal()
    focus_changed = Signal(bool)

    def __init__(self, parent: QWidget | None = None) -> None:
        """An empty field, one line high."""
        super().__init__(parent)
        self.setObjectName("messageEdit")
        self.setAccessibleName("Message")
        self.setAccessibleDescription("Enter sends, Shift and Enter begins a new line")
        self.setTabChangesFocus(True)
        self.setVerticalScrollBarPolicy(Qt.ScrollBarPolicy.ScrollBarAsNeeded)
        self.textChanged.connect(self._on_text_changed)
        self._fit_height()

    def keyPressEvent(self, event: QKeyEvent) -> None:  # noqa: N802
        """Enter without Shift submits."""
        is_enter = event.key() in (Qt.Key.Key_Return, Qt.Key.Key_Enter)
        if is_enter and not event.modifiers() & Qt.KeyboardModifier.ShiftModifier:
            self.submitted.emit()
            return
        super().keyPressEvent(event)

    def focusInEvent(self, event: QFocusEvent) -> None:  # noqa: N802
        """Tell the frame around."""
        super().focusInEvent(event)
        self.focus_changed.emit(True)

    def focusOutEvent(self, event: QFocusEvent) -> None:  # noqa: N802
        """Tell the frame around."""
        super().focusOutEvent(event)
        self.focus_changed.emit(False)

    def _on_text_changed(self) -> None:
        self._fit_height()

    def _fit_height(self) -> None:
        lines = min(max(1, round(self.document().size().height())), MAX_LINES)
        self.setFixedHeight(lines * self.fontMetrics().lineSpacing() + 18)


class Composer(QFrame):
    """The message field and the one button that sends or stops."""

    sent = Signal(str)
    stopped = Signal()

    def __init__(self, look: Look, parent: QWidget | None = None) -> None:
        """Not answering, and not able to send yet."""
        super().__init__(parent)
        self.setObjectName("composer")
        self._look = look
        self._can_send = False
        self._is_answering = False
        self.edit = MessageEdit(self)
        self.button = QPushButton("Send", self)
        self.button.setObjectName("sendButton")
        self.button.setIconSize(QSize(16, 16))
        layout = QHBoxLayout(self)
        layout.setContentsMargins(6, 4, 6, 4)
        layout.addWidget(self.edit, 1)
        layout.addWidget(self.button, 0, Qt.AlignmentFlag.AlignBottom)
        self.edit.submitted.connect(self._on_submitted)
        self.edit.focus_changed.connect(self._on_focus_changed)
        self.button.clicked.connect(self._on_button_clicked)
        look.theme_changed.connect(self._show_state)
        self._show_state()

    def set_state(self, *, can_send: bool, is_answering: bool, hint: str) -> None:
        """Follow the conversation.

        Args:
            hint: what the empty field says.
        """
        self._can_send = can_send
        self._is_answering = is_answering
        if hint != self.edit.placeholderText():
            self.edit.setPlaceholderText(hint)
            self.edit.viewport().update()
        self._show_state()

    def _show_state(self) -> None:
        if self._is_answering:
            text, icon, tip = "Stop", "stop", "Stop the answer (Esc)"
        else:
            text, icon, tip = "Send", "send", "Send the message (Enter)"
        self.button.setText(text)
        self.button.setIcon(self._look.icon(icon, "text" if self._is_answering else "on_accent"))
        self.button.setToolTip(tip)
        self.button.setAccessibleName(tip)
        self.button.setEnabled(self._is_answering or self._can_send)
        set_property(self.button, "primary", not self._is_answering)

    def _on_submitted(self) -> None:
        text = self.edit.toPlainText()
        if self._can_send and text.strip():
            self.edit.clear()
            self.sent.emit(text)

    def _on_button_clicked(self) -> None:
        if self._is_answering:
            self.stopped.emit()
        else:
            self._on_submitted()
            self.edit.setFocus()

    def _on_focus_changed(self, has_focus: bool) -> None:
        set_property(self, "active", has_focus)
