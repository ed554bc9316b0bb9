"""What a tokenizer is made of, whatever file it came from. It reads nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

# Control tokens that end a turn, whether or not the file declares them.
TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<end_of_turn>")


@dataclass(frozen=True, slots=True, kw_only=True)
class Vocabulary:
    """Everything a tokenizer is made of.

    Attributes:
        backend: settings of the `tokenizers` library without the protected tokens and without a
            post-processor: no text can come out of it as a protected token.
        tokens: id to text, in the file's own alphabet; ids without a token are absent.
        kind: how a token's text stands for bytes.
        control: ids that carry structure and are never shown.
        protected: text to id of the tokens that user input cannot become: the control tokens, and
            added tokens that the chat template writes, such as <tool_call>.
        raw: ids whose text stands for itself in UTF-8.
        strips: protected ids that swallow whitespace (left, right) beside them when parsed.
        special_tokens: names a chat template may use, such as bos_token, to their text.
    """

    path: Path
    backend: dict[str, Any]
    tokens: Mapping[int, str]
    kind: Literal["byte_level", "sentencepiece"]
    control: frozenset[int]
    protected: Mapping[str, int]
    raw: frozenset[int]
    bos_id: int | None
    eos_ids: frozenset[int]
    adds_bos: bool
    strips: Mapping[int, tuple[bool, bool]] = field(default_factory=dict[int, "tuple[bool, bool]"])
    special_tokens: Mapping[str, str] = field(default_factory=dict[str, str])
    chat_template: str | None = None
