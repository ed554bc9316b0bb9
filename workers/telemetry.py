"""What a node is and does: hardware, and live use of CPU, memory and network.

In: process ids to watch. Out: messages for the engine host. It measures; it does not judge.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import platform
import socket
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import psutil

from engine.cluster.messages import DeviceInfo, ProcessUsage, Telemetry
from workers.cpu_sensors import CpuSensors
from workers.gpus import Gpus

# Memory and processes cost most of a reading, and nobody watches them change ten times a second.
MEMORY_SECONDS = 0.5


def usable_cores() -> int:
    """Cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def machine_id() -> str:
    """A name of this computer that all its workers share and no other computer has."""
    own = f"{uuid.getnode():012x}"
    for place in ("/etc/machine-id", "/var/lib/dbus/machine-id"):
        with contextlib.suppress(OSError):
            own = Path(place).read_text(encoding="ascii").strip() or own
            break
    # The number itself is confidential: it identifies the computer to anyone.
    return hashlib.sha256(f"shardmix {own} {socket.gethostname()}".encode()).hexdigest()[:16]


def cpu_label() -> str:
    """The processor's name for a person."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def list_devices(node_name: str) -> tuple[DeviceInfo, ...]:
    """The CPU of this computer and the NVIDIA GPUs its driver shows."""
    cores = usable_cores()
    cpu = DeviceInfo(
        device=f"{node_name}/cpu",
        kind="cpu",
        label=f"{cpu_label()}, {cores} cores",
        num_cores=cores,
        memory_bytes=psutil.virtual_memory().total,
    )
    gpus = Gpus()
    try:
        return (cpu, *gpus.devices(node_name))
    finally:
        gpus.close()


def system_label() -> str:
    """System and versions that decide how a node computes: "Linux 6.1, torch 2.13.0, driver 560"."""
    # From its metadata: importing torch takes seconds and hundreds of megabytes.
    parts = [f"{platform.system()} {platform.release()}", f"torch {metadata.version('torch')}"]
    gpus = Gpus()
    try:
        driver = gpus.driver_version()
    finally:
        gpus.close()
    return ", ".join([*parts, f"driver {driver}"] if driver else parts)


def _network_bytes() -> tuple[int, int]:
    """Bytes received and sent by all interfaces; goes back when one of them is unplugged."""
    counters = psutil.net_io_counters(nowrap=False)
    return counters.bytes_recv, counters.bytes_sent


@dataclass(slots=True)
class _Watched:
    """A process and its last reading; half the work of psutil's own cpu_percent."""

    process: psutil.Process
    busy_seconds: float | None = None
    read_at: float = 0.0

    def percent(self, busy_seconds: float, now: float) -> float:
        """Share of one core since the last reading; 0 at the first."""
        before, self.busy_seconds = self.busy_seconds, busy_seconds
        seconds, self.read_at = now - self.read_at, now
        if before is None or seconds <= 0:
            return 0.0
        return max(busy_seconds - before, 0.0) / seconds * 100


class Meter:
    """Measures use since its last reading."""

    def __init__(self, node_name: str, memory_seconds: float = MEMORY_SECONDS) -> None:
        """Take the first reading, which later ones compare with.

        Args:
            node_name: what the names of this node's GPUs begin with.
            memory_seconds: memory and processes are looked at no more often.
        """
        self._memory_seconds = memory_seconds
        self._node_name = node_name
        self._gpus = Gpus()
        self._sensors = CpuSensors()
        self._sensors.power_w(time.monotonic())
        self._processes: dict[int, _Watched] = {}
        self._network_at = time.monotonic()
        self._network = _network_bytes()
        self._memory_at = -math.inf
        self._memory = psutil.virtual_memory()
        self._roles: dict[int, str] = {}
        self._usages: tuple[ProcessUsage, ...] = ()
        psutil.cpu_percent()

    def read(self, roles: Mapping[int, str]) -> Telemetry:
        """Use since the last call; memory and processes perhaps of a little earlier.

        Args:
            roles: what each watched process id does.
        """
        network, now = _network_bytes(), time.monotonic()
        if now - self._memory_at >= self._memory_seconds or roles != self._roles:
            self._memory_at, self._roles = now, dict(roles)
            self._memory = psutil.virtual_memory()
            usages = [self._read_process(pid, role, now) for pid, role in roles.items()]
            self._usages = tuple(usage for usage in usages if usage is not None)
        memory = self._memory
        seconds = max(now - self._network_at, 1e-3)
        before, self._network, self._network_at = self._network, network, now
        return Telemetry(
            cpu_percent=psutil.cpu_percent(),
            memory_used_bytes=memory.total - memory.available,
            memory_total_bytes=memory.total,
            network_in_bytes_per_second=max(network[0] - before[0], 0) / seconds,
            network_out_bytes_per_second=max(network[1] - before[1], 0) / seconds,
            processes=self._usages,
            cpu_temperature_c=self._sensors.temperature_c(),
            cpu_power_w=self._sensors.power_w(now),
            gpus=self._gpus.read(self._node_name),
        )

    def close(self) -> None:
        """Let the GPUs' driver go."""
        self._gpus.close()

    def forget(self, pid: int) -> None:
        """Stop watching a process that ended."""
        self._processes.pop(pid, None)

    def _read_process(self, pid: int, role: str, now: float) -> ProcessUsage | None:
        try:
            watched = self._processes.get(pid)
            if watched is None:
                watched = self._processes[pid] = _Watched(psutil.Process(pid))
            times = watched.process.cpu_times()
            memory_bytes = watched.process.memory_info().rss
        except psutil.Error:
            self.forget(pid)
            return None
        return ProcessUsage(
            role=role,
            pid=pid,
            cpu_percent=watched.percent(times.user + times.system, now),
            memory_bytes=memory_bytes,
        )
