"""What the engine host does before a call reaches the scheduler: opening models, reading prompts.

In: work of a call. Out: whatever the work does, or the call's failure. Images have a thread of
their own, because their encoding may take minutes: prompts without any go past them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Literal

from engine.errors import EngineError

logger = logging.getLogger(__name__)

Kind = Literal["text", "images"]


class Preparation:
    """See the module; its methods belong to the host's main thread."""

    def __init__(self, fail: Callable[[int, EngineError], None]) -> None:
        """Start no thread yet.

        Args:
            fail: ends a call; called in the thread of the work.
        """
        self._fail = fail
        self._pools: dict[Kind, ThreadPoolExecutor] = {
            "text": ThreadPoolExecutor(1, thread_name_prefix="text"),
            "images": ThreadPoolExecutor(1, thread_name_prefix="images"),
        }
        self._futures: dict[int, Future[None]] = {}

    def begin(self, request_id: int, kind: Kind, what: str, work: Callable[[], None]) -> None:
        """Queue work of a call.

        Args:
            what: the call, for messages.
        """
        self._futures[request_id] = self._pools[kind].submit(self._guard, request_id, what, work)

    def cancel(self, request_id: int) -> bool:
        """Take a call's work out of its queue; False where it has begun, or there is none."""
        future = self._futures.get(request_id)
        return future is not None and future.cancel()

    def forget(self, request_id: int) -> None:
        """The call has ended."""
        self._futures.pop(request_id, None)

    def close(self) -> None:
        """Begin nothing more; what has begun goes on until it is told to end."""
        for pool in self._pools.values():
            pool.shutdown(wait=False, cancel_futures=True)

    def _guard(self, request_id: int, what: str, work: Callable[[], None]) -> None:
        """Run work; whatever it raises ends the call, not the thread."""
        try:
            work()
        except EngineError as error:
            self._fail(request_id, error)
        except Exception as error:
            logger.exception("while serving %s", what)
            failure = EngineError(f"{what} failed: {type(error).__name__}: {error}")
            self._fail(request_id, failure)
