"""How byte-level vocabularies cut text into words, by the names GGUF files use.

In: the value of tokenizer.ggml.pre. Out: settings of the `tokenizers` library. The patterns are
part of each model's definition; a file only names them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
_GPT2 = {**_BYTES, "use_regex": True}
_NO_REGEX = {**_BYTES, "use_regex": False}


def _words(digits: str) -> str:
    """The pattern of Llama 3 and its relatives, which differ in how many digits make a word."""
    return (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
        + digits
        + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )


def _cased_words(endings: str, digits: str) -> str:
    """The pattern of Llama 4 and Tekken: a change from small to capital letters ends a word."""
    upper, lower = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
    start = r"[^\r\n\p{L}\p{N}]?"
    return (
        f"{start}{upper}*{lower}+{endings}|{start}{upper}+{lower}*{endings}|{digits}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )


def _sequence(*parts: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "pretokenizers": list(parts)}


def _split(pattern: str) -> dict[str, Any]:
    isolated = {"pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return _sequence({"type": "Split", **isolated}, _NO_REGEX)


@dataclass(frozen=True, slots=True)
class PreTokenizer:
    """Settings of one name.

    Attributes:
        ignores_merges: a word that is a whole token is taken at once.
        adds_bos: what the model wants where its file does not say.
    """

    words: dict[str, Any]
    normalizer: dict[str, Any] | None = field(default=None)
    ignores_merges: bool = False
    adds_bos: bool = False


_PLAIN = PreTokenizer(_GPT2)
# Every digit is a word of its own.
_DIGITS = PreTokenizer(_sequence({"type": "Digits", "individual_digits": True}, _GPT2))
_LLAMA3 = PreTokenizer(_split(_words(r"\p{N}{1,3}")), ignores_merges=True, adds_bos=True)
_LLAMA3_MERGING = PreTokenizer(_split(_words(r"\p{N}{1,3}")))
_QWEN2 = PreTokenizer(_split(_words(r"\p{N}")), normalizer={"type": "NFC"})
_CASED = _split(_cased_words(r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?", r"\p{N}{1,3}"))
_GPT4O = PreTokenizer(_CASED, ignores_merges=True)
_LLAMA4 = PreTokenizer(_CASED, ignores_merges=True, adds_bos=True)
_TEKKEN = PreTokenizer(_split(_cased_words("", r"\p{N}")), ignores_merges=True, adds_bos=True)

PRE_TOKENIZERS = {
    "default": _PLAIN,
    "gpt-2": _PLAIN,
    "gpt2": _PLAIN,
    "olmo": _PLAIN,
    "phi-2": _PLAIN,
    "smollm": _DIGITS,
    "starcoder": _DIGITS,
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "pixtral": _LLAMA3,
    "smaug-bpe": _LLAMA3_MERGING,
    "llama4": _LLAMA4,
    "gpt-4o": _GPT4O,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "tekken": _TEKKEN,
}
