"""The Cluster page: every node with its processes, what is known of one, ways to get more."""

from __future__ import annotations

from PySide6.QtCore import QItemSelectionModel, QModelIndex, Qt
from PySide6.QtGui import QResizeEvent
from PySide6.QtWidgets import QHBoxLayout, QHeaderView, QTreeView, QVBoxLayout, QWidget

from app.cluster.add_node_form import AddNodeForm
from app.cluster.node_detail import NodeDetail
from app.cluster.node_model import NodeModel
from app.cluster.node_rows import COLUMNS, summary
from app.cluster.offer_bar import OfferBar
from app.cluster.pairing_card import PairingCard
from app.cluster.presenter import ClusterPresenter
from app.look import Look
from app.session import Session
from app.stages import Stage
from app.widgets.making import make_button, make_label, mark_page

NARROW_PX = 960
MIN_TREE_PX = 120
_WIDE_WIDTHS = (250, 250, 64, 170, 96, 96, 68)
_NETWORK_COLUMNS = (4, 5)


class ClusterPage(QWidget):
    """Who is there, and how each one is."""

    def __init__(
        self,
        presenter: ClusterPresenter,
        session: Session,
        look: Look,
        parent: QWidget | None = None,
    ) -> None:
        """Follows the session's nodes and the presenter."""
        super().__init__(parent)
        mark_page(self, "clusterPage")
        self._presenter = presenter
        self._session = session
        self._look = look
        self._summary = make_label("", "clusterSummary", "muted")
        self._simulate_button = make_button(
            "Simulate two more nodes",
            "simulateButton",
            "A simulated node is a worker of its own on this computer: it shows how a split "
            "works, not that it is faster",
        )
        self._add_button = make_button(
            "Add node…", "addNodeButton", "Connect to a worker on another computer", kind="primary"
        )
        self._add_button.setCheckable(True)
        self.form = AddNodeForm(presenter)
        self.offer = OfferBar(presenter, "cluster")
        self.pairing = PairingCard(presenter)
        self.detail = NodeDetail(presenter, look)
        self._trouble = make_label("", "clusterTrouble", "bad", wraps=True)
        self.tree = QTreeView()
        self.model = NodeModel(session, look, self)
        self._is_following = False
        self._build()
        self._simulate_button.clicked.connect(presenter.simulate)
        self._add_button.toggled.connect(self._on_add_toggled)
        self.model.rowsInserted.connect(self._on_rows_inserted)
        self.tree.selectionModel().currentChanged.connect(self._on_current_changed)
        self.tree.activated.connect(self._on_activated)
        session.nodes_changed.connect(self.refresh)
        session.stage_changed.connect(self.refresh)
        presenter.changed.connect(self.refresh)
        look.theme_changed.connect(self._on_theme_changed)
        self._on_theme_changed()
        self.refresh()

    def refresh(self) -> None:
        """Follow the number of nodes and the selection."""
        session, presenter = self._session, self._presenter
        is_stopped = session.stage is Stage.STOPPED and session.last_plan is not None
        self._summary.setText(summary(session.nodes, is_stopped))
        self._trouble.setText(presenter.trouble)
        self._trouble.setVisible(bool(presenter.trouble))
        self._follow_selection()

    def tick(self) -> None:
        """Show the time that is left for pairing."""
        self.pairing.tick()

    def _build(self) -> None:
        head = QHBoxLayout()
        head.setSpacing(10)
        head.addWidget(make_label("Cluster", "clusterTitle", "title"))
        head.addWidget(self._summary)
        head.addStretch(1)
        head.addWidget(self._simulate_button)
        head.addWidget(self._add_button)
        self.form.hide()
        tree = self.tree
        tree.setObjectName("nodeTree")
        tree.setAccessibleName("Nodes, their devices and processes")
        tree.setModel(self.model)
        tree.setUniformRowHeights(True)
        tree.setAllColumnsShowFocus(True)
        tree.setRootIsDecorated(True)
        tree.setIndentation(22)
        tree.setMinimumHeight(MIN_TREE_PX)
        tree.setHorizontalScrollBarPolicy(Qt.ScrollBarPolicy.ScrollBarAlwaysOff)
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
        layout.addWidget(self.form)
        layout.addWidget(self._trouble)
        layout.addWidget(self.offer)
        layout.addWidget(self.pairing)
        layout.addWidget(tree, 1)
        layout.addWidget(self.detail)

    def _follow_selection(self) -> None:
        """Mark the presenter's node in the list, unless something inside it is marked."""
        selected = self._presenter.selected
        if self.model.node_name(self.tree.currentIndex()) == selected:
            return
        self._is_following = True
        flags = QItemSelectionModel.SelectionFlag
        self.tree.selectionModel().setCurrentIndex(
            self.model.index_of(selected), flags.ClearAndSelect | flags.Rows
        )
        self._is_following = False

    def _on_current_changed(self, current: QModelIndex) -> None:
        if not self._is_following and current.isValid():
            self._presenter.select(self.model.node_name(current))

    def _on_activated(self) -> None:
        self.detail.focus_first_action()

    def _on_add_toggled(self, is_open: bool) -> None:
        self.form.setVisible(is_open)
        if is_open:
            self.form.edit.setFocus()

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
