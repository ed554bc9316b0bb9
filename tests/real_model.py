"""The default model as transformers runs it: the same file, dequantised to float32."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.text.chat_template import ChatTemplate, Message, encode_chat
from engine.text.tokenizer import load_tokenizer

PROMPTS = (
    "What is the capital of France?",
    "Write a haiku about the sea.",
    "Explain why the sky is blue, in one sentence.",
    "Liste trois fruits rouges.",
    "def fibonacci(n):",
    "Count from one to ten.",
    "What is 17 plus 25?",
    "Translate 'good morning' to Spanish.",
    "Who wrote Romeo and Juliet? 🎭",
    "Give me a name for a small grey cat.",
)


@cache
def load_oracle(path: Path) -> Any:
    """transformers' float32 model of a GGUF file."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    return AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    ).eval()


@cache
def chat_ids(path: Path, prompt: str) -> list[int]:
    """Ids of a one-turn chat; tests/engine/text holds tokenizer and template to transformers'.

    (The conversion of GGUF tokenizers in transformers leaves out this model's rule for digits.)
    """
    tokenizer = load_tokenizer(path)
    with ChatTemplate.for_tokenizer(tokenizer) as template:
        return encode_chat(tokenizer, template, [Message("user", prompt)])


def greedy_ids(path: Path, prompt_ids: list[int], max_tokens: int) -> list[int]:
    """What transformers generates greedily, the end token included."""
    import torch

    model = load_oracle(path)
    with torch.no_grad():
        output = model.generate(
            torch.tensor([prompt_ids]),
            attention_mask=torch.ones(1, len(prompt_ids), dtype=torch.int64),
            max_new_tokens=max_tokens,
            do_sample=False,
            pad_token_id=2,
            eos_token_id=2,
        )
    return output[0, len(prompt_ids) :].tolist()


def oracle_logits(path: Path, ids: list[int]) -> NDArray[np.float32]:
    """Logits of every position, float32 [T, V]."""
    import torch

    model = load_oracle(path)
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].numpy()
