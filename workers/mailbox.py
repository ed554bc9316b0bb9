"""What helper threads say to the worker's loop, which sleeps in a poll meanwhile.

In: anything, from any thread. Out: all of it, in order, in the loop's thread.
"""

from __future__ import annotations

import contextlib
import queue
import socket
from typing import Generic, TypeVar

T = TypeVar("T")


class Mailbox(Generic[T]):
    """A queue whose arrival of something can be polled for beside sockets."""

    def __init__(self) -> None:
        """Open the pair of sockets that wakes the loop."""
        self._queue: queue.SimpleQueue[T] = queue.SimpleQueue()
        self.near, self._far = socket.socketpair()
        self.near.setblocking(False)
        self._far.setblocking(False)

    def put(self, item: T) -> None:
        """Leave something; any thread, and signal handlers."""
        self._queue.put(item)
        self.wake()

    def wake(self) -> None:
        """Let the loop look around; any thread, and signal handlers."""
        # Full means that it will wake; closed, that nobody listens any more.
        with contextlib.suppress(OSError):
            self._far.send(b"\0")

    def take_all(self) -> list[T]:
        """What has come since the last call; the loop only."""
        with contextlib.suppress(BlockingIOError):
            while self.near.recv(4096):
                pass
        items: list[T] = []
        with contextlib.suppress(queue.Empty):
            while True:
                items.append(self._queue.get_nowait())
        return items

    def close(self) -> None:
        """Close the sockets."""
        self.near.close()
        self._far.close()
