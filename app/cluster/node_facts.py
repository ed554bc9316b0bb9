"""What is known of one node, in words, and what can be done with it. No Qt.

In: a node's state, the plan's links and loads, the version of this computer. Out: facts with a
title, a value and where it comes from; the actions that make sense.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum

from app.figures import (
    UNKNOWN,
    figure,
    figure_age,
    figure_bit_rate,
    figure_bytes,
    figure_flops,
    figure_percent,
    figure_rate,
    figure_seconds,
)
from app.node_list import AVAILABLE_STATES, UNTRUSTED_STATES
from engine.cluster.messages import GpuUsage
from engine.host.messages import Link, LoadedBytes, NodeDevice, NodeState

FINGERPRINT_BYTES = 8


class Action(Enum):
    """What a person can do with a node; the value is the button's text."""

    PAIR = "Pair…"
    ADD = "Add to plan"
    FORGET = "Forget"


@dataclass(frozen=True, slots=True)
class Fact:
    """One thing that is known, or is not.

    Attributes:
        key: the same for the same thing at any time.
        tip: where it comes from.
    """

    key: str
    title: str
    value: str
    tip: str
    is_warning: bool = False


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What a node's facts need besides the node.

    Attributes:
        label: of a device, for a person.
    """

    own_version: str
    links: Mapping[tuple[str, str], Link]
    loaded: Mapping[str, LoadedBytes]
    label: Callable[[str], str]


def fingerprint(key: str) -> str:
    """The short form of a public key that people compare, such as "7f:a2:…"; a dash for none."""
    if not key:
        return UNKNOWN
    digest = hashlib.sha256(key.encode("ascii", "replace")).digest()
    return digest[:FINGERPRINT_BYTES].hex(":")


def display_name(node: NodeState) -> str:
    """A node's name for a person."""
    return "this computer" if node.name == "this" else node.name


def age_text(node: NodeState, now: float) -> str:
    """How long it has been in its state; empty where that is not known.

    Args:
        now: seconds since the epoch.
    """
    return figure_age(now - node.since_s) if node.since_s else ""


def actions(node: NodeState, is_computing: bool) -> list[Action]:
    """What makes sense now, the most likely first.

    Args:
        is_computing: whether it has a share in the plan in force.
    """
    found: list[Action] = []
    if node.state == "discovered":
        found.append(Action.PAIR)
    if node.state in AVAILABLE_STATES and not is_computing and node.devices:
        found.append(Action.ADD)
    is_known = node.kind == "remote" and node.state not in UNTRUSTED_STATES
    if is_known or (node.state == "lost" and node.kind != "this"):
        found.append(Action.FORGET)
    return found


def devices_to_add(node: NodeState) -> list[str]:
    """What "Add to plan" gives a part to: its GPUs, or its CPU where it has none."""
    gpus = [device.device for device in node.devices if device.kind != "cpu"]
    return gpus or [device.device for device in node.devices]


def node_facts(node: NodeState, around: Surroundings) -> list[Fact]:
    """Everything that is known of a node, in the order in which it is read."""
    facts: list[Fact] = []
    if node.kind == "remote":
        tip = "First 8 bytes of the SHA-256 of its public key, which is its identity"
        facts.append(Fact("fingerprint", "Fingerprint", fingerprint(node.key), tip))
    facts.append(_version(node, around.own_version))
    is_linked = node.state not in (*UNTRUSTED_STATES, "lost")
    facts.append(
        Fact("encrypted", "Encrypted", "yes" if is_linked else UNKNOWN, "CURVE, always on")
    )
    if node.endpoint:
        facts.append(
            Fact(
                "address",
                "Address",
                node.endpoint.removeprefix("tcp://"),
                "Where its worker listens",
            )
        )
    if not is_linked:
        return facts
    facts += _link_facts(node, around)
    facts.append(
        Fact(
            "cpu",
            "CPU",
            _joined(_percent(node.cpu_percent), _unit(node.cpu_temperature_c, "°C"), _watts(node)),
            "Load of all cores, temperature and power, as its sensors say",
        )
    )
    facts += [_gpu_fact(node, gpu) for gpu in node.gpus]
    facts += _speed_facts(node)
    facts += _loaded_facts(node, around)
    return facts


def gpu_of(node: NodeState, device: NodeDevice) -> GpuUsage | None:
    """What a device's GPU is doing; None for a CPU, and where nobody says."""
    return next((gpu for gpu in node.gpus if _is_same(gpu.device, device.device)), None)


