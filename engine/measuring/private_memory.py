"""The most memory that each process of a session had for itself alone.

In: the processes that this one started, directly or not, while a watch is on. Out: bytes by role.
Private means anonymous memory (RssAnon on Linux, unique set size elsewhere): pages of mapped files
belong to the system's file cache and are not counted. It looks 20 times a second; what comes and
goes between two looks is not seen.
"""

from __future__ import annotations

import mmap
import sys
import threading
from types import TracebackType
from typing import Literal, Self

import psutil

Role = Literal["host", "worker", "runner"]

LOOKS_PER_SECOND = 20
# Looking for new processes reads the whole process table, so it is done less often.
LOOKS_PER_SEARCH = 5
_PAGE_BYTES = mmap.PAGESIZE


def private_bytes(pid: int) -> int:
    """What a process has in memory for itself alone, now; 0 where it is gone."""
    if sys.platform == "linux":
        try:
            # Resident pages less those that belong to files are RssAnon of /proc/PID/status, which
            # takes six times as long to read.
            with open(f"/proc/{pid}/statm", "rb") as file:
                _size, resident, shared, *_rest = file.read().split()
        except (OSError, ValueError):
            return 0
        return (int(resident) - int(shared)) * _PAGE_BYTES
    try:
        return int(psutil.Process(pid).memory_full_info().uss)
    except psutil.Error:
        return 0


class MemoryWatch:
    """Watches from `with` to its end; start it before the session."""

    def __init__(self) -> None:
        """Nothing was seen yet."""
        self._peaks: dict[int, int] = {}
        self._roles: dict[int, Role] = {}
        self._should_search = True
        self._should_end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="memory watch", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._should_end.set()
        self._thread.join()

    def settle(self) -> None:
        """All processes are there: what is timed from now on is not disturbed by a search."""
        self._search()
        self._should_search = False

    def peak(self, role: Role) -> int:
        """Bytes of the process of this role that had the most; 0 where there was none."""
        return max(
            (self._peaks.get(pid, 0) for pid, r in self._roles.items() if r == role), default=0
        )

    def _run(self) -> None:
        looks = 0
        while True:
            if self._should_search and looks % LOOKS_PER_SEARCH == 0:
                self._search()
            looks += 1
            for pid in list(self._roles):
                self._peaks[pid] = max(self._peaks.get(pid, 0), private_bytes(pid))
            if self._should_end.wait(1 / LOOKS_PER_SECOND):
                return

    def _search(self) -> None:
        for process in psutil.Process().children(recursive=True):
            if process.pid in self._roles:
                continue
            try:
                role = _role_of(process.cmdline())
            except psutil.Error:
                continue  # It ended meanwhile.
            if role is not None:
                self._roles[process.pid] = role


def _role_of(command: list[str]) -> Role | None:
    if "shardmix-runner" in command:
        return "runner"
    if "shardmix-worker" in command:
        return "worker"
    return "host" if "shardmix-host" in command else None
