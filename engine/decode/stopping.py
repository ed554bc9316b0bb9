"""Ends an answer at a stop text, also one that spans several tokens.

In: pieces of text. Out: the text that is safe to show. Text that could be the beginning of a stop
text is held back until it is clear what it is.
"""

from __future__ import annotations

from collections.abc import Sequence


class StopMatcher:
    """Watches one answer."""

    def __init__(self, stops: Sequence[str]) -> None:
        """Args: stops: texts that end the answer; empty ones are ignored."""
        self._stops = tuple(stop for stop in stops if stop)
        self._held = ""
        self.has_stopped = False

    def push(self, text: str) -> str:
        """Take the next piece; returns what may be shown. Sets `has_stopped` at a stop text."""
        if not self._stops or self.has_stopped:
            return "" if self.has_stopped else text
        self._held += text
        found = [at for at in (self._held.find(stop) for stop in self._stops) if at >= 0]
        if found:
            self.has_stopped = True
            shown, self._held = self._held[: min(found)], ""
            return shown
        keep = self._longest_beginning()
        cut = len(self._held) - keep
        shown, self._held = self._held[:cut], self._held[cut:]
        return shown

    def finish(self) -> str:
        """What was held back, when the answer ends otherwise."""
        held, self._held = self._held, ""
        return held

    def _longest_beginning(self) -> int:
        """Length of the longest end of the held text that begins a stop text."""
        longest = max(len(stop) for stop in self._stops) - 1
        for length in range(min(longest, len(self._held)), 0, -1):
            end = self._held[-length:]
            if any(stop.startswith(end) for stop in self._stops):
                return length
        return 0
