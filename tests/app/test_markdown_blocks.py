"""Markdown that streams, cut into closed blocks, renders as the whole text would."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from app.chat.conversation_view import code_of
from app.chat.markdown_blocks import MAX_TAIL_CHARS, BlockSplitter, make_parser

LINES = (
    "plain words",
    "more *emphasis* and `code`",
    "",
    "",
    "# heading",
    "Title\n===",
    "- item",
    "  continued",
    "  - nested",
    "1. first",
    "2) other",
    "> quoted",
    "lazy",
    "    indented code",
    "```python",
    "```",
    "~~~",
    "````",
    "``` not `a` fence",
    "| a | b |",
    "|---|---|",
    "| 1 | 2 |",
    "---",
    "***",
    "<b>html</b>",
    "[ref]: http://x",
    "\t tabbed",
    "trailing  ",
    "a \\",
)
documents = st.lists(st.sampled_from(LINES), max_size=24).map("\n".join)


def _feed(text: str, cuts: list[int]) -> list[str]:
    """The blocks of a text that arrives in pieces."""
    splitter = BlockSplitter()
    blocks: list[str] = []
    start = 0
    for end in [*sorted(cuts), len(text)]:
        blocks += splitter.feed(text[start:end])
        start = end
    return blocks + splitter.finish()


@settings(max_examples=300)
@given(documents, st.data())
def test_any_stream_renders_as_the_whole(text: str, data: st.DataObject) -> None:
    cuts = data.draw(st.lists(st.integers(0, len(text)), max_size=30))
    blocks = _feed(text, cuts)
    parser = make_parser()
    assert "".join(parser.render(block) for block in blocks) == parser.render(text)


@given(documents, st.integers(1, 5))
def test_closed_blocks_do_not_depend_on_the_pieces(text: str, size: int) -> None:
    pieces = list(range(0, len(text), size))
    parser = make_parser()
    by_piece = [parser.render(block) for block in _feed(text, pieces)]
    at_once = [parser.render(block) for block in _feed(text, [])]
    assert "".join(by_piece) == "".join(at_once)


def test_an_open_fence_is_code_until_it_closes() -> None:
    splitter = BlockSplitter()
    assert splitter.feed("before\n\n```python title\nx = 1\n") == ["before\n\n"]
    code = splitter.open_code
    assert code is not None
    assert (code.language, code.text) == ("python", "x = 1\n")
    assert splitter.feed("```\n") == ["```python title\nx = 1\n```\n"]
    assert splitter.open_code is None


def test_text_after_a_long_answer_costs_only_the_open_block() -> None:
    """The tail never holds what is closed, so its length bounds the work of each piece."""
    splitter = BlockSplitter()
    generator = random.Random(3)
    longest = 0
    for _ in range(3000):
        splitter.feed(
            generator.choice(["word ", "word ", "end.\n\n", "- item\n", "```\ncode\n```\n"])
        )
        longest = max(longest, len(splitter.tail))
    assert longest < 2000


def test_one_endless_paragraph_is_cut_at_a_line() -> None:
    splitter = BlockSplitter()
    blocks: list[str] = []
    for _ in range(3 * MAX_TAIL_CHARS // 10):
        blocks += splitter.feed("nine char\n")
    assert len(splitter.tail) <= MAX_TAIL_CHARS + 10
    assert blocks


def test_code_of_gives_the_inside_of_the_first_fence() -> None:
    assert code_of("\n```py\na\n\nb\n```\n") == "a\n\nb"
    assert code_of("no fence") == "no fence"
