"""The pieces that a prompt's step is worked in, so that one travels while the next is computed.

In: a plan and a step's segments. Out: for each piece its segments, in order. Pure: every device
cuts alike, since each cuts for itself.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

from engine.model.batch import Segment, StepKind
from engine.plan.plan import Plan

# Weights are read once for every piece; with fewer tokens that costs more than the overlap gains.
MIN_PIECE_TOKENS = 64
MAX_PIECES = 4


class Piece(NamedTuple):
    """Tokens [first_token, end_token) of a step.

    Attributes:
        logit_rows: rows of this piece whose logits are wanted.
    """

    first_token: int
    end_token: int
    segments: tuple[Segment, ...]
    logit_rows: tuple[int, ...]


def most_pieces(plan: Plan) -> int:
    """Pieces that are of use under a plan.

    One group of two devices keeps the wire busy with two; where sums are scattered one piece is on
    its first hop and one on its second while a third is computed; several groups work at the same
    time on as many pieces as there are.
    """
    groups = {plan.group(row) for row in range(plan.shape.num_rows - 1)}
    if len(groups) > 1:
        return MAX_PIECES
    return min(len(groups.pop()), 3)


def num_pieces(plan: Plan, kind: StepKind, num_tokens: int) -> int:
    """Pieces that a step is cut into; 1 where nothing is exchanged within the layers."""
    if kind != "prompt":
        return 1
    return max(1, min(most_pieces(plan), num_tokens // MIN_PIECE_TOKENS))


def cut_step(segments: tuple[Segment, ...], count: int) -> list[Piece]:
    """Cut a step's tokens evenly; the order within a slot stays.

    Args:
        count: 1 to the number of tokens.
    """
    num_tokens = sum(segment.token_count for segment in segments)
    borders = [num_tokens * n // count for n in range(count + 1)]
    return [_piece(segments, first, end) for first, end in pairwise(borders)]


def _piece(segments: tuple[Segment, ...], first: int, end: int) -> Piece:
    cut: list[Segment] = []
    logit_rows: list[int] = []
    start = 0
    for segment in segments:
        low = max(first, start)
        high = min(end, start + segment.token_count)
        if low < high:
            skipped = low - start
            offsets = tuple(
                offset - skipped
                for offset in segment.logit_offsets
                if skipped <= offset < high - start
            )
            cut.append(
                Segment(
                    slot=segment.slot,
                    first_position=segment.first_position + skipped,
                    token_count=high - low,
                    logit_offsets=offsets,
                )
            )
            logit_rows += [low - first + offset for offset in offsets]
        start += segment.token_count
    return Piece(first, end, tuple(cut), tuple(logit_rows))
