"""A damaged or foreign vocabulary is told in one line, from a GGUF file or a folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers

from engine.errors import CheckpointError, ConfigError, PromptError
from engine.text.gguf_vocabulary import vocabulary_from_metadata
from engine.text.tokenizer import Tokenizer, load_tokenizer

TOKENS = ["<unk>", "<s>", "</s>", "a", "b", "ab", "\u2581"]


def metadata(kind: str = "gpt2", **changes: Any) -> dict[str, Any]:
    values: dict[str, Any] = {
        "model": kind,
        "tokens": list(TOKENS),
        "token_type": np.array([2, 3, 3, 1, 1, 1, 1], np.int32),
        "scores": np.zeros(7, np.float32),
        "merges": ["a b"],
        "bos_token_id": 1,
        "eos_token_id": 2,
        **changes,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in values.items() if value is not ...}


CASES: list[tuple[dict[str, Any], str]] = [
    ({"kind": "bert"}, r"tokenizer.ggml.model bert is not supported \(gpt2, llama\)"),
    ({"model": ...}, "tokenizer.ggml.model None is not supported"),
    ({"pre": "strange"}, "tokenizer.ggml.pre 'strange' is not supported .*smollm"),
    ({"tokens": ...}, "tokenizer.ggml.tokens is missing"),
    ({"token_type": ...}, r"token_type must be int32\[7\], found nothing"),
    (
        {"kind": "llama", "scores": np.zeros(8, np.int8)},
        r"tokenizer.ggml.scores must be float32\[7\], found int8\[8\]",
    ),
    ({"kind": "llama", "scores": np.zeros(6, np.float32)}, r"found float32\[6\]"),
    ({"kind": "llama", "scores": np.full(7, np.nan, np.float32)}, "a value that is no number"),
    ({"tokens": ["a", "b"]}, r"token_type must be int32\[2\], found int32\[7\]"),
    ({"tokens": ["x", *TOKENS[1:6], "x"]}, "tokens 0 and 6 have the same text 'x'"),
    ({"eos_token_id": 7}, "eos_token_id 7 is outside the vocabulary of 7 tokens"),
    ({"bos_token_id": "1"}, "bos_token_id 1 is no token id"),
    ({"merges": ["ab"]}, "merge 'ab' is not two tokens"),
    ({"merges": np.zeros(3, np.int32)}, r"merges must be string\[\], found int32\[3\]"),
    ({"add_bos_token": 3}, "add_bos_token must be a bool, found 3"),
    ({"kind": "llama", "add_space_prefix": "yes"}, "add_space_prefix must be a bool, found yes"),
    ({"kind": "llama", "tokens": ["x" * 5000, *TOKENS[1:]]}, "piece 0 is longer than 4,096 bytes"),
    ({"tokens": np.zeros(7, np.int32)}, r"tokens must be string\[\], found int32\[7\]"),
    ({"token_type": np.zeros(7, np.int8)}, r"token_type must be int32\[7\], found int8\[7\]"),
    ({"eot_token_id": -1}, "eot_token_id -1 is outside the vocabulary of 7 tokens"),
    ({"unknown_token_id": 1 << 40}, "unknown_token_id 1099511627776 is outside the vocabulary"),
]


@pytest.mark.parametrize(("changes", "message"), CASES, ids=[case[1][:30] for case in CASES])
def test_bad_metadata_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises((CheckpointError, ConfigError), match=message) as caught:
        Tokenizer(vocabulary_from_metadata(Path("x.gguf"), metadata(**changes)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("end_kind", [1, 3])
def test_text_does_not_merge_into_the_end_token(end_kind: int) -> None:
    """The pieces "</" and "s>" would join: in SentencePiece the whole text is one word."""
    tokens = ["<unk>", "<", "/", "s", ">", "</", "s>", "</s>", "a"]
    values = metadata(
        kind="llama",
        tokens=tokens,
        token_type=np.array([2, 1, 1, 1, 1, 1, 1, end_kind, 1], np.int32),
        scores=np.zeros(9, np.float32),
        bos_token_id=...,
        eos_token_id=7,
        unknown_token_id=0,
        add_space_prefix=False,
    )
    ours = Tokenizer(vocabulary_from_metadata(Path("x.gguf"), values))
    assert ours.encode("</s>a") == [5, 6, 8]
    assert ours.encode("</s>a", parse_control=True) == [7, 8]
    assert ours.encode("\N{SNOWMAN}<unk>") == [0, 1, 0, 4]


def _write(folder: Path, data: object, **settings: Any) -> Path:
    (folder / "tokenizer.json").write_text(json.dumps(data))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def _change(path: list[str | int], value: object) -> Callable[[dict[str, Any]], None]:
    def change(data: Any) -> None:
        for key in path[:-1]:
            data = data[key]
        data[path[-1]] = value

    return change


FOLDERS: list[tuple[Callable[[dict[str, Any]], None], str]] = [
    (_change(["model", "type"], "Unigram"), r"model of type Unigram is not supported \(BPE\)"),
    (_change(["decoder"], {"type": "WordPiece"}), "decoder of type .*WordPiece.* is not supported"),
    (_change(["decoder"], None), "decoder of type .* is not supported"),
    (_change(["model", "vocab"], []), "the vocabulary is not a JSON object"),
    (_change(["model", "vocab", "a"], 5), "two tokens share one id"),
    (_change(["model", "vocab", "a"], -1), "token 'a' has id -1"),
    (_change(["model", "vocab", "a"], "7"), "token 'a' has id 7"),
    (_change(["added_tokens", 0, "id"], 100), "share id 100"),
    (_change(["added_tokens", 0, "id"], 1 << 40), "has no valid id and text"),
    (_change(["added_tokens", 0], 7), "an added token is not a JSON object"),
    (_change(["model", "merges"], [["a"]]), "is not two tokens"),
    (_change(["model", "merges"], [["nothing", "here"]]), "the tokenizer cannot be built"),
    (_change(["pre_tokenizer"], {"type": "Odd"}), "the tokenizer cannot be built"),
    (
        # It makes the library panic, which Python sees as no Exception.
        _change(["normalizer"], {"type": "Precompiled", "precompiled_charsmap": "AAAA"}),
        "the tokenizer cannot be built: .*charsmap",
    ),
]


@pytest.mark.parametrize(("change", "message"), FOLDERS, ids=[case[1][:30] for case in FOLDERS])
def test_a_bad_tokenizer_json_is_refused(
    tmp_path: Path,
    train_bpe: Callable[..., tokenizers.Tokenizer],
    change: Callable[[dict[str, Any]], None],
    message: str,
) -> None:
    data = json.loads(train_bpe(["<s>"]).to_str())
    change(data)
    with pytest.raises((CheckpointError, ConfigError), match=message) as caught:
        load_tokenizer(_write(tmp_path, data))
    assert "\n" not in str(caught.value)


def test_a_tokenizer_with_its_own_code_is_refused(
    tmp_path: Path, train_bpe: Callable[..., tokenizers.Tokenizer]
) -> None:
    data = json.loads(train_bpe(["<s>"]).to_str())
    folder = _write(tmp_path, data, auto_map={"AutoTokenizer": ["evil.Tokenizer", None]})
    with pytest.raises(ConfigError, match="asks to run its own code"):
        load_tokenizer(folder)


def test_a_folder_without_tokenizer_says_so(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no tokenizer.json in .*, and no tokenizer.model"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("[1, 2]")
    with pytest.raises(CheckpointError, match="is not a JSON object"):
        load_tokenizer(tmp_path)


def _varint(value: int) -> bytes:
    found = b""
    while value > 0x7F:
        found += bytes([value & 0x7F | 0x80])
        value >>= 7
    return found + bytes([value])


def _piece(text: bytes, kind: int = 1, score: bytes = bytes(4)) -> bytes:
    body = b"\x0a" + _varint(len(text)) + text + b"\x15" + score + b"\x18" + _varint(kind)
    return b"\x0a" + _varint(len(body)) + body


UNKNOWN_PIECE = _piece(b"<unk>", 2)
MODEL_FILES: list[tuple[bytes, str]] = [
    (b"", r"neither a SentencePiece model nor a list .* \(begins with nothing\)"),
    (b"\x80\x04\x95", r"neither a SentencePiece .* \(begins with 80 04 95\)"),
    (b"GGUF\x03\0\0\0", "neither a SentencePiece model nor a list"),
    (b"hello world\n", "neither a SentencePiece model nor a list"),
    (b"\x0a", "a number without an end"),
    (b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\x7f", "where 0 are left"),
    (b"\x0a" + b"\xff" * 11, "a number without an end"),
    (UNKNOWN_PIECE + b"\x0b", "a field of unknown form 3"),
    (UNKNOWN_PIECE + b"\x08\x01", "a number where a message belongs"),
    (UNKNOWN_PIECE + _piece(b"\xff"), "a text that is no UTF-8"),
    (UNKNOWN_PIECE + _piece(b""), "piece 1 has text ''"),
    (UNKNOWN_PIECE + _piece(b"a", 7), "type 7; a text, a number and a type of 1 to 6"),
    (UNKNOWN_PIECE + _piece(b"a", 1, b"\0\0\xc0\x7f"), "score nan"),
    (UNKNOWN_PIECE + _piece(b"x" * 5000), "piece 1 is longer than 4,096 bytes"),
    (_piece(b"a"), "the tokenizer cannot be built: .*unk"),
    (UNKNOWN_PIECE + _piece(b"a") * 2, "the tokenizer cannot be built: .*a"),
    (UNKNOWN_PIECE + b"\x12\x03\xc0\x01\x01", "writes spaces behind words"),
    (UNKNOWN_PIECE + b"\x2a\x03\x12\x01x", "rewrites text after decoding"),
]


@pytest.mark.parametrize(("data", "message"), MODEL_FILES, ids=[c[1][:40] for c in MODEL_FILES])
def test_a_bad_model_file_is_refused(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(data)
    for place in (path, tmp_path):
        with pytest.raises(CheckpointError, match=message) as caught:
            load_tokenizer(place)
        assert "\n" not in str(caught.value)


def test_a_huge_model_file_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    with path.open("wb") as stream:
        stream.truncate(1 << 40)  # sparse: reading it would not end
    with pytest.raises(CheckpointError, match=r"1,099,511,627,776 bytes of tokenizer, at most"):
        load_tokenizer(path)


def test_a_missing_file_is_told(tmp_path: Path) -> None:
    for name in ("tokenizer.model", "tokenizer.json", "model.gguf"):
        with pytest.raises(CheckpointError, match=r"cannot be read|no such file"):
            load_tokenizer(tmp_path / name)


ADDED: list[tuple[dict[str, Any], str]] = [
    ({"1": "<other>"}, "added token '<other>' and another token share id 1"),
    ({"2": "a"}, "added token 'a' and another token share id 2 or the text"),
    ({"2": "x", "3": "x"}, "two added tokens have the same text"),
    ({"99999": "x"}, "has id 99999, the file ends at 1, and no id from 65538 on is taken"),
]


@pytest.mark.parametrize(("added", "message"), ADDED, ids=[case[1][:40] for case in ADDED])
def test_a_folder_that_contradicts_its_model_file_is_refused(
    tmp_path: Path, added: dict[str, str], message: str
) -> None:
    (tmp_path / "tokenizer.model").write_bytes(UNKNOWN_PIECE + _piece(b"a"))
    entries = {id: {"content": text} for id, text in added.items()}
    settings = json.dumps({"added_tokens_decoder": entries})
    (tmp_path / "tokenizer_config.json").write_text(settings)
    with pytest.raises(ConfigError, match=message) as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_text_that_a_vocabulary_cannot_write_is_told() -> None:
    """Without an unknown token and without bytes there is no id for it."""
    values = metadata(kind="llama", token_type=np.array([3, 3, 3, 1, 1, 1, 1], np.int32))
    ours = Tokenizer(vocabulary_from_metadata(Path("x.gguf"), values))
    assert ours.decode(ours.encode("ab")) == "ab"
    with pytest.raises(PromptError, match="characters that this model's vocabulary cannot write"):
        ours.encode("ab\N{SNOWMAN}")


ENDLESS = [
    ({"type": "Split", "pattern": {"Regex": "(a|a)*$"}, "behavior": "Isolated", "invert": False}),
    ({"type": "Split", "pattern": {"Regex": "(?:a|aa)+$"}, "behavior": "Removed", "invert": False}),
]


@pytest.mark.parametrize("rule", ENDLESS, ids=["same", "longer"])
def test_a_pattern_without_an_end_is_told(
    tmp_path: Path, train_bpe: Callable[..., tokenizers.Tokenizer], rule: dict[str, Any]
) -> None:
    """The library panics at such a text; the next text is served."""
    data = json.loads(train_bpe(["<s>"]).to_str())
    data["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [rule, data["pre_tokenizer"]]}
    ours = load_tokenizer(_write(tmp_path, data))
    with pytest.raises(PromptError, match=r"cannot cut the text: .*limit"):
        ours.encode("a" * 60 + "b")
    assert ours.decode(ours.encode("x y")) == "x y"
