"""What a tokenizer is made of, whatever file it came from. It reads nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from engine.text.sentencepiece_model import SentencePieceModel

Prefix = Literal["none", "first", "every"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Vocabulary:
    """Everything a tokenizer is made of.

    Attributes:
        backend: settings of the `tokenizers` library without the protected tokens and without a
            post-processor, or a SentencePiece model in which they are control symbols: no text can
            come out of either as a protected token.
        tokens: id to text, in the file's own alphabet; ids without a token are absent.
        kind: how a token's text stands for bytes.
        control: ids that carry structure and are never shown.
        protected: text to id of the tokens that user input cannot become: the control tokens, and
            added tokens that the chat template writes, such as <tool_call>.
        raw: ids whose text stands for itself in UTF-8.
        byte_values: id to byte, for the tokens that stand for one byte whatever their text.
        strips: protected ids that swallow whitespace (left, right) beside them when parsed.
        special_tokens: names a chat template may use, such as bos_token, to their text.
        unknown_id: stands for what the vocabulary cannot write.
        prefix: where encoding writes a space that the text does not have: nowhere, before the
            first word, or before the first word after every control token too.
    """

    path: Path
    backend: dict[str, Any] | SentencePieceModel
    tokens: Mapping[int, str]
    kind: Literal["byte_level", "sentencepiece"]
    control: frozenset[int]
    protected: Mapping[str, int]
    raw: frozenset[int]
    bos_id: int | None
    eos_ids: frozenset[int]
    adds_bos: bool
    unknown_id: int | None = None
    pad_id: int | None = None
    prefix: Prefix = "none"
    byte_values: Mapping[int, int] = field(default_factory=dict[int, int])
    strips: Mapping[int, tuple[bool, bool]] = field(default_factory=dict[int, "tuple[bool, bool]"])
    special_tokens: Mapping[str, str] = field(default_factory=dict[str, str])
    chat_template: str | None = None
