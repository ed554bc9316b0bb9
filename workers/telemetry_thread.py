"""Reads the meter beside the worker's loop, which must answer while a driver takes its time.

In: how often, and which processes. Out: Telemetry, handed to the loop. What is measured is
`telemetry`'s business.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Mapping

from engine.cluster.messages import Telemetry
from engine.host.telemetry_rate import MAX_HZ, MIN_HZ
from workers.telemetry import Meter

END_SECONDS = 1.0


class TelemetryThread:
    """Owns the meter; the only thread that touches it."""

    def __init__(self, meter: Meter, put: Callable[[Telemetry], None]) -> None:
        """Start, silent until `set_rate`.

        Args:
            put: takes each reading; called from the thread.
        """
        self._meter = meter
        self._put = put
        self._change = threading.Condition()
        self._seconds: float | None = None
        self._roles: Mapping[int, str] = {}
        self._is_ending = False
        self._thread = threading.Thread(target=self._run, name="telemetry", daemon=True)
        self._thread.start()

    def set_rate(self, hz: float | None) -> None:
        """Read so many times a second, MIN_HZ to MAX_HZ; None stops."""
        # A peer's number may be none at all: NaN is not larger than MIN_HZ.
        seconds = None if hz is None else 1 / (min(hz, MAX_HZ) if hz > MIN_HZ else MIN_HZ)
        with self._change:
            if seconds != self._seconds:
                self._seconds = seconds
                self._change.notify()

    def set_roles(self, roles: Mapping[int, str]) -> None:
        """Watch these process ids from now on; values say what each does."""
        self._roles = dict(roles)

    def close(self) -> None:
        """End the thread; a driver that hangs does not keep it."""
        with self._change:
            self._is_ending = True
            self._change.notify()
        self._thread.join(END_SECONDS)
        if not self._thread.is_alive():
            self._meter.close()

    def _run(self) -> None:
        watched: set[int] = set()
        last_at = -math.inf
        while (due := self._wait_until_due(last_at)) is not None:
            roles = self._roles
            for pid in watched - roles.keys():
                self._meter.forget(pid)
            watched = set(roles)
            # What was late by a little does not make all later ones late; by more, it starts over.
            now = time.monotonic()
            last_at = due if now - due < 1 / MAX_HZ else now
            self._put(self._meter.read(roles))

    def _wait_until_due(self, last_at: float) -> float | None:
        """Wait for the next reading's time; None to end. A changed rate counts from the last one."""
        with self._change:
            while not self._is_ending:
                left = None
                if self._seconds is not None:
                    due = last_at + self._seconds
                    left = due - time.monotonic()
                    if left <= 0:
                        return due
                self._change.wait(left)
        return None
