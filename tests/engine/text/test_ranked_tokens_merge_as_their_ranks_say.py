"""Meta's tokenizer.model of base64 tokens: ids by the definition, special tokens where they belong.

The oracle is the definition itself: cut the text into words, take a word that is a token, else
join the neighbours whose joined bytes have the lowest rank, leftmost first, until none have one.
"""

from __future__ import annotations

import base64
import json
import random
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import pre_tokenizers

from engine.errors import CheckpointError
from engine.text.bpe_settings import byte_text
from engine.text.byte_level import to_bytes
from engine.text.rank_vocabulary import parse_ranks
from engine.text.tokenizer import Tokenizer, load_tokenizer

# Ids of the published prompt formats.
LLAMA3_IDS = {
    "<|begin_of_text|>": 128000,
    "<|end_of_text|>": 128001,
    "<|finetune_right_pad_id|>": 128004,
    "<|start_header_id|>": 128006,
    "<|end_header_id|>": 128007,
    "<|eom_id|>": 128008,
    "<|eot_id|>": 128009,
    "<|python_tag|>": 128010,
    "<|reserved_special_token_245|>": 128255,
}
LLAMA4_IDS = {
    "<|begin_of_text|>": 200000,
    "<|end_of_text|>": 200001,
    "<|header_start|>": 200005,
    "<|header_end|>": 200006,
    "<|eom|>": 200007,
    "<|eot|>": 200008,
    "<|python_start|>": 200016,
    "<|python_end|>": 200017,
    "<|finetune_right_pad|>": 200018,
    "<|image_start|>": 200080,
    "<|image_end|>": 200081,
    "<|tile_x_separator|>": 200084,
    "<|tile_y_separator|>": 200085,
    "<|image|>": 200090,
    "<|patch|>": 200092,
    "<|vision_reserved_special_token_1047|>": 201133,
    "<|reasoning_thinking_start|>": 201142,
    "<|reasoning_thinking_end|>": 201143,
}
FAMILIES = {
    "llama3": (128_000, 256, LLAMA3_IDS, ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")),
    "llama4": (200_000, 2048, LLAMA4_IDS, ("<|end_of_text|>", "<|eom|>", "<|eot|>")),
}


Family = tuple[str, Tokenizer, dict[bytes, int]]


def rank_file(tokens: list[bytes]) -> bytes:
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens))


@pytest.fixture(scope="module", params=FAMILIES)
def family(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    train_bpe: Callable[..., tokenizers.Tokenizer],
) -> Family:
    """Trained tokens first, then as many random ones as the model has ranks."""
    num_ranks = FAMILIES[request.param][0]
    vocab = train_bpe([], vocab_size=501).get_vocab()
    tokens = [to_bytes(text) for text in sorted(vocab, key=vocab.__getitem__)]
    tokens.append(b" unreachable word")  # no two tokens join to it: only as a whole word
    tokens.append(b"<|eot_id|>")  # text that looks like a special token stays text
    seen = {*tokens}
    generator = random.Random(7)
    while len(tokens) < num_ranks:
        token = generator.randbytes(generator.randint(2, 7))
        if token not in seen:
            seen.add(token)
            tokens.append(token)
    path = tmp_path_factory.mktemp(request.param) / "tokenizer.model"
    path.write_bytes(rank_file(tokens))
    ranks = {token: rank for rank, token in enumerate(tokens)}
    return request.param, load_tokenizer(path), ranks


def expected_ids(word: bytes, ranks: dict[bytes, int]) -> list[int]:
    if word in ranks:
        return [ranks[word]]
    parts = [bytes([byte]) for byte in word]
    while True:
        joined = [left + right for left, right in pairwise(parts)]
        known = [(ranks[pair], place) for place, pair in enumerate(joined) if pair in ranks]
        if not known:
            return [ranks[part] for part in parts]
        place = min(known)[1]
        parts[place : place + 2] = [joined[place]]


def words_of(name: str, text: str) -> list[bytes]:
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    split = pre_tokenizers.Split(tokenizers.Regex(GGUF_PRE_TOKENIZER_SPLITS[name]), "isolated")
    return [word.encode() for word, _ in split.pre_tokenize_str(text)]


