"""The vocabulary of a Hugging Face model folder.

In: a folder with tokenizer.json and, usually, tokenizer_config.json, special_tokens_map.json,
generation_config.json and chat_template.jinja. Out: a Vocabulary. BPE models only.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, cast

from engine.errors import CheckpointError, ConfigError
from engine.text.vocabulary import TURN_ENDS, Vocabulary
from engine.weights.hf_config import read_json_object, refuse_own_code
from engine.weights.mapped import one_line

MAX_TOKENIZER_BYTES = 1 << 28
_SPECIAL_NAMES = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
Json = dict[str, Any]


def _optional(path: Path) -> Json:
    return read_json_object(path) if path.is_file() else {}


def _object(path: Path, value: object, what: str) -> Json:
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: {what} is not a JSON object")
    return cast("Json", value)


def _list(path: Path, value: object, what: str) -> list[Any]:
    """A JSON array; null or nothing is an empty one."""
    if value is None:
        return []
    if not isinstance(value, list):
        raise CheckpointError(f"{path}: {what} {one_line(value)} is not a JSON array")
    return cast("list[Any]", value)


def _kind(path: Path, decoder: object) -> Literal["byte_level", "sentencepiece"]:
    """How tokens stand for bytes, by the decoder of the file."""
    types: set[str] = set()
    waiting: list[object] = [decoder]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            entry = cast("Json", value)
            types.add(str(entry.get("type")))
            waiting.extend(_list(path, entry.get("decoders"), "decoders"))
    if "ByteLevel" in types:
        return "byte_level"
    if types & {"ByteFallback", "Metaspace"}:
        return "sentencepiece"
    raise CheckpointError(
        f"{path}: decoder of type {one_line(sorted(types))} is not supported "
        "(ByteLevel, ByteFallback, Metaspace)"
    )


def _added_tokens(path: Path, data: Json) -> dict[int, Json]:
    found: dict[int, Json] = {}
    for value in _list(path, data.get("added_tokens"), "added_tokens"):
        entry = _object(path, value, "an added token")
        id, text = entry.get("id"), entry.get("content")
        if type(id) is not int or not 0 <= id < 1 << 22 or not isinstance(text, str) or not text:
            raise CheckpointError(f"{path}: added token {one_line(entry)} has no valid id and text")
        if id in found:
            raise ConfigError(f"{path}: two added tokens have id {id}")
        found[id] = entry
    return found


def _vocab(path: Path, model: Json) -> dict[str, int]:
    vocab = _object(path, model.get("vocab"), "the vocabulary")
    for text, id in vocab.items():
        if type(id) is not int or not 0 <= id < 1 << 22:
            raise ConfigError(f"{path}: token {one_line(text)!r} has id {one_line(id)}")
    if len(set(vocab.values())) != len(vocab):
        raise ConfigError(f"{path}: two tokens share one id")
    return cast("dict[str, int]", vocab)


def _kept_merges(path: Path, model: Json, protected: Mapping[str, int]) -> list[tuple[str, str]]:
    """The merges without those that touch or make a protected token."""
    kept: list[tuple[str, str]] = []
    for value in _list(path, model.get("merges"), "merges"):
        pair = tuple(value.split(" ")) if isinstance(value, str) else value
        if not isinstance(pair, list | tuple) or len(cast("list[object]", pair)) != 2:
            raise CheckpointError(f"{path}: merge {one_line(value)} is not two tokens")
        left, right = cast("tuple[object, object]", pair)
        if not isinstance(left, str) or not isinstance(right, str):
            raise CheckpointError(f"{path}: merge {one_line(value)} is not two tokens")
        if not protected.keys() & {left, right, left + right}:
            kept.append((left, right))
    return kept


def _token_text(value: object) -> str | None:
    """A special token, given as its text or as an object with a content."""
    if isinstance(value, dict):
        value = cast("Json", value).get("content")
    return value if isinstance(value, str) else None


def _chat_template(folder: Path, settings: Json) -> str | None:
    path = folder / "chat_template.jinja"
    if path.is_file():
        try:
            return path.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{path}: cannot be read: {error}") from error
    value = settings.get("chat_template")
    if isinstance(value, list):
        named = [_object(folder, entry, "a chat template") for entry in cast("list[object]", value)]
        value = next(
            (entry.get("template") for entry in named if entry.get("name") == "default"), None
        )
    return value if isinstance(value, str) else None


def _declared_ends(folder: Path, settings: Json) -> Iterable[int]:
    """End-of-answer ids of generation_config.json, or else of config.json."""
    for path in (folder / "generation_config.json", folder / "config.json"):
        value = _optional(path).get("eos_token_id")
        values = cast("list[object]", value if isinstance(value, list) else [value])
        found = [id for id in values if type(id) is int]
        if found:
            return found
    return []


def _adds_bos(path: Path, data: Json, settings: Json, bos: str | None) -> bool:
    """Whether the model wants a BOS: as declared, else as its post-processor does it."""
    declared = settings.get("add_bos_token")
    if isinstance(declared, bool):
        return declared
    waiting: list[object] = [data.get("post_processor")]
    while waiting:
        value = waiting.pop()
        if not isinstance(value, dict):
            continue
        entry = cast("Json", value)
        waiting.extend(_list(path, entry.get("processors"), "processors"))
        single = _list(path, entry.get("single"), "single")
        if entry.get("type") == "TemplateProcessing" and single:
            first = _object(path, single[0], "single").get("SpecialToken")
            return isinstance(first, dict) and cast("Json", first).get("id") == bos
    return False


def read_hf_vocabulary(folder: Path) -> Vocabulary:
    """Read the vocabulary of a model folder.

    Raises:
        CheckpointError: tokenizer.json is missing, malformed or of an unsupported kind.
        ConfigError: ids clash or lie outside, or the tokenizer wants to run its own code.
    """
    path = folder / "tokenizer.json"
    settings_path = folder / "tokenizer_config.json"
    settings = _optional(settings_path)
    refuse_own_code(settings_path, settings)
    if not path.is_file():
        raise CheckpointError(
            f"{folder}: no tokenizer.json in this folder; save the model's fast tokenizer there "
            "(AutoTokenizer.from_pretrained(...).save_pretrained(...))"
        )
    data = read_json_object(path, MAX_TOKENIZER_BYTES)
    model = _object(path, data.get("model"), "the model")
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
    ids = {text: id for id, text in tokens.items()}
    named = {**_optional(folder / "special_tokens_map.json"), **settings}
    special = {
        name: text for name in _SPECIAL_NAMES if (text := _token_text(named.get(name))) in ids
    }
    template = _chat_template(folder, settings)
    control = {id for id, entry in added.items() if entry.get("special") is True}
    ends = {*_declared_ends(folder, settings)} & tokens.keys()
    ends |= {ids[text] for name, text in special.items() if name == "eos_token" and text}
    bos_id = ids.get(special.get("bos_token") or "")
    control |= ends | ({bos_id} if bos_id is not None else set())
    ends |= {ids[text] for text in TURN_ENDS if ids.get(text) in control}
    written = {id for id in added if template and tokens[id] in template}
    protected = {tokens[id]: id for id in control | written}
    return Vocabulary(
        path=folder,
        backend=_backend(path, data, model, vocab, added, protected),
        tokens=tokens,
        kind=_kind(path, data.get("decoder")),
        control=frozenset(control),
        protected=protected,
        raw=frozenset(added),
        bos_id=bos_id,
        eos_ids=frozenset(ends),
        adds_bos=bos_id is not None and _adds_bos(path, data, settings, special.get("bos_token")),
        strips={
            id: (added[id].get("lstrip") is True, added[id].get("rstrip") is True)
            for id in protected.values()
            if id in added
        },
        special_tokens={name: text for name, text in special.items() if text},
        chat_template=template,
    )


def _backend(
    path: Path,
    data: Json,
    model: Json,
    vocab: Mapping[str, int],
    added: Mapping[int, Json],
    protected: Mapping[str, int],
) -> Json:
    """The settings of the file without the protected tokens."""
    unknown = model.get("unk_token")
    kept = {text: id for text, id in vocab.items() if text not in protected or text == unknown}
    others = [entry for entry in added.values() if entry["content"] not in protected]
    # The library numbers added tokens itself; being in the vocabulary too pins their ids.
    kept.update({entry["content"]: entry["id"] for entry in others})
    changed = {"vocab": kept, "merges": _kept_merges(path, model, protected), "type": "BPE"}
    return {
        **data,
        "truncation": None,
        "padding": None,
        "post_processor": None,
        "added_tokens": others,
        "model": {**model, **changed},
    }
