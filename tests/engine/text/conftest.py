"""Tokenizers that the tests compare with, and tiny vocabularies to compare on."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from engine.text.tokenizer import Tokenizer, load_tokenizer
from engine.weights.gguf import GgufFile

# What has broken tokenizers: whitespace runs, digits, contractions, code, every plane of Unicode.
TEXTS = [
    "",
    " ",
    "Hello, world!",
    "a  b   c    d",
    "trailing space ",
    " leading, twice  ",
    "\n\n\n",
    "line\r\nline\n\tindented\n\n  two  \n",
    "I'm sure they'll say it's John's; WE'LL SEE, I'D SAY.",
    "2024-02-29, 1234567890, 3.14159, 1e-5, x  1  22   333",
    "def f(x):\n    return {k: v**2 for k, v in x.items() if k != '__name__'}\n",
    '<div class="a">&amp;</div> // comment /* x */ #! $HOME ~/.bashrc',
    "café cafe\u0301 naïve Ångström A\u030angström ﬁ ½ ² Ⅷ",
    "日本語のテキスト、中文文本。한국어 텍스트",
    "مرحبا بالعالم שלום עולם हिन्दी ไทย",
    "👍 👩‍👩‍👧‍👦 🏳️‍🌈 🇫🇷 e🙂e",
    "nul\0inside, bell\a, del\x7f, c1\x85, nbsp\u00a0, zwsp\u200b, ls\u2028, bom\ufeff.",
    "x" * 300,
    " " * 70 + "x" + "\t" * 9,
    "\U0001d49c\U0001d4c1\U0001d454 \U00010348 \U0001f9ff",
]

CORPUS = [
    *TEXTS,
    "the quick brown fox jumps over the lazy dog and the dog sleeps",
    "how much wood would a woodchuck chuck if a woodchuck could chuck wood",
    "numbers such as 10 20 30 and 100 200 300 are in the text as well",
]


# One sample of every kind of character that matters.
UNICODE = {
    "latin": "Ünïcödé Ÿ ß ẞ æ œ ŋ ƒ Ǆ ĳ",
    "greek": "Ελληνικά ώ ΐ ς Σ ϕ",
    "cyrillic": "Кириллица ё й ѣ Ѫ ґ",
    "hebrew": "שָׁלוֹם עולם ־ ״",
    "arabic": "السَّلامُ عليكم ٠١٢٣ \u200f",
    "devanagari": "क्षत्रिय हिन्दी ज़ ०१२",
    "thai": "ภาษาไทย เก้าอี้ ๐๑๒",
    "hangul": "한국어 ᄒ\u1161\u11ab ㄱㄴ",
    "cjk": "漢字 汉字 々〇 「」、。",
    "cjk extension b": "\U00020000\U0002a6d6 𠮷野家",
    "kana": "ひらがな カタカナ ｶﾀｶﾅ ー が か\u3099",
    "combining": "e\u0301\u0323 a\u0308 Z\u0351\u036b\u0343\u036a o\u0302\u0304",
    "emoji": "👩‍👩‍👧‍👦 👍🏽 🏳️‍🌈 🏴\U000e0067\U000e0062\U000e007f ☺️ 1️⃣",
    "regional": "🇫🇷🇩🇪🇯",
    "private use": "\ue000 \uf8ff \U000f0000 \U0010fffd",
    "astral": "\U0001d49c \U00010348 \U0001f9ff \U0010ffff",
    "control": "\x01\x07\x1b[0m\x7f\x80\x85\x9f",
    "nul": "\0 a\0b \0",
    "spaces": "a\u00a0b\u2003c\u3000d\u202fe",
    "zero width": "a\u200bb\u200cc\u200dd\u2060e\ufeff",
    "lines": "a\r\nb\nc\rd\u2028e\u2029f\x0bg\x0c",
    "runs": "  a   b     \n\n\n\n\t\t  ",
    "marks": "<|im_start|> </s> <s> <unk> <start_of_turn> <0x0A> <0xFF> [INST] <|eot_id|>",
    "halves": "<|im_ start|> </ s> <0x 0A>",
    "not characters": "\ufffe \uffff \ufffd",
}


@pytest.fixture(scope="session")
def unicode_texts() -> dict[str, str]:
    return UNICODE


@pytest.fixture(scope="session")
def train_pieces() -> Callable[..., bytes]:
    """Trains a tiny SentencePiece model on CORPUS; returns the bytes of the file.

    Most of UNICODE is not in it, so those characters are written in bytes.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        import sentencepiece

    lines = [line for text in CORPUS for line in text.split("\n")]
    lines = [line for line in lines if line.strip() and "\0" not in line] * 3

    @cache
    def train(model_type: str = "bpe", rule: str = "identity", **settings: Any) -> bytes:
        file = io.BytesIO()
        # The trainer takes lists, the cache tuples.
        settings = {key: [*v] if isinstance(v, tuple) else v for key, v in settings.items()}
        sentencepiece.SentencePieceTrainer.Train(
            sentence_iterator=iter(lines),
            model_writer=file,
            model_type=model_type,
            vocab_size=501,
            byte_fallback=True,
            normalization_rule_name=rule,
            minloglevel=2,
            hard_vocab_limit=False,
            num_threads=1,
            **{"character_coverage": 0.98, "remove_extra_whitespaces": False, **settings},
        )
        return file.getvalue()

    return train


