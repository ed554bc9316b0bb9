"""Guesses at the next tokens of an answer, to be verified together in one step.

In: the known ids. Out: ids that may follow. A guess costs nothing but the step that verifies it and
changes no token: what the model would have chosen is chosen. It computes no layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from engine.decode.run_index import RunIndex

# Tokens of a match, the surest first; one token alone is followed by anything.
MATCH_LENGTHS = (4, 3, 2)
# Even a sure guess is verified in steps short enough to stream.
MAX_DRAFT = 15
# Of guesses by a draft model, beside prompt lookup's sources, which are the lengths of its matches.
MODEL_SOURCE = 1
# Of a longer prompt only the end is looked through: it would take noticeable time and memory.
MAX_INDEXED = 1 << 15


class Draft(NamedTuple):
    """A guess.

    Attributes:
        ids: what may follow the known ids, the next one first; may be empty.
        source: where it comes from, larger for surer ones; the acceptance of each is counted apart.
    """

    ids: list[int]
    source: int


class Drafter(Protocol):
    """Whoever guesses for one sequence."""

    def draft(self, ids: Sequence[int], limit: int) -> Draft:
        """Guess what follows.

        Args:
            ids: prompt and answer so far; each call has all ids of the call before.
            limit: tokens at most.
        """
        ...


class PromptLookup:
    """Guesses that what followed the last few tokens before follows them again.

    Source: prompt lookup decoding (A. Saxena, 2023); the n-gram case of arXiv 2304.04487.
    """

    def __init__(self) -> None:
        """Know no ids yet."""
        self._indexes = [(length, RunIndex(length)) for length in MATCH_LENGTHS]
        self._num_indexed = 0

    def draft(self, ids: Sequence[int], limit: int) -> Draft:
        """What followed the latest earlier occurrence of the longest known run of last tokens."""
        first_end = max(self._num_indexed, len(ids) - MAX_INDEXED)
        self._num_indexed = len(ids)
        # All of them, also after a match: each notes what the next call may find.
        start, source = None, 0
        for length, index in self._indexes:
            end = index.latest(ids, first_end)
            if start is None and end is not None:
                start, source = end, length
        return Draft([] if start is None else _continue(ids, start, limit), source)


def _continue(ids: Sequence[int], start: int, limit: int) -> list[int]:
    """Ids from `start` on; where they end, the guess is that they repeat."""
    period = len(ids) - start
    return [ids[start + n % period] for n in range(limit)]
