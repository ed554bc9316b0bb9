"""A step as the native kernels read it: structs of addresses in memory of Python's.

In: a batch of `engine.kernels.torch_kernels` and the cache of its slots. Out: the same with addresses
of all its tokens at once, and of a few at a time.

T tokens of a step, D head width.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from engine.kernels.native_matrices import PASS_TOKENS, address_of, optional_address
from engine.kernels.torch_kernels import Batch
from engine.model.kv_cache import PLACE_NUMBERS, KVCache


class Pass(NamedTuple):
    """Tokens of a step that go through a row together.

    Attributes:
        address: of a `shardmix_step` of them.
        first_token: of the step's.
    """

    address: int
    first_token: int


@dataclass(frozen=True, slots=True, kw_only=True)
class NativeBatch(Batch):
    """A step, as native rows take it.

    Attributes:
        num_tokens: T.
        ends: slot, and the position after its last token, for each segment.
        places: where each slot's layers lie.
        whole: all tokens at once; valid, as the others, as long as this object and the slots live.
        passes: the same tokens, a few at a time.
        held: what lies at their addresses, and what that points to.
    """

    num_tokens: int
    ends: tuple[tuple[int, int], ...]
    places: tuple[array[int], ...]
    whole: Pass
    passes: tuple[Pass, ...]
    held: tuple[object, ...]

    def takes(self, most_prompt_tokens: int) -> bool:
        """Whether what multiplies so many tokens of a prompt multiplies these."""
        return self.kind == "generated" or self.num_tokens <= most_prompt_tokens


class _Piece(NamedTuple):
    """Tokens that follow each other in a slot."""

    places: array[int]
    first_position: int
    num_tokens: int


def make_native_batch(batch: Batch, cache: KVCache, head_width: int) -> NativeBatch:
    """A step's batch for native rows.

    Args: cache: has the batch's slots.
    Raises: ProtocolError: angles or scales have another shape, dtype or layout.
    """
    segments = batch.segments
    num_tokens = sum([s.token_count for s in segments])
    shape = (num_tokens, head_width // 2)
    angles = [
        (address_of("angles", cos, shape), address_of("angles", sin, shape))
        for cos, sin in batch.ropes
    ]
    tables = [cos for cos, _ in angles] + [sin for _, sin in angles]
    scales = optional_address("query scales", batch.query_scale, (num_tokens,)) or 0
    places = tuple([cache.places(s.slot) for s in segments])
    pieces = [
        _Piece(held, s.first_position, s.token_count)
        for s, held in zip(segments, places, strict=True)
    ]
    held: list[object] = []

    def make_pass(first_token: int, pieces: Sequence[_Piece]) -> Pass:
        # As arrays, whose making costs a third of that of ctypes structures: every field of the
        # header's structs is 8 bytes wide.
        fields = array("q")
        for piece in pieces:
            address, length = piece.places.buffer_info()
            places_held = length // PLACE_NUMBERS
            fields.extend((address, places_held, piece.first_position, piece.num_tokens))
        offset = 4 * first_token * shape[1]
        addresses = array("q", [table + offset for table in tables])
        first_table = addresses.buffer_info()[0]
        step = array(
            "q",
            (
                fields.buffer_info()[0],
                len(pieces),
                sum([piece.num_tokens for piece in pieces]),
                first_table,
                first_table + 8 * len(angles),
                len(angles),
                scales and scales + 4 * first_token,
                batch.kind == "prompt",
            ),
        )
        held.append((step, fields, addresses))
        return Pass(step.buffer_info()[0], first_token)

    whole = make_pass(0, pieces)
    passes = (whole,)
    if num_tokens > PASS_TOKENS:
        passes = tuple([make_pass(first, some) for first, some in _cut(pieces, PASS_TOKENS)])
    return NativeBatch(
        kind=batch.kind,
        segments=segments,
        positions=batch.positions,
        ropes=batch.ropes,
        query_scale=batch.query_scale,
        num_tokens=num_tokens,
        ends=tuple([(s.slot, s.first_position + s.token_count) for s in segments]),
        places=places,
        whole=whole,
        passes=passes,
        held=tuple(held),
    )


def _cut(pieces: Sequence[_Piece], most: int) -> Iterator[tuple[int, list[_Piece]]]:
    """Pieces of at most so many tokens together, and how many tokens come before them."""
    first, count = 0, 0
    some: list[_Piece] = []
    for places, first_position, num_tokens in pieces:
        end_position = first_position + num_tokens
        while first_position < end_position:
            taken = min(end_position - first_position, most - count)
            some.append(_Piece(places, first_position, taken))
            first_position += taken
            count += taken
            if count == most:
                yield first, some
                first, count, some = first + most, 0, []
    if some:
        yield first, some
