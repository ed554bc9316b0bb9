"""Ends an answer at a stop text or a run of stop ids, wherever the borders of its tokens fall.

In: pieces of text, or token ids. Out: those that are safe to show. What could be the beginning of a
stop is held back until it is clear what it is.
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


class IdStopMatcher:
    """Watches one answer for runs of token ids that end it."""

    def __init__(self, sequences: Sequence[Sequence[int]]) -> None:
        """Args: sequences: runs of ids that end the answer, none of them empty."""
        self._sequences = tuple(tuple(sequence) for sequence in sequences)
        self._tail: tuple[int, ...] = ()
        self._num_held = 0
        self.has_stopped = False

    def push(self, id: int, *, may_stop: bool = True) -> list[int]:
        """Take the next id; returns those that may be shown. Sets `has_stopped` at a stop.

        Args:
            may_stop: whether a run that is complete with this id ends the answer.
        """
        if not self._sequences:
            return [id]
        longest = max(len(sequence) for sequence in self._sequences)
        self._tail = (*self._tail, id)[-longest:]
        self._num_held += 1
        ends = [s for s in self._sequences if self._tail[-len(s) :] == s]
        if ends and may_stop:
            self.has_stopped = True
            return self._release(max(len(s) for s in ends))
        return self._release(self._longest_beginning())

    def finish(self) -> list[int]:
        """What was held back, when the answer ends otherwise."""
        return self._release(0)

    def _release(self, num_kept: int) -> list[int]:
        """All held ids but the last `num_kept`."""
        held = self._tail[len(self._tail) - self._num_held :]
        self._num_held = num_kept
        return list(held[: len(held) - num_kept])

    def _longest_beginning(self) -> int:
        """Length of the longest end of the tail that begins a run and is shorter than it."""
        for length in range(len(self._tail), 0, -1):
            end = self._tail[-length:]
            if any(len(s) > length and s[:length] == end for s in self._sequences):
                return length
        return 0
