"""The Monitor page: speed over time, and how each device's time went."""

from __future__ import annotations

from PySide6.QtCore import Qt
from PySide6.QtWidgets import (
    QButtonGroup,
    QHBoxLayout,
    QLabel,
    QScrollArea,
    QVBoxLayout,
    QWidget,
)

from app.chat.conversation import Conversation
from app.figures import UNKNOWN, figure, figure_percent, figure_seconds
from app.look import Look
from app.monitor.charts import DevicePlot, SpeedPlot
from app.monitor.history import History, bottleneck_text
from app.session import Session
from app.widgets.making import make_button, make_label, mark_page
from app.widgets.swatch import Swatch

WINDOWS = ((30.0, "30 s"), (120.0, "2 min"), (600.0, "10 min"))


class DeviceRow(QWidget):
    """One device's name, figures and chart."""

    def __init__(
        self, device: str, session: Session, history: History, look: Look, parent: QWidget
    ) -> None:
        """Args: device: such as "local-1/cpu"."""
        super().__init__(parent)
        self.device = device
        self._session = session
        index = session.device_index(device)
        self._name = make_label(session.device_label(device), f"monitorName {device}")
        self._figures = make_label("idle", f"monitorFigures {device}", "small")
        self.plot = DevicePlot(device, history, look, index)
        self.plot.setFixedHeight(92)
        head = QHBoxLayout()
        head.setSpacing(6)
        head.addWidget(Swatch(look, index))
        head.addWidget(self._name)
        head.addStretch(1)
        head.addWidget(self._figures)
        layout = QVBoxLayout(self)
        layout.setContentsMargins(0, 4, 0, 4)
        layout.setSpacing(4)
        layout.addLayout(head)
        layout.addWidget(self.plot)

    def show_time(self, compute: float, wait: float, network: float) -> None:
        """Fractions of the last seconds."""
        values = (figure_percent(round(value, 2)) for value in (compute, wait, network))
        self._figures.setText("computes {} · waits {} · network {}".format(*values))

    def show_idle(self) -> None:
        """Nothing ran."""
        self._figures.setText("idle")
        self._name.setText(self._session.device_label(self.device))


