"""The Split page: devices, presets, canvas, faders, and the bar that puts a draft in force."""

from __future__ import annotations

from PySide6.QtCore import QSize, Qt
from PySide6.QtWidgets import (
    QCheckBox,
    QFrame,
    QHBoxLayout,
    QLineEdit,
    QPushButton,
    QScrollArea,
    QStackedWidget,
    QVBoxLayout,
    QWidget,
)
from superqt import QFlowLayout

from app.look import Look
from app.session import Session
from app.split.apply_bar import ApplyBar
from app.split.canvas import PlanCanvas
from app.split.faders import FaderPanel
from app.split.presenter import SplitPresenter
from app.split.text_panel import TextPanel
from app.widgets.making import make_button, make_label, mark_page, set_property
from app.widgets.swatch import SIDE_PX, swatch_pixmap

FADERS_WIDTH = 320


class SplitPage(QWidget):
    """Who computes which layers, before and after Apply."""

    def __init__(
        self, presenter: SplitPresenter, session: Session, look: Look, parent: QWidget | None = None
    ) -> None:
        """Follows the presenter."""
        super().__init__(parent)
        mark_page(self, "splitPage")
        self._presenter = presenter
        self._session = session
        self._look = look
        self.canvas = PlanCanvas(presenter, session, look)
        self.faders = FaderPanel(presenter, session, look)
        self.text_panel = TextPanel(presenter)
        self.apply_bar = ApplyBar(presenter, session)
        self._chips = QFlowLayout()
        self._chip_boxes: dict[str, QCheckBox] = {}
        self._simulate_button = make_button(
            "Simulate two more nodes", "splitSimulateButton", "Start two more nodes here"
        )
        self._unfold_button = make_button(
            "Edit per layer", "unfoldButton", "Show a row for every layer", kind="quiet"
        )
        self._range = QLineEdit()
        self._text_button = make_button(
            "As text",
            "planTextButton",
            "The draft as a plan file, to copy or to paste",
            kind="quiet",
        )
        self._undo_button = make_button("", "undoButton", "Undo (Ctrl+Z)", kind="quiet")
        self._redo_button = make_button("", "redoButton", "Redo (Ctrl+Y)", kind="quiet")
        self._detour = make_label("", "splitDetour", "small", wraps=True)
        self._presets: list[QPushButton] = []
        self._side = QStackedWidget()
        self._build()
        self._connect()
        self._on_theme_changed()
        self._show_chips()
        self._show_detour()

    def show_layers(self) -> None:
        """Unfold the rows of the layers."""
        if not self.canvas.is_unfolded:
            self._unfold_button.setChecked(True)

    def _build(self) -> None:
        head = QHBoxLayout()
        head.setSpacing(6)
        head.addWidget(make_label("Split", "splitTitle", "title"))
        head.addSpacing(8)
        for text, name, tip in (
            ("Even", "presetEven", "Cut every layer evenly between the devices"),
            ("Whole layers", "presetPipeline", "Whole layers on each device, one after another"),
            ("Only this computer", "presetHome", "Everything on this computer"),
        ):
            button = make_button(text, name, tip)
            self._presets.append(button)
            head.addWidget(button)
        head.addStretch(1)
        head.addWidget(self._undo_button)
        head.addWidget(self._redo_button)
        head.addWidget(self._text_button)
        self._chips.setContentsMargins(0, 0, 0, 0)
        self._chips.setHorizontalSpacing(16)
        self._chips.setVerticalSpacing(4)
        chips = QHBoxLayout()
        chips.setSpacing(14)
        label = make_label("Devices", "devicesLabel", "muted")
        chips.addWidget(label, 0, Qt.AlignmentFlag.AlignTop)
        chips.addLayout(self._chips, 1)
        chips.addWidget(self._simulate_button)
        self._range.setObjectName("rangeEdit")
        self._range.setAccessibleName("Select layers by their numbers")
        self._range.setToolTip("Select layers by their numbers, such as 0-9, 12, then Enter")
        self._range.setPlaceholderText("Layers 0-9")
        self._range.setFixedWidth(120)
        self._unfold_button.setCheckable(True)
        self._text_button.setCheckable(True)
        tools = QHBoxLayout()
        tools.addWidget(self._unfold_button)
        tools.addStretch(1)
        tools.addWidget(make_label("Select", "rangeLabel", "muted"))
        tools.addWidget(self._range)
        scroll = QScrollArea()
        scroll.setObjectName("canvasScroll")
        scroll.setWidgetResizable(True)
        scroll.setHorizontalScrollBarPolicy(Qt.ScrollBarPolicy.ScrollBarAlwaysOff)
        scroll.setFocusPolicy(Qt.FocusPolicy.NoFocus)
        inside = QWidget()
        mark_page(inside, "splitPageScrolled")
        inside_layout = QVBoxLayout(inside)
        inside_layout.setContentsMargins(0, 0, 0, 0)
        inside_layout.addWidget(self.canvas)
        inside_layout.addStretch(1)
        scroll.setWidget(inside)
        left = QVBoxLayout()
        left.setSpacing(8)
        left.addLayout(tools)
        left.addWidget(scroll, 1)
        left.addWidget(
            make_label(
                "↑↓ choose a layer · Shift extends · ←→ choose a divider · [ ] move it · "
                "Ctrl+Z undo",
                "splitKeys",
                "small",
                wraps=True,
            )
        )
        fader_scroll = QScrollArea()
        fader_scroll.setObjectName("faderScroll")
        fader_scroll.setWidgetResizable(True)
        fader_scroll.setHorizontalScrollBarPolicy(Qt.ScrollBarPolicy.ScrollBarAlwaysOff)
        mark_page(self.faders, "faderPanel")
        fader_scroll.setWidget(self.faders)
        self._side.addWidget(fader_scroll)
        self._side.addWidget(self.text_panel)
        self._side.setFixedWidth(FADERS_WIDTH)
        line = QFrame()
        line.setFixedWidth(1)
        line.setProperty("bar", True)
        middle = QHBoxLayout()
        middle.setSpacing(14)
        middle.addLayout(left, 1)
        middle.addWidget(line)
        middle.addWidget(self._side)
        layout = QVBoxLayout(self)
        layout.setContentsMargins(20, 14, 20, 12)
        layout.setSpacing(10)
        layout.addLayout(head)
        layout.addWidget(self._detour)
        layout.addLayout(chips)
        layout.addLayout(middle, 1)
        layout.addWidget(self.apply_bar)

    def _connect(self) -> None:
        presenter = self._presenter
        even, pipeline, home = self._presets
        even.clicked.connect(presenter.use_even)
        pipeline.clicked.connect(presenter.use_pipeline)
        home.clicked.connect(presenter.use_home)
        stack = presenter.undo_stack
        self._undo_button.clicked.connect(stack.undo)
        self._redo_button.clicked.connect(stack.redo)
        stack.canUndoChanged.connect(self._undo_button.setEnabled)
        stack.canRedoChanged.connect(self._redo_button.setEnabled)
        self._undo_button.setEnabled(stack.canUndo())
        self._redo_button.setEnabled(stack.canRedo())
        self._unfold_button.toggled.connect(self._on_unfold_toggled)
        self._text_button.toggled.connect(self._on_text_toggled)
        self._range.returnPressed.connect(self._on_range_entered)
        self._range.textEdited.connect(self._on_range_edited)
        self._simulate_button.clicked.connect(self._on_simulate_clicked)
        presenter.devices_changed.connect(self._show_chips)
        presenter.draft_changed.connect(self._show_chips)
        self._session.plan_changed.connect(self._show_detour)
        self._look.theme_changed.connect(self._on_theme_changed)

    def _show_detour(self) -> None:
        """Why the running split is not the one that was applied."""
        detour = self._session.in_force.detour
        self._detour.setVisible(detour is not None)
        if detour is not None:
            words = f"{detour.words[:1].upper()}{detour.words[1:]}"
            self._detour.setText(f"{words}. {detour.note}")

    def _show_chips(self) -> None:
        """One check box per device that takes part or may."""
        known = self._presenter.known_devices()
        draft = self._presenter.draft
        for device in list(self._chip_boxes):
            if device not in known:
                box = self._chip_boxes.pop(device)
                self._chips.removeWidget(box)
                box.deleteLater()
        for place, device in enumerate(known):
            box = self._chip_boxes.get(device)
            if box is None:
                box = QCheckBox()
                box.setIconSize(QSize(SIDE_PX, SIDE_PX))
                box.setObjectName(f"takesPart {device}")
                box.setToolTip("Whether this device takes part in the draft")
                box.clicked.connect(self._on_chip_clicked)
                self._chip_boxes[device] = box
            if self._chips.indexOf(box) != place:
                # A flow has no way to insert: this one and those behind it go to the end in turn.
                self._chips.removeWidget(box)
                self._chips.addWidget(box)
            label = self._session.device_label(device)
            state = self._session.device_state(device)
            box.setText(label if self._presenter.is_available(device) else f"{label} ({state})")
            box.setAccessibleName(f"{label} takes part")
            index = self._session.device_index(device)
            box.setIcon(swatch_pixmap(self._look.theme, index, 2.0))
            takes_part = draft is not None and device in draft.devices
            box.setChecked(takes_part)
            box.setEnabled(draft is not None and not (takes_part and len(draft.devices) == 1))
        self._simulate_button.setVisible(len(known) <= 1)
        for button in self._presets:
            button.setEnabled(draft is not None)

    def _on_chip_clicked(self) -> None:
        for device, box in self._chip_boxes.items():
            self._presenter.set_taking_part(device, box.isChecked())

    def _on_simulate_clicked(self) -> None:
        self._session.add_simulated_nodes(self._session.num_simulated_nodes + 2)

    def _on_unfold_toggled(self, is_unfolded: bool) -> None:
        self.canvas.set_unfolded(is_unfolded)
        self._unfold_button.setIcon(self._look.icon("collapse" if is_unfolded else "expand"))

    def _on_text_toggled(self, is_open: bool) -> None:
        if is_open:
            self.text_panel.refresh()
        self._side.setCurrentIndex(int(is_open))

    def _on_range_entered(self) -> None:
        text = self._range.text().lower().removeprefix("layers").removeprefix("layer").strip()
        is_known = self._presenter.select_text(text)
        set_property(self._range, "wrong", not is_known)
        if is_known:
            self.show_layers()

    def _on_range_edited(self) -> None:
        set_property(self._range, "wrong", False)

    def _on_theme_changed(self) -> None:
        self._undo_button.setIcon(self._look.icon("undo"))
        self._redo_button.setIcon(self._look.icon("redo"))
        self._simulate_button.setIcon(self._look.icon("simulated"))
        name = "collapse" if self.canvas.is_unfolded else "expand"
        self._unfold_button.setIcon(self._look.icon(name))
        self._show_chips()
