"""Two tokenizers are the same only where every id means the same."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine.text.tokenizer import Tokenizer, load_tokenizer
from tests.tiny_models import VOCAB_SIZE, save_letter_tokenizer


def tokenizer(folder: Path, change: Callable[[dict[str, Any]], None] = lambda _: None) -> Tokenizer:
    """The tokenizer of single letters, with a change of its file."""
    folder.mkdir()
    save_letter_tokenizer(folder)
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    change(content)
    file.write_text(json.dumps(content), encoding="utf-8")
    return load_tokenizer(folder)


def swap(content: dict[str, Any]) -> None:
    vocab = content["model"]["vocab"]
    by_id = {id: token for token, id in vocab.items()}
    vocab[by_id[50]], vocab[by_id[40]] = 40, 50


def leave_one_out(content: dict[str, Any]) -> None:
    vocab = content["model"]["vocab"]
    content["model"]["vocab"] = {t: id for t, id in vocab.items() if id != VOCAB_SIZE - 1}


def add_one(content: dict[str, Any]) -> None:
    content["model"]["vocab"]["longer"] = VOCAB_SIZE


def add_row_without_token(content: dict[str, Any]) -> None:
    content["model"]["vocab"][f"[PAD{VOCAB_SIZE}]"] = VOCAB_SIZE


def show_a_control_token(content: dict[str, Any]) -> None:
    content["added_tokens"] = [t for t in content["added_tokens"] if t["content"] != "<unk>"]


@pytest.mark.parametrize(
    ("change", "first"),
    [
        (swap, 40),
        (leave_one_out, VOCAB_SIZE - 1),
        (add_one, VOCAB_SIZE),
        (add_row_without_token, None),
        (show_a_control_token, 0),
    ],
)
def test_the_first_id_that_differs_is_found_from_both_sides(
    tmp_path: Path, change: Callable[[dict[str, Any]], None], first: int | None
) -> None:
    plain, changed = tokenizer(tmp_path / "plain"), tokenizer(tmp_path / "changed", change)
    assert plain.first_difference(tokenizer(tmp_path / "again")) is None
    assert plain.first_difference(changed) == first
    assert changed.first_difference(plain) == first


def test_a_difference_is_shown_to_a_person(tmp_path: Path) -> None:
    plain = tokenizer(tmp_path / "plain")
    assert plain.show(1) == "'<s>'"
    assert plain.show(VOCAB_SIZE) == "missing"
