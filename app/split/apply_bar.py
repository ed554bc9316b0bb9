"""The bar under the split: what would change, Revert, Apply, and the progress of applying."""

from __future__ import annotations

from PySide6.QtWidgets import QFrame, QHBoxLayout, QLabel, QProgressBar, QVBoxLayout, QWidget

from app.figures import figure_bytes, plural
from app.progress import bar_range
from app.session import Session
from app.split.presenter import SplitPresenter
from app.widgets.making import keep_width, make_button, make_label
from engine.host.messages import Progress

MAX_LISTED = 3


class DeviceProgress(QWidget):
    """How far one device is."""

    def __init__(self) -> None:
        """Not begun."""
        super().__init__()
        self._label = make_label("", "applyDevice", "small")
        self._bar = QProgressBar()
        self._bar.setTextVisible(False)
        self._bar.setAccessibleName("Progress of one device")
        layout = QVBoxLayout(self)
        layout.setContentsMargins(0, 0, 0, 0)
        layout.setSpacing(3)
        layout.addWidget(self._label)
        layout.addWidget(self._bar)

    def show_progress(self, name: str, progress: Progress) -> None:
        """Bytes of weights, or that its process starts."""
        if progress.phase == "weights":
            amount = f"{figure_bytes(progress.done)} of {figure_bytes(progress.total)}"
            self._label.setText(f"{name}  {amount}")
        else:
            words = "Connecting" if progress.phase == "connect" else "Starting processes"
            self._label.setText(f"{words}  {progress.done} of {progress.total}")
        end, value = bar_range(progress)
        self._bar.setRange(0, end)
        self._bar.setValue(value)


class ApplyBar(QFrame):
    """Visible only when there is a draft, an Apply under way, or nothing runs."""

    def __init__(
        self, presenter: SplitPresenter, session: Session, parent: QWidget | None = None
    ) -> None:
        """Follows presenter and session."""
        super().__init__(parent)
        self.setObjectName("applyBar")
        self.setProperty("bar", True)
        self._presenter = presenter
        self._session = session
        self._title = make_label("", "applyTitle")
        self._list: QLabel = make_label("", "applyList", "small", wraps=True)
        self._trouble = make_label("", "applyTrouble", "bad", wraps=True)
        self.revert_button = make_button("Revert", "revertButton", "Back to the running split")
        self.apply_button = make_button(
            "Apply", "applyButton", "Put the draft in force (Ctrl+Return)", kind="primary"
        )
        self._devices: list[DeviceProgress] = []
        # A widget around, because an empty layout would bound the width of the texts.
        self._progress_box = QWidget()
        self._progress = QHBoxLayout(self._progress_box)
        self._progress.setContentsMargins(0, 0, 0, 0)
        self._progress.setSpacing(16)
        texts = QVBoxLayout()
        texts.setSpacing(3)
        texts.addWidget(self._title)
        texts.addWidget(self._list)
        texts.addWidget(self._trouble)
        texts.addWidget(self._progress_box)
        layout = QHBoxLayout(self)
        layout.setContentsMargins(12, 8, 10, 8)
        layout.setSpacing(8)
        layout.addLayout(texts, 1)
        layout.addWidget(self.revert_button)
        layout.addWidget(self.apply_button)
        keep_width(self.revert_button, self.apply_button)
        self._trouble.hide()
        self.revert_button.clicked.connect(presenter.revert)
        self.apply_button.clicked.connect(self._on_apply_clicked)
        presenter.draft_changed.connect(self._on_draft_changed)
        session.stage_changed.connect(self.refresh)
        session.progress_changed.connect(self.refresh)
        session.call_failed.connect(self._on_call_failed)
        self.refresh()

    def refresh(self) -> None:
        """Show what there is to apply, or how far applying is."""
        presenter, session = self._presenter, self._session
        is_applying = session.is_applying
        changes = presenter.changes()
        trouble = session.trouble
        self.setVisible(presenter.draft is not None and (is_applying or bool(changes)))
        self._show_progress()
        self.revert_button.setVisible(not is_applying and presenter.running is not None)
        self.apply_button.setEnabled(presenter.can_apply)
        interruption = session.in_force.interruption
        if interruption is not None:
            self._title.setText("Working around a lost device")
            self._list.setText(interruption.message)
        elif is_applying:
            self._title.setText("Applying the split")
            self._list.setText("")
        elif presenter.running is None:
            self._title.setText("No split is running")
            self._list.setText("" if trouble is None else trouble.message)
        else:
            self._title.setText(plural(len(changes), "change"))
            texts = [str(change) for change in changes[:MAX_LISTED]]
            if len(changes) > MAX_LISTED:
                texts.append(f"and {len(changes) - MAX_LISTED} more")
            self._list.setText("   ·   ".join(texts))
            self._list.setToolTip("\n".join(str(change) for change in changes))
        self._list.setVisible(bool(self._list.text()))

    def _show_progress(self) -> None:
        is_applying = self._session.is_applying
        progress = list(self._session.progress.items()) if is_applying else []
        while len(self._devices) > len(progress):
            line = self._devices.pop()
            self._progress.removeWidget(line)
            line.hide()
            line.deleteLater()
        while len(self._devices) < len(progress):
            line = DeviceProgress()
            self._devices.append(line)
            self._progress.addWidget(line)
        self._progress_box.setVisible(bool(progress))
        for line, (subject, state) in zip(self._devices, progress, strict=True):
            line.show_progress(self._session.device_label(subject), state)

    def _on_draft_changed(self) -> None:
        self._trouble.hide()
        self.refresh()

    def _on_apply_clicked(self) -> None:
        self._trouble.hide()
        self._presenter.apply()

    def _on_call_failed(self, message: str) -> None:
        self._trouble.setText(message)
        self._trouble.show()
        self.refresh()