@given(text=st.text(st.characters(codec="utf-8"), max_size=30))
def test_any_text(family: Family, text: str) -> None:
    name, ours, ranks = family
    expected = [id for word in words_of(name, text) for id in expected_ids(word, ranks)]
    assert ours.encode(text) == expected
    assert ours.decode(expected) == text


def test_known_texts(family: Family, texts: list[str], unicode_texts: dict[str, str]) -> None:
    name, ours, ranks = family
    more = ["the dog sleeps", " unreachable", "x unreachable word"]
    for text in [*texts, *unicode_texts.values(), *more]:
        expected = [id for word in words_of(name, text) for id in expected_ids(word, ranks)]
        assert ours.encode(text) == expected, text
        assert ours.decode(ours.encode(text)) == text


def test_special_tokens(family: Family) -> None:
    name, ours, _ = family
    num_ranks, num_special, ids, ends = FAMILIES[name]
    assert ours.vocab_size == num_ranks + num_special
    assert len(ours.protected) == num_special
    assert (ours.bos_id, ours.adds_bos) == (num_ranks, True)
    assert ours.eos_ids == {ids[text] for text in ends}
    assert ours.pad_id == ids[ours.special_tokens["pad_token"]]
    for text, id in ids.items():
        assert ours.encode(text, parse_control=True) == [id]
        assert not any(ours.is_control(found) for found in ours.encode(text))
        assert ours.decode(ours.encode(text)) == text


@pytest.mark.parametrize("family", ["llama3"], indirect=True)
def test_the_files_beside_it_are_read(family: Family, tmp_path: Path) -> None:
    _, ours, ranks = family
    (tmp_path / "tokenizer.model").write_bytes(rank_file([*ranks]))
    (tmp_path / "chat_template.jinja").write_text("{{ bos_token }}")
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [128010]}))
    found = load_tokenizer(tmp_path)
    assert found.chat_template == "{{ bos_token }}"
    assert found.eos_ids == ours.eos_ids | {128010}


SINGLE = [bytes([byte]) for byte in range(256)]
BAD = [
    (rank_file(SINGLE), "256 ranked tokens; known are Llama 3 with 128,000"),
    (rank_file(SINGLE) + b"QUI= 255\n", "line 257: rank 255 is there twice"),
    (rank_file(SINGLE) + b"QUI= 300\n", "257 ranks, the last is 300"),
    (rank_file(SINGLE) + b"AA== 256\n", "two ranks have the same token"),
    (rank_file(SINGLE[:-1]), "no token for byte 0xff"),
    (rank_file(SINGLE) + b"A*== 256\n", "line 257 .* is not a base64 token and its rank"),
    (rank_file(SINGLE) + b"QUI= -1\n", "is not a base64 token and its rank"),
    (rank_file(SINGLE) + b"QUI= " + b"9" * 40, "is not a base64 token and its rank"),
    (rank_file(SINGLE) + b"QUI=\n", "is not a base64 token and its rank"),
    (rank_file(SINGLE) + b"\xff\xfe 256\n", "is not a base64 token and its rank"),
]


@pytest.mark.parametrize(("data", "message"), BAD, ids=[case[1][:30] for case in BAD])
def test_bad_files_are_refused_in_one_line(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_tokenizer(path)
    assert "\n" not in str(caught.value)


@given(
    changes=st.lists(st.tuples(st.integers(0, 2400), st.binary(max_size=3)), max_size=5),
    end=st.integers(0, 2500),
)
def test_any_damage_gives_tokens_or_one_line(changes: list[tuple[int, bytes]], end: int) -> None:
    data = rank_file(SINGLE)
    for place, new in changes:
        data = data[:place] + new + data[place + 2 :]
    try:
        tokens = parse_ranks(Path("tokenizer.model"), data[:end])
    except CheckpointError as error:
        assert "\n" not in str(error)
    else:
        assert {*map(byte_text, tokens)} >= {*map(byte_text, SINGLE)}
