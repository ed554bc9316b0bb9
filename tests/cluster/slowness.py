"""Makes processes slow: stops them most of the time, as a machine with other work would.

In: processes, the share of the time that they may run. Out: a block in which they do. Their sockets
and helper threads are as slow as the rest, and all goes on at the end.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence

import psutil

# Much shorter than what anyone takes for hung.
PERIOD_SECONDS = 0.25


@contextlib.contextmanager
def slowed(processes: Sequence[psutil.Process], share: float) -> Iterator[None]:
    """Let processes run for a share of the time while a block runs."""
    is_over = threading.Event()

    def run() -> None:
        while not is_over.is_set():
            for process in processes:
                with contextlib.suppress(psutil.Error):
                    process.suspend()
            is_over.wait(PERIOD_SECONDS * (1 - share))
            for process in processes:
                with contextlib.suppress(psutil.Error):
                    process.resume()
            is_over.wait(PERIOD_SECONDS * share)

    thread = threading.Thread(target=run, name="slowness")
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()
