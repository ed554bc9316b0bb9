"""Tokenizers that the tests compare with, and tiny vocabularies to compare on."""

from __future__ import annotations

from collections.abc import Callable
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
