"""A lock between processes, held on a file and released by the system when its holder dies.

In: a path. Out: mutual exclusion. It is advisory: only those who use it are kept out.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

from engine.errors import Cancelled

_POLL_SECONDS = 0.2


def _try_lock(descriptor: int) -> bool:
    try:
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


class FileLock:
    """A context manager; entering waits until the lock is free."""

    def __init__(self, path: Path, cancelled: Callable[[], bool]) -> None:
        """Args: path: made if absent, and left behind. cancelled: ends the waiting."""
        self._path = path
        self._cancelled = cancelled
        self._descriptor = -1

    def __enter__(self) -> Self:
        """Raises: Cancelled: while waiting. OSError: the file cannot be made."""
        self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            while not _try_lock(self._descriptor):
                if self._cancelled():
                    raise Cancelled("waiting for another process to fetch the model was cancelled")
                time.sleep(_POLL_SECONDS)
        except BaseException:
            os.close(self._descriptor)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        os.close(self._descriptor)  # closing releases
