"""Nodes, devices and processes as rows of text. No Qt.

In: the node states of the session. Out: a small tree of rows with keys that stay the same while
their figures change.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from app.figures import UNKNOWN, figure_bytes, figure_percent, figure_rate, plural
from engine.host.messages import NodeDevice, NodeState

COLUMNS = ("Name", "State", "CPU", "Memory", "Network in", "Network out", "Process")
TIPS = (
    "A computer, its devices, and the processes that work for us on it",
    "What the node is doing, as its worker says",
    "Of a node: of all its cores. Of a process: 100 % is one core. Measured once a second",
    "Of a node: used of all. Of a process: resident memory. Measured once a second",
    "Bytes that came in over all interfaces in the last second",
    "Bytes that went out over all interfaces in the last second",
    "Process id on that computer",
)
STATE_WORDS = {
    "starting": "starting",
    "ready": "ready",
    "loading": "loading weights",
    "busy": "computing",
    "lost": "lost",
}
STATE_ROLES = {
    "starting": "warning",
    "ready": "good",
    "loading": "warning",
    "busy": "accent",
    "lost": "bad",
}


@dataclass(slots=True)
class Row:
    """One line of the list.

    Attributes:
        key: the same for the same thing at any time.
        icon: a name that `Look.icon` knows; empty where the colour square stands.
        device: whose colour the line carries; empty for none.
        role: theme role of the state's text.
    """

    key: str
    texts: tuple[str, ...]
    icon: str = ""
    device: str = ""
    role: str = "text_muted"
    tip: str = ""
    children: list[Row] = field(default_factory=list)


def node_rows(nodes: tuple[NodeState, ...], part_of: Callable[[str], str]) -> list[Row]:
    """The tree of rows.

    Args:
        part_of: what a device does in the plan in force, in words; empty for nothing.
    """
    return [_node_row(node, part_of) for node in nodes]


def summary(nodes: tuple[NodeState, ...]) -> str:
    """Such as "3 nodes ready" or "2 nodes ready · 1 lost"."""
    if not nodes:
        return "looking for this computer"
    lost = sum(node.state == "lost" for node in nodes)
    starting = sum(node.state == "starting" for node in nodes)
    parts = [f"{plural(len(nodes) - lost - starting, 'node')} ready"]
    if starting:
        parts.append(f"{starting} starting")
    if lost:
        parts.append(f"{lost} lost")
    return " · ".join(parts)


def _node_row(node: NodeState, part_of: Callable[[str], str]) -> Row:
    name = "this computer" if node.name == "this" else node.name
    kind = {"this": "", "simulated": "  (simulated)", "remote": f"  ({node.host_name})"}[node.kind]
    state = STATE_WORDS[node.state]
    texts = (
        f"{name}{kind}",
        f"{state}: {node.reason}" if node.reason else state,
        _percent(node.cpu_percent),
        _memory(node),
        figure_rate(node.network_in_bytes_per_second),
        figure_rate(node.network_out_bytes_per_second),
        "",
    )
    row = Row(
        node.name,
        texts,
        icon="simulated" if node.kind == "simulated" else "computer",
        role=STATE_ROLES[node.state],
        tip=f"{node.host_name}, version {node.version}",
    )
    row.children = [_device_row(device, part_of) for device in node.devices]
    for process in node.processes:
        row.children.append(
            Row(
                f"{node.name} process {process.pid}",
                (
                    process.role,
                    "",
                    _percent(process.cpu_percent),
                    figure_bytes(process.memory_bytes),
                    "",
                    "",
                    str(process.pid),
                ),
                icon="process",
            )
        )
    return row


def _device_row(device: NodeDevice, part_of: Callable[[str], str]) -> Row:
    part = part_of(device.device) if device.in_use else ""
    kind = "CPU" if device.kind == "cpu" else "GPU"
    label = f"{kind}  {device.label}" if device.label else kind
    memory = figure_bytes(device.memory_bytes or None)
    texts = (label, part or "not in the split", "", f"{memory} in all", "", "", "")
    if memory == UNKNOWN:
        texts = (*texts[:3], UNKNOWN, *texts[4:])
    return Row(device.device, texts, device=device.device, tip=device.device)


def _percent(value: float | None) -> str:
    return UNKNOWN if value is None else figure_percent(round(value / 100, 2))


def _memory(node: NodeState) -> str:
    used = figure_bytes(node.memory_used_bytes)
    return used if used == UNKNOWN else f"{used} of {figure_bytes(node.memory_total_bytes)}"
