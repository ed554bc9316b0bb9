"""Text to token ids by a library: `tokenizers` or `sentencepiece`.

In: the settings or the model of a vocabulary without its protected tokens. Out: ids of a run of
text that lies between two control tokens. It knows no control tokens and no limits.
"""

from __future__ import annotations

import importlib
import json
import secrets
import warnings
from pathlib import Path
from typing import Any, Protocol, cast

import tokenizers

from engine.errors import CheckpointError, PromptError
from engine.text.sentencepiece_model import SentencePieceModel
from engine.text.vocabulary import Prefix, Vocabulary
from engine.weights.mapped import one_line


class Segmenter(Protocol):
    """Both libraries behind one call; safe to use from several threads."""

    def segment(self, text: str, *, is_first: bool) -> list[int]:
        """Ids of a text, not empty, that begins the prompt or follows a control token.

        Raises: PromptError: the rules of the model's file do not come to an end with this text.
        """
        ...


def make_segmenter(vocabulary: Vocabulary) -> Segmenter:
    """The segmenter of a vocabulary.

    Raises: CheckpointError: the library refuses what the file says.
    """
    if isinstance(vocabulary.backend, SentencePieceModel):
        return _PieceSegmenter(vocabulary.path, vocabulary.backend, vocabulary.prefix)
    return _LibrarySegmenter(vocabulary.path, vocabulary.backend)


def _refused(path: Path, error: BaseException) -> CheckpointError:
    return CheckpointError(
        f"{path}: the tokenizer cannot be built: {_shown(error)}; fetch the model's files again"
    )


def _shown(error: BaseException) -> str:
    return one_line(" ".join(str(error).split()), 200)


def _is_of_library(error: BaseException) -> bool:
    # A panic in the library's Rust code is no Exception: it would pass every border and end the
    # process. Its class cannot be imported.
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


class _LibrarySegmenter:
    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        # A private token that no text contains: encoding it before a text gives the text the same
        # treatment that it has after a control token (no "first word" rules).
        self._separator = f"\ue000{secrets.token_hex(16)}\ue001"
        try:
            self._backend = tokenizers.Tokenizer.from_str(json.dumps(settings))
            token = tokenizers.AddedToken(self._separator, normalized=False, special=True)
            self._backend.add_special_tokens([token])  # pyright: ignore[reportUnknownMemberType]
        except BaseException as error:  # the library raises nothing narrower
            if not _is_of_library(error):
                raise
            raise _refused(path, error) from error

    def segment(self, text: str, *, is_first: bool) -> list[int]:
        whole = text if is_first else self._separator + text
        try:
            ids = self._backend.encode(whole, add_special_tokens=False).ids
        except BaseException as error:
            if not _is_of_library(error):
                raise
            raise PromptError(
                f"this model's tokenizer cannot cut the text: {_shown(error)}; use another model, "
                "or another text"
            ) from error
        return ids if is_first else ids[1:]


class _Processor(Protocol):
    """What is used of sentencepiece.SentencePieceProcessor, which has no types."""

    def LoadFromSerializedProto(self, serialized: bytes) -> bool: ...  # noqa: N802

    def EncodeAsIds(self, text: str) -> list[int]: ...  # noqa: N802


class _PieceSegmenter:
    def __init__(self, path: Path, model: SentencePieceModel, prefix: Prefix) -> None:
        base = model.without_prefix() if prefix == "none" and model.has_prefix else model
        self._first = _load(path, base)
        is_special = prefix == "first" and model.has_prefix
        self._later = _load(path, model.without_prefix()) if is_special else self._first

    def segment(self, text: str, *, is_first: bool) -> list[int]:
        return (self._first if is_first else self._later).EncodeAsIds(text)


def _load(path: Path, model: SentencePieceModel) -> _Processor:
    with warnings.catch_warnings():
        # Some versions of its C++ wrapper use what Python 3.13 deprecates.
        warnings.simplefilter("ignore", DeprecationWarning)
        library = importlib.import_module("sentencepiece")
    processor = cast("_Processor", library.SentencePieceProcessor())
    try:
        processor.LoadFromSerializedProto(model.serialized())
    # Its messages quote the file and need not be UTF-8.
    except (RuntimeError, ValueError, OSError) as error:
        raise _refused(path, error) from error
    return processor
