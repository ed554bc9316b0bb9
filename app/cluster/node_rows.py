"""Nodes, devices and processes as rows of text. No Qt.

In: the node states of the session. Out: a small tree of rows with keys that stay the same while
their figures change.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from app.cluster.node_facts import age_text, display_name, gpu_of, memory_text
from app.figures import UNKNOWN, figure_bytes, figure_percent, figure_rate, plural
from engine.host.messages import NodeDevice, NodeState, Progress

COLUMNS = ("Name", "State", "Load", "Memory", "Network in", "Network out", "Process")
TIPS = (
    "A computer, its devices, and the processes that work for us on it",
    "What the node is doing, and for how long, as its worker says",
    "Of a node: of all its cores. Of a process: 100 % is one core. Measured once a second",
    "Of a node or GPU: used of all. Of a process: resident memory. Measured once a second",
    "Bytes that came in over all interfaces in the last second",
    "Bytes that went out over all interfaces in the last second",
    "Process id on that computer",
)
STATE_WORDS = {
    "discovered": "discovered",
    "pairing": "pairing",
    "starting": "starting",
    "ready": "ready",
    "loading": "loading weights",
    "busy": "computing",
    "stale": "stale",
    "lost": "lost",
}
STATE_ROLES = {
    "discovered": "accent",
    "pairing": "accent",
    "starting": "warning",
    "ready": "good",
    "loading": "warning",
    "busy": "accent",
    "stale": "warning",
    "lost": "bad",
}
# A node that computes changes its state with every answer: how long says nothing.
_AGELESS = ("ready", "busy")


@dataclass(frozen=True, slots=True, kw_only=True)
class InUse:
    """What the session knows of a node's devices.

    Attributes:
        part_of: what a device does in the plan in force, in words; empty for nothing.
        progress_of: how far a device's weights are; None where none are on their way.
    """

    part_of: Callable[[str], str]
    progress_of: Callable[[str], Progress | None]


@dataclass(slots=True)
class Row:
    """One line of the list.

    Attributes:
        key: the same for the same thing at any time.
        icon: a name that `Look.icon` knows; empty where the colour square stands.
        device: whose colour the line carries; empty for none.
        role: theme role of the state's text.
        state: of a node; empty for what is in it.
    """

    key: str
    texts: tuple[str, ...]
    icon: str = ""
    device: str = ""
    role: str = "text_muted"
    tip: str = ""
    state: str = ""
    children: list[Row] = field(default_factory=list)


def node_rows(nodes: tuple[NodeState, ...], in_use: InUse, now: float) -> list[Row]:
    """The tree of rows.

    Args:
        now: seconds since the epoch.
    """
    return [_node_row(node, in_use, now) for node in nodes]


def summary(nodes: tuple[NodeState, ...], is_stopped: bool = False) -> str:
    """Such as "3 nodes ready" or "2 nodes ready · 1 lost".

    Args:
        is_stopped: whether a split was meant to run and none does.
    """
    if not nodes:
        return "looking for this computer"
    counts = Counter(node.state for node in nodes)
    there = counts["ready"] + counts["loading"] + counts["busy"]
    parts = [f"{plural(there, 'node')} ready"]
    parts += [
        f"{counts[state]} {state}"
        for state in ("starting", "pairing", "discovered", "stale", "lost")
        if counts[state]
    ]
    if is_stopped:
        parts.append("no split is running")
    return " · ".join(parts)


def state_text(node: NodeState, now: float) -> str:
    """A node's state, for how long, and why, such as "stale 42 s: no word from its worker".

    Args:
        now: seconds since the epoch.
    """
    words = [STATE_WORDS[node.state]]
    if node.state not in _AGELESS:
        words.append(age_text(node, now))
    text = " ".join(word for word in words if word)
    return f"{text}: {node.reason}" if node.reason else text


def _node_row(node: NodeState, in_use: InUse, now: float) -> Row:
    kind = ""
    if node.kind == "simulated":
        kind = "  (simulated)"
    elif node.kind == "remote" and node.host_name not in ("", node.name):
        kind = f"  ({node.host_name})"
    texts = (
        f"{display_name(node)}{kind}",
        state_text(node, now),
        _percent(node.cpu_percent),
        memory_text(node.memory_used_bytes, node.memory_total_bytes),
        figure_rate(node.network_in_bytes_per_second),
        figure_rate(node.network_out_bytes_per_second),
        "",
    )
    row = Row(
        node.name,
        texts,
        icon="simulated" if node.kind == "simulated" else "computer",
        role=STATE_ROLES[node.state],
        tip=_tip(node),
        state=node.state,
    )
    row.children = [_device_row(node, device, in_use) for device in node.devices]
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


def _device_row(node: NodeState, device: NodeDevice, in_use: InUse) -> Row:
    kind = "CPU" if device.kind == "cpu" else "GPU"
    label = f"{kind}  {device.label}" if device.label else kind
    gpu = gpu_of(node, device)
    if gpu is not None:
        load = _percent(gpu.percent)
        memory = memory_text(gpu.memory_used_bytes, gpu.memory_total_bytes)
    else:
        load = ""
        memory = figure_bytes(device.memory_bytes or None)
        memory = memory if memory == UNKNOWN else f"{memory} in all"
    texts = (label, _doing(device, in_use), load, memory, "", "", "")
    return Row(device.device, texts, device=device.device, tip=device.device)


def _doing(device: NodeDevice, in_use: InUse) -> str:
    progress = in_use.progress_of(device.device)
    if progress is not None and progress.total and progress.done < progress.total:
        share = figure_percent(round(progress.done / progress.total, 2))
        amount = f"{figure_bytes(progress.done)} of {figure_bytes(progress.total)}"
        return f"loading {share} · {amount}"
    part = in_use.part_of(device.device) if device.in_use else ""
    return part or "not in the split"


def _tip(node: NodeState) -> str:
    known = [node.host_name, f"version {node.version}" if node.version else "", node.endpoint]
    return ", ".join(text for text in known if text)


def _percent(value: float | None) -> str:
    return UNKNOWN if value is None else figure_percent(round(value / 100, 2))
