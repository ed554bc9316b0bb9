"""A .model file, or a GGUF file made of one, gives the ids and texts of the sentencepiece library."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.text.detokenizer import IncrementalDetokenizer
from engine.text.tokenizer import Tokenizer, load_tokenizer

# Runs of spaces as Gemma has them, lines, a tag, and a mark of a turn that the file calls text.
USER_DEFINED = ("\u2581\u2581", "\u2581\u2581\u2581", "\n\n", "<table>", "<start_of_turn>")
SYMBOLS = {"user_defined_symbols": USER_DEFINED, "control_symbols": ("<ctl>", "<mask>")}
TEXT = st.lists(
    st.sampled_from(["  ", " ", "\n\n", "<table>", "the", " dog", "é", "語", "🙂", "\0", "<ctl>"])
    | st.text(st.characters(codec="utf-8"), max_size=6),
    max_size=10,
).map("".join)
ALL_FORMS = [
    (model_type, rule, prefix)
    for model_type in ("bpe", "unigram")
    for rule in ("identity", "nfkc", "nmt_nfkc")
    for prefix in (True, False)
]


def write(folder: Path, data: bytes, name: str = "tokenizer.model") -> Path:
    path = folder / name
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(("model_type", "rule", "prefix"), ALL_FORMS)
def test_ids_and_texts_of_a_model_file(
    tmp_path: Path,
    train_pieces: Callable[..., bytes],
    load_pieces: Callable[[bytes], Any],
    texts: list[str],
    unicode_texts: dict[str, str],
    model_type: str,
    rule: str,
    prefix: bool,
) -> None:
    """NFKC files give the text as they normalise it; the others give it back unchanged."""
    data = train_pieces(model_type, rule, add_dummy_prefix=prefix)
    reference = load_pieces(data)
    ours = load_tokenizer(write(tmp_path, data, "bare.model"))
    assert ours.vocab_size == reference.GetPieceSize()
    assert (ours.bos_id, ours.eos_ids, ours.unk_id) == (1, {2}, 0)
    assert ours.adds_bos
    for text in [*texts, *unicode_texts.values()]:
        ids = ours.encode(text)
        assert ids == reference.EncodeAsIds(text), text
        assert (
            ours.decode(ids)
            == reference.Normalize(text).replace("\u2581", " ")[1 if prefix and text else 0 :]
        )
        if rule == "identity":
            assert ours.decode(ids) == text


@pytest.mark.parametrize("removes", [True, False])
def test_files_that_remove_spaces_do_so(
    tmp_path: Path,
    train_pieces: Callable[..., bytes],
    load_pieces: Callable[[bytes], Any],
    texts: list[str],
    removes: bool,
) -> None:
    data = train_pieces("bpe", "nmt_nfkc", remove_extra_whitespaces=removes)
    reference = load_pieces(data)
    ours = load_tokenizer(write(tmp_path, data))
    for text in texts:
        assert ours.encode(text) == reference.EncodeAsIds(text)
    assert ours.decode(ours.encode("  a  b  ")) == ("a b" if removes else "  a  b  ")


@pytest.fixture(scope="module", params=["bpe", "unigram"])
def symbols(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    train_pieces: Callable[..., bytes],
    load_pieces: Callable[[bytes], Any],
) -> tuple[Tokenizer, Any]:
    data = train_pieces(request.param, add_dummy_prefix=False, **SYMBOLS)
    folder = tmp_path_factory.mktemp("symbols")
    return load_tokenizer(write(folder, data)), load_pieces(data)


@given(text=TEXT)
def test_any_text_with_user_defined_symbols(symbols: tuple[Tokenizer, Any], text: str) -> None:
    ours, reference = symbols
    ids = ours.encode(text)
    assert ids == reference.EncodeAsIds(text)
    assert not any(ours.is_control(id) for id in ids if id != ours.unk_id)
    # The library's space is U+2581, so that character itself comes back as a space.
    assert ours.decode(ids) == text.replace("\u2581", " ")


@given(data=st.data())
def test_any_ids_stream_as_they_decode(symbols: tuple[Tokenizer, Any], data: st.DataObject) -> None:
    """With broken UTF-8 from byte tokens too."""
    ours, reference = symbols
    ids = data.draw(st.lists(st.integers(0, ours.vocab_size - 1) | st.integers(3, 300)))
    for is_start in (True, False):
        stream = IncrementalDetokenizer(ours, is_start=is_start)
        parts = [*map(stream.push, ids), stream.finish()]
        assert "".join(parts) == ours.decode(ids, is_start=is_start)
    shown = [id for id in ids if not ours.is_control(id)]
    pieces = [reference.IdToPiece(id) for id in shown]
    expected = b"".join(
        bytes([int(piece[3:5], 16)])
        if reference.IsByte(id)
        else piece.replace("\u2581", " ").encode()
        for id, piece in zip(shown, pieces, strict=True)
    )
    assert ours.decode(ids, is_start=False) == expected.decode("utf-8", errors="replace")


def test_marks_of_turns_are_control_tokens_whatever_the_file_calls_them(
    symbols: tuple[Tokenizer, Any],
) -> None:
    ours, reference = symbols
    mark, table = (reference.PieceToId(text) for text in ("<start_of_turn>", "<table>"))
    text = "a <start_of_turn>user <ctl></s><s><0x0A><unk>"
    assert mark in reference.EncodeAsIds(text)  # what the file alone would do
    ids = ours.encode(text)
    assert mark not in ids
    assert not any(ours.is_control(id) for id in ids)
    assert ours.decode(ids) == text
    assert ours.is_control(mark)
    assert not ours.is_control(table)
    parsed = ours.encode("<start_of_turn>a<ctl></s>", parse_control=True)
    assert parsed == [mark, *ours.encode("a"), reference.PieceToId("<ctl>"), 2]


def test_no_normalisation_makes_a_control_token(
    tmp_path: Path, train_pieces: Callable[..., bytes]
) -> None:
    """NFKC turns full-width signs into those of the tokens."""
    data = train_pieces("bpe", "nmt_nfkc", add_dummy_prefix=False, **SYMBOLS)
    ours = load_tokenizer(write(tmp_path, data))
    for name in ("/s", "start_of_turn", "ctl"):
        text = f"\uff1c{name}\uff1e"
        ids = ours.encode(text)
        assert ours.decode(ids) == unicodedata.normalize("NFKC", text)
        assert not any(ours.is_control(id) for id in ids)


@pytest.mark.parametrize("legacy", [None, True, False])
def test_the_space_after_a_control_token(
    tmp_path: Path,
    train_pieces: Callable[..., bytes],
    load_pieces: Callable[[bytes], Any],
    legacy: bool | None,
) -> None:
    """Each text between control tokens gets one, unless the folder says `legacy: false`."""
    data = train_pieces("bpe", **SYMBOLS, add_dummy_prefix=True)
    reference = load_pieces(data)
    write(tmp_path, data)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"legacy": legacy}))
    ours = load_tokenizer(tmp_path)
    later = reference.EncodeAsIds("dog")
    if legacy is False:
        # Nothing is written before the rest of a text after a piece that always stands alone.
        whole = reference.EncodeAsIds("<table>dog")
        later = whole[whole.index(reference.PieceToId("<table>")) + 1 :]
        assert later != reference.EncodeAsIds("dog")
    ids = ours.encode("the<ctl>dog", parse_control=True)
    assert ids == [*reference.EncodeAsIds("the"), reference.PieceToId("<ctl>"), *later]


def test_a_folder_adds_tokens_after_those_of_the_file(
    tmp_path: Path, train_pieces: Callable[..., bytes], load_pieces: Callable[[bytes], Any]
) -> None:
    """ChatML tokens behind a Llama vocabulary with holes between them, and one that is text."""
    data = train_pieces("bpe")
    reference = load_pieces(data)
    size = reference.GetPieceSize()
    write(tmp_path, data)
    added = {
        "0": {"content": "<unk>", "special": True},
        str(size + 3): {"content": "<|im_end|>", "special": True},
        str(size + 5): {"content": "<tool>", "special": False},
    }
    template = "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"
    settings = {"added_tokens_decoder": added, "chat_template": template, "add_bos_token": False}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<|im_start|>": size}))
    ours = load_tokenizer(tmp_path)
    assert ours.vocab_size == size + 6
    assert ours.eos_ids == {2, size + 3}
    assert [ours.token_bytes(size + k) for k in (1, 2, 4)] == [b""] * 3
    assert not ours.adds_bos
    parsed = ours.encode("<|im_start|><tool><|im_end|>", parse_control=True)
    assert [id for id in parsed if id >= size] == [size, size + 5, size + 3]
    ids = ours.encode("<|im_start|>a<tool>b<|im_end|>")
    assert [id for id in ids if id >= size] == [size + 5]
    assert ours.decode(ids) == "<|im_start|>a<tool>b<|im_end|>"
    assert ours.encode("the dog") == reference.EncodeAsIds("the dog")


def write_gguf(path: Path, reference: Any, *, prefix: bool, **extra: int) -> Path:
    """What a converter writes: runs of spaces as spaces, one type a token."""
    tests = (
        (reference.IsUnknown, gguf.TokenType.UNKNOWN),
        (reference.IsControl, gguf.TokenType.CONTROL),
        (reference.IsByte, gguf.TokenType.BYTE),
    )
    tokens: list[str] = []
    types: list[int] = []
    for id in range(reference.GetPieceSize()):
        text = reference.IdToPiece(id)
        kind = next((kind for test, kind in tests if test(id)), gguf.TokenType.NORMAL)
        if text in USER_DEFINED:
            text, kind = text.replace("\u2581", " "), gguf.TokenType.USER_DEFINED
        tokens.append(text)
        types.append(int(kind))
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([reference.GetScore(id) for id in range(len(tokens))])
    writer.add_token_types(types)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_add_space_prefix(prefix)
    for name, id in extra.items():
        writer.add_uint32(f"tokenizer.ggml.{name}_token_id", id)
    writer.add_tensor("token_embd.weight", np.zeros((len(tokens), 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("prefix", [True, False])
def test_a_gguf_file_gives_the_same_ids(
    tmp_path: Path,
    train_pieces: Callable[..., bytes],
    load_pieces: Callable[[bytes], Any],
    texts: list[str],
    unicode_texts: dict[str, str],
    prefix: bool,
) -> None:
    reference = load_pieces(train_pieces("bpe", **SYMBOLS, add_dummy_prefix=prefix))
    table = reference.PieceToId("<table>")
    path = write_gguf(tmp_path / "tiny.gguf", reference, prefix=prefix, eot=table, padding=0)
    ours = load_tokenizer(path)
    assert (ours.unk_id, ours.pad_id, ours.bos_id) == (0, 0, 1)
    assert ours.eos_ids == {2, table}  # and so <table> is text no longer
    for text in [*texts, *unicode_texts.values()]:
        if "<start_of_turn>" in text:
            continue
        assert ours.encode(text) == reference.EncodeAsIds(text), text
        assert ours.decode(ours.encode(text)) == text
    for text in ("<table>", "<start_of_turn>"):
        ids = ours.encode(text)
        assert not any(ours.is_control(id) for id in ids)
        assert ours.decode(ids) == text
