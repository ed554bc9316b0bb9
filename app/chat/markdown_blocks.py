"""Markdown that arrives piece by piece, cut into blocks that can no longer change.

In: text as it streams. Out: the sources of closed top-level blocks, each exactly once, and the tail
that may still change. Rendering the blocks one by one gives what rendering the whole text gives.
Reference definitions are not supported: one at the end would change the beginning.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from markdown_it import MarkdownIt

MAX_TAIL_CHARS = 8_000
# An open block is looked at again when it has grown by this part, so that lines cost little.
REGROWTH = 8
_FENCE = re.compile(r"^ {0,3}(?P<marks>`{3,}|~{3,})(?P<info>[^\n]*)$")
# A list, a quotation or indented code may go on after a blank line.
_ENDED_BY_BLANK = ("paragraph_open", "heading_open", "table_open", "hr")


class OpenCode(NamedTuple):
    """A code fence whose end has not arrived."""

    language: str
    text: str


def make_parser() -> MarkdownIt:
    """The one dialect of this window: CommonMark with tables and strike-through, without HTML."""
    parser = MarkdownIt("commonmark", {"html": False})
    parser.enable(["table", "strikethrough"])
    parser.disable("reference")
    return parser


def _make_block_parser() -> MarkdownIt:
    parser = make_parser()
    parser.core.ruler.enableOnly(["normalize", "block"])
    return parser


class BlockSplitter:
    """Cuts a growing text at the borders of its top-level blocks.

    Only whole lines decide about a border. What one piece costs depends on the open block, not on
    the length of the text before it.

    Attributes:
        tail: source of the block that is still open, with its unfinished last line.
    """

    _parser = _make_block_parser()

    def __init__(self) -> None:
        """Nothing has arrived yet."""
        self.tail = ""
        self._scanned = 0

    def feed(self, text: str) -> list[str]:
        """Take the next piece.

        Returns: the sources of the blocks that this piece closed, in order.
        """
        text = text.replace("\r", "")
        self.tail += text
        if "\n" not in text:
            return []
        closed: list[str] = []
        while (end := self._closed_end()) > 0:
            closed += self._cut(end)
        return closed

    def finish(self) -> list[str]:
        """No more text will come: the blocks that the tail holds."""
        rest, self.tail, self._scanned = self.tail, "", 0
        return [rest] if rest.strip() else []

    @property
    def open_code(self) -> OpenCode | None:
        """The tail, where it is a code fence without an end."""
        first, found, rest = self.tail.lstrip("\n").partition("\n")
        match = _FENCE.match(first) if found else None
        if match is None or _is_not_fence(match):
            return None
        return OpenCode(_language(match["info"]), rest)

    def _cut(self, end: int) -> list[str]:
        source, self.tail = self.tail[:end], self.tail[end:]
        self._scanned = 0
        return [source] if source.strip() else []

    def _closed_end(self) -> int:
        """Length of the part of the tail that is one closed block; 0 for none."""
        whole = self.tail.rfind("\n") + 1
        if not whole:
            return 0
        blank = len(self.tail) - len(self.tail.lstrip("\n"))
        first_end = self.tail.find("\n", blank)
        if first_end < 0:
            return 0
        match = _FENCE.match(self.tail[blank:first_end])
        if match is not None and not _is_not_fence(match):
            return self._fence_end(match["marks"], first_end + 1, whole)
        if len(self.tail) > MAX_TAIL_CHARS:
            # Laying out one huge paragraph for every piece would cost more than a wrong border.
            return whole
        ends_blank = self.tail.endswith("\n\n", 0, whole)
        if not ends_blank and (whole - self._scanned) * REGROWTH < whole:
            return 0
        self._scanned = whole
        return self._first_block_end(whole, ends_blank)

    def _fence_end(self, marks: str, body: int, whole: int) -> int:
        start = max(self._scanned, body)
        end = re.compile(rf"^ {{0,3}}{re.escape(marks[0])}{{{len(marks)},}}[ \t]*\n", re.MULTILINE)
        match = end.search(self.tail, start, whole)
        self._scanned = whole
        return 0 if match is None else match.end()

    def _first_block_end(self, whole: int, ends_blank: bool) -> int:
        source = self.tail[:whole]
        blocks = [
            (token.type, token.map[0])
            for token in self._parser.parse(source)
            if token.level == 0 and token.nesting >= 0 and token.map is not None
        ]
        if len(blocks) < 2:
            is_over = ends_blank and bool(blocks) and blocks[0][0] in _ENDED_BY_BLANK
            return whole if is_over else 0
        position = 0
        for _ in range(blocks[1][1]):
            position = source.index("\n", position) + 1
        return position


def _is_not_fence(match: re.Match[str]) -> bool:
    """Backticks in the info string make it inline code."""
    return match["marks"][0] == "`" and "`" in match["info"]


def _language(info: str) -> str:
    words = info.split()
    return words[0] if words else ""
