"""The vocabulary of a tokenizer.json and of the files beside it.

In: the path of the file, or of the model folder that has it. Out: a Vocabulary. BPE models only.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any, Literal, cast

from engine.errors import CheckpointError, ConfigError
from engine.text.folder_settings import (
    MAX_TOKEN_ID,
    FolderSettings,
    Json,
    as_list,
    as_object,
    read_folder_settings,
)
from engine.text.sentencepiece_model import filler
from engine.text.special_tokens import assign_roles
from engine.text.vocabulary import Prefix, Vocabulary
from engine.weights.json_settings import read_json_object
from engine.weights.mapped import one_line

FILE_NAME = "tokenizer.json"
MAX_TOKENIZER_BYTES = 1 << 28
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
# What a file that stands alone leaves unsaid; the first that is a special token counts.
_USUAL_NAMES = {
    "bos_token": ("<s>", "<bos>", "<|begin_of_text|>"),
    "eos_token": ("</s>", "<eos>", "<|end_of_text|>", "<|endoftext|>", "<|im_end|>"),
}


def _nested(path: Path, value: object, key: str) -> list[Json]:
    """An object and those in the lists below it, such as a sequence of decoders and its parts."""
    found: list[Json] = []
    waiting: list[object] = [value]
    while waiting:
        entry = waiting.pop()
        if isinstance(entry, dict):
            found.append(cast("Json", entry))
            waiting.extend(as_list(path, found[-1].get(key), key))
    return found


def _kind(path: Path, decoder: object) -> Literal["byte_level", "sentencepiece"]:
    """How tokens stand for bytes, by the decoder of the file."""
    types = {str(entry.get("type")) for entry in _nested(path, decoder, "decoders")}
    if "ByteLevel" in types:
        return "byte_level"
    if types & {"ByteFallback", "Metaspace"}:
        return "sentencepiece"
    raise CheckpointError(
        f"{path}: decoder of type {one_line(sorted(types))} is not supported "
        "(ByteLevel, ByteFallback, Metaspace)"
    )


def _prefix(path: Path, data: Json) -> Prefix:
    """Where the file's rules write a space."""
    for entry in _nested(path, data.get("normalizer"), "normalizers"):
        if entry.get("type") == "Prepend":
            return "every"
    for entry in _nested(path, data.get("pre_tokenizer"), "pretokenizers"):
        if entry.get("type") == "ByteLevel" and entry.get("add_prefix_space") is True:
            return "every"
        if entry.get("type") == "Metaspace":
            scheme = entry.get("prepend_scheme", "always")
            if scheme == "first" or (scheme == "always" and entry.get("add_prefix_space", True)):
                return "first" if scheme == "first" else "every"
    return "none"


def _added_tokens(path: Path, data: Json) -> dict[int, Json]:
    found: dict[int, Json] = {}
    for value in as_list(path, data.get("added_tokens"), "added_tokens"):
        entry = as_object(path, value, "an added token")
        id, text = entry.get("id"), entry.get("content")
        is_valid = type(id) is int and 0 <= id < MAX_TOKEN_ID and isinstance(text, str) and text
        if not is_valid:
            raise CheckpointError(f"{path}: added token {one_line(entry)} has no valid id and text")
        if id in found:
            raise ConfigError(f"{path}: two added tokens have id {id}")
        found[cast("int", id)] = entry
    return found


def _vocab(path: Path, model: Json) -> dict[str, int]:
    vocab = as_object(path, model.get("vocab"), "the vocabulary")
    for text, id in vocab.items():
        if type(id) is not int or not 0 <= id < MAX_TOKEN_ID:
            raise ConfigError(f"{path}: token {one_line(text)!r} has id {one_line(id)}")
    if len(set(vocab.values())) != len(vocab):
        raise ConfigError(f"{path}: two tokens share one id")
    return cast("dict[str, int]", vocab)


def _kept_merges(path: Path, model: Json, hidden: AbstractSet[str]) -> list[tuple[str, str]]:
    """The merges without those that touch or make a hidden token."""
    kept: list[tuple[str, str]] = []
    for value in as_list(path, model.get("merges"), "merges"):
        pair = tuple(value.split(" ")) if isinstance(value, str) else value
        if not isinstance(pair, list | tuple) or len(cast("list[object]", pair)) != 2:
            raise CheckpointError(f"{path}: merge {one_line(value)} is not two tokens")
        left, right = cast("tuple[object, object]", pair)
        if not isinstance(left, str) or not isinstance(right, str):
            raise CheckpointError(f"{path}: merge {one_line(value)} is not two tokens")
        if not hidden & {left, right, left + right}:
            kept.append((left, right))
    return kept


def _adds_bos(path: Path, data: Json, settings: FolderSettings, bos: str | None) -> bool:
    """Whether the model wants a BOS: as declared, else as its post-processor does it."""
    declared = settings.flag("add_bos_token")
    if declared is not None:
        return declared
    for entry in _nested(path, data.get("post_processor"), "processors"):
        single = as_list(path, entry.get("single"), "single")
        if entry.get("type") == "TemplateProcessing" and single:
            first = as_object(path, single[0], "single").get("SpecialToken")
            return isinstance(first, dict) and cast("Json", first).get("id") == bos
    return False


