"""Added tokens without a row in the model's embedding do not exist: their texts are plain ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from engine.errors import ConfigError
from engine.host.opened_model import OpenedModel
from engine.text.tokenizer import load_tokenizer
from tests.tiny_models import VOCAB_SIZE, save_tiny_llama

# As Gemma 3 1B has the first, CodeLlama 34B the second, and many tuned models the third.
LACKING = ("<image_soft_token>", "zPREz", "<pad>")
TEXTS = [
    *("".join(parts) for parts in zip(("", "(a", ")"), LACKING, ("", "'b'", "(("), strict=True)),
    "".join(LACKING) * 2,
    "#!(-)",
]


def save_folder(folder: Path) -> Path:
    """A model of 99 rows whose tokenizer adds three tokens after them."""
    save_tiny_llama(folder)
    path = folder / "tokenizer.json"
    data = json.loads(path.read_text(encoding="utf-8"))
    data["added_tokens"] += [
        {
            "id": VOCAB_SIZE + place,
            "content": text,
            "special": text != "zPREz",
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
        }
        for place, text in enumerate(LACKING)
    ]
    path.write_text(json.dumps(data), encoding="utf-8")
    settings_path = folder / "tokenizer_config.json"
    settings = json.loads(settings_path.read_text(encoding="utf-8"))
    template = "{% for m in messages %}<s>{{ m.content }}<image_soft_token>{% endfor %}"
    settings |= {"pad_token": "<pad>", "chat_template": template}
    settings_path.write_text(json.dumps(settings), encoding="utf-8")
    return folder


def test_such_a_model_is_opened_and_its_ids_have_rows(tmp_path: Path) -> None:
    """gemma-3-1b-it was refused for its image token."""
    save_tiny_llama(tmp_path / "without")
    plain = AutoTokenizer.from_pretrained(tmp_path / "without")
    model = OpenedModel(save_folder(tmp_path / "with"), "float32", None)
    try:
        tokenizer = model.tokenizer
        assert tokenizer.vocab_size == model.config.vocab_size == VOCAB_SIZE
        assert tokenizer.pad_id is None
        assert not tokenizer.protected & {*LACKING}
        for text in TEXTS:
            expected = plain.encode(text, add_special_tokens=False)
            for parses in (False, True):
                ids = tokenizer.encode(text, parse_control=parses)
                assert ids == expected
                assert model.checkpoint.embed(ids).shape == (len(ids), 48)
        # What the file has within the rows still is a control token where it is asked for.
        assert tokenizer.encode("<s>", parse_control=True) == [1]
    finally:
        model.close()


def test_without_a_model_all_tokens_are_there(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(save_folder(tmp_path))
    assert tokenizer.vocab_size == VOCAB_SIZE + len(LACKING)
    assert tokenizer.encode("".join(LACKING), parse_control=True) == [99, 100, 101]


def test_an_added_token_may_be_in_the_vocabulary_too(tmp_path: Path) -> None:
    """Some files list added tokens twice, and even have merges that make them."""
    folder = save_folder(tmp_path)
    path = folder / "tokenizer.json"
    data = json.loads(path.read_text(encoding="utf-8"))
    kept = {text: id for text, id in data["model"]["vocab"].items() if id < 96}
    data["model"]["vocab"] = kept | {"PR": 96, "PRE": 97, "zPRE": 98, "zPREz": 100}
    data["model"]["merges"] = [["P", "R"], ["PR", "E"], ["z", "PRE"], ["zPRE", "z"]]
    path.write_text(json.dumps(data), encoding="utf-8")
    assert load_tokenizer(folder).encode("zPREz") == [100]
    assert load_tokenizer(folder, VOCAB_SIZE).encode("zPREz") == [98, kept["z"]]


def test_a_trained_token_without_a_row_is_an_error(tmp_path: Path) -> None:
    folder = save_folder(tmp_path)
    path = folder / "tokenizer.json"
    data = json.loads(path.read_text(encoding="utf-8"))
    data["model"]["vocab"]["zz"] = VOCAB_SIZE + 7
    path.write_text(json.dumps(data), encoding="utf-8")
    message = "the tokenizer has 107 tokens, the model embeddings for 99; files of two models are"
    with pytest.raises(ConfigError, match=message) as caught:
        OpenedModel(folder, "float32", None)
    assert "\n" not in str(caught.value)


def test_an_end_without_a_row_is_an_error(tmp_path: Path) -> None:
    """Such a model could not end an answer."""
    folder = save_folder(tmp_path)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(settings | {"eos_token": "<pad>"}), encoding="utf-8")
    with pytest.raises(ConfigError, match="eos_token '<pad>' is not in the vocabulary"):
        OpenedModel(folder, "float32", None)


def test_a_model_file_loses_what_its_folder_adds_without_a_row(
    tmp_path: Path, train_pieces: Callable[..., bytes], load_pieces: Callable[[bytes], Any]
) -> None:
    data = train_pieces("bpe")
    reference = load_pieces(data)
    size = reference.GetPieceSize()
    (tmp_path / "tokenizer.model").write_bytes(data)
    added = {"<|kept|>": size, "<|lost|>": size + 1, "<|far|>": size + 9}
    (tmp_path / "added_tokens.json").write_text(json.dumps(added))
    tokenizer = load_tokenizer(tmp_path, size + 1)
    assert tokenizer.vocab_size == size + 1
    parsed = tokenizer.encode("<|kept|><|lost|><|far|>", parse_control=True)
    assert parsed[0] == size
    assert size not in parsed[1:]
    assert tokenizer.decode(parsed[1:], is_start=False).strip() == "<|lost|><|far|>"
    assert tokenizer.encode("<|lost|>") == reference.EncodeAsIds("<|lost|>")
    with pytest.raises(ConfigError, match=f"the model embeddings for {size - 1:,}"):
        load_tokenizer(tmp_path, size - 1)
