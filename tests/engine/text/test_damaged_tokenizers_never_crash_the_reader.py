"""Any change of a tokenizer's files: a tokenizer that works, or one line."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, processors

from engine.errors import CheckpointError, ConfigError
from engine.text.tokenizer import load_tokenizer

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 70), 1 << 70)
    | st.floats()
    | st.sampled_from(["", "a", "<s>", "ByteLevel", "BPE", "Sequence", "\ud800", "x y z"]),
    lambda children: (
        st.lists(children, max_size=3)
        | st.dictionaries(st.sampled_from(["type", "id", "content", "vocab", "a"]), children)
    ),
    max_leaves=5,
)
CHANGES = st.lists(
    st.tuples(st.lists(st.floats(0, 1), min_size=1, max_size=5), st.booleans(), JSON),
    min_size=1,
    max_size=3,
)


def change(data: Any, way: list[float], is_removed: bool, value: Any) -> None:
    """Replace or remove one node, found by a fraction at every level."""
    for level, fraction in enumerate(way):
        if not isinstance(data, dict | list) or not data:
            return
        keys = list(data) if isinstance(data, dict) else list(range(len(data)))
        key = keys[int(fraction * (len(keys) - 1))]
        if level == len(way) - 1:
            if is_removed:
                del data[key]
            else:
                data[key] = value
            return
        data = data[key]


@pytest.fixture(scope="module")
def files(
    tmp_path_factory: pytest.TempPathFactory, train_bpe: Callable[..., tokenizers.Tokenizer]
) -> dict[str, Any]:
    backend = train_bpe(["<s>", "</s>"], vocab_size=300)
    backend.add_tokens([AddedToken("<tool>", special=False, normalized=False)])
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    return {
        "tokenizer.json": json.loads(backend.to_str()),
        "tokenizer_config.json": {
            "bos_token": {"content": "<s>"},
            "eos_token": "</s>",
            "chat_template": [{"name": "default", "template": "x"}],
        },
        "special_tokens_map.json": {"unk_token": "<s>"},
        "generation_config.json": {"eos_token_id": [1, 2]},
    }


@settings(max_examples=150)
@given(changes=CHANGES, which=st.integers(0, 7))
def test_damaged_json(
    tmp_path_factory: pytest.TempPathFactory,
    files: dict[str, Any],
    changes: list[tuple[list[float], bool, Any]],
    which: int,
) -> None:
    folder = tmp_path_factory.getbasetemp() / "damaged-tokenizer"
    folder.mkdir(exist_ok=True)
    names = list(files)
    name = names[which] if which < len(names) else names[0]
    for other, data in files.items():
        if other == name:
            data = copy.deepcopy(data)
            for way, is_removed, value in changes:
                change(data, way, is_removed, value)
        (folder / other).write_text(json.dumps(data))
    try:
        tokenizer = load_tokenizer(folder)
    except (CheckpointError, ConfigError) as error:
        assert "\n" not in str(error)
        assert len(str(error)) < 2000
        return
    ids = tokenizer.encode("hello <s> 12 é")
    assert not any(tokenizer.is_control(id) for id in ids)
    assert isinstance(tokenizer.decode(ids), str)


def test_a_file_that_is_no_utf8_is_told(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(b'{"model": "\xff"}')
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_tokenizer(tmp_path)
