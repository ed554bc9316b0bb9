"""The vocabulary of a GGUF file.

In: the checked metadata of a file. Out: a Vocabulary. Two kinds are known: "gpt2" (byte-level BPE
with stored merges) and "llama" (SentencePiece BPE with scores).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from engine.errors import CheckpointError, ConfigError
from engine.text.bpe_settings import bpe_settings
from engine.text.model_vocabulary import byte_values, protected_model
from engine.text.pretokenizers import PRE_TOKENIZERS, PreTokenizer
from engine.text.sentencepiece_model import (
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    Piece,
    check_piece_length,
    filler,
    make_bpe_model,
)
from engine.text.special_tokens import Roles, assign_roles
from engine.text.vocabulary import Vocabulary
from engine.weights.gguf import GgufFile, Value, metadata_strings
from engine.weights.mapped import one_line

_SPECIAL_NAMES = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
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
    ends = {metadata.token_id(f"{name}_token_id") for name in ("eos", "eot", "eom")}
    others = {id for id, type in enumerate(types) if type == USER_DEFINED}
    roles = assign_roles(
        tokens=dict(enumerate(tokens)),
        control=(id for id, type in enumerate(types) if type in (CONTROL, UNKNOWN)),
        others=others,
        ends=(id for id in ends if id is not None),
        bos_id=bos_id,
        template=template,
    )
    adds_bos = True
    special = {name: metadata.token_id(key) for name, key in _SPECIAL_NAMES.items()}
    extra: dict[str, Any] = {"raw": frozenset(others), "unknown_id": special["unk_token"]}
    if kind == "gpt2":
        pre = _pre_tokenizer(metadata)
        adds_bos = pre.adds_bos
        hidden = {*roles.protected.values()}
        vocab = {text: id for text, id in ids.items() if id not in hidden}
        extra["backend"] = bpe_settings(
            vocab=vocab,
            merges=_stored_merges(metadata, vocab),
            added=[(id, tokens[id]) for id in sorted(others - hidden) if tokens[id]],
            normalizer=pre.normalizer,
            words=pre.words,
            ignores_merges=pre.ignores_merges,
        )
    else:
        extra |= _piece_settings(metadata, types, roles, special["unk_token"])
    return Vocabulary(
        path=path,
        tokens=dict(enumerate(tokens)),
        kind="byte_level" if kind == "gpt2" else "sentencepiece",
        control=roles.control,
        protected=roles.protected,
        bos_id=bos_id,
        pad_id=special["pad_token"],
        eos_ids=roles.ends,
        adds_bos=metadata.flag("add_bos_token", adds_bos) and bos_id is not None,
        special_tokens={name: tokens[id] for name, id in special.items() if id is not None},
        chat_template=template,
        **extra,
    )


def _pre_tokenizer(metadata: _Metadata) -> PreTokenizer:
    name = metadata.text("tokenizer.ggml.pre") or "default"
    pre = PRE_TOKENIZERS.get(name)
    if pre is None:
        raise CheckpointError(
            f"{metadata.path}: tokenizer.ggml.pre {one_line(name)!r} is not supported "
            f"({', '.join(PRE_TOKENIZERS)}); use another model"
        )
    return pre


def _piece_settings(
    metadata: _Metadata, types: Sequence[int], roles: Roles, unknown_id: int | None
) -> dict[str, Any]:
    """The fields of a vocabulary whose tokens are SentencePiece pieces with scores."""
    scores = metadata.numbers("scores", "float32")
    if not all(map(math.isfinite, scores)):
        raise CheckpointError(
            f"{metadata.path}: tokenizer.ggml.scores has a value that is no number; fetch the file "
            "again"
        )
    declared = [id for id, type in enumerate(types) if type == UNKNOWN]
    if unknown_id is None:
        unknown_id = min(declared, default=None)
    pieces: list[Piece] = []
    for id, (text, score, type) in enumerate(zip(metadata.tokens, scores, types, strict=True)):
        if id == unknown_id:
            type = UNKNOWN
        elif type == UNKNOWN:
            type = CONTROL
        elif type not in (NORMAL, CONTROL, USER_DEFINED, BYTE) or not text:
            type = UNUSED
        if type == USER_DEFINED:
            # Files have runs of spaces as they are; the library looks for them as it writes them.
            text = text.replace(" ", "\u2581")
        check_piece_length(metadata.path, id, text)
        pieces.append(Piece(text or filler(id), score, type))
    bytes_of_ids = byte_values(pieces)
    hidden = {*roles.protected.values()}
    has_bytes = len({byte for id, byte in bytes_of_ids.items() if id not in hidden}) == 256
    if not has_bytes:  # some bytes help no text; the library refuses them
        pieces = [Piece(p.text, p.score, CONTROL) if p.kind == BYTE else p for p in pieces]
    if unknown_id is None:  # the library wants one; the id it gets is outside the vocabulary
        pieces.append(Piece(filler("unknown"), 0.0, UNKNOWN))
    unknown = pieces[-1 if unknown_id is None else unknown_id].text
    has_prefix = metadata.flag("add_space_prefix", True)
    model = make_bpe_model(pieces, has_prefix=has_prefix, has_bytes=has_bytes, unknown=unknown)
    return {
        "backend": protected_model(model, roles.protected),
        "byte_values": bytes_of_ids,
        "prefix": "every" if has_prefix else "none",
        "raw": frozenset[int](),
        "unknown_id": unknown_id,
    }
