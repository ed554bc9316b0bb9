"""How fast this computer is: measured once, kept, and told from then on.

In: the devices, and the folder where the figures are kept. Out: a SpeedReport. The measuring is
done in a child process of low priority (`speed_process`), because it needs torch and all cores,
and the worker has neither to spare.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import msgspec

from engine.cluster.messages import DeviceInfo, DeviceSpeed, SpeedReport
from engine.cluster.processes import Child, Greeting
from workers.speed_file import Hardware, MeasuredDevice, SpeedFile

logger = logging.getLogger(__name__)

FILE_NAME = "speed.json"
# Measuring takes three seconds; a computer under load takes long to import torch.
DEADLINE_SECONDS = 120.0


class SpeedTest:
    """Knows the figures of this computer, or finds them."""

    def __init__(self, node_name: str, devices: Sequence[DeviceInfo], folder: Path) -> None:
        """Read the figures kept from an earlier time, if they are of this hardware.

        Args:
            node_name: what the names of the devices in the report begin with.
            devices: what to measure, as `list_devices` tells.
            folder: the cache folder, whose disk is measured too.
        """
        self._node_name = node_name
        self._file = SpeedFile(folder / FILE_NAME)
        self._hardware = hardware_of(devices)
        self._figures = self._file.read(self._hardware)
        self._child: Child | None = None
        self._deadline: threading.Timer | None = None
        self._is_done = threading.Event()

    def start(self, *, again: bool = False) -> None:
        """Measure in the background, if that was not done on this hardware; returns at once.

        Args:
            again: measure also where figures are kept.
        """
        if self._child is not None or (self._figures is not None and not again):
            return
        self._child = Child(
            "workers.speed_process",
            ["shardmix-speed-test"],
            Greeting(
                parent_key="",
                settings={
                    "file": str(self._file.path),
                    "hardware": msgspec.to_builtins(self._hardware),
                },
            ),
            # As the driver numbers GPUs in list_devices.
            environment={"CUDA_DEVICE_ORDER": "PCI_BUS_ID"},
            on_exit=self._on_exit,
        )
        self._deadline = threading.Timer(DEADLINE_SECONDS, self._give_up, (self._child,))
        self._deadline.daemon = True
        self._deadline.start()

    def report(self) -> SpeedReport | None:
        """The figures; None where they are not known (yet). Returns at once."""
        figures = self._figures
        if figures is None:
            return None
        return SpeedReport(
            devices=tuple(
                DeviceSpeed(
                    device=f"{self._node_name}/{speed.device}",
                    flops=speed.flops,
                    memory_bytes_per_second=speed.memory_bytes_per_second,
                )
                for speed in figures.devices
            ),
            disk_bytes_per_second=figures.disk_bytes_per_second,
        )

    def wait(self) -> SpeedReport | None:
        """After `start`: the figures once they are measured; None where that failed."""
        if self._child is not None:
            self._is_done.wait(DEADLINE_SECONDS)
        return self.report()

    def close(self) -> None:
        """End a measurement that still runs."""
        if self._deadline is not None:
            self._deadline.cancel()
        if self._child is not None:
            self._child.end(0)

    def _on_exit(self, child: Child) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
        if not child.is_ending:
            if child.process.returncode == 0:
                self._figures = self._file.read(self._hardware)
            if child.process.returncode != 0 or self._figures is None:
                logger.warning(
                    "this computer's speed could not be measured: %s; plans are made without it, "
                    "the next start measures again",
                    child.cause(),
                )
        child.end(0)  # Releases its pipes.
        self._is_done.set()

    def _give_up(self, child: Child) -> None:
        if child.process.poll() is not None:
            return
        logger.warning(
            "measuring this computer's speed did not end within %.0f s and was stopped; plans are "
            "made without it, the next start measures again",
            DEADLINE_SECONDS,
        )
        child.end(0)


def hardware_of(devices: Sequence[DeviceInfo]) -> Hardware:
    """What figures depend on; with another processor, number of cores or torch they are void."""
    return Hardware(
        devices=tuple(
            MeasuredDevice(
                device=info.device.rpartition("/")[2],
                label=info.label,
                num_cores=info.num_cores,
            )
            for info in devices
        ),
        torch=metadata.version("torch"),
    )
