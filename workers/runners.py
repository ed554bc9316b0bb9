"""The runner processes of a node: one per device in use, started, watched, ended.

In: which device to start or end. Out: RunnerStarted and RunnerExited for the engine host, through
the worker's mailbox. Starting and ending take seconds and happen in threads; which runner is the
present one of its device is decided in the worker's loop alone.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

from engine.cluster import messages as m
from engine.cluster.processes import Child, Greeting
from engine.cluster.runner_start import start_runner
from engine.errors import WorkerLost
from workers.out_of_memory import KillCounter

logger = logging.getLogger(__name__)

START_SECONDS = 60.0
# A frozen runner does not hear that it should end; it is killed after this, well before this
# process must be gone itself.
END_SECONDS = 1.0
# For all of them together, when this process ends.
CLOSE_SECONDS = 2.5


class RunnerEvent(NamedTuple):
    """What a thread has to say about a runner; `number` names the start it belongs to."""

    number: int
    message: m.RunnerStarted | m.RunnerExited


class _Launch:
    """One start of one device's runner."""

    def __init__(self, device: str, number: int) -> None:
        self.device = device
        self.number = number
        self.kills = KillCounter()
        self._lock = threading.Lock()
        self._child: Child | None = None
        self._is_over = False

    @property
    def child(self) -> Child | None:
        return self._child

    def spawn(self, start: Callable[[], Child]) -> Child | None:
        """Start the process, unless it is not wanted any more."""
        with self._lock:
            if not self._is_over:
                self._child = start()
            return self._child

    def end(self) -> None:
        """End the process, or see to it that there will be none."""
        with self._lock:
            self._is_over = True
        if self._child is not None:
            self._child.end(END_SECONDS)


class Runners:
    """All runners of a worker; every method is for the worker's loop."""

    def __init__(self, put: Callable[[RunnerEvent], None]) -> None:
        """Args: put: takes what happens; called from threads."""
        self._put = put
        self._launches: dict[str, _Launch] = {}
        self._number = 0
        self._starters: list[threading.Thread] = []
        self._enders: dict[threading.Thread, str] = {}

    @property
    def processes(self) -> dict[str, int]:
        """Process ids by device."""
        return {
            device: launch.child.pid
            for device, launch in self._launches.items()
            if launch.child is not None
        }

    def start(self, device: str, greeting: Greeting) -> None:
        """Start the runner of a device; one that it has already is ended first."""
        self.end(device)
        self._number += 1
        launch = self._launches[device] = _Launch(device, self._number)
        # Its memory must be free before the new one takes any.
        before = [thread for thread, ended in self._enders.items() if ended == device]
        thread = threading.Thread(
            target=self._start,
            args=(launch, greeting, before),
            name=f"start {device}",
            daemon=True,
        )
        self._starters = [t for t in self._starters if t.is_alive()] + [thread]
        thread.start()

    def end(self, device: str) -> None:
        """End the runner of a device, if it has one; does not wait."""
        launch = self._launches.pop(device, None)
        if launch is None:
            return
        thread = threading.Thread(target=launch.end, name=f"end {device}", daemon=True)
        self._enders = {t: d for t, d in self._enders.items() if t.is_alive()}
        self._enders[thread] = device
        thread.start()

    def end_all(self) -> None:
        """End all of them; does not wait."""
        for device in list(self._launches):
            self.end(device)

    def take(self, event: RunnerEvent) -> m.RunnerStarted | m.RunnerExited | None:
        """What an event means for the engine host; None when it is of a runner that was ended."""
        launch = self._launches.get(event.message.device)
        if launch is None or launch.number != event.number:
            return None
        if isinstance(event.message, m.RunnerExited):
            self.end(event.message.device)  # The process is gone; its threads and pipes are not.
        return event.message

    def close(self) -> None:
        """End all of them and wait for it."""
        self.end_all()
        deadline = time.monotonic() + CLOSE_SECONDS
        for thread in [*self._enders, *self._starters]:
            thread.join(max(0.0, deadline - time.monotonic()))

    # ---- in threads --------------------------------------------------------------------------

    def _start(self, launch: _Launch, greeting: Greeting, before: list[threading.Thread]) -> None:
        for thread in before:
            thread.join()
        try:
            child = launch.spawn(lambda: self._spawn(launch, greeting))
        except OSError as error:
            self._exited(launch, 0, f"its process cannot be started: {error.strerror}")
            return
        if child is None:
            return
        try:
            address = child.address(START_SECONDS)
        except WorkerLost as error:
            self._exited(launch, child.pid, str(error))
            return
        control, exchange, *rendezvous = address.endpoints
        started = m.RunnerStarted(
            device=launch.device,
            pid=child.pid,
            control_endpoint=control,
            exchange_endpoint=exchange,
            public_key=address.public_key.encode("ascii"),
            rendezvous=rendezvous[0] if rendezvous else "",
        )
        self._put(RunnerEvent(launch.number, started))

    def _spawn(self, launch: _Launch, greeting: Greeting) -> Child:
        return start_runner(launch.device, greeting, lambda child: self._on_exit(launch, child))

    def _on_exit(self, launch: _Launch, child: Child) -> None:
        if not child.is_ending:
            cause = child.cause(is_out_of_memory=launch.kills.has_risen())
            self._exited(launch, child.pid, cause)

    def _exited(self, launch: _Launch, pid: int, cause: str) -> None:
        logger.warning("the runner of %s: %s", launch.device, cause)
        exited = m.RunnerExited(device=launch.device, pid=pid, cause=cause)
        self._put(RunnerEvent(launch.number, exited))
