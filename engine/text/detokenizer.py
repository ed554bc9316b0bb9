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

    @property
    def writes_space(self) -> bool:
        """Whether encoding writes a space before the first word."""
        ...


class IncrementalDetokenizer:
    """The outputs of `push` and `finish`, joined, are what `Tokenizer.decode` gives at once."""

    def __init__(self, tokenizer: TokenBytes, *, is_start: bool = True) -> None:
        """Begin a text.

        Args:
            tokenizer: of the model.
            is_start: whether a text begins here, so that the space which vocabularies of
                SentencePiece write before a first word is left out. False where the text goes on
                from a prompt that a person wrote.
        """
        self._tokenizer = tokenizer
        self._is_start = is_start and tokenizer.writes_space
        self._skips_space = self._is_start
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, id: int) -> str:
        """Text that became certain with this token, often but not always a whole word.

        Args:
            id: a token id; a control token adds nothing.
        Returns: possibly the empty string. At most three bytes stay behind.
        """
        data = self._tokenizer.token_bytes(id)
        if self._skips_space and data:
            self._skips_space = False
            data = data.removeprefix(b" ")
        return self._decoder.decode(data)

    def finish(self) -> str:
        """What was left of an unfinished character, as U+FFFD; afterwards a new text begins."""
        rest = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        self._skips_space = self._is_start
        return rest
