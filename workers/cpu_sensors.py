"""Temperature and power of the processor, from the files in which Linux shows them.

In: the folder /sys, and the time. Out: degrees and watts; None where there is no such file or it
may not be read (the energy counter is root's on most systems). Elsewhere than on Linux there is
nothing to read.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

SYSTEM_FILES = Path("/sys")

# Drivers of sensors inside the processor: Intel, AMD, and those of small ARM boards.
_CPU_CHIPS = ("coretemp", "k10temp", "zenpower", "cpu_thermal", "soc_thermal", "scpi_sensors")
# Labels of the sensor for the whole package. Tdie before Tctl, which some AMD models offset.
_PACKAGE_LABELS = ("Package id", "Tdie", "Tctl")
_CPU_ZONES = ("x86_pkg_temp", "cpu-thermal", "cpu_thermal", "soc-thermal", "cpu")
# "intel-rapl:0" is a package, "intel-rapl:0:0" a part of it; AMD's carry the same name.
_PACKAGE_ZONE = re.compile(r"intel-rapl:\d+")


@dataclass(slots=True)
class _EnergyCounter:
    """Microjoules a package has used, starting again at 0 after `range_uj`."""

    path: Path
    range_uj: int
    last_uj: int | None = None


class CpuSensors:
    """Finds the files once; psutil would look through all sensors at each reading."""

    def __init__(self, system_files: Path = SYSTEM_FILES) -> None:
        """Look for the files.

        Args:
            system_files: the folder that is /sys.
        """
        self._temperatures = _temperature_files(system_files)
        self._counters = _energy_counters(system_files)
        self._read_at: float | None = None

    def temperature_c(self) -> float | None:
        """Degrees Celsius of the hottest package."""
        degrees = [value for path in self._temperatures if (value := _number(path)) is not None]
        return max(degrees) / 1000 if degrees else None

    def power_w(self, now_seconds: float) -> float | None:
        """Watts of all packages together since the last call; None at the first.

        Args:
            now_seconds: a clock that never goes back.
        """
        before, self._read_at = self._read_at, now_seconds
        used_uj: int | None = None
        for counter in self._counters:
            last_uj, counter.last_uj = counter.last_uj, _number(counter.path)
            if last_uj is None or counter.last_uj is None:
                continue
            difference = counter.last_uj - last_uj
            if difference < 0:
                difference += counter.range_uj
            if difference >= 0:
                used_uj = (used_uj or 0) + difference
        if used_uj is None or before is None or now_seconds <= before:
            return None
        return used_uj / 1e6 / (now_seconds - before)


def _temperature_files(system_files: Path) -> list[Path]:
    """The sensors of whole packages; one of a part where there is none of the whole."""
    files: list[Path] = []
    for chip in sorted((system_files / "class" / "hwmon").glob("hwmon*")):
        if _text(chip / "name") not in _CPU_CHIPS:
            continue
        inputs = [path for path in sorted(chip.glob("temp*_input")) if _number(path) is not None]
        labels = {path: _text(path.with_name(f"{path.name[:-6]}_label")) for path in inputs}
        for wanted in _PACKAGE_LABELS:
            found = [path for path in inputs if labels[path].startswith(wanted)]
            if found:
                files += found
                break
        else:
            files += inputs[:1]
    if files:
        return files
    return [
        zone / "temp"
        for zone in sorted((system_files / "class" / "thermal").glob("thermal_zone*"))
        if _text(zone / "type") in _CPU_ZONES and _number(zone / "temp") is not None
    ]


def _energy_counters(system_files: Path) -> list[_EnergyCounter]:
    counters: list[_EnergyCounter] = []
    for zone in sorted((system_files / "class" / "powercap").glob("intel-rapl:*")):
        # psys counts the whole computer, packages included.
        if not _PACKAGE_ZONE.fullmatch(zone.name) or _text(zone / "name") == "psys":
            continue
        if _number(zone / "energy_uj") is not None:
            range_uj = _number(zone / "max_energy_range_uj") or 0
            counters.append(_EnergyCounter(zone / "energy_uj", range_uj))
    return counters


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def _number(path: Path) -> int | None:
    """The file's whole number; None where it cannot be read or holds none."""
    try:
        return int(path.read_bytes())
    except (OSError, ValueError):
        return None
