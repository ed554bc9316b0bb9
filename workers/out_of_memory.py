"""The kernel's word on whether it ended a process because memory ran out.

In: the kernel's counters, where they can be read. Out: whether they rose. Linux only; elsewhere,
and in sandboxes that hide them, nothing is known.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

SYSTEM_COUNTER = Path("/proc/vmstat")


def counter_files(own_groups: str, root: Path = Path("/sys/fs/cgroup")) -> list[Path]:
    """Where kills for memory are counted: of this process's control group, then system-wide.

    Args:
        own_groups: text of /proc/self/cgroup.
        root: where control groups are mounted.
    """
    files: list[Path] = []
    for line in own_groups.splitlines():
        _, _, rest = line.partition(":")
        controllers, _, group = rest.partition(":")
        place = group.strip().lstrip("/")
        if controllers == "":
            files.append(root / place / "memory.events")
        elif controllers == "memory":
            files.append(root / "memory" / place / "memory.oom_control")
    return [*files, SYSTEM_COUNTER]


class KillCounter:
    """Counts from the moment it is made."""

    def __init__(self, files: Sequence[Path] | None = None) -> None:
        """Args: files: where to look; None finds out."""
        if files is None:
            try:
                files = counter_files(Path("/proc/self/cgroup").read_text(encoding="utf-8"))
            except OSError:
                files = ()
        self._files = tuple(files)
        self._before = self._read()

    def has_risen(self) -> bool:
        """Whether the kernel has ended something for memory since."""
        return any(
            now > before
            for before, now in zip(self._before, self._read(), strict=True)
            if before is not None and now is not None
        )

    def _read(self) -> list[int | None]:
        return [_read_kills(path) for path in self._files]


def _read_kills(path: Path) -> int | None:
    try:
        text = path.read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    found = re.search(r"^oom_kill (\d+)$", text, re.MULTILINE)
    return int(found[1]) if found else None
