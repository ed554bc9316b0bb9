"""The nodes that the window knows, and the names, order and presence of their devices.

In: node states, as they arrive. Out: places in the order of joining, which give colours; labels for
a person. No calls, no signals.
"""

from __future__ import annotations

from PySide6.QtCore import QObject

from engine.host.messages import NodeState

HOME_DEVICE = "this/cpu"
UNTRUSTED_STATES = ("discovered", "pairing")
AVAILABLE_STATES = ("ready", "loading", "busy")


class NodeList(QObject):
    """What is known of nodes; the session is one.

    Attributes:
        device_order: devices in the order in which they joined, which gives their colours.
    """

    def __init__(self, parent: QObject | None = None) -> None:
        """Nobody is there yet."""
        super().__init__(parent)
        self.nodes: tuple[NodeState, ...] = ()
        self.device_order: list[str] = [HOME_DEVICE]

    def take_nodes(self, nodes: tuple[NodeState, ...]) -> None:
        """Replace all states; devices that were never seen join."""
        self.nodes = nodes
        for node in nodes:
            if node.state in UNTRUSTED_STATES:
                continue
            # A node that still starts keeps its place, and with it its colour.
            names = [device.device for device in node.devices]
            for device in names or [f"{node.name}/cpu"]:
                self.device_index(device)

    @property
    def num_simulated_nodes(self) -> int:
        """Simulated nodes, lost ones included: their names are taken."""
        return sum(node.kind == "simulated" for node in self.nodes)

    def device_index(self, device: str) -> int:
        """A device's place in the order of joining; a device never seen joins now."""
        if device not in self.device_order:
            self.device_order.append(device)
        return self.device_order.index(device)

    def device_label(self, device: str) -> str:
        """A device's name for a person, such as "this computer" or "local-1"."""
        node_name, _, kind = device.partition("/")
        name = "this computer" if node_name == "this" else node_name
        node = next((node for node in self.nodes if node.name == node_name), None)
        if node is not None and len(node.devices) > 1:
            return f"{name} {kind.upper()}"
        return name

    def device_state(self, device: str) -> str:
        """The state of a device's node in a word; "lost" where the node is not listed."""
        name = device.partition("/")[0]
        return next((node.state for node in self.nodes if node.name == name), "lost")

    def available_devices(self) -> list[str]:
        """Devices of nodes that are there, in order of joining."""
        devices = [
            device.device
            for node in self.nodes
            if node.state in AVAILABLE_STATES
            for device in node.devices
        ]
        return sorted(devices, key=self.device_index)