def read_hf_vocabulary(path: Path, vocab_size: int | None = None) -> Vocabulary:
    """Read the vocabulary of a tokenizer.json.

    Args:
        path: a folder that has the file, or the file. Files beside it are read too if it has its
            usual name; under another name it stands alone.
        vocab_size: rows of the model's embedding: added tokens beyond them are left out, so that
            their texts are ordinary ones. None: all tokens are kept.
    Raises:
        CheckpointError: it is missing, malformed or of an unsupported kind.
        ConfigError: ids clash or lie outside, or the tokenizer wants to run its own code.
    """
    folder = path if path.is_dir() else path.parent
    path = path / FILE_NAME if path.is_dir() else path
    stands_alone = path.name != FILE_NAME
    settings = FolderSettings(path=path) if stands_alone else read_folder_settings(folder)
    data = read_json_object(path, MAX_TOKENIZER_BYTES)
    model = as_object(path, data.get("model"), "the model")
    # Files of the first versions do not name the type of a BPE model.
    if model.get("type", "BPE") != "BPE":
        raise CheckpointError(
            f"{path}: model of type {one_line(model['type'])} is not supported (BPE)"
        )
    vocab, added = _vocab(path, model), _added_tokens(path, data)
    tokens = {id: text for text, id in vocab.items()}
    for id, entry in added.items():
        text = cast("str", entry["content"])
        if tokens.get(id, text) != text or vocab.get(text, id) != id:
            raise ConfigError(
                f"{path}: added token {one_line(text)!r} and another token share id {id}"
            )
        tokens[id] = text
    dropped = {tokens.pop(id) for id in added if vocab_size is not None and id >= vocab_size}
    added = {id: entry for id, entry in added.items() if id in tokens}
    ids = {text: id for id, text in tokens.items()}
    if len(ids) != len(tokens):
        raise ConfigError(f"{path}: two added tokens have the same text; correct the file")
    special = settings.known_special_tokens(ids)
    marked = {id for id, entry in added.items() if entry.get("special") is True}
    for name, usual in _USUAL_NAMES.items():
        if not settings.tokenizer_config and name not in special:
            found = next((text for text in usual if ids.get(text) in marked), None)
            special |= {} if found is None else {name: found}
    bos_id = ids.get(special.get("bos_token", ""))
    ends = settings.known_end_ids(tokens)
    if "eos_token" in special:
        ends.add(ids[special["eos_token"]])
    roles = assign_roles(
        tokens=tokens,
        control=marked,
        others=added.keys() - marked,
        ends=ends,
        bos_id=bos_id,
        template=settings.chat_template,
    )
    kind = _kind(path, data.get("decoder"))
    unknown = model.get("unk_token")
    return Vocabulary(
        path=folder,
        backend=_backend(path, data, model, vocab, added, roles.protected, dropped),
        tokens=tokens,
        kind=kind,
        control=roles.control,
        protected=roles.protected,
        raw=frozenset(added) if kind == "byte_level" else frozenset(),
        byte_values=_byte_values(tokens, added) if kind == "sentencepiece" else {},
        prefix=_prefix(path, data),
        unknown_id=ids.get(unknown) if isinstance(unknown, str) else None,
        pad_id=ids.get(special.get("pad_token", "")),
        bos_id=bos_id,
        eos_ids=roles.ends,
        adds_bos=_adds_bos(path, data, settings, special.get("bos_token")) and bos_id is not None,
        strips={
            id: (added[id].get("lstrip") is True, added[id].get("rstrip") is True)
            for id in roles.protected.values()
            if id in added
        },
        special_tokens=special,
        chat_template=settings.chat_template,
    )


def _byte_values(tokens: Mapping[int, str], added: Mapping[int, Json]) -> dict[int, int]:
    """The tokens that are one byte; an added token of such a text is that text."""
    found = {id: _BYTE_TOKEN.fullmatch(text) for id, text in tokens.items() if id not in added}
    return {id: int(match[1], 16) for id, match in found.items() if match}


def _backend(
    path: Path,
    data: Json,
    model: Json,
    vocab: Mapping[str, int],
    added: Mapping[int, Json],
    protected: Mapping[str, int],
    dropped: AbstractSet[str],
) -> dict[str, Any]:
    """The settings of the file without the protected tokens and those that the model lacks."""
    hidden = protected.keys() | dropped
    kept = {text: id for text, id in vocab.items() if text not in hidden}
    unknown = model.get("unk_token")
    if isinstance(unknown, str) and unknown in protected and unknown in vocab:
        # The library must have it, but not by a text that a person can write.
        kept[filler("unknown")] = vocab[unknown]
        unknown = filler("unknown")
    others = [entry for entry in added.values() if entry["content"] not in protected]
    # The library numbers added tokens itself; being in the vocabulary too pins their ids.
    kept.update({entry["content"]: entry["id"] for entry in others})
    merges = _kept_merges(path, model, hidden)
    changed = {"vocab": kept, "merges": merges, "type": "BPE", "unk_token": unknown}
    return {
        **data,
        "truncation": None,
        "padding": None,
        "post_processor": None,
        "added_tokens": others,
        "model": {**model, **changed},
    }
