"""A guess is what followed the latest earlier occurrence of the longest run of last tokens."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.decode.drafting import MATCH_LENGTHS, MAX_INDEXED, PromptLookup

# Half a megabyte for the 8,192 of a usual window.
MOST_BYTES_PER_ID = 0.5 * 2**20 / 8192
# Few different tokens, so that runs come again often.
IDS = st.lists(st.integers(0, 2), min_size=1, max_size=40)


def searched(ids: list[int], limit: int) -> list[int]:
    """The same by looking at every place, and by going on token by token."""
    for length in sorted(MATCH_LENGTHS, reverse=True):
        run = ids[len(ids) - length :]
        for end in range(len(ids) - 1, length - 1, -1):
            if ids[end - length : end] == run and len(ids) >= length:
                going_on = list(ids)
                for n in range(limit):
                    going_on.append(going_on[end + n])
                return going_on[len(ids) :]
    return []


@given(prompt=IDS, answer=st.lists(st.integers(0, 2), max_size=20), limit=st.integers(1, 15))
def test_guesses_are_those_of_a_plain_search_as_the_answer_grows(
    prompt: list[int], answer: list[int], limit: int
) -> None:
    lookup, ids = PromptLookup(), list(prompt)
    for following in [*answer, None]:
        draft = lookup.draft(ids, limit)
        assert draft.ids == searched(ids, limit)
        assert PromptLookup().draft(ids, limit) == draft
        if following is not None:
            ids.append(following)


@given(
    seed=st.integers(0, 1 << 32),
    num_words=st.sampled_from([2, 9, 60, 40_000]),
    num_prompt=st.integers(1, 400),
    accepted=st.lists(st.integers(1, 90), max_size=12),
)
def test_long_texts_are_guessed_at_as_short_ones(
    seed: int, num_words: int, num_prompt: int, accepted: list[int]
) -> None:
    """Enough runs for tables to fill and to be made anew, with one token a step or with many."""
    random = np.random.default_rng(seed)
    lookup, ids = PromptLookup(), random.integers(0, num_words, num_prompt).tolist()
    for count in accepted:
        assert lookup.draft(ids, 6).ids == searched(ids, 6)
        # What a text repeats, it repeats in pieces.
        start = int(random.integers(0, len(ids)))
        ids += [*ids[start : start + count // 2], *random.integers(0, num_words, 1).tolist()]


@pytest.mark.parametrize("num_words", [50, 1 << 16])
def test_a_conversation_takes_little_memory(num_words: int) -> None:
    """The index of 8,192 different ids took 2.7 MB for each conversation, on the engine host."""
    random = np.random.default_rng(3)
    ids = random.integers(0, num_words, 16_384).tolist()
    lookup = PromptLookup()
    tracemalloc.start()
    try:
        lookup.draft(ids[:8192], 15)
        for end in range(8193, len(ids) + 1, 7):
            lookup.draft(ids[:end], 15)
            held, _ = tracemalloc.get_traced_memory()
            assert held < MOST_BYTES_PER_ID * end, end
    finally:
        tracemalloc.stop()


def test_a_longer_match_is_a_surer_source() -> None:
    lookup = PromptLookup()
    assert lookup.draft([1, 2, 3, 4, 5, 6, 9, 2, 3, 4, 5], 2) == ([6, 9], 4)
    assert PromptLookup().draft([1, 2, 7, 8, 1, 2], 1) == ([7], 2)
    assert PromptLookup().draft([1, 2, 3], 5) == ([], 0)


def test_of_a_very_long_prompt_only_the_end_is_looked_through() -> None:
    ids = [7, 8, 9, *range(10, 10 + MAX_INDEXED), 7, 8]
    assert PromptLookup().draft(ids, 3).ids == []
    near = [*range(10, 10 + MAX_INDEXED), 7, 8, 9, 1, 7, 8]
    assert PromptLookup().draft(near, 2).ids == [9, 1]
