"""Which engine host has this worker.

In: who says Hello, when, and whether the holder can still be reached. Out: whom to serve. It sends
nothing and looks at no clock.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Claim = Literal["new", "kept", "taken over", "busy"]


@dataclass(frozen=True, slots=True)
class Holder:
    """The engine host that is served.

    Attributes:
        key: its public key, which is its identity.
        route: its connection.
        host_name: what it calls itself.
        heard_at: when it last said something, in seconds of a monotonic clock.
    """

    key: bytes
    route: bytes
    host_name: str
    heard_at: float


class Lease:
    """Belongs to one engine host until that says it is done, vanishes, or falls silent."""

    def __init__(self, seconds: float | None) -> None:
        """Args: seconds: of silence that end it; None never ends it."""
        self._seconds = seconds
        self.holder: Holder | None = None

    def claim(
        self,
        key: bytes,
        route: bytes,
        host_name: str,
        now: float,
        is_reachable: Callable[[], bool],
    ) -> Claim:
        """A host says Hello.

        A host that started over has the key of the holder, and so has a second one of the same
        installation: only the connection of the first tells them apart.

        Args:
            is_reachable: whether the holder's connection still stands; asked only of another
                connection than the holder's.
        Returns: "new": it has the free lease now. "kept": it had it. "taken over": the holder was
            gone, and whatever it started must end. "busy": the holder keeps it.
        """
        held = self.holder
        if held is not None and held.route == route and held.key == key:
            self.holder = Holder(key, route, host_name, now)
            return "kept"
        if held is not None and not self.is_expired(now) and is_reachable():
            return "busy"
        self.holder = Holder(key, route, host_name, now)
        return "new" if held is None else "taken over"

    def is_held_by(self, key: bytes, route: bytes) -> bool:
        """Whether a message comes from the holder."""
        held = self.holder
        return held is not None and (held.key, held.route) == (key, route)

    def is_expired(self, now: float) -> bool:
        """Whether the holder has been silent for too long."""
        held = self.holder
        return (
            held is not None and self._seconds is not None and (now - held.heard_at > self._seconds)
        )

    def free(self) -> None:
        """Nobody has it any more."""
        self.holder = None
