"""For any ids: pieces joined are the bytes decoded at once, and none ends in half a character."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.text.detokenizer import IncrementalDetokenizer
from engine.text.tokenizer import Tokenizer


class Bytes:
    """A vocabulary of given byte strings."""

    def __init__(self, pieces: list[bytes], writes_space: bool = False) -> None:
        self.pieces = pieces
        self.writes_space = writes_space

    def token_bytes(self, id: int) -> bytes:
        return self.pieces[id]


@given(
    pieces=st.lists(st.binary(max_size=5) | st.sampled_from([b" ", b"  a", b""]), max_size=20),
    writes_space=st.booleans(),
    is_start=st.booleans(),
)
def test_any_bytes(pieces: list[bytes], writes_space: bool, is_start: bool) -> None:
    """Two texts in a row; the space that a vocabulary writes itself is left out at a start."""
    stream = IncrementalDetokenizer(Bytes(pieces, writes_space), is_start=is_start)
    data = b"".join(pieces)
    if writes_space and is_start:
        data = data.removeprefix(b" ")
    for _ in range(2):
        parts = [stream.push(id) for id in range(len(pieces))]
        parts.append(stream.finish())
        assert "".join(parts) == data.decode("utf-8", errors="replace")


@given(text=st.text(st.characters(codec="utf-8"), max_size=30), data=st.data())
def test_a_valid_text_never_shows_a_replacement(text: str, data: st.DataObject) -> None:
    raw = text.encode()
    cuts = sorted(data.draw(st.lists(st.integers(0, len(raw)), max_size=10)))
    pieces = [raw[a:b] for a, b in zip([0, *cuts], [*cuts, len(raw)], strict=True)]
    stream = IncrementalDetokenizer(Bytes(pieces))
    shown = ""
    for id in range(len(pieces)):
        shown += stream.push(id)
        assert text.startswith(shown)
    assert shown + stream.finish() == text


@given(ids=st.lists(st.integers(0, 49151), max_size=40))
def test_any_ids_of_the_default_model(smollm: Tokenizer, ids: list[int]) -> None:
    stream = IncrementalDetokenizer(smollm)
    assert "".join([*map(stream.push, ids), stream.finish()]) == smollm.decode(ids)


def test_an_emoji_appears_with_its_last_token(smollm: Tokenizer) -> None:
    ids = smollm.encode("a🏴\U000e0067b")
    stream = IncrementalDetokenizer(smollm)
    parts = [stream.push(id) for id in ids]
    assert "\ufffd" not in "".join(parts)
    assert "" in parts
    assert stream.finish() == ""


def test_finish_begins_a_new_text() -> None:
    stream = IncrementalDetokenizer(Bytes([b"\xf0\x9f", b"ok"]))
    assert stream.push(0) == ""
    assert stream.finish() == "\ufffd"
    assert stream.push(1) == "ok"
    assert stream.finish() == ""


@pytest.mark.parametrize("length", [200_000])
def test_a_token_costs_the_same_at_any_length(smollm: Tokenizer, length: int) -> None:
    stream = IncrementalDetokenizer(smollm)
    ids = smollm.encode("the quick brown fox 🙂 ")

    def seconds(count: int) -> float:
        start = time.perf_counter()
        for place in range(count):
            stream.push(ids[place % len(ids)])
        return time.perf_counter() - start

    seconds(1000)
    early = min(seconds(2000) for _ in range(5))
    seconds(length)
    late = min(seconds(2000) for _ in range(5))
    assert late < 5 * early  # a quadratic one would be a hundred times slower
