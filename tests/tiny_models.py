"""Tiny random models with odd sizes, as transformers makes and saves them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

VOCAB_SIZE = 99


def save_tiny_llama(folder: Path, **changes: Any) -> LlamaForCausalLM:
    """Write a random Llama folder (config, safetensors, a tokenizer of single letters).

    Args:
        changes: fields of LlamaConfig; the sizes are odd, so that a swapped axis cannot pass.
    Returns: the float32 oracle, in eval mode.
    """
    torch.manual_seed(11)
    config = LlamaConfig(
        **{
            "vocab_size": VOCAB_SIZE,
            "hidden_size": 48,
            "intermediate_size": 75,
            "num_hidden_layers": 3,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "head_dim": 20,
            "max_position_embeddings": 256,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
            "tie_word_embeddings": False,
            "initializer_range": 0.1,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "attn_implementation": "eager",
            **changes,
        }
    )
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(folder, safe_serialization=True)
    save_letter_tokenizer(folder)
    return model


def save_letter_tokenizer(folder: Path) -> None:
    """Write a byte-level tokenizer without merges that fits a vocabulary of 99."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    control = ["<unk>", "<s>", "</s>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())[: VOCAB_SIZE - len(control)]
    vocab = {token: i for i, token in enumerate([*control, *letters])}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(control)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
