"""The faders: one line per device that edits the selected rows."""

from __future__ import annotations

from PySide6.QtCore import Qt
from PySide6.QtWidgets import (
    QButtonGroup,
    QDoubleSpinBox,
    QHBoxLayout,
    QSlider,
    QToolButton,
    QVBoxLayout,
    QWidget,
)

from app.figures import figure_percent
from app.look import Look
from app.session import Session
from app.split.draft import Part, ShareFact
from app.split.presenter import SplitPresenter
from app.widgets.making import make_button, make_label, make_tool_button
from app.widgets.swatch import Swatch

TENTHS = 1000


class Fader(QWidget):
    """One device: lock, slider, percentage, and what runs for it."""

    def __init__(self, presenter: SplitPresenter, session: Session, look: Look) -> None:
        """Empty until shown."""
        super().__init__()
        self.device = ""
        self._presenter = presenter
        self._session = session
        self._look = look
        self._is_showing = False
        self._swatch = Swatch(look)
        self._name = make_label("", "faderName")
        self._lock: QToolButton = make_tool_button(look, "unlock", "faderLock", "Keep this share")
        self._lock.setCheckable(True)
        self.slider = QSlider(Qt.Orientation.Horizontal)
        self.slider.setRange(0, TENTHS)
        self.box = QDoubleSpinBox()
        self.box.setRange(0, 100)
        self.box.setDecimals(1)
        self.box.setSuffix(" %")
        self.box.setKeyboardTracking(False)
        self.box.setAlignment(Qt.AlignmentFlag.AlignRight)
        self.box.setFixedWidth(76)
        self._facts = make_label("", "faderFacts", "small", wraps=True)
        head = QHBoxLayout()
        head.setSpacing(6)
        head.addWidget(self._swatch)
        head.addWidget(self._name, 1)
        head.addWidget(self._lock)
        row = QHBoxLayout()
        row.setSpacing(8)
        row.addWidget(self.slider, 1)
        row.addWidget(self.box)
        layout = QVBoxLayout(self)
        layout.setContentsMargins(0, 4, 0, 6)
        layout.setSpacing(4)
        layout.addLayout(head)
        layout.addLayout(row)
        layout.addWidget(self._facts)
        self.slider.sliderPressed.connect(self._presenter.begin_gesture)
        self.slider.sliderReleased.connect(self._presenter.end_gesture)
        self.slider.valueChanged.connect(self._on_slider_changed)
        self.box.valueChanged.connect(self._on_box_changed)
        self._lock.toggled.connect(self._on_lock_toggled)

    def show_device(self, device: str, fact: ShareFact, tenths: int, is_enabled: bool) -> None:
        """Show a device's share of the selection."""
        self._is_showing = True
        self.device = device
        index = self._session.device_index(device)
        name = self._session.device_label(device)
        is_locked = device in self._presenter.locked
        self._swatch.show_device(index)
        state = self._session.device_state(device)
        self._name.setText(name if self._presenter.is_available(device) else f"{name} ({state})")
        self._lock.setChecked(is_locked)
        self._lock.setIcon(self._look.icon("lock" if is_locked else "unlock"))
        self._lock.setAccessibleName(f"Keep the share of {name}")
        fill = self._look.theme.device_fill(index).name()
        sheet = f"QSlider::sub-page:horizontal {{ background: {fill}; }}"
        if self.slider.styleSheet() != sheet:
            self.slider.setStyleSheet(sheet)
        if not self.slider.isSliderDown():
            self.slider.setValue(tenths)
        self.box.setValue(tenths / 10)
        for widget, what in ((self.slider, "fader"), (self.box, "percentage")):
            widget.setObjectName(f"{what} {device}")
            widget.setAccessibleName(f"Share of {name}")
            widget.setEnabled(is_enabled and not is_locked)
        self._facts.setText(self._facts_text(fact, is_enabled))
        self._is_showing = False

    def _facts_text(self, fact: ShareFact, is_enabled: bool) -> str:
        if not is_enabled:
            return "select a row"
        text = fact.quanta
        if fact.is_mixed:
            text = f"{figure_percent(fact.low)} to {figure_percent(fact.high)} · {text}"
        asked = self._presenter.asked
        if asked is not None and asked[0] == self.device and abs(asked[1] - fact.fraction) > 5e-4:
            wanted, runs = figure_percent(asked[1]), figure_percent(fact.fraction)
            text = f"asked {wanted} → runs {runs} ({text})"
        return text

    def _on_slider_changed(self, value: int) -> None:
        if not self._is_showing:
            self._presenter.set_share(self.device, value / TENTHS)

    def _on_box_changed(self, value: float) -> None:
        if not self._is_showing:
            self._presenter.set_share(self.device, value / 100)

    def _on_lock_toggled(self, is_locked: bool) -> None:
        if not self._is_showing:
            self._presenter.set_locked(self.device, is_locked)


