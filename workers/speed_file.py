"""The file that keeps what a computer measured of itself.

In: figures and the hardware they hold for. Out: the same, or nothing where the file is missing,
damaged or of other hardware. Device names in it are without the node's, which may change.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import msgspec

logger = logging.getLogger(__name__)


class MeasuredDevice(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A device to measure: "cpu" or "cuda0", its name for a person, its cores."""

    device: str
    label: str
    num_cores: int


class Hardware(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What figures hold for."""

    devices: tuple[MeasuredDevice, ...]
    torch: str


class Speed(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What one device reached, as in messages.DeviceSpeed."""

    device: str
    flops: float
    memory_bytes_per_second: float


class Figures(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a computer reached; `disk_bytes_per_second` of the folder with this file."""

    devices: tuple[Speed, ...]
    disk_bytes_per_second: float | None


class _Kept(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    hardware: Hardware
    figures: Figures


@dataclass(frozen=True, slots=True)
class SpeedFile:
    """One such file; it may not be there yet."""

    path: Path

    def read(self, hardware: Hardware) -> Figures | None:
        """The figures, if they are of this hardware."""
        try:
            kept = msgspec.json.decode(self.path.read_bytes(), type=_Kept)
        except FileNotFoundError:
            return None
        except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
            logger.warning("%s cannot be used and will be measured again: %s", self.path, error)
            return None
        if kept.hardware != hardware or not _are_sane(kept.figures):
            return None
        return kept.figures

    def write(self, hardware: Hardware, figures: Figures) -> None:
        """Keep figures, all or nothing.

        Raises: OSError: the folder cannot be written.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=self.path.parent, prefix=f".{self.path.name}.")
        try:
            with os.fdopen(handle, "wb") as stream:
                stream.write(msgspec.json.encode(_Kept(hardware=hardware, figures=figures)))
            Path(name).replace(self.path)
        except OSError:
            with contextlib.suppress(OSError):
                Path(name).unlink()
            raise


def _are_sane(figures: Figures) -> bool:
    """Whether a plan may be made with them: a zero would be divided by."""
    values = [value for speed in figures.devices for value in _values(speed)]
    if figures.disk_bytes_per_second is not None:
        values.append(figures.disk_bytes_per_second)
    return all(math.isfinite(value) and value > 0 for value in values)


def _values(speed: Speed) -> tuple[float, float]:
    return speed.flops, speed.memory_bytes_per_second
