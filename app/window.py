"""The main window: menus, the rail, the four pages, the status strip.

In: the presenters. Out: nothing but calls to them. It also holds the one timer of all charts.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from PySide6.QtCore import QSize, Qt, QTimer
from PySide6.QtGui import QAction, QActionGroup, QCloseEvent, QKeySequence
from PySide6.QtWidgets import (
    QButtonGroup,
    QFileDialog,
    QFrame,
    QHBoxLayout,
    QMainWindow,
    QMenu,
    QStackedWidget,
    QToolButton,
    QVBoxLayout,
    QWidget,
)

from app.actions import ACTIONS, MENUS, ActionSpec
from app.chat.chat_page import ChatPage
from app.chat.conversation import Conversation
from app.cluster.cluster_page import ClusterPage
from app.cluster.presenter import ClusterPresenter
from app.icon import window_icon
from app.look import Look
from app.monitor.history import History
from app.monitor.monitor_page import MonitorPage
from app.session import Session
from app.settings import Settings
from app.split.presenter import SplitPresenter
from app.split.split_page import SplitPage
from app.status_strip import StatusStrip

TICK_MS = 200
RAIL_WIDTH = 76
MINIMUM_SIZE = QSize(760, 480)
FIRST_SIZE = QSize(1280, 820)
FRAME_ROOM = QSize(8, 40)
_PAGES = (("Chat", "chat"), ("Cluster", "cluster"), ("Split", "split"), ("Monitor", "monitor"))
_MODEL_FILTER = "Models (*.gguf *.safetensors);;All files (*)"


class MainWindow(QMainWindow):
    """Everything a person sees."""

    def __init__(self, session: Session, look: Look, settings: Settings) -> None:
        """Builds the pages; the session may not have started yet."""
        super().__init__()
        self.setObjectName("mainWindow")
        self.setWindowTitle("Shardmix")
        self.setWindowIcon(window_icon())
        self.setMinimumSize(MINIMUM_SIZE)
        self._session = session
        self._look = look
        self._settings = settings
        self.history = History()
        self.conversation = Conversation(session, self)
        self.split = SplitPresenter(session, self)
        self.cluster = ClusterPresenter(session, self.split, self)
        self.chat_page = ChatPage(session, self.conversation, self.history, self.cluster, look)
        self.cluster_page = ClusterPage(self.cluster, session, look)
        self.split_page = SplitPage(self.split, session, look)
        self.monitor_page = MonitorPage(session, self.conversation, self.history, look)
        self.strip = StatusStrip(session, self.conversation, self.history, look)
        self.pages = QStackedWidget()
        self._rail_buttons = QButtonGroup(self)
        self._actions: dict[str, QAction] = {}
        self._theme_group = QActionGroup(self)
        self._build()
        self._make_menus()
        self._chart_timer = QTimer(self)
        self._chart_timer.setObjectName("chartTimer")
        self._chart_timer.setInterval(TICK_MS)
        self._chart_timer.timeout.connect(self._on_tick)
        self._chart_timer.start()
        self._connect()
        self._on_theme_changed()
        self._show_state()
        self._restore()

    def show_page(self, index: int) -> None:
        """Go to a page of the rail."""
        self.pages.setCurrentIndex(index)
        self._rail_buttons.button(index).setChecked(True)
        self._first_fields[index].setFocus()

    def closeEvent(self, event: QCloseEvent) -> None:  # noqa: N802
        """Remember the place; the application ends the engine after the last window."""
        self._chart_timer.stop()
        self._settings.geometry = self.saveGeometry()
        self._settings.save()
        super().closeEvent(event)

    # ---- building ----------------------------------------------------------------------------

    def _build(self) -> None:
        rail = QFrame()
        rail.setObjectName("rail")
        rail.setFixedWidth(RAIL_WIDTH)
        rail_layout = QVBoxLayout(rail)
        rail_layout.setContentsMargins(6, 8, 6, 8)
        rail_layout.setSpacing(4)
        for index, (title, _) in enumerate(_PAGES):
            button = QToolButton()
            button.setObjectName(f"rail{title}")
            button.setText(title)
            button.setAccessibleName(f"{title} page")
            button.setToolTip(f"{title} (Ctrl+{index + 1})")
            button.setToolButtonStyle(Qt.ToolButtonStyle.ToolButtonTextUnderIcon)
            button.setIconSize(QSize(20, 20))
            button.setCheckable(True)
            button.setFixedSize(RAIL_WIDTH - 13, 56)
            self._rail_buttons.addButton(button, index)
            rail_layout.addWidget(button)
        rail_layout.addStretch(1)
        self._rail_buttons.button(0).setChecked(True)
        self._rail_buttons.idClicked.connect(self.show_page)
        for page in (self.chat_page, self.cluster_page, self.split_page, self.monitor_page):
            self.pages.addWidget(page)
        self._first_fields = (
            self.chat_page.composer.edit,
            self.cluster_page.tree,
            self.split_page.canvas,
            self.monitor_page,
        )
        middle = QHBoxLayout()
        middle.setContentsMargins(0, 0, 0, 0)
        middle.setSpacing(0)
        middle.addWidget(rail)
        middle.addWidget(self.pages, 1)
        central = QWidget()
        layout = QVBoxLayout(central)
        layout.setContentsMargins(0, 0, 0, 0)
        layout.setSpacing(0)
        layout.addLayout(middle, 1)
        layout.addWidget(self.strip)
        self.setCentralWidget(central)

    def _make_menus(self) -> None:
        menus: dict[str, QMenu] = {title: self.menuBar().addMenu(title) for title in MENUS}
        last_group: dict[str, int] = {}
        for spec in ACTIONS:
            menu = menus[spec.menu]
            if last_group.setdefault(spec.menu, spec.group) != spec.group:
                menu.addSeparator()
                last_group[spec.menu] = spec.group
            menu.addAction(self._make_action(spec))
        choice = f"theme{self._look.choice.title()}"
        self._actions[choice].setChecked(True)

    def _make_action(self, spec: ActionSpec) -> QAction:
        action = QAction(spec.title, self)
        action.setObjectName(spec.name)
        if spec.shortcut:
            action.setShortcut(QKeySequence(spec.shortcut))
        if spec.is_choice:
            action.setCheckable(True)
            self._theme_group.addAction(action)
        if spec.menu == "Split":
            # In the chat, Ctrl+Return and Ctrl+Z belong to the message.
            action.setShortcutContext(Qt.ShortcutContext.WidgetWithChildrenShortcut)
            self.split_page.addAction(action)
        handler: Callable[[], None] = getattr(self, spec.handler)
        action.triggered.connect(handler)
        self._actions[spec.name] = action
        return action

    def _connect(self) -> None:
        session = self._session
        session.throughput_measured.connect(self.history.add)
        session.stage_changed.connect(self._show_state)
        session.model_changed.connect(self._on_model_changed)
        self.conversation.state_changed.connect(self._show_state)
        self.split.draft_changed.connect(self._show_state)
        self.cluster.split_wanted.connect(self._on_show_split)
        stack = self.split.undo_stack
        stack.undoTextChanged.connect(self._on_undo_text_changed)
        stack.redoTextChanged.connect(self._on_redo_text_changed)
        self._look.theme_changed.connect(self._on_theme_changed)

    def _restore(self) -> None:
        geometry = self._settings.geometry
        if geometry is None or not self.restoreGeometry(geometry):
            # Window managers add a frame that nobody can ask for before the window is shown.
            room = self.screen().availableSize() - FRAME_ROOM
            self.resize(FIRST_SIZE.boundedTo(room))

    # ---- state -------------------------------------------------------------------------------

    def _show_state(self) -> None:
        conversation, split = self.conversation, self.split
        enabled = {
            "newChat": bool(conversation.messages),
            "stop": conversation.is_answering,
            "regenerate": conversation.can_regenerate,
            "undo": split.undo_stack.canUndo(),
            "redo": split.undo_stack.canRedo(),
            "apply": split.can_apply,
            "revert": split.has_changes and split.running is not None,
            "loadAgain": self._session.last_plan is not None and self._session.plan is None,
        }
        for name, is_enabled in enabled.items():
            self._actions[name].setEnabled(is_enabled)

    def _on_tick(self) -> None:
        if self.isMinimized() or not self.isVisible():
            return
        now = time.time()
        self.strip.tick(now)
        self.chat_page.tick(now)
        self.cluster_page.tick()
        self.monitor_page.tick(now)

    def _on_model_changed(self) -> None:
        model = self._session.model
        if model is not None:
            self.setWindowTitle(f"{model.name} - Shardmix")
            # Only what could be opened is worth opening again.
            self._settings.last_model = self._session.open_path

    def _on_undo_text_changed(self, text: str) -> None:
        self._actions["undo"].setText(f"Undo: {text}" if text else "Undo")

    def _on_redo_text_changed(self, text: str) -> None:
        self._actions["redo"].setText(f"Redo: {text}" if text else "Redo")

    def _on_theme_changed(self) -> None:
        for index, (_, icon) in enumerate(_PAGES):
            self._rail_buttons.button(index).setIcon(self._look.icon(icon))

    # ---- actions -----------------------------------------------------------------------------

    def _on_open_file(self) -> None:
        path, _ = QFileDialog.getOpenFileName(self, "Open model file", "", _MODEL_FILTER)
        if path:
            self._open(path)

    def _on_open_folder(self) -> None:
        path = QFileDialog.getExistingDirectory(self, "Open model folder")
        if path:
            self._open(path)

    def _on_open_default(self) -> None:
        self._open(None)

    def _open(self, path: str | None) -> None:
        self._session.open_model(path)
        self.show_page(0)

    def _on_quit(self) -> None:
        self.close()

    def _on_new_chat(self) -> None:
        self.conversation.new_chat()
        self.show_page(0)

    def _on_stop(self) -> None:
        self.conversation.stop()

    def _on_regenerate(self) -> None:
        self.conversation.regenerate()

    def _on_parameters(self) -> None:
        self.show_page(0)
        self.chat_page.toggle_parameters()

    def _on_undo(self) -> None:
        self.split.undo_stack.undo()

    def _on_redo(self) -> None:
        self.split.undo_stack.redo()

    def _on_apply(self) -> None:
        self.split.apply()

    def _on_revert(self) -> None:
        self.split.revert()

    def _on_load_again(self) -> None:
        self._session.load_again()

    def _on_show_chat(self) -> None:
        self.show_page(0)

    def _on_show_cluster(self) -> None:
        self.show_page(1)

    def _on_show_split(self) -> None:
        self.show_page(2)

    def _on_show_monitor(self) -> None:
        self.show_page(3)

    def _on_theme_system(self) -> None:
        self._look.choose("system")

    def _on_theme_light(self) -> None:
        self._look.choose("light")

    def _on_theme_dark(self) -> None:
        self._look.choose("dark")

    def _on_larger_text(self) -> None:
        self._look.change_text_size(1)

    def _on_smaller_text(self) -> None:
        self._look.change_text_size(-1)

    def _on_default_text(self) -> None:
        self._look.change_text_size(0)
