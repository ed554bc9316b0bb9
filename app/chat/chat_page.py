"""The Chat page: head line, conversation, composer, and what is folded beside it."""

from __future__ import annotations

import time

from PySide6.QtCore import Qt
from PySide6.QtGui import QResizeEvent
from PySide6.QtWidgets import (
    QFrame,
    QHBoxLayout,
    QProgressBar,
    QStackedWidget,
    QVBoxLayout,
    QWidget,
)
from superqt import QElidingLabel

from app.chat.composer import Composer
from app.chat.conversation import Conversation
from app.chat.conversation_view import ConversationView
from app.chat.parameters_panel import ParametersPanel
from app.chat.progress_card import REMEDIES, ProgressCard
from app.cluster.offer_bar import OfferBar
from app.cluster.presenter import ClusterPresenter
from app.figures import figure_count
from app.look import Look
from app.monitor.history import History
from app.monitor.now_panel import PANEL_WIDTH, NowPanel
from app.progress import ProgressText, bar_range, overall
from app.session import Session
from app.stages import Stage
from app.widgets.making import keep_width, make_button, make_card, make_label, mark_page

MIN_TEXT_PX = 600
WIDE_HEAD_PX = 840


class ChatPage(QWidget):
    """Where questions are asked and answers stream."""

    def __init__(
        self,
        session: Session,
        conversation: Conversation,
        history: History,
        cluster: ClusterPresenter,
        look: Look,
        parent: QWidget | None = None,
    ) -> None:
        """Follows the session, the conversation and the nodes on offer."""
        super().__init__(parent)
        mark_page(self, "chatPage")
        self._session = session
        self._conversation = conversation
        self._look = look
        self._wants_parameters = False
        self._apply_text = ProgressText()
        self.view = ConversationView(conversation, session, look)
        self.card = ProgressCard(session)
        self.composer = Composer(look)
        self.now_panel = NowPanel(session, history, look)
        self.parameters = ParametersPanel(conversation.settings)
        self.parameters.setFixedWidth(PANEL_WIDTH + 16)
        self._model_name = QElidingLabel()
        self._model_name.setObjectName("modelName")
        self._model_name.setProperty("role", "title")
        self._model_facts = make_label("", "modelFacts", "small")
        self._context = make_label("", "contextText", "small")
        self._context_bar = QProgressBar()
        self._parameters_button = make_button(
            "Parameters", "parametersButton", "Temperature, system prompt and so on", kind="quiet"
        )
        self._new_button = make_button(
            "New chat", "newChatButton", "Begin a new conversation (Ctrl+N)", kind="quiet"
        )
        self._banner = make_card("chatBanner", "trouble")
        self._banner_text = make_label("", "chatBannerText", wraps=True)
        self._banner_button = make_button(
            "", "chatBannerButton", "Put the split in force again", kind="primary"
        )
        self._strip = make_card("applyStrip", "bar")
        self._strip_text = make_label("", "applyStripText", "small")
        self._strip_bar = QProgressBar()
        self._offer = OfferBar(cluster, "chat")
        self._stack = QStackedWidget()
        self._build()
        self._connect()
        self._on_theme_changed()
        self.refresh()

    def refresh(self) -> None:
        """Follow the session's state."""
        session, conversation = self._session, self._conversation
        model = session.model
        self._model_name.setText(model.name if model is not None else "No model yet")
        if model is not None:
            self._model_facts.setText(f"{model.config.num_layers} layers · {model.dtype}")
            self._model_facts.setToolTip(model.warning or model.path)
        self._stack.setCurrentWidget(self.view if conversation.messages else self.card)
        self.composer.set_state(
            can_send=conversation.can_send,
            is_answering=conversation.is_answering,
            hint=self._hint(),
        )
        self._new_button.setEnabled(bool(conversation.messages))
        self._show_context()
        trouble = session.trouble
        self._banner.setVisible(trouble is not None and bool(conversation.messages))
        if trouble is not None:
            # What an answer says already is not said twice.
            is_told = bool(conversation.messages) and (
                conversation.messages[-1].error == trouble.message
            )
            text = trouble.title if is_told else f"{trouble.title}. {trouble.message}"
            self._banner_text.setText(text)
            self._banner_button.setText(REMEDIES[trouble.remedy])
        self._show_strip()

    def tick(self, now: float) -> None:
        """Let the charts move."""
        if self.now_panel.isVisible():
            self.now_panel.refresh(now)

    def toggle_parameters(self) -> None:
        """Fold the parameters out or in."""
        self._wants_parameters = not self._wants_parameters
        self._parameters_button.setChecked(self._wants_parameters)
        self._arrange()

    def _build(self) -> None:
        self._context_bar.setObjectName("contextBar")
        self._context_bar.setAccessibleName("Context used")
        self._context_bar.setTextVisible(False)
        self._context_bar.setFixedWidth(72)
        self._parameters_button.setCheckable(True)
        self._strip_bar.setObjectName("applyStripBar")
        self._strip_bar.setAccessibleName("Progress of loading")
        self._strip_bar.setTextVisible(False)
        head = QHBoxLayout()
        head.setContentsMargins(20, 10, 12, 6)
        head.setSpacing(10)
        head.addWidget(self._model_name, 1)
        head.addWidget(self._model_facts)
        head.addWidget(self._context)
        head.addWidget(self._context_bar)
        head.addWidget(self._parameters_button)
        head.addWidget(self._new_button)
        line = QFrame()
        line.setFrameShape(QFrame.Shape.HLine)
        line.setFixedHeight(1)
        line.setProperty("bar", True)
        self._stack.addWidget(self.card)
        self._stack.addWidget(self.view)
        keep_width(self._banner_button)
        banner = QHBoxLayout(self._banner)
        banner.setContentsMargins(12, 8, 8, 8)
        banner.addWidget(self._banner_text, 1)
        banner.addWidget(self._banner_button)
        strip = QHBoxLayout(self._strip)
        strip.setContentsMargins(12, 6, 12, 6)
        strip.addWidget(self._strip_text)
        strip.addWidget(self._strip_bar, 1)
        below = QVBoxLayout()
        below.setContentsMargins(16, 8, 16, 6)
        below.setSpacing(6)
        below.addWidget(self._banner)
        below.addWidget(self._strip)
        below.addWidget(self._offer)
        below.addWidget(self.composer)
        hint = make_label("Enter sends · Shift+Enter new line · Esc stops", "composerHint", "small")
        hint.setAlignment(Qt.AlignmentFlag.AlignHCenter)
        below.addWidget(hint)
        middle = QVBoxLayout()
        middle.setSpacing(0)
        middle.addLayout(head)
        middle.addWidget(line)
        middle.addWidget(self._stack, 1)
        middle.addLayout(below)
        layout = QHBoxLayout(self)
        layout.setContentsMargins(0, 0, 0, 0)
        layout.setSpacing(0)
        layout.addLayout(middle, 1)
        layout.addWidget(self.parameters)
        layout.addWidget(self.now_panel)
        self.parameters.hide()

    def _connect(self) -> None:
        session, conversation = self._session, self._conversation
        session.stage_changed.connect(self.refresh)
        session.model_changed.connect(self.refresh)
        session.progress_changed.connect(self._show_strip)
        conversation.state_changed.connect(self.refresh)
        conversation.was_reset.connect(self.refresh)
        conversation.message_changed.connect(self._show_strip)
        conversation.text_added.connect(self._on_text_added)
        conversation.message_added.connect(self.refresh)
        self.composer.sent.connect(self._on_sent)
        self.composer.stopped.connect(conversation.stop)
        self.card.suggestion_chosen.connect(self._on_sent)
        self.view.load_again_clicked.connect(session.load_again)
        self.view.regenerate_clicked.connect(conversation.regenerate)
        self.parameters.settings_changed.connect(self._on_settings_changed)
        self._parameters_button.clicked.connect(self.toggle_parameters)
        self._new_button.clicked.connect(conversation.new_chat)
        self._banner_button.clicked.connect(session.mend)
        self._look.theme_changed.connect(self._on_theme_changed)

    def _hint(self) -> str:
        if self._conversation.is_answering:
            return "Write the next question meanwhile"
        if self._session.is_ready:
            return "Ask something"
        if self._session.trouble is not None:
            return "Nobody can answer now"
        return "You can write already; it can be sent when the model is loaded"

    def _show_context(self) -> None:
        model, used = self._session.model, self._conversation.used_tokens
        window = None if model is None else model.kv_window
        self._context.setText(f"context {figure_count(used)} of {figure_count(window)}")
        self._context.setToolTip(
            "Tokens of the conversation, as the engine counted them with the last answer, "
            "and the room there is"
        )
        self._context_bar.setRange(0, window or 1)
        self._context_bar.setValue(min(used or 0, window or 1))

    def _show_strip(self) -> None:
        session = self._session
        is_moving = session.stage in (Stage.LOADING, Stage.OPENING, Stage.RECOVERING)
        progress = overall(session.progress) if is_moving else self._conversation.reading
        is_wanted = is_moving or progress is not None
        self._strip.setVisible(is_wanted and bool(self._conversation.messages))
        end, value = bar_range(progress)
        self._strip_bar.setRange(0, end)
        self._strip_bar.setValue(value)
        if progress is None:
            is_mending = session.stage is Stage.RECOVERING
            text = "Working around a lost device" if is_mending else "Applying the split"
            self._strip_text.setText(text)
        else:
            self._strip_text.setText(self._apply_text.describe(progress, time.monotonic()))

    def _on_text_added(self) -> None:
        if self._strip.isVisible():
            self._show_strip()

    def _on_sent(self, text: str) -> None:
        if self._conversation.send(text):
            self.composer.edit.setFocus()

    def _on_settings_changed(self, settings: object) -> None:
        self._conversation.settings = settings  # type: ignore[assignment]

    def _on_theme_changed(self) -> None:
        self._parameters_button.setIcon(self._look.icon("parameters"))
        self._new_button.setIcon(self._look.icon("new"))

    def _arrange(self) -> None:
        """Beside the conversation there is room for as much as fits."""
        room = self.width() - (self.parameters.width() if self._wants_parameters else 0)
        has_now = room - PANEL_WIDTH >= MIN_TEXT_PX
        room -= PANEL_WIDTH if has_now else 0
        self.parameters.setVisible(self._wants_parameters)
        self.now_panel.setVisible(has_now)
        self._context.setVisible(room >= MIN_TEXT_PX)
        self._context_bar.setVisible(room >= WIDE_HEAD_PX)
        self._model_facts.setVisible(room >= WIDE_HEAD_PX)

    def resizeEvent(self, event: QResizeEvent) -> None:  # noqa: N802
        """Panels collapse where the window is narrow."""
        super().resizeEvent(event)
        self._arrange()