def memory_text(used: float | None, total: float | None) -> str:
    """Such as "5.20 GB of 16.0 GB"."""
    text = figure_bytes(used)
    return text if text == UNKNOWN else f"{text} of {figure_bytes(total)}"


def loaded_text(item: LoadedBytes) -> str:
    """Such as "0 B sent, 98.4 MB from its disk"."""
    parts = [f"{figure_bytes(item.received)} sent"]
    if item.cached or not item.local:
        parts.append(f"{figure_bytes(item.cached)} from its disk")
    if item.local:
        parts.append(f"{figure_bytes(item.local)} from its own copy of the model")
    return ", ".join(parts)


def link_text(round_trip_seconds: float | None, bytes_per_second: float | None) -> str:
    """Such as "0.400 ms, 940 Mbit/s"."""
    if round_trip_seconds is None and bytes_per_second is None:
        return UNKNOWN
    return f"{figure_seconds(round_trip_seconds)}, {figure_bit_rate(bytes_per_second)}"


def _version(node: NodeState, own: str) -> Fact:
    tip = "Of Shardmix on that computer, compared with this one"
    if not node.version:
        return Fact("version", "Version", UNKNOWN, tip)
    if node.kind != "remote" or not own:
        return Fact("version", "Version", node.version, tip)
    is_same = node.version == own
    value = f"{node.version} (same as here)" if is_same else f"{node.version} (here {own})"
    return Fact("version", "Version", value, tip, is_warning=not is_same)


def _link_facts(node: NodeState, around: Surroundings) -> list[Fact]:
    facts: list[Fact] = []
    if node.kind == "remote":
        text = link_text(node.round_trip_seconds, node.bytes_per_second)
        tip = "Round trip and speed between this computer and its worker, as measured"
        facts.append(Fact("link", "Link to here", text, tip))
    tip = "Round trip and speed between two devices of the plan, refreshed from what goes over it"
    for (first, second), link in around.links.items():
        if first.partition("/")[0] != node.name:
            continue
        text = link_text(link.round_trip_seconds, link.bytes_per_second)
        several = len(node.devices) > 1
        title = (
            f"{around.label(first)} to {around.label(second)}"
            if several
            else (f"To {around.label(second)}")
        )
        facts.append(Fact(f"link {first} {second}", title, text, tip))
    return facts


def _gpu_fact(node: NodeState, gpu: GpuUsage) -> Fact:
    device = next((item for item in node.devices if _is_same(gpu.device, item.device)), None)
    title = device.label if device is not None and device.label else gpu.device
    value = _joined(
        _percent(gpu.percent),
        memory_text(gpu.memory_used_bytes, gpu.memory_total_bytes),
        _unit(gpu.temperature_c, "°C"),
        f"{figure(gpu.power_w)} W",
    )
    tip = "Load, memory, temperature and power, as its driver says"
    return Fact(f"gpu {gpu.device}", title, value, tip)


def _speed_facts(node: NodeState) -> list[Fact]:
    tip = "Matrix product in float32 and reading memory, measured once by its worker"
    facts: list[Fact] = []
    for speed in node.speeds:
        name = speed.device.rpartition("/")[2].upper()
        value = _joined(
            figure_flops(speed.flops), f"memory {figure_rate(speed.memory_bytes_per_second)}"
        )
        facts.append(Fact(f"speed {speed.device}", f"Speed of {name}", value, tip))
    return facts or [Fact("speed", "Speed", UNKNOWN, tip)]


def _loaded_facts(node: NodeState, around: Surroundings) -> list[Fact]:
    tip = "Where the weights of the plan in force came from, in the file's format"
    own = [device.device for device in node.devices if device.device in around.loaded]
    facts: list[Fact] = []
    for device in own:
        title = "Weights" if len(own) == 1 else f"Weights of {around.label(device)}"
        facts.append(Fact(f"loaded {device}", title, loaded_text(around.loaded[device]), tip))
    return facts


def _is_same(short: str, device: str) -> bool:
    """Whether a worker's name of a device and the cluster's are of the same one."""
    return short in (device, device.partition("/")[2])


def _joined(*parts: str) -> str:
    return " · ".join(parts)


def _percent(value: float | None) -> str:
    return UNKNOWN if value is None else figure_percent(round(value / 100, 2))


def _unit(value: float | None, unit: str) -> str:
    return f"{UNKNOWN} {unit}" if value is None else f"{value:.0f} {unit}"


def _watts(node: NodeState) -> str:
    return f"{figure(node.cpu_power_w)} W"
