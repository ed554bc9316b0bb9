"""Token ids to text, one token at a time.

In: ids in order. Out: the text that each makes certain. It never shows half a character: bytes of
an unfinished UTF-8 sequence wait for the next token. It does not look for stop strings.
"""

from __future__ import annotations

import codecs
from typing import Protocol


class TokenBytes(Protocol):
    """What a detokenizer needs of a tokenizer."""

    def token_bytes(self, id: int) -> bytes:
        """Bytes of one token; none for a control token."""
        ...


class IncrementalDetokenizer:
    """Joins the outputs of `push` and `finish` to the bytes decoded with errors="replace"."""

    def __init__(self, tokenizer: TokenBytes) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, id: int) -> str:
        """Text that became certain with this token, often but not always a whole word.

        Args:
            id: a token id; a control token adds nothing.
        Returns: possibly the empty string. At most three bytes stay behind.
        """
        return self._decoder.decode(self._tokenizer.token_bytes(id))

    def finish(self) -> str:
        """What was left of an unfinished character, as U+FFFD; afterwards a new text begins."""
        rest = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return rest
