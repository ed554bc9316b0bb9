"""The draft model of the open model, and the process on this computer that computes it.

In: an open draft model. Out: where its runner listens, or why there is none; the scheduler talks to
it. A process that ends is not started again: answers go on without its guesses. Belongs to the
host's main thread; starting and ending the process take seconds and happen in threads.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from engine.cluster.processes import Address, Child, Greeting
from engine.cluster.runner_links import RunnerAddress
from engine.cluster.runner_start import runner_settings, start_runner
from engine.cluster.security import KeyPair
from engine.cluster.transport import new_local_endpoint
from engine.decode.draft_model import DraftPlan
from engine.errors import WorkerLost
from engine.host.opened_draft import DRAFT_DEVICE, OpenedDraft

logger = logging.getLogger(__name__)

START_SECONDS = 60.0
# A frozen process does not hear that it should end.
END_SECONDS = 1.0


class DraftRunner:
    """See the module.

    Attributes:
        model: which it computes; closed by `end`.
    """

    def __init__(
        self,
        model: OpenedDraft,
        keys: KeyPair,
        call_soon: Callable[[Callable[[], None]], None],
        on_change: Callable[[], None],
        on_exit: Callable[[bytes, str], None],
        on_lost: Callable[[str], None],
    ) -> None:
        """Start the process.

        Args:
            keys: the host's own.
            call_soon: runs a function in the main thread.
            on_change: it listens now, or never will.
            on_exit: (public key, cause): the process ended, which the scheduler should know.
            on_lost: (why): there are no guesses any more; called once.
        """
        self.model = model
        self._keys = keys
        self._call_soon = call_soon
        self._on_change = on_change
        self._on_exit = on_exit
        self._on_lost = on_lost
        self._address: RunnerAddress | None = None
        self._is_lost = False
        self._lock = threading.Lock()
        self._is_over = False
        self._child: Child | None = None
        self._starter = threading.Thread(target=self._start, name="start draft", daemon=True)
        self._starter.start()

    @property
    def is_settled(self) -> bool:
        """Whether it listens, or never will."""
        return self._address is not None or self._is_lost

    @property
    def is_lost(self) -> bool:
        """Whether there are no guesses of it any more; its process has ended, or will now."""
        return self._is_lost

    def plan(self, num_threads: int, kept_positions: int) -> DraftPlan | None:
        """What the scheduler needs of it; None where it is lost.

        Args: as `OpenedDraft.load_request`.
        """
        if self._address is None or self._is_lost:
            return None
        load = self.model.load_request(num_threads, kept_positions)
        return DraftPlan(load, self._address, self.model.checkpoint)

    def lose(self, reason: str) -> None:
        """It cannot be used any more: end the process, and tell, once."""
        if self._is_lost or self._is_over:
            return
        self._is_lost = True
        logger.warning("the draft model is lost: %s", reason)
        self.end_process()
        self._on_lost(reason)
        self._on_change()

    def end(self) -> threading.Thread:
        """End the process and close the model, which nobody may read any more.

        Returns: the thread that waits for the process.
        """
        thread = self.end_process()
        self.model.close()
        return thread

    def end_process(self) -> threading.Thread:
        """End the process alone, which the scheduler may be waiting for."""
        with self._lock:
            self._is_over = True
        thread = threading.Thread(target=self._wait_for_end, name="end draft", daemon=True)
        thread.start()
        return thread

    # ---- in threads --------------------------------------------------------------------------

    def _start(self) -> None:
        try:
            settings = runner_settings(
                new_local_endpoint(), "tcp://127.0.0.1:*", "zmq", "", 0, is_host_here=True
            )
            greeting = Greeting(self._keys.public.decode("ascii"), settings)
            with self._lock:
                if self._is_over:
                    return
                child = self._child = start_runner(DRAFT_DEVICE, greeting, self._exited)
            address = child.address(START_SECONDS)
        except WorkerLost as error:
            cause = str(error)
            self._call_soon(lambda: self.lose(cause))
        except Exception as error:
            # Whatever it is: plans wait until this has an end.
            logger.exception("while starting the draft model's process")
            cause = f"its process cannot be started: {getattr(error, 'strerror', None) or error}"
            self._call_soon(lambda: self.lose(cause))
        else:
            self._call_soon(lambda: self._take(address))

    def _wait_for_end(self) -> None:
        if self._child is not None:
            self._child.end(END_SECONDS)
        self._starter.join(END_SECONDS)

    def _exited(self, child: Child) -> None:
        if child.is_ending:
            return
        cause = child.cause()
        self._call_soon(lambda: self._take_exit(cause))

    # ---- the main thread ---------------------------------------------------------------------

    def _take(self, address: Address) -> None:
        control, exchange, *_ = address.endpoints
        self._address = RunnerAddress(
            DRAFT_DEVICE, control, exchange, address.public_key.encode("ascii"), self._keys
        )
        self._on_change()

    def _take_exit(self, cause: str) -> None:
        """The scheduler tells how it was lost, if it was in use."""
        if self._address is not None:
            self._on_exit(self._address.public_key, cause)