@pytest.fixture(scope="session")
def load_pieces() -> Callable[[bytes], Any]:
    """sentencepiece's own processor of a model, the oracle."""
    import sentencepiece

    def load(data: bytes) -> Any:
        processor = sentencepiece.SentencePieceProcessor()
        processor.LoadFromSerializedProto(data)
        return processor

    return load


@pytest.fixture(scope="session")
def texts() -> list[str]:
    return TEXTS


@pytest.fixture(scope="session")
def smollm(default_model_path: Path) -> Tokenizer:
    """Ours, from the default model's file."""
    return load_tokenizer(default_model_path)


@pytest.fixture(scope="session")
def smollm_metadata(default_model_path: Path) -> dict[str, Any]:
    """What the default model's file says."""
    file = GgufFile(default_model_path)
    file.close()
    return file.metadata


@pytest.fixture(scope="session")
def reference_smollm(smollm_metadata: dict[str, Any]) -> Any:
    """transformers' tokenizer with the published SmolLM2 pipeline: single digits, then bytes.

    transformers' own conversion of a GGUF file leaves the digits out (it knows one pre-tokenizer
    for all byte-level files), so it would cut "x  1" otherwise than the model was trained on.
    """
    from transformers import PreTrainedTokenizerFast

    tokens = smollm_metadata["tokenizer.ggml.tokens"]
    types = smollm_metadata["tokenizer.ggml.token_type"]
    merges = [tuple(line.split(" ")) for line in smollm_metadata["tokenizer.ggml.merges"]]
    backend = tokenizers.Tokenizer(
        models.BPE(vocab={text: id for id, text in enumerate(tokens)}, merges=merges)
    )
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(
        [text for text, kind in zip(tokens, types, strict=True) if kind == 3]
    )
    reference = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=tokens[1],
        eos_token=tokens[2],
        clean_up_tokenization_spaces=False,
    )
    reference.chat_template = smollm_metadata["tokenizer.chat_template"]
    return reference


@pytest.fixture(scope="session")
def train_bpe() -> Callable[..., tokenizers.Tokenizer]:
    """Trains a tiny byte-level BPE tokenizer on the texts above."""

    def train(special: list[str], words: Any = None, vocab_size: int = 401) -> tokenizers.Tokenizer:
        backend = tokenizers.Tokenizer(models.BPE())
        backend.pre_tokenizer = words or pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            show_progress=False,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        )
        backend.train_from_iterator(CORPUS, trainer)
        return backend

    return train
