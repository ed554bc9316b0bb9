"""The draft as a plan file: to read, to copy, to paste one."""

from __future__ import annotations

from PySide6.QtGui import QGuiApplication
from PySide6.QtWidgets import QHBoxLayout, QPlainTextEdit, QVBoxLayout, QWidget

from app.split.presenter import SplitPresenter
from app.theme import monospace_font
from app.widgets.making import make_button, make_label
from engine.errors import PlanError


class TextPanel(QWidget):
    """A text field with the TOML of the draft."""

    def __init__(self, presenter: SplitPresenter, parent: QWidget | None = None) -> None:
        """Shows the draft whenever that changes."""
        super().__init__(parent)
        self.setObjectName("planTextPanel")
        self._presenter = presenter
        self._edit = QPlainTextEdit()
        self._edit.setObjectName("planText")
        self._edit.setAccessibleName("The draft as a plan file")
        self._edit.setTabChangesFocus(True)
        self._edit.setLineWrapMode(QPlainTextEdit.LineWrapMode.NoWrap)
        self._trouble = make_label("", "planTextTrouble", "bad", wraps=True)
        self._copy_button = make_button("Copy", "copyPlanButton", "Copy the text")
        self._use_button = make_button("Use this text", "usePlanButton", "Make it the draft")
        row = QHBoxLayout()
        row.addWidget(self._copy_button)
        row.addStretch(1)
        row.addWidget(self._use_button)
        layout = QVBoxLayout(self)
        layout.setContentsMargins(0, 0, 0, 0)
        layout.setSpacing(8)
        layout.addWidget(make_label("Plan file", "planTextTitle", "title"))
        layout.addWidget(self._edit, 1)
        layout.addWidget(self._trouble)
        layout.addLayout(row)
        self._trouble.hide()
        self._copy_button.clicked.connect(self._on_copy_clicked)
        self._use_button.clicked.connect(self._on_use_clicked)
        presenter.draft_changed.connect(self._on_draft_changed)

    def refresh(self) -> None:
        """Show the draft."""
        font = monospace_font(self.fontInfo().pixelSize())
        self._edit.setFont(font)
        text = self._presenter.as_text()
        if text != self._edit.toPlainText():
            self._edit.setPlainText(text)
        self._trouble.hide()

    def _on_draft_changed(self) -> None:
        if self.isVisible():
            self.refresh()

    def _on_copy_clicked(self) -> None:
        QGuiApplication.clipboard().setText(self._edit.toPlainText())

    def _on_use_clicked(self) -> None:
        try:
            self._presenter.use_text(self._edit.toPlainText())
        except PlanError as error:
            self._trouble.setText(str(error))
            self._trouble.show()
