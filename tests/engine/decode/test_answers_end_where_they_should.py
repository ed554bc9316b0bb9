"""EOS, stop ids, runs of ids, stop texts, min_tokens and max_tokens, each alone and together."""

from __future__ import annotations

from collections.abc import Sequence as Seq

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.decode.sequence import NextToken, Sequence
from engine.decode.stopping import IdStopMatcher, StopMatcher
from engine.host.messages import SamplingSettings
from engine.sampling.choice import all_candidates
from engine.text.detokenizer import IncrementalDetokenizer

EOS = 0
VOCABULARY = 9


class Letters:
    """A table of tokens: 0 is EOS, 1 to 8 are the letters a to h."""

    writes_space = False

    def token_bytes(self, id: int) -> bytes:
        return b"" if id == EOS else bytes([ord("a") + id - 1])


def answer(
    *,
    stops: Seq[str] = (),
    stop_ids: frozenset[int] = frozenset(),
    runs: Seq[Seq[int]] = (),
    min_tokens: int = 0,
    max_tokens: int = 1000,
) -> tuple[Sequence, list[tuple[int, str]]]:
    """A greedy request, and what is said of it."""
    said: list[tuple[int, str]] = []
    sequence = Sequence(
        checkpoint_id="",
        request_id=1,
        ids=[8, 8],
        num_prompt=2,
        max_tokens=max_tokens,
        settings=SamplingSettings(temperature=0.0),
        seed=1,
        eos_ids=frozenset([EOS]),
        stops=StopMatcher(stops),
        detokenizer=IncrementalDetokenizer(Letters()),
        on_text=lambda token_id, text: said.append((token_id, text)),
        on_prefill=lambda _done, _total: None,
        stop_ids=stop_ids,
        id_stops=IdStopMatcher(runs),
        min_tokens=min_tokens,
    )
    return sequence, said


def feed(sequence: Sequence, ids: Seq[int]) -> None:
    """Accept ids until the answer ends."""
    for i in ids:
        if sequence.finish_reason is not None:
            return
        sequence.accept(NextToken(i, None))


def letters(ids: Seq[int]) -> str:
    return b"".join(Letters().token_bytes(i) for i in ids).decode()


ids_strategy = st.lists(st.integers(1, 3), max_size=25)
runs_strategy = st.lists(st.lists(st.integers(1, 3), min_size=2, max_size=4), max_size=3)


@given(ids_strategy, runs_strategy, st.integers(0, 8))
def test_a_run_of_ids_ends_the_answer_where_it_is_first_complete(
    ids: list[int], runs: list[list[int]], min_tokens: int
) -> None:
    sequence, said = answer(runs=runs, min_tokens=min_tokens)
    feed(sequence, ids)
    ends = [
        (n, max(len(r) for r in runs if ids[n - len(r) : n] == r))
        for n in range(max(1, min_tokens), len(ids) + 1)
        if any(ids[max(0, n - len(r)) : n] == r for r in runs)
    ]
    if ends:
        length, run = ends[0]
        assert sequence.finish_reason == "stop"
        assert [i for i, _ in said] == ids[:length]
        # An earlier run that min_tokens let pass is part of the text.
        assert "".join(sequence.text) == letters(ids[: length - run])
    else:
        assert sequence.finish_reason is None
        assert letters(ids).startswith("".join(sequence.text))
        feed(sequence, [EOS])
        assert "".join(sequence.text) == letters(ids)
    assert "".join(text for _, text in said) == "".join(sequence.text)


def test_text_that_may_become_a_stop_run_is_held_back_and_shown_when_it_does_not() -> None:
    sequence, said = answer(runs=[[2, 3, 4]])
    feed(sequence, [1, 2, 3, 2, 3, 5])
    assert said == [(1, "a"), (2, ""), (3, ""), (2, "bc"), (3, ""), (5, "bce")]


@pytest.mark.parametrize("last", [EOS, 5])
def test_eos_and_stop_ids_belong_to_the_ids_but_not_to_the_text(last: int) -> None:
    sequence, said = answer(stop_ids=frozenset([5]), stops=["cx"], runs=[[3, 3]])
    feed(sequence, [1, 2, 3, last, 1])
    assert sequence.finish_reason == "stop"
    assert sequence.ids[2:] == [1, 2, 3, last]
    # What was held back for the stop text and the run is shown: neither came.
    assert "".join(sequence.text) == "abc"
    assert [i for i, _ in said] == [1, 2, 3, last]


def test_the_limit_shows_what_was_held_back() -> None:
    sequence, _ = answer(stops=["abcd"], runs=[[3, 3]], max_tokens=3)
    feed(sequence, [1, 2, 3, 4])
    assert sequence.finish_reason == "length"
    assert "".join(sequence.text) == "abc"


def test_a_stop_text_in_what_the_limit_lets_out_ends_the_answer_as_a_stop() -> None:
    sequence, _ = answer(stops=["bc"], runs=[[3, 3]], max_tokens=3)
    feed(sequence, [1, 2, 3, 4])
    assert sequence.finish_reason == "stop"
    assert "".join(sequence.text) == "a"


def test_a_cancelled_answer_keeps_what_was_held_back() -> None:
    sequence, _ = answer(stops=["bcx"], runs=[[3, 3]])
    feed(sequence, [1, 2, 3])
    sequence.cancel()
    assert sequence.finish_reason == "cancelled"
    assert "".join(sequence.text) == "abc"


@given(
    ids_strategy, st.lists(st.text("abc", min_size=1, max_size=3), max_size=3), st.integers(0, 9)
)
def test_stop_texts_end_an_answer_only_after_min_tokens(
    ids: list[int], stops: list[str], min_tokens: int
) -> None:
    sequence, _ = answer(stops=stops, min_tokens=min_tokens)
    feed(sequence, ids)
    # One letter a token: what the first min_tokens - 1 of them said is not looked at.
    first = max(0, min_tokens - 1)
    rest = letters(ids)[first:]
    ends = [rest.find(s) + len(s) for s in stops if s in rest]
    assert (sequence.finish_reason == "stop") == bool(ends)
    if ends:
        assert sequence.num_generated == first + min(ends)
        assert sequence.num_generated >= min_tokens


def test_until_min_tokens_neither_eos_nor_stop_ids_are_chosen() -> None:
    """Greedy; the logits want EOS first, then the stop id, then 3."""
    logits = np.zeros(VOCABULARY, dtype=np.float32)
    logits[[EOS, 5, 3]] = [9, 8, 7]
    sequence, _ = answer(stop_ids=frozenset([5]), min_tokens=3)
    while sequence.finish_reason is None:
        token = sequence.choose(all_candidates(logits), sequence.changes())
        assert token is not None
        sequence.accept(token)
    assert sequence.ids[2:] == [3, 3, 3, EOS]
    assert sequence.finish_reason == "stop"


def test_members_of_a_batch_draw_from_streams_of_their_own() -> None:
    logits = np.zeros(VOCABULARY, dtype=np.float32)
    drawn: set[tuple[int, ...]] = set()
    for index in range(20):
        sequence, _ = answer()
        sequence.settings = SamplingSettings(temperature=1.0, top_p=1.0)
        sequence.batch_index = index
        tokens = []
        for _ in range(12):
            token = sequence.choose(all_candidates(logits), sequence.changes())
            assert token is not None
            tokens.append(token.token_id)
            sequence.ids.append(token.token_id)
        drawn.add(tuple(tokens))
    assert len(drawn) == 20
