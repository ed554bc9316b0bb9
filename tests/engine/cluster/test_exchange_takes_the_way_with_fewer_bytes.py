"""The choice between one hop and two, and the cut of a step into pieces, are plain arithmetic."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.cluster.collectives import (
    EXTRA_HOP_BYTES,
    busiest_bytes,
    hand_over_table,
    is_scattered,
    token_parts,
)
from engine.cluster.pieces import MAX_PIECES, MIN_PIECE_TOKENS, cut_step, num_pieces
from engine.model.batch import Segment
from tests.engine.cluster.exchange_members import plan_of_groups

WIDTH = 2048
STREAM = 512 * WIDTH * 4
WIRES = st.sampled_from(["float32", "bfloat16", "float16"])


def everyone(count: int) -> list[list[int]]:
    """Groups of a plan that all devices share in."""
    return [list(range(count))] * 3


@pytest.mark.parametrize(
    ("count", "wire", "expected"),
    [
        (2, "float32", False),
        (2, "bfloat16", False),
        (3, "float32", True),
        (3, "bfloat16", False),
        (4, "bfloat16", True),
        (5, "float16", True),
    ],
)
def test_many_devices_scatter_a_prompt(count: int, wire: str, expected: bool) -> None:
    table = hand_over_table(plan_of_groups(everyone(count), count), 0)[0]
    assert is_scattered(table, 512, WIDTH, wire) is expected


@given(st.integers(2, 8), WIRES)
def test_generated_tokens_take_one_hop(count: int, wire: str) -> None:
    table = hand_over_table(plan_of_groups(everyone(count), count), 0)[0]
    assert not is_scattered(table, 1, WIDTH, wire)


def test_bytes_are_those_of_the_formula() -> None:
    for count in range(2, 7):
        table = hand_over_table(plan_of_groups(everyone(count), count), 0)[0]
        for wire, part in (("float32", 1.0), ("bfloat16", 0.5)):
            direct = busiest_bytes(table, 512, WIDTH, wire, is_scattered=False)
            assert direct == (count - 1) * STREAM * part
            scattered = busiest_bytes(table, 512, WIDTH, wire, is_scattered=True)
            formula = (count - 1) / count * STREAM * (part + 1)
            assert scattered == pytest.approx(formula, rel=0.02)  # parts are whole tokens


@given(st.data())
def test_all_devices_choose_alike_and_only_what_saves_bytes(data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 6))
    group = st.sets(st.integers(0, count - 1), min_size=1).map(sorted)
    plan = plan_of_groups([data.draw(group), data.draw(group), [0]], count)
    num_tokens, wire = data.draw(st.integers(1, 2000)), data.draw(WIRES)
    tables = [hand_over_table(plan, index)[0] for index in range(count)]
    choices = {is_scattered(table, num_tokens, WIDTH, wire) for table in tables}
    assert len(choices) == 1
    if choices == {True}:
        direct, scattered = (
            busiest_bytes(tables[0], num_tokens, WIDTH, wire, is_scattered=scattered)
            for scattered in (False, True)
        )
        assert scattered + EXTRA_HOP_BYTES < direct


@given(st.integers(0, 500), st.integers(1, 9))
def test_parts_cover_all_tokens_once(num_tokens: int, count: int) -> None:
    parts = token_parts(num_tokens, count)
    covered = [token for start, end in parts for token in range(start, end)]
    assert covered == list(range(num_tokens))
    sizes = [end - start for start, end in parts]
    assert max(sizes) - min(sizes) <= 1


def test_only_a_prompt_that_is_exchanged_is_cut_into_pieces() -> None:
    two = plan_of_groups(everyone(2), 2)
    many = 10 * MIN_PIECE_TOKENS
    assert num_pieces(two, "prompt", many) == 2
    assert num_pieces(two, "generated", many) == 1
    assert num_pieces(two, "prompt", 2 * MIN_PIECE_TOKENS - 1) == 1
    assert num_pieces(plan_of_groups(everyone(3), 3), "prompt", many) == 3
    stages = plan_of_groups([[0], [0], [1], [1], [1]], 2)
    assert num_pieces(stages, "prompt", many) == MAX_PIECES
    assert num_pieces(plan_of_groups([[0]] * 3, 1), "prompt", many) == 1
    head_elsewhere = plan_of_groups([[0], [0], [0], [0], [1]], 2)
    assert num_pieces(head_elsewhere, "prompt", many) == 1


@given(st.data())
def test_pieces_hold_every_token_and_every_wanted_logit_once(data: st.DataObject) -> None:
    lengths = data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=4))
    segments: list[Segment] = []
    for slot, length in enumerate(lengths):
        offsets = data.draw(st.sets(st.integers(0, length - 1)))
        first = data.draw(st.integers(0, 99))
        segments.append(
            Segment(
                slot=slot,
                first_position=first,
                token_count=length,
                logit_offsets=tuple(sorted(offsets)),
            )
        )

    def tokens(cut: tuple[Segment, ...]) -> list[tuple[int, int, bool]]:
        return [
            (s.slot, s.first_position + n, n in s.logit_offsets)
            for s in cut
            for n in range(s.token_count)
        ]

    count = data.draw(st.integers(1, min(MAX_PIECES, sum(lengths))))
    pieces = cut_step(tuple(segments), count)
    found = [token for piece in pieces for token in tokens(piece.segments)]
    assert found == tokens(tuple(segments))
    for piece in pieces:
        own = tokens(piece.segments)
        assert len(own) == piece.end_token - piece.first_token
        assert [n for n, (_, _, is_wanted) in enumerate(own) if is_wanted] == list(piece.logit_rows)
