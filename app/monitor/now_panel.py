"""The strip beside the chat: how fast it runs now, and which device does what."""

from __future__ import annotations

from PySide6.QtCore import Qt
from PySide6.QtWidgets import QFrame, QHBoxLayout, QVBoxLayout, QWidget

from app.figures import UNKNOWN, figure, figure_percent
from app.look import Look
from app.monitor.charts import ShareBar, SpeedPlot
from app.monitor.history import History
from app.plan_facts import part_text
from app.session import Session
from app.widgets.making import make_label
from app.widgets.swatch import Swatch

WINDOW_SECONDS = 60.0
PANEL_WIDTH = 264


class DeviceLine(QWidget):
    """One device: its colour and name, its part of the plan, how its time goes."""

    def __init__(self, look: Look, parent: QWidget | None = None) -> None:
        """Empty until shown."""
        super().__init__(parent)
        self.device = ""
        self._swatch = Swatch(look)
        self._name = make_label("", "deviceName")
        self._use = make_label(UNKNOWN, "deviceUse", "small")
        self._part = make_label("", "devicePart", "small", wraps=True)
        self._bar = ShareBar(look)
        top = QHBoxLayout()
        top.setSpacing(6)
        top.addWidget(self._swatch)
        top.addWidget(self._name, 1)
        top.addWidget(self._use)
        layout = QVBoxLayout(self)
        layout.setContentsMargins(0, 4, 0, 4)
        layout.setSpacing(3)
        layout.addLayout(top)
        layout.addWidget(self._bar)
        layout.addWidget(self._part)

    def show_device(self, device: str, index: int, name: str, part: str) -> None:
        """Which device this line is about."""
        self.device = device
        self._swatch.show_device(index)
        self._name.setText(name)
        self._part.setText(part)
        self.setAccessibleName(f"{name}: {part}")

    def show_time(self, index: int, fractions: tuple[float, float, float] | None) -> None:
        """How its time goes: compute, wait, network; None while nothing runs."""
        self._bar.show_time(index, fractions or (0.0, 0.0, 0.0))
        if fractions is None:
            self._use.setText("idle")
            self._use.setToolTip("No step ran in the last seconds")
            return
        compute, wait, network = (figure_percent(round(value, 2)) for value in fractions)
        self._use.setText(f"computes {compute}")
        self._use.setToolTip(
            f"Of the last two seconds: computes {compute}, waits {wait}, network {network}, "
            "as the device measured it"
        )

    def show_gone(self, state: str) -> None:
        """It does nothing, because its node is stale or lost."""
        self._use.setText(state)
        self._use.setToolTip("The Cluster page says why")


class NowPanel(QFrame):
    """Speed and devices, for the eye's corner while chatting."""

    def __init__(
        self, session: Session, history: History, look: Look, parent: QWidget | None = None
    ) -> None:
        """Follows the plan in force; `refresh` follows time."""
        super().__init__(parent)
        self.setObjectName("nowPanel")
        self.setProperty("side", True)
        self._session = session
        self._history = history
        self._look = look
        self._lines: list[DeviceLine] = []
        self._title = make_label("Speed", "nowTitle", "muted")
        self._speed = make_label(UNKNOWN, "nowSpeed", "large")
        self._speed.setToolTip("Generated tokens per second in the last second")
        self._plot = SpeedPlot(history, look, "nowSpeedPlot")
        self._plot.background_role = "window"
        self._plot.colour()
        self._plot.set_window(WINDOW_SECONDS)
        self._plot.setFixedHeight(120)
        self._devices = QVBoxLayout()
        self._devices.setSpacing(2)
        self._legend = make_label(
            "solid computes · light waits · striped network", "timeLegend", "small", wraps=True
        )
        self.setFixedWidth(PANEL_WIDTH)
        layout = QVBoxLayout(self)
        layout.setContentsMargins(12, 12, 12, 12)
        layout.setSpacing(8)
        title = QHBoxLayout()
        title.addWidget(self._title)
        title.addStretch(1)
        title.addWidget(self._speed, 0, Qt.AlignmentFlag.AlignRight)
        layout.addLayout(title)
        layout.addWidget(self._plot)
        layout.addWidget(make_label("Who computes", "nowDevicesTitle", "muted"))
        layout.addLayout(self._devices)
        self._nobody = make_label("No split is loaded.", "nowNobody", "small")
        layout.addWidget(self._nobody)
        layout.addWidget(self._legend)
        layout.addStretch(1)
        session.plan_changed.connect(self._on_plan_changed)
        session.nodes_changed.connect(self._on_plan_changed)
        look.theme_changed.connect(self._on_theme_changed)
        self._on_plan_changed()

    def refresh(self, now: float) -> None:
        """Draw the last minute."""
        self._plot.refresh(now, WINDOW_SECONDS)
        rate = self._history.rate_now(now)
        reading = self._history.prompt_rate_now(now)
        is_reading = rate is None and reading is not None
        self._title.setText("Reads" if is_reading else "Speed")
        self._speed.setText(figure(reading if is_reading else rate, "tok/s"))
        totals = {item.device: item for item in self._history.totals(now)}
        for line in self._lines:
            total = totals.get(line.device)
            fractions = None if total is None else (total.compute, total.wait, total.network)
            line.show_time(self._session.device_index(line.device), fractions)
            state = self._session.device_state(line.device)
            if state in ("stale", "lost"):
                line.show_gone(state)

    def _on_plan_changed(self) -> None:
        plan = self._session.plan
        used = () if plan is None else plan.used_devices()
        while len(self._lines) > len(used):
            line = self._lines.pop()
            self._devices.removeWidget(line)
            line.deleteLater()
        while len(self._lines) < len(used):
            line = DeviceLine(self._look)
            self._lines.append(line)
            self._devices.addWidget(line)
        self._nobody.setVisible(plan is None)
        self._legend.setVisible(plan is not None)
        if plan is None:
            return
        for line, column in zip(self._lines, used, strict=True):
            device = plan.devices[column]
            line.show_device(
                device,
                self._session.device_index(device),
                self._session.device_label(device),
                part_text(plan, column),
            )

    def _on_theme_changed(self) -> None:
        self._on_plan_changed()
