"""The vocabulary of a GGUF file.

In: the checked metadata of a file. Out: a Vocabulary. Two kinds are known: "gpt2" (byte-level BPE
with stored merges) and "llama" (SentencePiece BPE, whose merges follow from the scores).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from engine.errors import CheckpointError, ConfigError
from engine.text.pretokenizers import PRE_TOKENIZERS
from engine.text.vocabulary import TURN_ENDS, Vocabulary
from engine.weights.gguf import GgufFile, Value, metadata_strings
from engine.weights.mapped import one_line

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 1, 2, 3, 4, 6
_SPECIAL_NAMES = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}


def bpe_backend(
    *,
    vocab: Mapping[str, int],
    merges: Sequence[tuple[str, str]],
    added: Sequence[tuple[int, str]] = (),
    normalizer: dict[str, Any] | None = None,
    words: dict[str, Any] | None = None,
    unknown: str | None = None,
    byte_fallback: bool = False,
    ignores_merges: bool = False,
) -> dict[str, Any]:
    """Settings of the `tokenizers` library for a BPE model."""
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": id,
                "content": text,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": False,
            }
            for id, text in added
        ],
        "normalizer": normalizer,
        "pre_tokenizer": words,
        "post_processor": None,
        "decoder": None,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": unknown,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": unknown is not None,
            "byte_fallback": byte_fallback,
            "ignore_merges": ignores_merges,
            "vocab": dict(vocab),
            "merges": list(merges),
        },
    }


class _Metadata:
    """Typed access to the tokenizer.ggml section."""

    def __init__(self, path: Path, values: Mapping[str, Value]) -> None:
        self.path = path
        self.values = values
        self.tokens = self.strings("tokens")

    def strings(self, key: str) -> list[str]:
        """A string array that must be there."""
        found = metadata_strings(self.path, self.values, f"tokenizer.ggml.{key}")
        if found is None:
            raise CheckpointError(
                f"{self.path}: tokenizer.ggml.{key} is missing; the file has no tokenizer"
            )
        return found

    def numbers(self, key: str, dtype: str) -> list[Any]:
        """A numeric array with one entry a token."""
        value = self.values.get(f"tokenizer.ggml.{key}")
        wanted = f"{dtype}[{len(self.tokens)}]"
        if isinstance(value, np.ndarray):
            found = f"{value.dtype}[{value.size}]"
        else:
            found = "nothing" if value is None else type(value).__name__
        if not isinstance(value, np.ndarray) or found != wanted:
            raise CheckpointError(
                f"{self.path}: tokenizer.ggml.{key} must be {wanted}, found {found}"
            )
        return value.tolist()

    def text(self, key: str) -> str | None:
        """A string, or None where it is absent."""
        value = self.values.get(key)
        if value is not None and not isinstance(value, str):
            raise CheckpointError(f"{self.path}: {key} must be a string, found {one_line(value)}")
        return value

    def flag(self, key: str, default: bool) -> bool:
        """A bool, or the default where it is absent."""
        value = self.values.get(f"tokenizer.ggml.{key}", default)
        if not isinstance(value, bool):
            raise CheckpointError(
                f"{self.path}: tokenizer.ggml.{key} must be a bool, found {one_line(value)}"
            )
        return value

    def token_id(self, key: str) -> int | None:
        """A token id inside the vocabulary, or None where it is absent."""
        value = self.values.get(f"tokenizer.ggml.{key}")
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int):
            raise ConfigError(f"{self.path}: tokenizer.ggml.{key} {one_line(value)} is no token id")
        if not 0 <= value < len(self.tokens):
            raise ConfigError(
                f"{self.path}: tokenizer.ggml.{key} {value} is outside the vocabulary of "
                f"{len(self.tokens):,} tokens"
            )
        return value


def _unique_ids(path: Path, tokens: Sequence[str]) -> dict[str, int]:
    ids: dict[str, int] = {}
    for id, text in enumerate(tokens):
        if text and ids.setdefault(text, id) != id:
            raise ConfigError(
                f"{path}: tokens {ids[text]} and {id} have the same text {one_line(text)!r}"
            )
    return ids


def _stored_merges(metadata: _Metadata, vocab: Mapping[str, int]) -> list[tuple[str, str]]:
    merges: list[tuple[str, str]] = []
    for line in metadata.strings("merges"):
        left, space, right = line.partition(" ")
        if not space or not left or not right or " " in right:
            raise CheckpointError(f"{metadata.path}: merge {one_line(line)!r} is not two tokens")
        # A merge with or into a protected token is dropped, so that text cannot become one.
        if left in vocab and right in vocab and left + right in vocab:
            merges.append((left, right))
    return merges


def _merges_from_scores(
    pieces: Mapping[str, int], scores: Sequence[float]
) -> list[tuple[str, str]]:
    """Every way to join two pieces into a third, best score first."""
    ranked: list[tuple[float, int, str, str]] = []
    for text, id in pieces.items():
        for cut in range(1, len(text)):
            left, right = text[:cut], text[cut:]
            if left in pieces and right in pieces:
                ranked.append((-scores[id], id, left, right))
    ranked.sort(key=lambda entry: entry[:2])
    return [(left, right) for _, _, left, right in ranked]


def read_gguf_vocabulary(path: Path) -> Vocabulary:
    """Read the vocabulary of a GGUF file.

    Raises: CheckpointError, ConfigError: the file or its tokenizer is damaged or unsupported.
    """
    file = GgufFile(path)
    try:
        return vocabulary_from_metadata(path, file.metadata)
    finally:
        file.close()


def vocabulary_from_metadata(path: Path, values: Mapping[str, Value]) -> Vocabulary:
    """Make the vocabulary from the metadata of a GGUF file.

    Args:
        path: for messages.
        values: key to value, as `GgufFile.metadata`.
    Raises:
        CheckpointError: arrays are missing, of the wrong type or length, or the kind is unknown.
        ConfigError: an id lies outside the vocabulary, or two tokens share a text.
    """
    kind = values.get("tokenizer.ggml.model")
    if kind not in ("gpt2", "llama"):
        raise CheckpointError(
            f"{path}: tokenizer.ggml.model {one_line(kind)} is not supported (gpt2, llama)"
        )
    metadata = _Metadata(path, values)
    tokens = metadata.tokens
    types = metadata.numbers("token_type", "int32")
    ids = _unique_ids(path, tokens)
    template = metadata.text("tokenizer.chat_template")
    bos_id = metadata.token_id("bos_token_id")
    ends = {metadata.token_id(f"{name}_token_id") for name in ("eos", "eot", "eom")} - {None}
    control = {id for id, type in enumerate(types) if type in (_CONTROL, _UNKNOWN)}
    control |= {id for id in (*ends, bos_id) if id is not None}
    ends |= {ids[text] for text in TURN_ENDS if ids.get(text) in control}
    user_defined = {id for id, type in enumerate(types) if type == _USER_DEFINED} - control
    protected_ids = control | {id for id in user_defined if template and tokens[id] in template}
    protected = {tokens[id]: id for id in protected_ids if tokens[id]}
    vocab = {text: id for text, id in ids.items() if id not in protected_ids}
    added = [(id, tokens[id]) for id in sorted(user_defined - protected_ids) if tokens[id]]
    if kind == "gpt2":
        name = metadata.text("tokenizer.ggml.pre") or "default"
        pre = PRE_TOKENIZERS.get(name)
        if pre is None:
            raise CheckpointError(
                f"{path}: tokenizer.ggml.pre {one_line(name)!r} is not supported "
                f"({', '.join(PRE_TOKENIZERS)})"
            )
        adds_bos = pre.adds_bos
        backend = bpe_backend(
            vocab=vocab,
            merges=_stored_merges(metadata, vocab),
            added=added,
            normalizer=pre.normalizer,
            words=pre.words,
            ignores_merges=pre.ignores_merges,
        )
    else:
        adds_bos = True
        backend = _sentencepiece_backend(metadata, types, vocab, added)
    special = {name: metadata.token_id(key) for name, key in _SPECIAL_NAMES.items()}
    return Vocabulary(
        path=path,
        backend=backend,
        tokens=dict(enumerate(tokens)),
        kind="byte_level" if kind == "gpt2" else "sentencepiece",
        control=frozenset(control),
        protected=protected,
        raw=frozenset(user_defined),
        bos_id=bos_id,
        eos_ids=frozenset(id for id in ends if id is not None),
        adds_bos=metadata.flag("add_bos_token", adds_bos) and bos_id is not None,
        special_tokens={name: tokens[id] for name, id in special.items() if id is not None},
        chat_template=template,
    )


def _sentencepiece_backend(
    metadata: _Metadata,
    types: Sequence[int],
    vocab: Mapping[str, int],
    added: Sequence[tuple[int, str]],
) -> dict[str, Any]:
    scores = metadata.numbers("scores", "float32")
    if not all(map(math.isfinite, scores)):
        raise CheckpointError(
            f"{metadata.path}: tokenizer.ggml.scores has a value that is no number"
        )
    pieces = {text: id for text, id in vocab.items() if types[id] == _NORMAL}
    kept = {text: id for text, id in vocab.items() if types[id] in (_NORMAL, _USER_DEFINED, _BYTE)}
    unknown_id = metadata.token_id("unknown_token_id")
    unknown = metadata.tokens[unknown_id] if unknown_id is not None else None
    if unknown_id is not None and unknown:
        kept[unknown] = unknown_id
    normalizers: list[dict[str, Any]] = []
    if metadata.flag("add_space_prefix", True):
        normalizers.append({"type": "Prepend", "prepend": "\u2581"})
    normalizers.append({"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"})
    return bpe_backend(
        vocab=kept,
        merges=_merges_from_scores(pieces, scores),
        added=added,
        normalizer={"type": "Sequence", "normalizers": normalizers},
        unknown=unknown or None,
        byte_fallback=True,
    )
