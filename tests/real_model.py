"""The default model as transformers runs it: the same file, dequantised to float32."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

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
def load_oracle(path: Path) -> tuple[Any, Any]:
    """transformers' tokenizer and float32 model of a GGUF file."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    ).eval()
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    return tokenizer, model


def chat_ids(path: Path, prompt: str) -> list[int]:
    """Ids of a one-turn chat, by transformers' template and tokenizer."""
    tokenizer, _ = load_oracle(path)
    turns = [{"role": "user", "content": prompt}]
    encoded = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)
    return list(encoded["input_ids"])


def greedy_ids(path: Path, prompt_ids: list[int], max_tokens: int) -> list[int]:
    """What transformers generates greedily, the end token included."""
    import torch

    _, model = load_oracle(path)
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

    _, model = load_oracle(path)
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].numpy()
