"""The form that adds a node by its join token or its address."""

from __future__ import annotations

from PySide6.QtCore import Qt
from PySide6.QtWidgets import QGridLayout, QHBoxLayout, QLineEdit, QVBoxLayout, QWidget

from app.cluster.add_entry import read_entry
from app.cluster.presenter import ClusterPresenter
from app.widgets.making import make_button, make_card, make_label, set_property

WAYS = (
    ("shardmix-worker token", "prints a join token: paste it here, and the node joins."),
    (
        "shardmix-worker pair",
        "shows a code: pair with the node in the list below, or enter its address here first.",
    ),
)
_WORDS = {
    "empty": "",
    "token": "A join token: the node joins at once.",
    "address": "An address: the node is listed below, pair with it next.",
    "unknown": "Neither a join token nor an address with a port, such as 192.168.1.20:47500.",
}


class AddNodeForm(QWidget):
    """One field for both ways, and the commands that lead to each."""

    def __init__(self, presenter: ClusterPresenter, parent: QWidget | None = None) -> None:
        """An empty form."""
        super().__init__(parent)
        self.setObjectName("addNodeForm")
        self._presenter = presenter
        self.edit = QLineEdit()
        self._kind = make_label("", "addNodeKind", "small", wraps=True)
        self._button = make_button(
            "Add", "connectButton", "Add the node by what was entered", kind="primary"
        )
        self._build()
        self.edit.textChanged.connect(self._on_text_changed)
        self.edit.returnPressed.connect(self._on_add_clicked)
        self._button.clicked.connect(self._on_add_clicked)
        self._on_text_changed()

    def _build(self) -> None:
        self.edit.setObjectName("tokenEdit")
        self.edit.setAccessibleName("Join token or address of the other computer")
        self.edit.setPlaceholderText("Join token, or address:port")
        frame = make_card("addNodeFrame", "bar")
        inside = QVBoxLayout(frame)
        inside.setContentsMargins(12, 10, 12, 10)
        inside.setSpacing(8)
        inside.addWidget(
            make_label("On the other computer run one of these:", "addNodeHelp", "muted")
        )
        ways = QGridLayout()
        ways.setHorizontalSpacing(16)
        ways.setVerticalSpacing(4)
        ways.setColumnStretch(1, 1)
        for row, (command, effect) in enumerate(WAYS):
            label = make_label(command, f"addNodeCommand{row}")
            label.setTextInteractionFlags(
                Qt.TextInteractionFlag.TextSelectableByMouse
                | Qt.TextInteractionFlag.TextSelectableByKeyboard
            )
            ways.addWidget(label, row, 0, Qt.AlignmentFlag.AlignTop)
            ways.addWidget(make_label(effect, f"addNodeEffect{row}", "muted", wraps=True), row, 1)
        inside.addLayout(ways)
        row = QHBoxLayout()
        row.addWidget(self.edit, 1)
        row.addWidget(self._button)
        inside.addLayout(row)
        inside.addWidget(self._kind)
        layout = QVBoxLayout(self)
        layout.setContentsMargins(0, 0, 0, 0)
        layout.addWidget(frame)

    def _on_text_changed(self) -> None:
        entry = read_entry(self.edit.text())
        self._button.setEnabled(entry.is_usable)
        self._kind.setText(_WORDS[entry.kind])
        self._kind.setVisible(bool(_WORDS[entry.kind]))
        set_property(self.edit, "wrong", entry.kind == "unknown")

    def _on_add_clicked(self) -> None:
        if self._presenter.add(self.edit.text()).is_usable:
            self.edit.clear()
