"""A damaged or foreign vocabulary is told in one line, from a GGUF file or a folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers

from engine.errors import CheckpointError, ConfigError
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
    with pytest.raises(CheckpointError, match=r"no tokenizer.json in this folder"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("[1, 2]")
    with pytest.raises(CheckpointError, match="is not a JSON object"):
        load_tokenizer(tmp_path)
