"""A stop text ends an answer wherever the borders of its tokens fall."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from engine.decode.stopping import StopMatcher

texts = st.text(alphabet="ab<|>", max_size=30)
stops = st.lists(st.text(alphabet="ab<|>", min_size=1, max_size=4), max_size=3)


def pieces_of(text: str, cuts: list[int]) -> list[str]:
    borders = [0, *sorted({c % (len(text) + 1) for c in cuts}), len(text)]
    return [text[a:b] for a, b in pairwise(borders)]


@given(texts, stops, st.lists(st.integers(0, 99), max_size=8))
def test_what_is_shown_is_the_text_up_to_the_first_stop(
    text: str, stop_texts: list[str], cuts: list[int]
) -> None:
    matcher = StopMatcher(stop_texts)
    shown = ""
    for piece in pieces_of(text, cuts):
        shown += matcher.push(piece)
        assert text.startswith(shown)
        if matcher.has_stopped:
            break
    else:
        shown += matcher.finish()
    # The stop that is complete first ends the answer; among those, the earliest beginning.
    ends = [text.find(s) + len(s) for s in stop_texts if s in text]
    assert matcher.has_stopped == bool(ends)
    if not ends:
        assert shown == text
    else:
        assert not any(s in shown for s in stop_texts)
        assert any(text[len(shown) :].startswith(s) for s in stop_texts)


@given(texts, st.lists(st.integers(0, 99), max_size=8))
def test_without_stop_texts_nothing_is_held_back(text: str, cuts: list[int]) -> None:
    matcher = StopMatcher(())
    for piece in pieces_of(text, cuts):
        assert matcher.push(piece) == piece
    assert matcher.finish() == ""
