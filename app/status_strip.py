"""The strip that is always at the bottom: plan, speed, first token, context, who waits."""

from __future__ import annotations

from PySide6.QtWidgets import QFrame, QHBoxLayout, QWidget
from superqt import QElidingLabel

from app.chat.conversation import Conversation
from app.figures import figure, figure_count, figure_seconds
from app.look import Look
from app.monitor.charts import Sparkline
from app.monitor.history import History, bottleneck_text
from app.plan_facts import plan_in_words
from app.session import Session
from app.widgets.making import make_label


class StatusStrip(QFrame):
    """The engine in one line."""

    def __init__(
        self,
        session: Session,
        conversation: Conversation,
        history: History,
        look: Look,
        parent: QWidget | None = None,
    ) -> None:
        """Follows everything; `tick` follows time."""
        super().__init__(parent)
        self.setObjectName("statusStrip")
        self._session = session
        self._conversation = conversation
        self._history = history
        self._plan = QElidingLabel()
        self._plan.setObjectName("stripPlan")
        self._waits = QElidingLabel()
        self._waits.setObjectName("stripWaits")
        self._waits.setToolTip("Of the last two seconds of work, as the devices measured them")
        self._speed = make_label("", "stripSpeed")
        self._speed.setToolTip("Now, or of the last answer while nothing runs")
        self._sparkline = Sparkline(history, look)
        self._first = make_label("", "stripFirst")
        self._first.setToolTip("From the last question to the first token of its answer")
        self._context = make_label("", "stripContext")
        self._context.setToolTip("Tokens of the conversation, and the room there is")
        layout = QHBoxLayout(self)
        layout.setContentsMargins(14, 4, 14, 4)
        layout.setSpacing(18)
        layout.addWidget(self._plan, 3)
        layout.addWidget(self._waits, 4)
        for widget in (self._sparkline, self._speed, self._first, self._context):
            layout.addWidget(widget)
        session.plan_changed.connect(self.refresh)
        session.nodes_changed.connect(self.refresh)
        session.stage_changed.connect(self.refresh)
        conversation.state_changed.connect(self.refresh)
        self.refresh()

    def refresh(self) -> None:
        """Show what does not change with time alone."""
        session, conversation = self._session, self._conversation
        text, tip = session.stage.value, "The split in force"
        interruption, detour = session.in_force.interruption, session.in_force.detour
        if interruption is not None:
            tip = interruption.message
            text = f"{tip.rstrip('. ')} · working around it"
        elif session.plan is not None and session.is_ready:
            text = plan_in_words(session.plan, session.device_label)
            if session.is_applying:
                text += " · a new split is loading"
            elif detour is not None:
                text += f" · {detour.words}"
                tip = detour.note
        self._plan.setText(text)
        self._plan.setToolTip(tip)
        self._first.setText(f"first token {figure_seconds(conversation.ttft_s)}")
        window = None if session.model is None else session.model.kv_window
        used = figure_count(conversation.used_tokens)
        self._context.setText(f"context {used} of {figure_count(window)}")

    def tick(self, now: float) -> None:
        """Show the last moment."""
        rate = self._history.rate_now(now)
        if rate is None and not self._conversation.is_answering:
            rate = self._conversation.decode_tps
        self._speed.setText(figure(rate, "tok/s"))
        self._sparkline.refresh(now)
        totals = self._history.totals(now)
        names = {item.device: self._session.device_label(item.device) for item in totals}
        waits = bottleneck_text(totals, names)
        self._waits.setText(waits)
        # While nobody works, the plan has the room.
        self._waits.setVisible(bool(waits))
