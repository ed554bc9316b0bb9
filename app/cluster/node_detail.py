"""The bar under the list: everything about the selected node, and what can be done with it."""

from __future__ import annotations

from PySide6.QtCore import QSize, Qt
from PySide6.QtWidgets import QHBoxLayout, QLabel, QPushButton, QVBoxLayout, QWidget
from superqt import QFlowLayout

from app.cluster.node_facts import Action, Fact, age_text, display_name
from app.cluster.node_rows import STATE_ROLES, STATE_WORDS
from app.cluster.presenter import ClusterPresenter
from app.look import Look
from app.widgets.making import make_button, make_card, make_label, set_property
from engine.host.messages import NodeState

ICON_PX = 16
ACTION_TIPS = {
    Action.PAIR: "Compare codes with this computer, then trust it",
    Action.ADD: "Give it a part of the draft on the Split page",
    Action.FORGET: "Remove this node and its pairing",
}


class FactTile(QWidget):
    """A title and a value under it."""

    def __init__(self, fact: Fact) -> None:
        """Shows a fact."""
        super().__init__()
        self._title = make_label("", f"factTitle {fact.key}", "small")
        self._value = make_label("", f"fact {fact.key}")
        self._value.setTextInteractionFlags(Qt.TextInteractionFlag.TextSelectableByMouse)
        layout = QVBoxLayout(self)
        layout.setContentsMargins(0, 0, 0, 0)
        layout.setSpacing(1)
        layout.addWidget(self._title)
        layout.addWidget(self._value)
        self.show_fact(fact)

    def show_fact(self, fact: Fact) -> None:
        """Take newer words."""
        self._title.setText(fact.title)
        self._value.setText(fact.value)
        self._value.setAccessibleName(f"{fact.title}: {fact.value}")
        set_property(self._value, "role", "warning" if fact.is_warning else "")
        self.setToolTip(fact.tip)


class NodeDetail(QWidget):
    """One node; nothing is rebuilt while only its figures change."""

    def __init__(
        self, presenter: ClusterPresenter, look: Look, parent: QWidget | None = None
    ) -> None:
        """Follows the presenter's selection."""
        super().__init__(parent)
        self.setObjectName("nodeDetail")
        self._presenter = presenter
        self._look = look
        self._frame = make_card("nodeDetailFrame")
        self._name = make_label("", "detailName", "title")
        self._icon = QLabel()
        self._state = make_label("", "detailState")
        self._reason = make_label("", "detailReason", "muted", wraps=True)
        self._question = make_label("", "forgetQuestion", wraps=True)
        self._buttons: dict[Action, QPushButton] = {}
        self._forget_button = make_button(
            "Forget it", "forgetConfirmButton", "Remove this node and its pairing"
        )
        self._keep_button = make_button("Keep it", "forgetKeepButton", "Leave it as it is")
        self._tiles: dict[str, FactTile] = {}
        self._flow = QFlowLayout()
        self._build()
        self._forget_button.clicked.connect(presenter.forget)
        self._keep_button.clicked.connect(presenter.keep)
        presenter.changed.connect(self.refresh)
        look.theme_changed.connect(self.refresh)
        self.refresh()

    def refresh(self) -> None:
        """Show the selected node as it is now."""
        presenter = self._presenter
        node = presenter.node
        self.setVisible(node is not None)
        if node is None:
            return
        role = STATE_ROLES[node.state]
        self._name.setText(display_name(node))
        icon = self._look.icon(f"state {node.state}", role, role)
        self._icon.setPixmap(icon.pixmap(QSize(ICON_PX, ICON_PX), self.devicePixelRatioF()))
        words = [STATE_WORDS[node.state], age_text(node, presenter.clock())]
        self._state.setText(" ".join(word for word in words if word))
        self._reason.setText(node.reason)
        self._reason.setVisible(bool(node.reason))
        self._show_actions(node)
        self._show_facts(presenter.facts(node))

    def focus_first_action(self) -> None:
        """Put the keyboard on the likeliest button."""
        for button in (self._keep_button, *self._buttons.values()):
            if button.isVisible() and button.isEnabled():
                button.setFocus()
                return

    def _build(self) -> None:
        head = QHBoxLayout()
        head.setSpacing(8)
        head.addWidget(self._name)
        head.addWidget(self._icon)
        head.addWidget(self._state)
        head.addStretch(1)
        for action, name in (
            (Action.PAIR, "pairButton"),
            (Action.ADD, "addToPlanButton"),
            (Action.FORGET, "forgetButton"),
        ):
            kind = "" if action is Action.FORGET else "primary"
            button = make_button(action.value, name, ACTION_TIPS[action], kind=kind)
            button.clicked.connect(self._on_action_clicked)
            self._buttons[action] = button
            head.addWidget(button)
        question = QHBoxLayout()
        question.addWidget(self._question, 1)
        question.addWidget(self._keep_button)
        question.addWidget(self._forget_button)
        self._flow.setContentsMargins(0, 0, 0, 0)
        self._flow.setHorizontalSpacing(28)
        self._flow.setVerticalSpacing(8)
        inside = QVBoxLayout(self._frame)
        inside.setContentsMargins(12, 10, 12, 12)
        inside.setSpacing(8)
        inside.addLayout(head)
        inside.addWidget(self._reason)
        inside.addLayout(question)
        inside.addLayout(self._flow)
        layout = QVBoxLayout(self)
        layout.setContentsMargins(0, 0, 0, 0)
        layout.addWidget(self._frame)

    def _show_actions(self, node: NodeState) -> None:
        presenter = self._presenter
        is_asking = presenter.forgetting == node.name
        possible = presenter.actions(node)
        for action, button in self._buttons.items():
            button.setVisible(action in possible and not (is_asking and action is Action.FORGET))
        is_pairing = presenter.pairing is not None and not presenter.pairing.error
        self._buttons[Action.PAIR].setEnabled(not is_pairing)
        self._buttons[Action.ADD].setEnabled(presenter.can_add)
        forget = self._buttons[Action.FORGET]
        is_computing = presenter.is_computing(node)
        forget.setEnabled(not is_computing)
        tip = "It has a share in the running split: take it out of that first"
        forget.setToolTip(tip if is_computing else ACTION_TIPS[Action.FORGET])
        for widget in (self._question, self._forget_button, self._keep_button):
            widget.setVisible(is_asking)
        if is_asking:
            name = display_name(node)
            text = f"Forget {name}?"
            if node.kind == "remote":
                text += " Its pairing is destroyed: to use it again you pair with it anew."
            self._question.setText(text)

    def _show_facts(self, facts: list[Fact]) -> None:
        if list(self._tiles) != [fact.key for fact in facts]:
            for tile in self._tiles.values():
                self._flow.removeWidget(tile)
                tile.hide()
                tile.deleteLater()
            self._tiles = {fact.key: FactTile(fact) for fact in facts}
            for tile in self._tiles.values():
                self._flow.addWidget(tile)
        for fact in facts:
            self._tiles[fact.key].show_fact(fact)

    def _on_action_clicked(self) -> None:
        node = self._presenter.node
        sender = self.sender()
        if node is None:
            return
        for action, button in self._buttons.items():
            if button is sender:
                self._presenter.act(node.name, action)
        if self._presenter.forgetting == node.name:
            self._keep_button.setFocus()
