"""How much of this computer its owner lends: which devices, how much memory, how many cores.

In: the flags of `shardmix-worker run` and the devices found. Out: the devices that engine hosts
hear of. Nothing is enforced here: a host plans with what it is told, and threads follow cores.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from engine.cluster.messages import DeviceInfo
from engine.errors import ConfigError

UNITS = {"MB": 10**6, "MIB": 2**20, "GB": 10**9, "GIB": 2**30, "TB": 10**12, "TIB": 2**40}
SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([A-Za-z]+)")
PERCENTAGE = re.compile(r"(\d+(?:\.\d+)?)\s*%")


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What the owner said; None and () limit nothing.

    Attributes:
        devices: kinds to lend, such as "cpu" and "cuda0".
        memory: "8GB" or "75%" of the computer's memory.
        threads: cores to lend.
        leave_cores: cores to keep.
    """

    devices: tuple[str, ...] = ()
    memory: str | None = None
    threads: int | None = None
    leave_cores: int | None = None

    def apply(self, found: Sequence[DeviceInfo]) -> tuple[DeviceInfo, ...]:
        """The devices to lend.

        Args:
            found: what the computer has; names are "NODE/KIND".
        Raises: ConfigError: a limit that this computer cannot keep.
        """
        kinds = [info.device.rpartition("/")[2] for info in found]
        for kind in self.devices:
            if kind not in kinds:
                raise ConfigError(
                    f"--devices {','.join(self.devices)}: this computer has no {kind!r}, it has "
                    f"{', '.join(kinds)}. Name some of these"
                )
        wanted = self.devices or tuple(kinds)
        return tuple(
            self._lend(info) for info, kind in zip(found, kinds, strict=True) if kind in wanted
        )

    def _lend(self, info: DeviceInfo) -> DeviceInfo:
        if info.kind != "cpu":
            return info
        return msgspec.structs.replace(
            info,
            num_cores=self._cores(info.num_cores),
            memory_bytes=self._memory(info.memory_bytes),
        )

    def _cores(self, available: int) -> int:
        if self.threads is not None and self.leave_cores is not None:
            raise ConfigError(
                "--threads and --leave-cores say the same thing in two ways; give one of them"
            )
        if self.threads is not None:
            if not 1 <= self.threads <= available:
                raise ConfigError(
                    f"--threads {self.threads}: this computer has {available} cores; give 1 to "
                    f"{available}"
                )
            return self.threads
        if self.leave_cores is not None:
            if not 0 <= self.leave_cores < available:
                raise ConfigError(
                    f"--leave-cores {self.leave_cores}: this computer has {available} cores and "
                    f"one must be lent; give 0 to {available - 1}"
                )
            return available - self.leave_cores
        return available

    def _memory(self, available_bytes: int) -> int:
        if self.memory is None:
            return available_bytes
        percentage = PERCENTAGE.fullmatch(self.memory.strip())
        if percentage is not None:
            size_bytes = int(available_bytes * float(percentage[1]) / 100)
        else:
            size_bytes = parse_size(self.memory, "--memory-limit")
        if not 0 < size_bytes <= available_bytes:
            raise ConfigError(
                f"--memory-limit {self.memory}: this computer has {available_bytes / 1e9:.1f} GB; "
                "give a part of it, such as 75%"
            )
        return size_bytes


def parse_size(text: str, flag: str) -> int:
    """Bytes of a size such as "8GB" or "512 MiB"; "0" is nothing.

    Raises: ConfigError: it is none; names `flag`.
    """
    if text.strip() == "0":
        return 0
    found = SIZE.fullmatch(text.strip())
    if found is None or found[2].upper() not in UNITS:
        raise ConfigError(
            f"{flag} {text!r} is no size: a number and MB, GB, TB, MiB, GiB or TiB, such as 8GB"
        )
    return int(float(found[1]) * UNITS[found[2].upper()])


def parse_devices(text: str | None) -> tuple[str, ...]:
    """Kinds in a list such as "cpu,cuda0".

    Raises: ConfigError: an empty name.
    """
    if text is None:
        return ()
    kinds = tuple(part.strip() for part in text.split(","))
    if not all(kinds):
        raise ConfigError(
            f"--devices {text!r} has an empty name; give names with commas, such as cpu,cuda0"
        )
    return kinds