class MonitorPage(QWidget):
    """Live charts of everything that was computed lately."""

    def __init__(
        self,
        session: Session,
        conversation: Conversation,
        history: History,
        look: Look,
        parent: QWidget | None = None,
    ) -> None:
        """Args: history: what the charts draw; `tick` draws it."""
        super().__init__(parent)
        mark_page(self, "monitorPage")
        self.setFocusPolicy(Qt.FocusPolicy.StrongFocus)
        self._session = session
        self._conversation = conversation
        self._history = history
        self._look = look
        self._window = WINDOWS[1][0]
        self._rows: dict[str, DeviceRow] = {}
        self._window_buttons = QButtonGroup(self)
        self.speed_plot = SpeedPlot(history, look, "speedPlot")
        self.speed_plot.show_time_axis()
        self.speed_plot.set_window(self._window)
        self._rate = make_label(UNKNOWN, "monitorRate", "large")
        self._reading = make_label(UNKNOWN, "monitorReading", "large")
        self._first = make_label(UNKNOWN, "monitorFirst", "large")
        self._verdict = make_label("", "monitorVerdict", "muted", wraps=True)
        self._empty = make_label(
            "Nothing has been computed yet. Ask something in the chat, and watch it here.",
            "monitorEmpty",
            "muted",
            wraps=True,
        )
        self._list = QVBoxLayout()
        self._build()

    def tick(self, now: float) -> None:
        """Draw what happened until now; only while visible."""
        if not self.isVisible():
            return
        self.speed_plot.refresh(now, self._window)
        for device in self._history.devices:
            if device not in self._rows:
                self._add_row(device)
        totals = {item.device: item for item in self._history.totals(now)}
        for device, row in self._rows.items():
            row.plot.refresh(now, self._window)
            item = totals.get(device)
            if item is None:
                row.show_idle()
            else:
                row.show_time(item.compute, item.wait, item.network)
        self._rate.setText(figure(self._history.rate_now(now), "tok/s"))
        self._reading.setText(figure(self._history.prompt_rate_now(now), "tok/s"))
        self._first.setText(figure_seconds(self._conversation.ttft_s))
        names = {device: self._session.device_label(device) for device in self._rows}
        self._verdict.setText(bottleneck_text(list(totals.values()), names))
        self._empty.setVisible(not self._rows)

    def choose_window(self, seconds: float) -> None:
        """Look back this long."""
        self._window = seconds
        self.speed_plot.set_window(seconds)
        for row in self._rows.values():
            row.plot.set_window(seconds)

    def _build(self) -> None:
        head = QHBoxLayout()
        head.setSpacing(6)
        head.addWidget(make_label("Monitor", "monitorTitle", "title"))
        head.addStretch(1)
        for index, (seconds, text) in enumerate(WINDOWS):
            button = make_button(text, f"window{text}", f"Show the last {text}", kind="quiet")
            button.setCheckable(True)
            button.setChecked(seconds == self._window)
            self._window_buttons.addButton(button, index)
            head.addWidget(button)
        self._window_buttons.idClicked.connect(self._on_window_clicked)
        figures = QHBoxLayout()
        figures.setSpacing(32)
        for title, label, tip in (
            ("Generates", self._rate, "Generated tokens per second in the last second"),
            ("Reads prompts", self._reading, "Prompt tokens per second in the last second"),
            ("First token after", self._first, "Of the last answer, from question to first token"),
        ):
            figures.addLayout(_figure_box(title, label, tip))
        figures.addWidget(self._verdict, 1, Qt.AlignmentFlag.AlignBottom)
        self.speed_plot.setMinimumHeight(140)
        self.speed_plot.setMaximumHeight(240)
        self._list.setSpacing(4)
        self._list.addWidget(self._empty)
        inside = QWidget()
        mark_page(inside, "monitorPageScrolled")
        inside_layout = QVBoxLayout(inside)
        inside_layout.setContentsMargins(0, 0, 0, 0)
        inside_layout.addLayout(self._list)
        inside_layout.addStretch(1)
        scroll = QScrollArea()
        scroll.setObjectName("monitorScroll")
        scroll.setWidgetResizable(True)
        scroll.setHorizontalScrollBarPolicy(Qt.ScrollBarPolicy.ScrollBarAlwaysOff)
        scroll.setWidget(inside)
        layout = QVBoxLayout(self)
        layout.setContentsMargins(20, 14, 20, 14)
        layout.setSpacing(10)
        layout.addLayout(head)
        layout.addLayout(figures)
        layout.addWidget(self.speed_plot, 2)
        legend = make_label(
            "How each device's time went:  solid computes · light waits for others · "
            "striped network · empty idle",
            "monitorLegend",
            "small",
            wraps=True,
        )
        layout.addWidget(legend)
        layout.addWidget(scroll, 3)

    def _add_row(self, device: str) -> None:
        row = DeviceRow(device, self._session, self._history, self._look, self)
        row.plot.set_window(self._window)
        self._rows[device] = row
        order = sorted(self._rows, key=self._session.device_index)
        # The label for the empty page comes first.
        self._list.insertWidget(1 + order.index(device), row)

    def _on_window_clicked(self, index: int) -> None:
        self.choose_window(WINDOWS[index][0])


def _figure_box(title: str, label: QLabel, tip: str) -> QVBoxLayout:
    label.setToolTip(tip)
    label.setMinimumWidth(130)
    box = QVBoxLayout()
    box.setSpacing(0)
    box.addWidget(make_label(title, f"{label.objectName()}Title", "muted"))
    box.addWidget(label)
    return box
