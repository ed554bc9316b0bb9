"""The Cluster page's state: the selected node, pairing, forgetting, nodes that offer themselves.

In: what a person does, the session's nodes and plan. Out: calls through the session, and one signal
for the views. No widgets.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from PySide6.QtCore import QObject, Signal

from app.cluster.add_entry import Entry, read_entry
from app.cluster.node_facts import (
    Action,
    Fact,
    Surroundings,
    actions,
    devices_to_add,
    display_name,
    node_facts,
)
from app.node_list import AVAILABLE_STATES
from app.session import Session
from app.split.presenter import SplitPresenter
from engine.cluster.messages import Message
from engine.host.messages import (
    AddAddress,
    AddNode,
    CallFailed,
    ConfirmPairing,
    Done,
    ForgetNode,
    NodeState,
    PairingCode,
    PairNode,
)

PAIRING_SECONDS = 60.0
# What a person should look at first, where nothing was selected.
_URGENT = ("pairing", "lost", "stale", "discovered")


@dataclass(slots=True)
class Pairing:
    """An attempt to pair with a node.

    Attributes:
        code: the six digits; empty until both computers have answered each other.
        started_s: seconds since the epoch.
        answer: what the person said of the codes; None before.
        error: why it ended; empty while it runs.
    """

    name: str
    request_id: int
    started_s: float
    code: str = ""
    answer: bool | None = None
    error: str = ""


@dataclass(frozen=True, slots=True)
class Offer:
    """A node that could take part; `words` say why it is offered now."""

    name: str
    words: str


class ClusterPresenter(QObject):
    """What the page shows and does.

    Attributes:
        selected: name of the node whose details are shown; "" for none.
        pairing: the attempt under way, or the last one that failed, until it is closed.
        forgetting: name of the node that a person is asked about; "" for none.
        trouble: why the last thing asked for did not work; "" where it did.
    """

    changed = Signal()
    split_wanted = Signal()

    def __init__(
        self,
        session: Session,
        split: SplitPresenter,
        parent: QObject | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Args: clock: seconds since the epoch."""
        super().__init__(parent)
        self._session = session
        self._split = split
        self.clock = clock
        self.selected = ""
        self.pairing: Pairing | None = None
        self.forgetting = ""
        self.trouble = ""
        self._is_chosen = False
        # Nodes that were lost, by identity; nodes to be offered once they are there, by name.
        self._lost: set[str] = set()
        self._awaited: dict[str, str] = {}
        session.nodes_changed.connect(self._on_nodes_changed)
        session.plan_changed.connect(self._on_nodes_changed)
        session.links_changed.connect(self.changed)
        session.node_call_failed.connect(self._on_call_failed)

    # ---- facts -------------------------------------------------------------------------------

    @property
    def node(self) -> NodeState | None:
        """The selected node."""
        return self._find(self.selected)

    @property
    def offers(self) -> list[Offer]:
        """Nodes that are there, compute nothing, and came since the person last decided."""
        found: list[Offer] = []
        for name, words in self._awaited.items():
            node = self._find(name)
            if node is not None and Action.ADD in self.actions(node):
                found.append(Offer(name, f"{display_name(node)} {words}"))
        return found

    @property
    def can_add(self) -> bool:
        """Whether there is a draft that a node can be added to."""
        return self._split.draft is not None

    def actions(self, node: NodeState) -> list[Action]:
        """What can be done with a node now."""
        return actions(node, self.is_computing(node))

    def is_computing(self, node: NodeState) -> bool:
        """Whether a node has a share in the plan in force."""
        computing = self._session.in_force.computing_devices()
        return any(device.partition("/")[0] == node.name for device in computing)

    def facts(self, node: NodeState) -> list[Fact]:
        """What is known of a node."""
        own = next((item.version for item in self._session.nodes if item.kind == "this"), "")
        in_force = self._session.in_force
        around = Surroundings(own, in_force.links, in_force.loaded, self._session.device_label)
        return node_facts(node, around)

    def seconds_left(self) -> float:
        """Of the attempt to pair."""
        if self.pairing is None:
            return 0.0
        return max(0.0, self.pairing.started_s + PAIRING_SECONDS - self.clock())

    # ---- what a person does ------------------------------------------------------------------

    def select(self, name: str) -> None:
        """Show the details of a node."""
        self._is_chosen = bool(name)
        if name != self.selected:
            self.selected, self.forgetting = name, ""
            self.changed.emit()

    def act(self, name: str, action: Action) -> None:
        """Do what a button says."""
        self.trouble = ""
        match action:
            case Action.PAIR:
                self.pair(name)
            case Action.ADD:
                self.add_to_plan(name)
            case Action.FORGET:
                self.forgetting = name
                self.changed.emit()

    def pair(self, name: str) -> None:
        """Begin to pair with a discovered node."""
        if self.pairing is not None and not self.pairing.error:
            return

        def make(request_id: int) -> Message:
            return PairNode(request_id=request_id, name=name)

        request_id = self._session.call(make, self._on_pairing_event)
        self.pairing = Pairing(name, request_id, self.clock())
        self.changed.emit()

    def answer(self, is_same: bool) -> None:
        """Say whether the other computer shows the same code."""
        pairing = self.pairing
        if pairing is None or not pairing.code or pairing.answer is not None:
            return
        pairing.answer = is_same
        name = pairing.name

        def make(request_id: int) -> Message:
            return ConfirmPairing(request_id=request_id, name=name, is_same=is_same)

        self._session.call(make, self._on_confirm_event)
        self.changed.emit()

    def close_pairing(self) -> None:
        """Give up the attempt, or put away why it failed."""
        pairing = self.pairing
        if pairing is None:
            return
        if not pairing.error:
            if pairing.code and pairing.answer is None:
                self.answer(False)
            self._session.cancel(pairing.request_id)
        self.pairing = None
        self.changed.emit()

    def forget(self) -> None:
        """Remove the node that was asked about, its key included."""
        name, self.forgetting = self.forgetting, ""

        def make(request_id: int) -> Message:
            return ForgetNode(request_id=request_id, name=name)

        if name:
            self._session.call(make, self._on_node_event)
        self.changed.emit()

    def keep(self) -> None:
        """Do not forget it after all."""
        self.forgetting = ""
        self.changed.emit()

    def add_to_plan(self, name: str) -> None:
        """Give a node a part of the draft, and show the draft."""
        node = self._find(name)
        if node is None or not self.can_add:
            return
        self._awaited.pop(name, None)
        self._split.add_devices(devices_to_add(node))
        self.changed.emit()
        self.split_wanted.emit()

    def dismiss(self, name: str) -> None:
        """Do not offer a node any more."""
        self._awaited.pop(name, None)
        self.changed.emit()

    def add(self, text: str) -> Entry:
        """Add a node by what was typed.

        Returns: what it was; nothing was done where it is not usable.
        """
        entry = read_entry(text)
        self.trouble = ""

        def make(request_id: int) -> Message:
            if entry.kind == "token":
                return AddNode(request_id=request_id, token=entry.value)
            return AddAddress(request_id=request_id, endpoint=entry.value)

        if entry.is_usable:
            self._session.call(make, self._on_node_event)
        self.changed.emit()
        return entry

    def simulate(self) -> None:
        """Start two more nodes on this computer."""
        self.trouble = ""
        self._session.add_simulated_nodes(self._session.num_simulated_nodes + 2)
        self.changed.emit()

    # ---- events ------------------------------------------------------------------------------

    def _find(self, name: str) -> NodeState | None:
        return next((node for node in self._session.nodes if node.name == name), None)

    def _on_nodes_changed(self) -> None:
        for node in self._session.nodes:
            identity = node.key or node.name
            if node.state == "lost":
                self._lost.add(identity)
            elif node.state in AVAILABLE_STATES and identity in self._lost:
                self._lost.discard(identity)
                self._awaited[node.name] = "is back"
            if self.is_computing(node):
                self._awaited.pop(node.name, None)
        self._follow_pairing()
        if self._find(self.forgetting) is None:
            self.forgetting = ""
        if not self._is_chosen or self.node is None:
            self.selected, self._is_chosen = self._most_urgent(), False
        self.changed.emit()

    def _follow_pairing(self) -> None:
        """The code is in the node's own words too."""
        pairing = self.pairing
        node = self._find(pairing.name) if pairing is not None else None
        if pairing is not None and node is not None and node.state == "pairing" and node.code:
            pairing.code = node.code

    def _most_urgent(self) -> str:
        nodes = self._session.nodes
        for state in _URGENT:
            found = next((node.name for node in nodes if node.state == state), "")
            if found:
                return found
        return nodes[0].name if nodes else ""

    def _on_pairing_event(self, event: Message) -> None:
        pairing = self.pairing
        if pairing is None or getattr(event, "request_id", None) != pairing.request_id:
            return
        match event:
            case PairingCode():
                pairing.code = event.code
                pairing.started_s = self.clock()
            case Done():
                self._awaited[pairing.name] = "is paired"
                self.pairing = None
            case CallFailed():
                pairing.error = event.message
            case _:
                return
        self.changed.emit()

    def _on_confirm_event(self, event: Message) -> None:
        # Where the attempt fails for it, the pairing call says so too.
        if isinstance(event, CallFailed) and self.pairing is not None and not self.pairing.error:
            self.pairing.error = event.message
            self.changed.emit()

    def _on_node_event(self, event: Message) -> None:
        if isinstance(event, CallFailed):
            self._on_call_failed(event.message)

    def _on_call_failed(self, message: str) -> None:
        self.trouble = message
        self.changed.emit()
