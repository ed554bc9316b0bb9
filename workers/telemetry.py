"""What a node is and does: hardware, and live use of CPU, memory and network.

In: process ids to watch. Out: messages for the engine host. It measures; it does not judge.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import socket
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

from engine.cluster.messages import DeviceInfo, ProcessUsage, Telemetry


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
    devices = [
        DeviceInfo(
            device=f"{node_name}/cpu",
            kind="cpu",
            label=f"{cpu_label()}, {cores} cores",
            num_cores=cores,
            memory_bytes=psutil.virtual_memory().total,
        )
    ]
    return (*devices, *_list_gpus(node_name))


def _list_gpus(node_name: str) -> list[DeviceInfo]:
    import pynvml as untyped  # pyright: ignore[reportMissingTypeStubs]

    pynvml: Any = untyped
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return []  # No driver: no GPU to offer.
    try:
        devices: list[DeviceInfo] = []
        for index in range(pynvml.nvmlDeviceGetCount()):
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            name = pynvml.nvmlDeviceGetName(handle)
            devices.append(
                DeviceInfo(
                    device=f"{node_name}/cuda{index}",
                    kind="cuda",
                    label=name if isinstance(name, str) else name.decode("utf-8", "replace"),
                    num_cores=0,
                    memory_bytes=int(pynvml.nvmlDeviceGetMemoryInfo(handle).total),
                )
            )
        return devices
    except pynvml.NVMLError:
        return []  # A driver that does not answer offers no GPU; the CPU stays.
    finally:
        pynvml.nvmlShutdown()


class Meter:
    """Measures use since its last reading."""

    def __init__(self) -> None:
        """Take the first reading, which later ones compare with."""
        self._processes: dict[int, psutil.Process] = {}
        self._network_at = time.monotonic()
        self._network = psutil.net_io_counters()
        psutil.cpu_percent()

    def read(self, roles: Mapping[int, str]) -> Telemetry:
        """Use since the last call.

        Args:
            roles: what each watched process id does.
        """
        memory = psutil.virtual_memory()
        network, now = psutil.net_io_counters(), time.monotonic()
        seconds = max(now - self._network_at, 1e-3)
        before, self._network, self._network_at = self._network, network, now
        return Telemetry(
            cpu_percent=psutil.cpu_percent(),
            memory_used_bytes=memory.total - memory.available,
            memory_total_bytes=memory.total,
            network_in_bytes_per_second=(network.bytes_recv - before.bytes_recv) / seconds,
            network_out_bytes_per_second=(network.bytes_sent - before.bytes_sent) / seconds,
            processes=tuple(
                usage
                for pid, role in roles.items()
                if (usage := self._read_process(pid, role)) is not None
            ),
        )

    def forget(self, pid: int) -> None:
        """Stop watching a process that ended."""
        self._processes.pop(pid, None)

    def _read_process(self, pid: int, role: str) -> ProcessUsage | None:
        try:
            if pid not in self._processes:
                self._processes[pid] = psutil.Process(pid)
                self._processes[pid].cpu_percent()  # The first reading has nothing to compare with.
            process = self._processes[pid]
            with process.oneshot():
                return ProcessUsage(
                    role=role,
                    pid=pid,
                    cpu_percent=process.cpu_percent(),
                    memory_bytes=process.memory_info().rss,
                )
        except psutil.Error:
            self.forget(pid)
            return None
