"""What a worker says, checked before anything else reads it: it may be broken, or lie.

In: a message as it came over the wire, and where its worker is. Out: the same message, fit for
plans, for a table and for a terminal. What it means is decided elsewhere.
"""

from __future__ import annotations

import contextlib
import ipaddress
import math
import re
from collections.abc import Collection, Sequence

from msgspec.structs import replace

from engine.cluster import messages as m
from engine.cluster.security import is_public_key
from engine.errors import ProtocolError, one_line

MAX_DEVICES = 64
# A worker, its speed test, and a runner for each device, generously.
MAX_PROCESSES = 2 * MAX_DEVICES
# Bytes, or operations a second: more than any computer has.
MAX_FIGURE = 1 << 60
MAX_CORES = 1 << 16
MAX_CAUSE = 500

_KIND = re.compile(r"cpu|cuda\d{1,3}")
_ADDRESS = re.compile(r"(\[[0-9A-Za-z:.%]+\]|[0-9A-Za-z_.-]+):([0-9]{1,5})")


def checked(message: m.Message, own_addresses: Collection[str] | None) -> m.Message:
    """The message with text that can be shown and numbers that are some.

    Figures of telemetry that are none become 0 or None: a sensor may be broken. Anything else
    that cannot be is refused.

    Args:
        own_addresses: host names and addresses under which a remote worker is reached, where
            alone its runners may listen; None for a worker that this host has started.
    Raises: ProtocolError: no worker that works would say so.
    """
    if isinstance(message, m.NodeDescription):
        return _description(message)
    if isinstance(message, m.Telemetry):
        return _telemetry(message)
    if isinstance(message, m.SpeedReport):
        _check_devices([speed.device for speed in message.devices])
        figures = [f for s in message.devices for f in (s.flops, s.memory_bytes_per_second)]
        if not all(map(_is_figure, [*figures, message.disk_bytes_per_second or 0.0])):
            raise ProtocolError("SpeedReport has a speed that is none")
    elif isinstance(message, m.RunnerStarted):
        _check_started(message, own_addresses)
    elif isinstance(message, m.RunnerExited):
        _check_devices([message.device])
        return replace(message, cause=one_line(message.cause, MAX_CAUSE))
    elif isinstance(message, m.Busy):
        return replace(message, holder=one_line(message.holder, 100))
    elif isinstance(message, m.Failed):
        return replace(message, message=one_line(message.message, MAX_CAUSE))
    return message


def host_of(endpoint: str) -> str:
    """The host part of "tcp://HOST:PORT"."""
    return endpoint.removeprefix("tcp://").rpartition(":")[0]


def _description(message: m.NodeDescription) -> m.NodeDescription:
    _check_devices([info.device for info in message.devices])
    if not message.devices:
        raise ProtocolError("a node without devices; it lends one at least")
    for info in message.devices:
        if not info.device.rpartition("/")[2].startswith(info.kind):
            raise ProtocolError(f"{one_line(info.device, 80)} is called a {info.kind}")
        least_cores = 1 if info.kind == "cpu" else 0
        are_cores = least_cores <= info.num_cores <= MAX_CORES
        if not (0 <= info.memory_bytes <= MAX_FIGURE and are_cores):
            raise ProtocolError(
                f"{one_line(info.device, 80)} is said to have {info.num_cores} cores and "
                f"{info.memory_bytes} bytes of memory"
            )
    return replace(
        message,
        name=one_line(message.name, 64),
        host_name=one_line(message.host_name, 100),
        machine=one_line(message.machine, 64),
        system=one_line(message.system, 200),
        version=one_line(message.version, 32),
        devices=tuple(replace(d, label=one_line(d.label, 100)) for d in message.devices),
    )


