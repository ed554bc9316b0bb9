"""A guess is what followed the latest earlier occurrence of the longest run of last tokens."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from engine.decode.drafting import MATCH_LENGTHS, MAX_INDEXED, PromptLookup

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
