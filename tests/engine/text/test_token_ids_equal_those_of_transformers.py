"""Ids of any text equal those of the reference tokenizers for the same vocabulary."""

from __future__ import annotations

import inspect
import json
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, pre_tokenizers, processors

from engine.text.gguf_vocabulary import vocabulary_from_metadata
from engine.text.pretokenizers import PRE_TOKENIZERS
from engine.text.tokenizer import Tokenizer, load_tokenizer

TEXT = st.text(st.characters(codec="utf-8"), max_size=60)
MIXED = st.lists(
    st.sampled_from(["  ", "\n", "12", "'s", "é", "e\u0301", "語", "🙂", "the", " dog", "_", "}\t"])
    | TEXT,
    max_size=12,
).map("".join)
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6


def test_smollm_texts(smollm: Tokenizer, reference_smollm: Any, texts: list[str]) -> None:
    for text in texts:
        assert smollm.encode(text) == reference_smollm.encode(text), text


@given(text=MIXED)
def test_smollm_any_text(smollm: Tokenizer, reference_smollm: Any, text: str) -> None:
    assert smollm.encode(text) == reference_smollm.encode(text)


@given(parts=st.lists(st.sampled_from(["<|im_start|>", "<|im_end|>", "<|im_", "|>", " a", "\n1"])))
def test_smollm_with_control_tokens(
    smollm: Tokenizer, reference_smollm: Any, parts: list[str]
) -> None:
    text = "".join(parts)
    assert smollm.encode(text, parse_control=True) == reference_smollm.encode(text)


def test_digits_are_single_as_in_the_published_tokenizer(smollm: Tokenizer) -> None:
    """transformers' conversion of the file would join the two spaces otherwise: " ", " 1"."""
    two_spaces = smollm.encode("  ")
    assert smollm.encode("x  1")[1:] == [*two_spaces, *smollm.encode("1")]
    assert len(smollm.encode("123456789")) == 9


def test_smollm_decodes_like_transformers(
    smollm: Tokenizer, reference_smollm: Any, texts: list[str]
) -> None:
    for text in texts:
        ids = smollm.encode(text)
        assert smollm.decode(ids) == reference_smollm.decode(ids), text


def bpe_metadata(backend: tokenizers.Tokenizer, pre: str, special: list[str]) -> dict[str, Any]:
    """A trained tokenizer as a converter would store it."""
    model = json.loads(backend.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    kinds = [CONTROL if text in special else NORMAL for text in tokens]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": np.array(kinds, np.int32),
        "tokenizer.ggml.merges": [" ".join(pair) for pair in model["merges"]],
        "tokenizer.ggml.eos_token_id": tokens.index(special[0]),
    }


@pytest.mark.parametrize("pre", ["gpt-2", "default"])
def test_a_gpt2_vocabulary(
    pre: str, train_bpe: Callable[..., tokenizers.Tokenizer], texts: list[str]
) -> None:
    backend = train_bpe(["<|end|>"])
    values = bpe_metadata(backend, pre, ["<|end|>"])
    ours = Tokenizer(vocabulary_from_metadata(Path("x.gguf"), values))
    for text in texts:
        assert ours.encode(text) == backend.encode(text, add_special_tokens=False).ids, text


def test_a_qwen2_vocabulary(
    train_bpe: Callable[..., tokenizers.Tokenizer], texts: list[str]
) -> None:
    from transformers import Qwen2Tokenizer

    values = bpe_metadata(train_bpe(["<|endoftext|>"]), "qwen2", ["<|endoftext|>"])
    tokens = values["tokenizer.ggml.tokens"]
    reference = Qwen2Tokenizer(
        vocab={text: id for id, text in enumerate(tokens)},
        merges=[tuple(line.split(" ")) for line in values["tokenizer.ggml.merges"]],
    )
    ours = Tokenizer(vocabulary_from_metadata(Path("x.gguf"), values))
    for text in texts:
        assert ours.encode(text) == reference.encode(text), text


def test_the_words_of_every_name_are_those_of_transformers() -> None:
    from transformers.convert_slow_tokenizer import TikTokenConverter
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    shared = PRE_TOKENIZERS.keys() & GGUF_PRE_TOKENIZER_SPLITS.keys()
    assert {"llama-bpe", "llama3", "llama4", "gpt-4o", "qwen2", "tekken"} <= shared
    for name in shared:
        words = PRE_TOKENIZERS[name].words["pretokenizers"]
        assert words[0]["pattern"]["Regex"] == GGUF_PRE_TOKENIZER_SPLITS[name], name
    pattern = inspect.signature(TikTokenConverter).parameters["pattern"].default
    assert PRE_TOKENIZERS["llama-bpe"].words["pretokenizers"][0]["pattern"]["Regex"] == pattern
    for name in ("llama-bpe", "llama4", "tekken"):
        assert PRE_TOKENIZERS[name].ignores_merges


@pytest.mark.parametrize("pre", ["llama-bpe", "llama4", "tekken", "qwen2", "smaug-bpe"])
def test_vocabularies_with_patterns_of_their_own(
    pre: str,
    train_bpe: Callable[..., tokenizers.Tokenizer],
    texts: list[str],
    unicode_texts: dict[str, str],
) -> None:
    """The oracle cuts words by the pattern that transformers has for the name."""
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    words = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(GGUF_PRE_TOKENIZER_SPLITS[pre]), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend = train_bpe(["<|end|>"], words)
    if pre == "qwen2":
        backend.normalizer = tokenizers.normalizers.NFC()
    ours = Tokenizer(
        vocabulary_from_metadata(Path("x.gguf"), bpe_metadata(backend, pre, ["<|end|>"]))
    )
    for text in [*texts, *unicode_texts.values()]:
        ids = ours.encode(text)
        assert ids == backend.encode(text, add_special_tokens=False).ids, text
        normal = unicodedata.normalize("NFC", text) if pre == "qwen2" else text
        assert ours.decode(ids) == normal


