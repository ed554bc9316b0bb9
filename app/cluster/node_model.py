"""The list of nodes as a Qt model: figures change in place, so that nothing folds or jumps."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from PySide6.QtCore import QAbstractItemModel, QModelIndex, QObject, QPersistentModelIndex, Qt

from app.cluster.node_rows import COLUMNS, TIPS, InUse, Row, node_rows
from app.look import Look
from app.plan_facts import part_text
from app.session import Session
from app.widgets.swatch import swatch_pixmap
from engine.host.messages import Progress

Index = QModelIndex | QPersistentModelIndex
NUMBER_COLUMNS = (2, 3, 4, 5, 6)


class NodeModel(QAbstractItemModel):
    """Two levels: nodes, then their devices and processes."""

    def __init__(
        self,
        session: Session,
        look: Look,
        parent: QObject | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Follows the session's nodes.

        Args:
            clock: seconds since the epoch.
        """
        super().__init__(parent)
        self._clock = clock
        self._in_use = InUse(part_of=self._part_of, progress_of=self._progress_of)
        self._session = session
        self._look = look
        self._rows: list[Row] = []
        # Qt keeps only a number with an index: the place of the parent plus one, 0 at the top.
        session.nodes_changed.connect(self.refresh)
        session.plan_changed.connect(self.refresh)
        session.progress_changed.connect(self.refresh)
        look.theme_changed.connect(self._on_theme_changed)
        self.refresh()

    def refresh(self) -> None:
        """Take the nodes as they are now."""
        new = node_rows(self._session.nodes, self._in_use, self._clock())
        self._merge(QModelIndex(), self._rows, new)
        for place, row in enumerate(new):
            self._merge(self.index(place, 0), self._rows[place].children, row.children)

    def _merge(self, parent: QModelIndex, old: list[Row], new: list[Row]) -> None:
        """Bring the rows of one parent to the new ones with as few changes as there are."""
        new_keys = {row.key for row in new}
        for place in range(len(old) - 1, -1, -1):
            if old[place].key not in new_keys:
                self.beginRemoveRows(parent, place, place)
                del old[place]
                self.endRemoveRows()
        for place, row in enumerate(new):
            if place < len(old) and old[place].key == row.key:
                self._update(parent, place, old[place], row)
                continue
            known = next((i for i in range(place, len(old)) if old[i].key == row.key), None)
            if known is not None:
                # Children belong to places, so a moved row leaves and comes back.
                self.beginRemoveRows(parent, known, known)
                del old[known]
                self.endRemoveRows()
            self.beginInsertRows(parent, place, place)
            old.insert(place, replace(row, children=[]))
            self.endInsertRows()

    def _update(self, parent: QModelIndex, place: int, old: Row, new: Row) -> None:
        if replace(new, children=old.children) == old:
            return
        old.texts, old.role, old.tip, old.state = new.texts, new.role, new.tip, new.state
        first = self.index(place, 0, parent)
        self.dataChanged.emit(first, self.index(place, len(COLUMNS) - 1, parent))

    def _part_of(self, device: str) -> str:
        plan = self._session.plan
        if plan is None or device not in plan.devices:
            return ""
        return part_text(plan, plan.devices.index(device))

    def _progress_of(self, device: str) -> Progress | None:
        return self._session.progress.get(device)

    def node_name(self, index: Index) -> str:
        """The node that a row is, or is part of; "" for none."""
        if not index.isValid():
            return ""
        place = index.row() if index.internalId() == 0 else index.internalId() - 1
        return self._rows[place].key

    def index_of(self, name: str) -> QModelIndex:
        """The row of a node; invalid where it is not listed."""
        for place, row in enumerate(self._rows):
            if row.key == name:
                return self.index(place, 0)
        return QModelIndex()

    def _on_theme_changed(self) -> None:
        self.layoutChanged.emit()

    def _row(self, index: Index) -> Row:
        parent = index.internalId()
        rows = self._rows if parent == 0 else self._rows[parent - 1].children
        return rows[index.row()]

    # Qt's own names.
    def index(self, row: int, column: int, parent: Index = QModelIndex()) -> QModelIndex:  # noqa: B008
        """The index of a cell."""
        if not self.hasIndex(row, column, parent):
            return QModelIndex()
        return self.createIndex(row, column, parent.row() + 1 if parent.isValid() else 0)

    def parent(self, index: Index = QModelIndex()) -> Any:  # type: ignore[override]  # noqa: B008
        """The node a device or process belongs to."""
        if not index.isValid() or index.internalId() == 0:
            return QModelIndex()
        return self.createIndex(index.internalId() - 1, 0, 0)

    def rowCount(self, parent: Index = QModelIndex()) -> int:  # noqa: N802, B008
        """Nodes at the top; devices and processes in a node."""
        if not parent.isValid():
            return len(self._rows)
        if parent.internalId() != 0 or parent.column() > 0:
            return 0
        return len(self._rows[parent.row()].children)

    def columnCount(self, parent: Index = QModelIndex()) -> int:  # noqa: N802, B008
        """As many as there are titles."""
        del parent
        return len(COLUMNS)

    def data(self, index: Index, role: int = Qt.ItemDataRole.DisplayRole) -> Any:
        """What a cell shows."""
        if not index.isValid():
            return None
        row, column = self._row(index), index.column()
        match role:
            case Qt.ItemDataRole.DisplayRole | Qt.ItemDataRole.AccessibleTextRole:
                return row.texts[column]
            case Qt.ItemDataRole.ForegroundRole:
                return self._look.theme.colour(row.role) if column == 1 else None
            case Qt.ItemDataRole.TextAlignmentRole if column in NUMBER_COLUMNS:
                return Qt.AlignmentFlag.AlignRight | Qt.AlignmentFlag.AlignVCenter
            case Qt.ItemDataRole.ToolTipRole:
                return row.tip if column == 0 and row.tip else row.texts[column] or None
            case Qt.ItemDataRole.DecorationRole if column == 0:
                return self._decoration(row)
            case Qt.ItemDataRole.DecorationRole if column == 1 and row.state:
                return self._look.icon(f"state {row.state}", row.role, row.role)
            case _:
                return None

    def headerData(  # noqa: N802
        self,
        section: int,
        orientation: Qt.Orientation,
        role: int = Qt.ItemDataRole.DisplayRole,
    ) -> Any:
        """Titles and where their numbers come from."""
        if orientation != Qt.Orientation.Horizontal or not 0 <= section < len(COLUMNS):
            return None
        match role:
            case Qt.ItemDataRole.DisplayRole:
                return COLUMNS[section]
            case Qt.ItemDataRole.ToolTipRole:
                return TIPS[section]
            case Qt.ItemDataRole.TextAlignmentRole if section in NUMBER_COLUMNS:
                return Qt.AlignmentFlag.AlignRight | Qt.AlignmentFlag.AlignVCenter
            case _:
                return None

    def _decoration(self, row: Row) -> Any:
        if row.device:
            return swatch_pixmap(self._look.theme, self._session.device_index(row.device), 2.0)
        return self._look.icon(row.icon)
