"""What a link can do, from pings at first and from the traffic on it afterwards.

In: times and sizes of messages. Out: round trip and bandwidth. No clock is read here. The two ends
of a link have clocks that started at different times; a message's age by both clocks is therefore
off by a constant, which cancels out where ages of both directions are added, or two of one
direction subtracted.
"""

from __future__ import annotations

from collections.abc import Callable

# An age counts for this long: old enough to have seen a quick message, too young for the two
# clocks to have drifted apart by more than some microseconds.
WINDOW_NS = 10_000_000_000
# Up to here a message's age is latency, from here on it is bandwidth.
SMALL_BYTES = 16 << 10
LARGE_BYTES = 64 << 10
_SHORTEST_SECONDS = 1e-6


class _Best:
    """The best value of the last one to two windows."""

    def __init__(self, choose: Callable[[float, float], float]) -> None:
        self._choose = choose
        self.value: float | None = None
        self._values: list[float | None] = [None, None]
        self._window = 0

    def take(self, value: float, now_ns: int) -> None:
        window = now_ns // WINDOW_NS
        if window != self._window:
            self._values = [None, self._values[0] if window == self._window + 1 else None]
            self._window = window
        current = self._values[0]
        current = self._values[0] = value if current is None else self._choose(current, value)
        before = self._values[1]
        self.value = current if before is None else self._choose(current, before)


class LinkEstimate:
    """One link, as one end sees it.

    Attributes:
        round_trip_seconds: of a small message and its answer.
        bytes_per_second: from the other end to this one.
        heard_ns: the least age of a small message from the other end, by both clocks; to be told
            to it. None before one came.
        is_fresh: whether traffic has changed a figure since `is_fresh` was last cleared.
    """

    def __init__(self) -> None:
        """Know nothing yet."""
        self.round_trip_seconds = 0.0
        self.bytes_per_second = 0.0
        self.heard_ns: int | None = None
        self.is_fresh = False
        self._least_age = _Best(min)
        self._most_bandwidth = _Best(max)

    def take_ping(self, seconds: float) -> None:
        """A small message went there and back."""
        known = self.round_trip_seconds
        self.round_trip_seconds = min(known, seconds) if known else seconds

    def take_transfer(self, num_bytes: int, seconds: float) -> None:
        """A message was asked for, and came whole after so long."""
        # One that took hardly longer than a small message says only that the link is not slower.
        travelled = max(seconds - self.round_trip_seconds, seconds / 2)
        self.bytes_per_second = max(self.bytes_per_second, num_bytes / travelled)

    def take_message(
        self, num_bytes: int, sent_ns: int, received_ns: int, heard_ns: int | None
    ) -> None:
        """A hand-over came while this end did nothing but wait for it.

        Args:
            sent_ns: by the other end's clock.
            received_ns: by this end's.
            heard_ns: `heard_ns` of the other end.
        """
        age = received_ns - sent_ns
        if num_bytes <= SMALL_BYTES:
            self._least_age.take(age, received_ns)
        least = self._least_age.value
        if least is None:
            return
        self.heard_ns = int(least)
        if num_bytes >= LARGE_BYTES:
            seconds = max((age - least) * 1e-9, _SHORTEST_SECONDS)
            self._most_bandwidth.take(num_bytes / seconds, received_ns)
            self.bytes_per_second = self._most_bandwidth.value or self.bytes_per_second
            self.is_fresh = True
        if heard_ns is not None:
            self.round_trip_seconds = max((least + heard_ns) * 1e-9, _SHORTEST_SECONDS)
            self.is_fresh = True