class FaderPanel(QWidget):
    """All faders of the draft, over a title that says what they edit."""

    def __init__(
        self, presenter: SplitPresenter, session: Session, look: Look, parent: QWidget | None = None
    ) -> None:
        """Follows the presenter."""
        super().__init__(parent)
        self.setObjectName("faderPanel")
        self._presenter = presenter
        self._session = session
        self._look = look
        self.faders: list[Fader] = []
        self._title = make_label("", "selectionTitle", "title", wraps=True)
        self._sum = make_label("", "selectionSum", "small", wraps=True)
        self._parts = QButtonGroup(self)
        parts = QHBoxLayout()
        parts.setSpacing(4)
        for index, part in enumerate(Part):
            tip = f"Edit {part.value.lower()}" if part is not Part.BOTH else "Edit whole layers"
            button = make_button(part.value, f"part{part.name.title()}", tip, kind="quiet")
            button.setCheckable(True)
            button.setChecked(part is Part.BOTH)
            self._parts.addButton(button, index)
            parts.addWidget(button)
        parts.addStretch(1)
        self._parts.idClicked.connect(self._on_part_clicked)
        self._list = QVBoxLayout()
        self._list.setSpacing(2)
        layout = QVBoxLayout(self)
        layout.setContentsMargins(0, 0, 0, 0)
        layout.setSpacing(8)
        layout.addWidget(self._title)
        layout.addLayout(parts)
        layout.addLayout(self._list)
        layout.addWidget(self._sum)
        layout.addStretch(1)
        presenter.draft_changed.connect(self.refresh)
        presenter.selection_changed.connect(self.refresh)
        session.nodes_changed.connect(self._on_nodes_changed)
        look.theme_changed.connect(self.refresh)
        self._names: list[str] = []
        self.refresh()

    def refresh(self) -> None:
        """Show the selection's shares."""
        facts = self._presenter.facts()
        shape = self._presenter.shape
        while len(self.faders) > len(facts):
            fader = self.faders.pop()
            self._list.removeWidget(fader)
            fader.hide()
            fader.deleteLater()
        while len(self.faders) < len(facts):
            fader = Fader(self._presenter, self._session, self._look)
            self.faders.append(fader)
            self._list.addWidget(fader)
        has_rows = bool(self._presenter.rows)
        for fader, (device, fact, tenths) in zip(self.faders, facts, strict=True):
            fader.show_device(device, fact, tenths, has_rows)
        if shape is None:
            self._title.setText("No model is open")
            self._sum.setText("")
            return
        self._title.setText(self._presenter.selection.describe(shape))
        self._sum.setText(
            "Together always 100 %, in whole heads and blocks of 32 columns."
            if len(facts) > 1
            else "Add a node to share the work."
        )

    def _on_nodes_changed(self) -> None:
        names = [
            f"{device}{self._session.device_label(device)}{self._presenter.is_available(device)}"
            for device, _, _ in self._presenter.facts()
        ]
        if names != self._names:
            self._names = names
            self.refresh()

    def _on_part_clicked(self, index: int) -> None:
        self._presenter.choose_part(list(Part)[index])
