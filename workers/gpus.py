"""The NVIDIA GPUs of this computer, as their driver shows them.

In: the driver's library. Out: what they are, and what they do now. Where there is no driver there
are no GPUs; a figure that the driver refuses is None.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

from engine.cluster.messages import DeviceInfo, GpuUsage


def _load_driver_library() -> Any:
    import pynvml  # pyright: ignore[reportMissingTypeStubs]

    return pynvml


class Gpus:
    """An open driver; opening costs milliseconds, reading does not."""

    def __init__(self, driver: Any = None) -> None:
        """Open the driver, if there is one.

        Args:
            driver: the module `pynvml`, or one with its functions.
        """
        self._driver = driver if driver is not None else _load_driver_library()
        self._handles: dict[int, Any] = {}
        try:
            self._driver.nvmlInit()
        except self._driver.NVMLError:
            self._is_open = False
            return
        self._is_open = True
        for index in range(self._ask(self._driver.nvmlDeviceGetCount) or 0):
            handle = self._ask(self._driver.nvmlDeviceGetHandleByIndex, index)
            if handle is not None:
                self._handles[index] = handle

    def close(self) -> None:
        """Let the driver go."""
        self._handles.clear()
        if self._is_open:
            self._is_open = False
            with contextlib.suppress(self._driver.NVMLError):
                self._driver.nvmlShutdown()

    def driver_version(self) -> str | None:
        """As NVIDIA numbers it, such as "560.35.03"."""
        return self._text(self._driver.nvmlSystemGetDriverVersion) if self._is_open else None

    def devices(self, node_name: str) -> list[DeviceInfo]:
        """The GPUs that tell name and memory, which a plan needs."""
        devices: list[DeviceInfo] = []
        for index, handle in self._handles.items():
            name = self._text(self._driver.nvmlDeviceGetName, handle)
            memory = self._ask(self._driver.nvmlDeviceGetMemoryInfo, handle)
            if name is not None and memory is not None:
                devices.append(
                    DeviceInfo(
                        device=f"{node_name}/cuda{index}",
                        kind="cuda",
                        label=name,
                        num_cores=0,
                        memory_bytes=int(memory.total),
                    )
                )
        return devices

    def read(self, node_name: str) -> tuple[GpuUsage, ...]:
        """What each GPU does now; its memory counts as 0 where the driver does not say."""
        driver = self._driver
        usages: list[GpuUsage] = []
        for index, handle in self._handles.items():
            rates = self._ask(driver.nvmlDeviceGetUtilizationRates, handle)
            memory = self._ask(driver.nvmlDeviceGetMemoryInfo, handle)
            celsius = self._ask(
                driver.nvmlDeviceGetTemperature, handle, driver.NVML_TEMPERATURE_GPU
            )
            milliwatts = self._ask(driver.nvmlDeviceGetPowerUsage, handle)
            usages.append(
                GpuUsage(
                    device=f"{node_name}/cuda{index}",
                    percent=None if rates is None else float(rates.gpu),
                    memory_used_bytes=0 if memory is None else int(memory.used),
                    memory_total_bytes=0 if memory is None else int(memory.total),
                    temperature_c=None if celsius is None else float(celsius),
                    power_w=None if milliwatts is None else milliwatts / 1000,
                )
            )
        return tuple(usages)

    def _ask(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """What the driver answers; None where this GPU or this driver has no such figure."""
        try:
            return function(*arguments)
        except self._driver.NVMLError:
            return None

    def _text(self, function: Callable[..., Any], *arguments: Any) -> str | None:
        answer = self._ask(function, *arguments)
        # Older versions of the library answer in bytes.
        return answer.decode("utf-8", "replace") if isinstance(answer, bytes) else answer
