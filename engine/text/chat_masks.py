"""Words that stand for pieces of a person's text while a chat template runs.

In: contents of messages and the texts that must not come out of them as one token. Out: contents
with such pieces hidden behind random words, and the rendered text cut at those words again. It
renders nothing and encodes nothing.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from engine.text.tokenizer import literal_pattern


@dataclass(frozen=True, slots=True)
class Pieces:
    """A rendered conversation, cut.

    Attributes:
        parts: in order; joined they are the prompt.
        is_plain: for each part, whether a person wrote it, so that it must stay text.
        is_whole: whether no word was cut by the template; otherwise `parts` contain rubble.
    """

    parts: list[str]
    is_plain: list[bool]
    is_whole: bool

    def text(self) -> str:
        """The prompt."""
        return "".join(self.parts)

    def found(self, pattern: re.Pattern[str]) -> list[str]:
        """What a pattern finds in the parts that nobody wrote, in order."""
        pairs = zip(self.parts, self.is_plain, strict=True)
        return [match for part, plain in pairs if not plain for match in pattern.findall(part)]


class Masks:
    """Hides texts and finds them again. Every conversation gets its own, so none can be guessed."""

    def __init__(self) -> None:
        self._nonce = "q" + secrets.token_hex(12)
        self._texts: list[str] = []
        self._pattern = re.compile(self._nonce + r"x(\d+)z")

    def hide(self, text: str) -> str:
        """A word of letters and digits that stands for a text."""
        self._texts.append(text)
        return f"{self._nonce}x{len(self._texts) - 1}z"

    def split(self, rendered: str) -> Pieces:
        """Undo the words."""
        pieces = self._pattern.split(rendered)
        parts = [self._texts[int(piece)] if k % 2 else piece for k, piece in enumerate(pieces)]
        # Any eight characters of the random word give away that a piece of it is left.
        rubble = re.compile("|".join(self._nonce[k : k + 8] for k in range(len(self._nonce) - 7)))
        is_whole = not any(rubble.search(piece) for piece in pieces[::2])
        return Pieces(parts, [k % 2 == 1 for k in range(len(pieces))], is_whole)


def hide_everything(content: str, masks: Masks) -> str:
    """Hide all but the whitespace around a content, which templates may trim."""
    inner = content.strip()
    if not inner:
        return content
    start = content.index(inner)
    return content[:start] + masks.hide(inner) + content[start + len(inner) :]


def _partial_ends(text: str, protected: Collection[str]) -> tuple[int, int]:
    """Characters at the start and the end of a text that text around it could complete."""
    start = end = 0
    for token in protected:
        if text in token:
            return len(text), 0
        for size in range(1, min(len(token), len(text) + 1)):
            if size > start and text.startswith(token[-size:]):
                start = size
            if size > end and text.endswith(token[:size]):
                end = size
    return start, end


def hide_tokens(
    content: str, pattern: re.Pattern[str], protected: Sequence[str], masks: Masks
) -> str:
    """Hide protected texts: whole ones, and ones that the border of the content cuts."""
    inner = content.strip()
    if not inner:
        return content
    first = content.index(inner)
    start, end = _partial_ends(inner, protected)
    end_at = max(len(inner) - end, start)
    middle = pattern.sub(lambda match: masks.hide(match.group()), inner[start:end_at])
    head = masks.hide(inner[:start]) if start else ""
    tail = masks.hide(inner[end_at:]) if end_at < len(inner) else ""
    return content[:first] + head + middle + tail + content[first + len(inner) :]


def symbol_pattern(protected: Collection[str]) -> re.Pattern[str]:
    """Finds runs of characters without which no protected text can be put together."""
    symbols: set[str] = set()
    for token in protected:
        marks = {
            character for character in token if not (character.isalnum() or character.isspace())
        }
        symbols |= marks or {token[0]}
    runs = literal_pattern(symbols).pattern
    return re.compile(f"(?:{runs})+")


def hide_symbols(content: str, symbols: re.Pattern[str], masks: Masks) -> str:
    """Hide every run of symbols."""
    return symbols.sub(lambda match: masks.hide(match.group()), content)
