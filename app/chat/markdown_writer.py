"""Writes Markdown into a text document through a private cursor.

In: the source of one or more blocks, and a theme. Out: paragraphs, lists, tables and code at the
end of the document. It never touches what was written before, nor anybody's visible cursor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markdown_it.token import Token
from PySide6.QtGui import (
    QBrush,
    QColor,
    QFont,
    QTextBlockFormat,
    QTextCharFormat,
    QTextCursor,
    QTextFormat,
    QTextFrame,
    QTextFrameFormat,
    QTextList,
    QTextListFormat,
    QTextTableFormat,
)

from app.chat.code_colours import coloured_runs
from app.chat.markdown_blocks import make_parser
from app.theme import Theme, monospace_font

INDENT_PX = 22
_HEADING_STEPS = {"h1": 1.45, "h2": 1.25, "h3": 1.1}


@dataclass(frozen=True, slots=True)
class Place:
    """An end of the document that can be returned to.

    Attributes:
        is_fresh: whether the last block is empty and the next paragraph goes into it.
    """

    position: int
    is_fresh: bool


class MarkdownWriter:
    """Appends formatted blocks to a document."""

    _parser = make_parser()

    def __init__(self, cursor: QTextCursor, theme: Theme) -> None:
        """Args: cursor: private, at the end of an empty document."""
        self._cursor = cursor
        self._theme = theme
        self._is_fresh = True
        self._box: QTextFrame | None = None
        self._lists: list[QTextList | None] = []
        self._list_formats: list[QTextListFormat] = []
        self._item_is_new = False
        self._quote_depth = 0

    # ---- places ------------------------------------------------------------------------------

    def place(self) -> Place:
        """The end of the document now."""
        self._cursor.movePosition(QTextCursor.MoveOperation.End)
        return Place(self._cursor.position(), self._is_fresh)

    def rewind(self, place: Place) -> None:
        """Remove everything that was written after a place."""
        self._cursor.setPosition(place.position)
        self._cursor.movePosition(QTextCursor.MoveOperation.End, QTextCursor.MoveMode.KeepAnchor)
        self._cursor.removeSelectedText()
        self._is_fresh = place.is_fresh
        self._box = None

    # ---- plain pieces ------------------------------------------------------------------------

    def start_block(
        self,
        *,
        top: float = 0,
        bottom: float = 0,
        left: float = 0,
    ) -> QTextBlockFormat:
        """Begin a paragraph at the end; margins in pixels."""
        block = QTextBlockFormat()
        block.setTopMargin(top)
        block.setBottomMargin(bottom)
        block.setLeftMargin(left + INDENT_PX * self._quote_depth)
        block.setLineHeight(118, QTextBlockFormat.LineHeightTypes.ProportionalHeight.value)
        self._cursor.movePosition(QTextCursor.MoveOperation.End)
        if self._is_fresh:
            self._cursor.setBlockFormat(block)
            self._cursor.setBlockCharFormat(self.text_format())
            self._is_fresh = False
        else:
            self._cursor.insertBlock(block, self.text_format())
        return block

    def text_format(
        self, role: str = "text", *, step: int = 0, bold: bool = False
    ) -> QTextCharFormat:
        """How characters look; step as in `Theme.font_px`."""
        chars = QTextCharFormat()
        chars.setForeground(self._theme.colour(role))
        chars.setProperty(QTextFormat.Property.FontPixelSize, self._theme.font_px(step))
        if bold:
            chars.setFontWeight(QFont.Weight.DemiBold)
        return chars

    def code_format(self, role: str = "text") -> QTextCharFormat:
        """How code looks."""
        chars = QTextCharFormat()
        chars.setFont(monospace_font(self._theme.font_px(0)))
        chars.setForeground(self._theme.colour(role))
        return chars

    def insert(self, text: str, chars: QTextCharFormat) -> None:
        """Add characters to the paragraph at the end; a new line in a box is a new block."""
        if self._box is None:
            self._cursor.movePosition(QTextCursor.MoveOperation.End)
        else:
            self._cursor.setPosition(self._box.lastPosition())
        self._cursor.insertText(text, chars)

    def insert_link(self, text: str, address: str, *, step: int = 0) -> None:
        """Add a link to the paragraph at the end."""
        chars = self.text_format("accent", step=step)
        chars.setAnchor(True)
        chars.setAnchorHref(address)
        self.insert(text, chars)

    def insert_swatch(self, brush: QBrush | QColor) -> None:
        """Add a small square in a device's colour."""
        chars = self.text_format(step=0)
        chars.setForeground(brush)
        self.insert("■ ", chars)

    # ---- boxes -------------------------------------------------------------------------------

    def start_box(self, *, top: float = 6, bottom: float = 6) -> None:
        """Begin a box with its own background; pieces go into it until `end_box`."""
        self._cursor.movePosition(QTextCursor.MoveOperation.End)
        if self._is_fresh:
            # Qt wants a block before a box; this one takes no room.
            flat = QTextBlockFormat()
            flat.setLineHeight(1, QTextBlockFormat.LineHeightTypes.FixedHeight.value)
            self._cursor.setBlockFormat(flat)
        box = QTextFrameFormat()
        box.setBackground(self._theme.colour("raised"))
        box.setPadding(8)
        box.setTopMargin(top)
        box.setBottomMargin(bottom)
        box.setLeftMargin(INDENT_PX * (len(self._lists) + self._quote_depth))
        self._box = self._cursor.insertFrame(box)
        self._cursor.setBlockFormat(QTextBlockFormat())

    def end_box(self) -> None:
        """Go on below the box, in the empty block that Qt keeps there."""
        self._box = None
        self._is_fresh = True

    # ---- code --------------------------------------------------------------------------------

    def start_code(self, language: str, copy_address: str | None) -> None:
        """Begin a box of code with its title line."""
        self.start_box()
        self.insert(f"{language or 'code'}   ", self.text_format("text_muted", step=-1))
        if copy_address is not None:
            self.insert_link("Copy code", copy_address, step=-1)
        self.insert("\n", self.code_format())

    def append_code(self, text: str) -> None:
        """Add plain code at the end of an open box."""
        self.insert(text, self.code_format())

    def write_code(self, language: str, text: str, copy_address: str | None) -> None:
        """Write a finished box of code, coloured once."""
        self.start_code(language, copy_address)
        for run, role in coloured_runs(language, text.rstrip("\n")):
            self.insert(run, self.code_format(role))
        self.end_box()

    # ---- Markdown ----------------------------------------------------------------------------

    def write(self, source: str, copy_address: str | None = None) -> None:
        """Write the blocks of a Markdown source.

        Args:
            copy_address: link under which code blocks offer a copy; the caller answers it.
        """
        self._write_tokens(self._parser.parse(source), copy_address)

    def _write_tokens(self, tokens: Sequence[Token], copy_address: str | None) -> None:
        index = 0
        while index < len(tokens):
            token = tokens[index]
            match token.type:
                case "heading_open":
                    self._write_heading(token, tokens[index + 1])
                    index += 2
                case "paragraph_open":
                    self._start_paragraph(is_tight=token.hidden)
                    self._write_inline(tokens[index + 1], self.text_format())
                    index += 2
                case "bullet_list_open" | "ordered_list_open":
                    self._open_list(token)
                case "bullet_list_close" | "ordered_list_close":
                    self._lists.pop()
                    self._list_formats.pop()
                case "list_item_open":
                    self._item_is_new = True
                case "blockquote_open":
                    self._quote_depth += 1
                case "blockquote_close":
                    self._quote_depth -= 1
                case "fence" | "code_block":
                    words = token.info.split()
                    language = words[0] if words else ""
                    self.write_code(language, token.content, copy_address)
                case "hr":
                    self._write_rule()
                case "table_open":
                    index = self._write_table(tokens, index)
                case _:
                    pass
            index += 1

    def _write_heading(self, token: Token, inline: Token) -> None:
        self._start_paragraph(top=10)
        chars = self.text_format(bold=True)
        scale = _HEADING_STEPS.get(token.tag, 1.0)
        size = round(self._theme.font_px(0) * scale)
        chars.setProperty(QTextFormat.Property.FontPixelSize, size)
        self._write_inline(inline, chars)

    def _start_paragraph(self, *, is_tight: bool = False, top: float = 4) -> None:
        bottom = 2 if is_tight else 6
        if not self._lists:
            self.start_block(top=top, bottom=bottom)
            return
        if not self._item_is_new:
            self.start_block(bottom=bottom, left=INDENT_PX * len(self._lists))
            return
        self._item_is_new = False
        self.start_block(top=0, bottom=bottom)
        current = self._lists[-1]
        if current is None:
            self._lists[-1] = self._cursor.createList(self._list_formats[-1])
        else:
            current.add(self._cursor.block())

    def _open_list(self, token: Token) -> None:
        listing = QTextListFormat()
        if token.type == "ordered_list_open":
            listing.setStyle(QTextListFormat.Style.ListDecimal)
            listing.setStart(int(token.attrGet("start") or 1))
        else:
            listing.setStyle(QTextListFormat.Style.ListDisc)
        listing.setIndent(len(self._lists) + 1)
        self._lists.append(None)
        self._list_formats.append(listing)

    def _write_rule(self) -> None:
        block = self.start_block(top=8, bottom=10)
        block.setBackground(self._theme.colour("line"))
        block.setLineHeight(1, QTextBlockFormat.LineHeightTypes.FixedHeight.value)
        self._cursor.setBlockFormat(block)

    def _write_table(self, tokens: Sequence[Token], start: int) -> int:
        """Write the table that opens at `start`.

        Returns: the index of its last token.
        """
        end = next(i for i in range(start, len(tokens)) if tokens[i].type == "table_close")
        rows: list[list[Token]] = []
        num_header_rows = 0
        for index in range(start, end):
            match tokens[index].type:
                case "tr_open":
                    rows.append([])
                case "th_open" | "td_open":
                    rows[-1].append(tokens[index + 1])
                case "thead_close":
                    num_header_rows = len(rows)
                case _:
                    pass
        layout = QTextTableFormat()
        layout.setBorder(1)
        layout.setBorderBrush(self._theme.colour("line"))
        layout.setBorderStyle(QTextFrameFormat.BorderStyle.BorderStyle_Solid)
        layout.setBorderCollapse(True)
        layout.setCellPadding(5)
        layout.setTopMargin(4)
        layout.setBottomMargin(4)
        self._cursor.movePosition(QTextCursor.MoveOperation.End)
        table = self._cursor.insertTable(len(rows), max(len(row) for row in rows), layout)
        for row_index, row in enumerate(rows):
            chars = self.text_format(bold=row_index < num_header_rows)
            for column, inline in enumerate(row):
                cell = table.cellAt(row_index, column).firstCursorPosition()
                self._write_inline(inline, chars, cell)
        self._cursor.movePosition(QTextCursor.MoveOperation.End)
        # Qt keeps an empty block behind a table; the next paragraph goes into it.
        self._is_fresh = True
        return end

    def _write_inline(
        self, inline: Token, base: QTextCharFormat, cursor: QTextCursor | None = None
    ) -> None:
        target = self._cursor if cursor is None else cursor
        chars = QTextCharFormat(base)
        for token in inline.children or ():
            match token.type:
                case "text":
                    target.insertText(token.content, chars)
                case "code_inline":
                    code = self.code_format()
                    code.setBackground(self._theme.colour("raised"))
                    target.insertText(token.content, code)
                case "softbreak" | "hardbreak":
                    # A model breaks lines where it means to: code without a fence, verse.
                    target.insertText("\u2028", chars)
                case "strong_open":
                    chars.setFontWeight(QFont.Weight.Bold)
                case "strong_close":
                    chars.setFontWeight(base.fontWeight())
                case "em_open":
                    chars.setFontItalic(True)
                case "em_close":
                    chars.setFontItalic(False)
                case "s_open":
                    chars.setFontStrikeOut(True)
                case "s_close":
                    chars.setFontStrikeOut(False)
                case "link_open":
                    chars.setAnchor(True)
                    chars.setAnchorHref(str(token.attrGet("href") or ""))
                    chars.setForeground(self._theme.colour("accent"))
                case "link_close":
                    chars.setAnchor(False)
                    chars.setAnchorHref("")
                    chars.setForeground(base.foreground())
                case "image":
                    # Nothing is fetched from anywhere.
                    target.insertText(f"[image: {token.content}]", chars)
                case _:
                    target.insertText(token.content, chars)
