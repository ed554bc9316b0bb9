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

from engine.errors import CheckpointError, ConfigError, EngineError
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


BYTES = st.binary(min_size=1, max_size=3) | st.sampled_from([b"\xff" * 9, b"\0", b"\x80\x80", b""])
DAMAGE = st.lists(st.tuples(st.floats(0, 1), st.booleans(), BYTES), min_size=1, max_size=6)
SAMPLE = "h\u00e9llo \ufb01  the dog\n\n\0 <table> \u65e5\u672c e\u0301 </s>"


def damaged(data: bytes, damage: list[tuple[float, bool, bytes]], cut: float) -> bytes:
    """Replace or insert bytes at fractions of the length, then cut the end off."""
    for fraction, is_inserted, new in damage:
        place = int(fraction * (len(data) - 1))
        data = data[:place] + new + data[place + (0 if is_inserted else len(new)) :]
    return data[: int(cut * len(data))] if cut < 0.9 else data


def check_loads_or_tells(path: Path) -> None:
    try:
        tokenizer = load_tokenizer(path)
        ids = tokenizer.encode(SAMPLE)
    except EngineError as error:
        assert "\n" not in str(error)
        assert len(str(error)) < 2000
        return
    assert not any(tokenizer.is_control(id) for id in ids if id != tokenizer.unk_id)
    assert isinstance(tokenizer.decode(ids), str)


@pytest.mark.parametrize(("model_type", "rule"), [("bpe", "identity"), ("unigram", "nmt_nfkc")])
@settings(max_examples=250)
@given(damage=DAMAGE, cut=st.floats(0, 10), where=st.sampled_from([1.0, 0.02]))
def test_damaged_model_files(
    tmp_path_factory: pytest.TempPathFactory,
    train_pieces: Callable[..., bytes],
    model_type: str,
    rule: str,
    damage: list[tuple[float, bool, bytes]],
    cut: float,
    where: float,
) -> None:
    """Pieces at the beginning, settings and the table of NFKC, most of the file, after them."""
    data = train_pieces(model_type, rule, user_defined_symbols=("\n\n", "<table>"))
    path = tmp_path_factory.getbasetemp() / f"damaged-{model_type}.model"
    path.write_bytes(damaged(data, [(f * where, *rest) for f, *rest in damage], cut))
    check_loads_or_tells(path)


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def gguf_file(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A real, small file of either kind."""
    import gguf
    import numpy as np

    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    kinds = [2, 3, 3, *[6] * 256]
    tokens += ["\u2581", "t", "h", "e", "th", "the", "<table>"]
    kinds += [*[1] * 6, 4]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model(request.param)
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_scores([-float(id) for id in range(len(tokens))])
    writer.add_token_types(kinds)
    writer.add_token_merges(["t h", "th e"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template("{{ messages }}<table>")
    writer.add_tensor("token_embd.weight", np.zeros((len(tokens), 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


@settings(max_examples=250)
@given(damage=DAMAGE, cut=st.floats(0, 10))
def test_damaged_gguf_vocabularies(
    tmp_path_factory: pytest.TempPathFactory,
    gguf_file: bytes,
    damage: list[tuple[float, bool, bytes]],
    cut: float,
) -> None:
    """Only the metadata are damaged: the tensors are the affair of other tests."""
    size = gguf_file.index(b"token_embd.weight")
    path = tmp_path_factory.getbasetemp() / "damaged.gguf"
    path.write_bytes(damaged(gguf_file[:size], damage, cut) + gguf_file[size:])
    check_loads_or_tells(path)
