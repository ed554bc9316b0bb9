"""Configuration and every tensor of a folder written by transformers come back as it has them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.weights.checkpoint import open_checkpoint
from engine.weights.families import FAMILIES
from engine.weights.formats import dequantize
from engine.weights.name_rows import WHOLE


@pytest.mark.parametrize("is_tied", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_saved_llama(tmp_path: Path, is_tied: bool, dtype: str) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(3)
    theirs = LlamaConfig(
        vocab_size=99,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=10,
        max_position_embeddings=77,
        rms_norm_eps=3e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 4321.0},
        tie_word_embeddings=is_tied,
    )
    model: Any = LlamaForCausalLM(theirs).to(getattr(torch, dtype))
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    weights = model.state_dict()
    with open_checkpoint(tmp_path) as ours:
        config = ours.config
        assert (config.width, config.num_layers, config.layers[0].mlp_width) == (48, 3, 80)
        assert (config.num_heads, config.num_kv_heads, config.head_width) == (6, 2, 10)
        assert (config.vocab_size, config.max_positions) == (99, 77)
        assert (config.norm_epsilon, config.ropes[0].theta) == (3e-5, 4321.0)
        assert (config.is_head_tied, config.rope_layout) == (is_tied, "half")
        seen = 0
        for row in FAMILIES["llama"].tables["huggingface"].rows:
            if row.canonical.endswith("_bias") or row.part != WHOLE:
                continue  # other exports have these
            for layer in range(3) if "{i}" in row.canonical else [0]:
                info = ours.tensors[row.canonical.replace("{i}", str(layer))]
                raw = ours.read_slice(info.name, 0, 0, info.shape[0])
                expected = weights[row.stored.replace("{i}", str(layer))].float().numpy()
                assert np.array_equal(dequantize(info.format, raw, info.shape), expected)
                seen += 1
        assert seen == len(ours.tensors) == len(weights)
