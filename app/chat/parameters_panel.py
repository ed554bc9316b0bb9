"""The folded panel with the parameters of the next answer."""

from __future__ import annotations

from PySide6.QtCore import Qt, Signal
from PySide6.QtWidgets import (
    QCheckBox,
    QDoubleSpinBox,
    QFormLayout,
    QFrame,
    QHBoxLayout,
    QPlainTextEdit,
    QSpinBox,
    QVBoxLayout,
    QWidget,
)

from app.chat.conversation import ChatSettings
from app.widgets.making import make_button, make_label

MAX_SEED = 2**31 - 1


class ParametersPanel(QFrame):
    """Edits a `ChatSettings`."""

    settings_changed = Signal(object)

    def __init__(self, settings: ChatSettings, parent: QWidget | None = None) -> None:
        """Shows the given settings."""
        super().__init__(parent)
        self.setObjectName("parametersPanel")
        self.setProperty("side", True)
        self._is_filling = False
        self._temperature = self._decimal("temperature", 0, 2, 0.05, "0 always takes the likeliest")
        self._top_p = self._decimal("topP", 0.01, 1, 0.05, "1 keeps all tokens")
        self._top_k = self._whole("topK", 1000, "all", "How many of the likeliest tokens count")
        self._penalty = self._decimal("repetitionPenalty", 0.5, 2, 0.05, "1 does not penalise")
        self._max_tokens = self._whole(
            "maxTokens", 1_000_000, "until the end", "Longest answer, in tokens"
        )
        self._uses_seed = QCheckBox("Fixed seed")
        self._uses_seed.setObjectName("usesSeed")
        self._uses_seed.setToolTip("The same seed, question and split give the same answer")
        self._seed = self._whole("seed", MAX_SEED, "", "The seed of the random choices")
        self._system_prompt = QPlainTextEdit()
        self._system_prompt.setObjectName("systemPrompt")
        self._system_prompt.setAccessibleName("System prompt")
        self._system_prompt.setPlaceholderText("How the model should behave")
        self._system_prompt.setTabChangesFocus(True)
        self._system_prompt.setFixedHeight(88)
        self._reset_button = make_button("Defaults", "defaultParameters", "Back to the defaults")
        self._build()
        self.show_settings(settings)
        for box in (self._temperature, self._top_p, self._penalty):
            box.valueChanged.connect(self._on_edited)
        for box in (self._top_k, self._max_tokens, self._seed):
            box.valueChanged.connect(self._on_edited)
        self._uses_seed.toggled.connect(self._on_edited)
        self._system_prompt.textChanged.connect(self._on_edited)
        self._reset_button.clicked.connect(self._on_reset_clicked)

    def show_settings(self, settings: ChatSettings) -> None:
        """Fill the fields."""
        self._is_filling = True
        self._temperature.setValue(settings.temperature)
        self._top_p.setValue(settings.top_p)
        self._top_k.setValue(settings.top_k)
        self._penalty.setValue(settings.repetition_penalty)
        self._max_tokens.setValue(settings.max_tokens)
        self._uses_seed.setChecked(settings.seed is not None)
        self._seed.setValue(settings.seed or 0)
        self._seed.setEnabled(settings.seed is not None)
        if self._system_prompt.toPlainText() != settings.system_prompt:
            self._system_prompt.setPlainText(settings.system_prompt)
        self._is_filling = False

    def settings(self) -> ChatSettings:
        """What the fields say."""
        return ChatSettings(
            system_prompt=self._system_prompt.toPlainText(),
            temperature=round(self._temperature.value(), 3),
            top_p=round(self._top_p.value(), 3),
            top_k=self._top_k.value(),
            repetition_penalty=round(self._penalty.value(), 3),
            max_tokens=self._max_tokens.value(),
            seed=self._seed.value() if self._uses_seed.isChecked() else None,
        )

    def _build(self) -> None:
        form = QFormLayout()
        form.setRowWrapPolicy(QFormLayout.RowWrapPolicy.DontWrapRows)
        form.setLabelAlignment(Qt.AlignmentFlag.AlignLeft)
        form.setVerticalSpacing(8)
        form.addRow("Temperature", self._temperature)
        form.addRow("Top-p", self._top_p)
        form.addRow("Top-k", self._top_k)
        form.addRow("Repetition penalty", self._penalty)
        form.addRow("Longest answer", self._max_tokens)
        form.addRow(self._uses_seed, self._seed)
        layout = QVBoxLayout(self)
        layout.setContentsMargins(16, 16, 16, 16)
        layout.setSpacing(8)
        layout.addWidget(make_label("Parameters", "parametersTitle", "title"))
        layout.addWidget(make_label("System prompt", "systemPromptLabel", "muted"))
        layout.addWidget(self._system_prompt)
        layout.addLayout(form)
        buttons = QHBoxLayout()
        buttons.addStretch(1)
        buttons.addWidget(self._reset_button)
        layout.addLayout(buttons)
        layout.addStretch(1)

    def _on_edited(self) -> None:
        self._seed.setEnabled(self._uses_seed.isChecked())
        if not self._is_filling:
            self.settings_changed.emit(self.settings())

    def _on_reset_clicked(self) -> None:
        self.show_settings(ChatSettings())
        self.settings_changed.emit(self.settings())

    @staticmethod
    def _decimal(name: str, low: float, high: float, step: float, tip: str) -> QDoubleSpinBox:
        box = QDoubleSpinBox()
        box.setObjectName(name)
        box.setAccessibleName(tip)
        box.setToolTip(tip)
        box.setRange(low, high)
        box.setSingleStep(step)
        box.setDecimals(2)
        return box

    @staticmethod
    def _whole(name: str, high: int, zero_text: str, tip: str) -> QSpinBox:
        box = QSpinBox()
        box.setObjectName(name)
        box.setAccessibleName(tip)
        box.setToolTip(tip)
        box.setRange(0, high)
        box.setGroupSeparatorShown(True)
        if zero_text:
            box.setSpecialValueText(zero_text)
        return box