def test_a_word_that_is_a_token_needs_no_merges_in_llama3(
    train_bpe: Callable[..., tokenizers.Tokenizer],
) -> None:
    values = bpe_metadata(train_bpe(["<|end|>"]), "llama-bpe", ["<|end|>"])
    values["tokenizer.ggml.tokens"].append("zyxwv")
    kinds = values["tokenizer.ggml.token_type"]
    values["tokenizer.ggml.token_type"] = np.append(kinds, np.int32(NORMAL))
    ours = Tokenizer(vocabulary_from_metadata(Path("x.gguf"), values))
    assert ours.encode("zyxwv") == [len(kinds)]


@pytest.mark.filterwarnings("ignore:builtin type .* has no __module__ attribute")
@pytest.mark.parametrize("adds_space", [True, False])
def test_a_sentencepiece_vocabulary(tmp_path: Path, texts: list[str], adds_space: bool) -> None:
    import sentencepiece

    corpus = tmp_path / "corpus.txt"
    corpus.write_text("\n".join(text for text in texts if text.strip() and "\0" not in text) * 3)
    sentencepiece.SentencePieceTrainer.Train(
        input=str(corpus),
        model_prefix=str(tmp_path / "tiny"),
        model_type="bpe",
        vocab_size=601,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=adds_space,
        character_coverage=0.98,
        minloglevel=2,
    )
    reference = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tiny.model"))
    ids = range(reference.GetPieceSize())

    def kind(id: int) -> int:
        if reference.IsUnknown(id):
            return UNKNOWN
        if reference.IsControl(id):
            return CONTROL
        return BYTE if reference.IsByte(id) else NORMAL

    values: dict[str, Any] = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [reference.IdToPiece(id) for id in ids],
        "tokenizer.ggml.scores": np.array([reference.GetScore(id) for id in ids], np.float32),
        "tokenizer.ggml.token_type": np.array([kind(id) for id in ids], np.int32),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.add_space_prefix": adds_space,
    }
    ours = Tokenizer(vocabulary_from_metadata(Path("x.gguf"), values))
    assert ours.adds_bos
    for text in texts:
        assert ours.encode(text) == reference.EncodeAsIds(text), text
        assert ours.decode(ours.encode(text)) == text
        decoded = ours.decode(ours.encode(text), is_start=False)
        assert decoded == (f" {text}" if adds_space and text else text)
    assert not {1, 2} & {*ours.encode("<s>hello</s>")}


def save_folder(folder: Path, backend: tokenizers.Tokenizer, **settings: Any) -> Path:
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def test_a_tokenizer_json(
    tmp_path: Path, train_bpe: Callable[..., tokenizers.Tokenizer], texts: list[str]
) -> None:
    """Control tokens first, last and apart; an added token in between keeps its id."""
    backend = train_bpe(["<s>", "</s>"])
    backend.add_special_tokens([AddedToken("<|turn|>", special=True)])
    backend.add_tokens([AddedToken("<tool>", special=False, normalized=False)])
    backend.add_special_tokens([AddedToken("<|end|>", special=True, rstrip=True)])
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))]
    )
    ours = load_tokenizer(
        save_folder(tmp_path, backend, bos_token="<s>", eos_token={"content": "</s>"})
    )
    assert (ours.bos_id, ours.adds_bos) == (backend.token_to_id("<s>"), True)
    assert ours.eos_ids == {backend.token_to_id("</s>")}
    assert ours.vocab_size == backend.get_vocab_size()
    marked = ["a<tool>b", "<|turn|>user\nhi<|end|>  \n<|turn|>x<s></s>", "<|end|>", "a <|end|>  "]
    for text in [*texts, *marked]:
        expected = backend.encode(text, add_special_tokens=False).ids
        assert ours.encode(text, parse_control=True) == expected, text
    for text in [*texts, *marked[:1]]:
        assert ours.encode(text) == backend.encode(text, add_special_tokens=False).ids, text
    assert not any(ours.is_control(id) for text in marked for id in ours.encode(text))
    assert ours.decode(ours.encode("".join(marked))) == "".join(marked)


def test_a_metaspace_tokenizer_json(tmp_path: Path, texts: list[str]) -> None:
    """Text after a control token is not the first word, so it gets no space of its own."""
    from tokenizers import decoders, models, trainers

    backend = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.decoder = decoders.Metaspace(prepend_scheme="first")
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=501, show_progress=False, special_tokens=special)
    backend.train_from_iterator(texts, trainer)
    data = json.loads(backend.to_str())
    data["added_tokens"] = data["added_tokens"][:3]
    backend = tokenizers.Tokenizer.from_str(json.dumps(data))
    ours = load_tokenizer(save_folder(tmp_path, backend, bos_token="<s>", eos_token="</s>"))
    for text in [*texts, "<s>hello there</s> more<s><s>x"]:
        expected = backend.encode(text, add_special_tokens=False).ids
        assert ours.encode(text, parse_control=True) == expected, text


def test_transformers_saved_folders_are_read(
    tmp_path: Path, smollm: Tokenizer, reference_smollm: Any, texts: list[str]
) -> None:
    reference_smollm.save_pretrained(tmp_path)
    ours = load_tokenizer(tmp_path)
    assert ours.chat_template == smollm.chat_template
    assert (ours.bos_id, ours.eos_ids) == (smollm.bos_id, smollm.eos_ids)
    assert ours.protected == smollm.protected
    for text in texts:
        assert ours.encode(text) == smollm.encode(text)
