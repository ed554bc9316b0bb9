"""The Cluster page: every node with its processes, and ways to get more nodes."""

from __future__ import annotations

from PySide6.QtCore import QModelIndex
from PySide6.QtGui import QResizeEvent
from PySide6.QtWidgets import QHBoxLayout, QHeaderView, QLineEdit, QTreeView, QVBoxLayout, QWidget

from app.cluster.node_model import NodeModel
from app.cluster.node_rows import COLUMNS, summary
from app.look import Look
from app.session import Session
from app.widgets.making import make_button, make_card, make_label, mark_page

NARROW_PX = 900
_WIDE_WIDTHS = (290, 250, 70, 160, 96, 96, 76)
_NETWORK_COLUMNS = (4, 5)


class ClusterPage(QWidget):
    """Who is there, and how each one is."""

    def __init__(self, session: Session, look: Look, parent: QWidget | None = None) -> None:
        """Follows the session's nodes."""
        super().__init__(parent)
        mark_page(self, "clusterPage")
        self._session = session
        self._look = look
        self._summary = make_label("", "clusterSummary", "muted")
        self._simulate_button = make_button(
            "Simulate two more nodes",
            "simulateButton",
            "Start two more nodes on this computer, to try a split without a second one",
        )
        self._add_button = make_button(
            "Add node…", "addNodeButton", "Connect to a worker on another computer", kind="primary"
        )
        self._add_button.setCheckable(True)
        self._form = make_card("addNodeForm", "bar")
        self._token = QLineEdit()
        self._connect_button = make_button("Connect", "connectButton", kind="primary")
        self._trouble = make_label("", "clusterTrouble", "bad", wraps=True)
        self.tree = QTreeView()
        self.model = NodeModel(session, look, self)
        self._build()
        self._simulate_button.clicked.connect(self._on_simulate_clicked)
        self._add_button.toggled.connect(self._on_add_toggled)
        self._connect_button.clicked.connect(self._on_connect_clicked)
        self._token.returnPressed.connect(self._on_connect_clicked)
        self._token.textChanged.connect(self._on_token_changed)
        self.model.rowsInserted.connect(self._on_rows_inserted)
        session.nodes_changed.connect(self.refresh)
        session.call_failed.connect(self._on_call_failed)
        look.theme_changed.connect(self._on_theme_changed)
        self._on_theme_changed()
        self.refresh()

    def refresh(self) -> None:
        """Follow the number of nodes."""
        self._summary.setText(summary(self._session.nodes))

    def _build(self) -> None:
        head = QHBoxLayout()
        head.setSpacing(10)
        head.addWidget(make_label("Cluster", "clusterTitle", "title"))
        head.addWidget(self._summary)
        head.addStretch(1)
        head.addWidget(self._simulate_button)
        head.addWidget(self._add_button)
        self._token.setObjectName("tokenEdit")
        self._token.setAccessibleName("Join token of the other computer")
        self._token.setPlaceholderText("Join token")
        form = QVBoxLayout(self._form)
        form.setContentsMargins(12, 10, 12, 10)
        form.addWidget(
            make_label(
                "On the other computer run:  shardmix-worker run. It prints a join token. "
                "Paste it here.",
                "addNodeHelp",
                "muted",
                wraps=True,
            )
        )
        row = QHBoxLayout()
        row.addWidget(self._token, 1)
        row.addWidget(self._connect_button)
        form.addLayout(row)
        self._form.hide()
        self._trouble.hide()
        tree = self.tree
        tree.setObjectName("nodeTree")
        tree.setAccessibleName("Nodes, their devices and processes")
        tree.setModel(self.model)
        tree.setUniformRowHeights(True)
        tree.setAllColumnsShowFocus(True)
        tree.setRootIsDecorated(True)
        tree.setIndentation(22)
        tree.setTextElideMode(tree.textElideMode())
        header = tree.header()
        header.setStretchLastSection(False)
        header.setSectionsMovable(False)
        for column, width in enumerate(_WIDE_WIDTHS):
            header.resizeSection(column, width)
        header.setSectionResizeMode(1, QHeaderView.ResizeMode.Stretch)
        tree.expandAll()
        layout = QVBoxLayout(self)
        layout.setContentsMargins(20, 14, 20, 14)
        layout.setSpacing(10)
        layout.addLayout(head)
        layout.addWidget(self._form)
        layout.addWidget(self._trouble)
        layout.addWidget(tree, 1)
        layout.addWidget(
            make_label(
                "A simulated node is a worker of its own on this computer: it shows how a split "
                "works, not that it is faster.",
                "clusterHint",
                "small",
                wraps=True,
            )
        )

    def _on_simulate_clicked(self) -> None:
        self._trouble.hide()
        self._session.add_simulated_nodes(self._session.num_simulated_nodes + 2)

    def _on_add_toggled(self, is_open: bool) -> None:
        self._form.setVisible(is_open)
        if is_open:
            self._on_token_changed()
            self._token.setFocus()

    def _on_token_changed(self) -> None:
        self._connect_button.setEnabled(bool(self._token.text().strip()))

    def _on_connect_clicked(self) -> None:
        token = self._token.text().strip()
        if token:
            self._trouble.hide()
            self._session.add_node(token)
            self._token.clear()

    def _on_call_failed(self, message: str) -> None:
        self._trouble.setText(message)
        self._trouble.show()

    def _on_rows_inserted(self, parent: QModelIndex) -> None:
        # A node comes open: its processes are what the page is for.
        self.tree.expand(parent) if parent.isValid() else self.tree.expandAll()

    def _on_theme_changed(self) -> None:
        self._simulate_button.setIcon(self._look.icon("simulated"))
        self._add_button.setIcon(self._look.icon("add", "on_accent", "on_accent"))

    def resizeEvent(self, event: QResizeEvent) -> None:  # noqa: N802
        """The network columns give way first."""
        super().resizeEvent(event)
        is_narrow = self.width() < NARROW_PX
        for column in _NETWORK_COLUMNS:
            self.tree.setColumnHidden(column, is_narrow)
        assert len(COLUMNS) == len(_WIDE_WIDTHS)