def _telemetry(message: m.Telemetry) -> m.Telemetry:
    _check_devices([gpu.device for gpu in message.gpus])
    if len(message.processes) > MAX_PROCESSES:
        raise ProtocolError(
            f"Telemetry of {len(message.processes)} processes; up to {MAX_PROCESSES} are taken"
        )
    return replace(
        message,
        cpu_percent=_figure(message.cpu_percent),
        memory_used_bytes=_count(message.memory_used_bytes),
        memory_total_bytes=_count(message.memory_total_bytes),
        network_in_bytes_per_second=_figure(message.network_in_bytes_per_second),
        network_out_bytes_per_second=_figure(message.network_out_bytes_per_second),
        processes=tuple(
            replace(
                process,
                role=one_line(process.role, 100),
                pid=_count(process.pid),
                cpu_percent=_figure(process.cpu_percent),
                memory_bytes=_count(process.memory_bytes),
            )
            for process in message.processes
        ),
        cpu_temperature_c=_reading(message.cpu_temperature_c),
        cpu_power_w=_reading(message.cpu_power_w),
        gpus=tuple(
            replace(
                gpu,
                percent=_reading(gpu.percent),
                memory_used_bytes=_count(gpu.memory_used_bytes),
                memory_total_bytes=_count(gpu.memory_total_bytes),
                temperature_c=_reading(gpu.temperature_c),
                power_w=_reading(gpu.power_w),
            )
            for gpu in message.gpus
        ),
    )


def _check_devices(names: Sequence[str]) -> None:
    """Names end in what the device is; what is before that is the worker's own name for itself.

    Raises: ProtocolError: they do not, or not each of them alone.
    """
    if len(names) > MAX_DEVICES:
        raise ProtocolError(f"{len(names)} devices; a node may have up to {MAX_DEVICES}")
    kinds = [name.rpartition("/")[2] for name in names]
    for name, kind in zip(names, kinds, strict=True):
        if not _KIND.fullmatch(kind) or not kind.isascii():
            raise ProtocolError(
                f"{one_line(name, 80)!r} is no device; their names end in cpu or cuda0, cuda1 ..."
            )
        if kinds.count(kind) > 1:
            raise ProtocolError(f"{one_line(name, 80)} is there more than once")


def _check_started(message: m.RunnerStarted, own_addresses: Collection[str] | None) -> None:
    _check_devices([message.device])
    if not is_public_key(message.public_key):
        raise ProtocolError(f"the key of the runner of {one_line(message.device, 80)} is none")
    if own_addresses is None:
        return
    own = {_plain(address) for address in own_addresses}
    endpoints = [message.control_endpoint, message.exchange_endpoint]
    if message.rendezvous:
        endpoints.append(f"tcp://{message.rendezvous}")
    for endpoint in endpoints:
        found = _ADDRESS.fullmatch(endpoint.removeprefix("tcp://"))
        is_address = endpoint.startswith("tcp://") and found is not None
        if found is None or not is_address or not 0 < int(found[2]) < 65536:
            raise ProtocolError(
                f"{one_line(endpoint, 100)!r} is no address of a runner; it must be tcp://HOST:PORT"
            )
        if _plain(found[1]) not in own:
            raise ProtocolError(
                f"its runner is said to listen at {found[0]}, which is not on the worker's own "
                f"address {', '.join(sorted(own))}"
            )


def _plain(host: str) -> str:
    """A host in the one form that can be compared."""
    host = host.strip("[]").lower()
    with contextlib.suppress(ValueError):
        address = ipaddress.ip_address(host)
        if isinstance(address, ipaddress.IPv6Address):
            # Which of our interfaces leads there is no part of the other's address.
            address = address.ipv4_mapped or ipaddress.IPv6Address(host.partition("%")[0])
        return str(address)
    return host


def _is_figure(number: float) -> bool:
    return math.isfinite(number) and 0 <= number <= MAX_FIGURE


def _figure(number: float) -> float:
    return number if _is_figure(number) else 0.0


def _count(number: int) -> int:
    return min(max(number, 0), MAX_FIGURE)


def _reading(number: float | None) -> float | None:
    """Of a sensor; temperatures may be below zero."""
    if number is None or not math.isfinite(number) or abs(number) > MAX_FIGURE:
        return None
    return number
