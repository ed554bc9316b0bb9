"""What stands in the place of an empty conversation: where the start is, or what went wrong."""

from __future__ import annotations

import time

from PySide6.QtCore import Qt, Signal
from PySide6.QtWidgets import QHBoxLayout, QProgressBar, QSizePolicy, QVBoxLayout, QWidget

from app.progress import ProgressText, bar_range, overall
from app.session import Session
from app.stages import Stage
from app.widgets.making import make_button, make_label

SUGGESTIONS = (
    "Explain grouped-query attention in three sentences.",
    "Write a haiku about two old laptops working together.",
    "Show a Python function that reverses a list, with an example.",
)
REMEDIES = {
    "load_again": "Load again",
    "open_default": "Open the default model",
    "restart": "Start the engine again",
}


class ProgressCard(QWidget):
    """A calm middle of the page: a title, a line, a bar, at most one button."""

    suggestion_chosen = Signal(str)

    def __init__(self, session: Session, parent: QWidget | None = None) -> None:
        """Follows the session."""
        super().__init__(parent)
        self.setObjectName("progressCard")
        self._session = session
        self._text = ProgressText()
        self._title = make_label("", "progressTitle", "large")
        self._line = make_label("", "progressLine", "muted", wraps=True)
        self._bar = QProgressBar()
        self._bar.setObjectName("startProgress")
        self._bar.setAccessibleName("Progress of the start")
        self._bar.setTextVisible(False)
        self._button = make_button("", "mendButton", "Try to go on", kind="primary")
        self._suggestions = [
            make_button(text, f"suggestion{index}", "Ask this")
            for index, text in enumerate(SUGGESTIONS)
        ]
        self._build()
        self._button.clicked.connect(self._on_button_clicked)
        for button in self._suggestions:
            button.clicked.connect(self._on_suggestion_clicked)
        session.stage_changed.connect(self.refresh)
        session.progress_changed.connect(self.refresh)
        session.model_changed.connect(self.refresh)
        self.refresh()

    def refresh(self) -> None:
        """Show where things are."""
        session = self._session
        trouble = session.trouble
        is_ready = session.is_ready and session.model is not None
        self._button.setVisible(trouble is not None)
        for button in self._suggestions:
            button.setVisible(is_ready)
        self._bar.setVisible(trouble is None and not is_ready)
        if trouble is not None:
            self._title.setText(trouble.title)
            self._line.setText(trouble.message)
            self._button.setText(REMEDIES[trouble.remedy])
            return
        if is_ready and session.model is not None:
            self._title.setText("What would you like to know?")
            self._line.setText(
                f"{session.model.name} is ready. It runs on your own computers only."
            )
            return
        title = _STAGE_TITLES[session.stage]
        self._title.setText(title)
        progress = overall(session.progress)
        end, value = bar_range(progress)
        self._bar.setRange(0, end)
        self._bar.setValue(value)
        interruption = session.in_force.interruption
        if progress is not None:
            text = self._text.describe(progress, time.monotonic())
            # What the title says already is not said twice.
            self._line.setText(text.removeprefix(title).strip())
        elif interruption is not None:
            self._line.setText(interruption.message)
        else:
            self._line.setText(_STAGE_LINES[session.stage])

    def _build(self) -> None:
        self._title.setAlignment(Qt.AlignmentFlag.AlignCenter)
        self._line.setAlignment(Qt.AlignmentFlag.AlignCenter)
        self._bar.setFixedWidth(320)
        layout = QVBoxLayout(self)
        layout.setContentsMargins(24, 24, 24, 24)
        layout.setSpacing(12)
        layout.addStretch(2)
        layout.addWidget(self._title)
        layout.addWidget(self._line)
        row = QHBoxLayout()
        row.addStretch(1)
        row.addWidget(self._bar)
        row.addWidget(self._button)
        row.addStretch(1)
        layout.addLayout(row)
        layout.addSpacing(8)
        for button in self._suggestions:
            button.setSizePolicy(QSizePolicy.Policy.Maximum, QSizePolicy.Policy.Fixed)
            layout.addWidget(button, 0, Qt.AlignmentFlag.AlignHCenter)
        layout.addStretch(3)

    def _on_button_clicked(self) -> None:
        self._session.mend()

    def _on_suggestion_clicked(self) -> None:
        button = self.sender()
        if button in self._suggestions:
            self.suggestion_chosen.emit(SUGGESTIONS[self._suggestions.index(button)])  # type: ignore[arg-type]


_STAGE_TITLES = {
    Stage.STARTING: "Starting",
    Stage.OPENING: "Opening the model",
    Stage.LOADING: "Loading weights",
    Stage.READY: "Ready",
    Stage.RECOVERING: "Working around a lost device",
    Stage.STOPPED: "Stopped",
}
_STAGE_LINES = {
    Stage.STARTING: "The engine starts in a process of its own.",
    Stage.OPENING: "Reading what the file says about the model.",
    Stage.LOADING: "The computing process starts.",
    Stage.READY: "",
    Stage.RECOVERING: "The other devices take over.",
    Stage.STOPPED: "",
}
