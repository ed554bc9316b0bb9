"""What Meta's files leave unsaid, or say of the image encoder, is known of the released models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from engine.model.config import ModelConfig
from engine.model.rope import inverse_frequencies
from engine.weights.checkpoint import open_checkpoint
from engine.weights.meta_config import config_from_meta, open_consolidated
from tests.tiny_families import save_tiny, save_tiny_meta

FILE = "consolidated.safetensors"
# Of params.json and of the Hugging Face config.json, as published.
RELEASED: dict[str, tuple[dict[str, Any], float]] = {
    "Llama-3.1-8B": ({"dim": 4096, "n_layers": 32, "n_heads": 32, "n_kv_heads": 8}, 8.0),
    "Llama-3.2-1B": ({"dim": 2048, "n_layers": 16, "n_heads": 32, "n_kv_heads": 8}, 32.0),
    "Llama-3.2-3B": ({"dim": 3072, "n_layers": 28, "n_heads": 24, "n_kv_heads": 8}, 32.0),
    "Llama-3.3-70B": ({"dim": 8192, "n_layers": 80, "n_heads": 64, "n_kv_heads": 8}, 8.0),
}
# Both compute in float32; only the order of operations differs.
TOLERANCE = 1e-6


def meta_config(folder: Path, params: dict[str, Any]) -> ModelConfig:
    """The configuration of a folder that has only what tells the widths of its MLPs."""
    folder.mkdir()
    (folder / "params.json").write_text(json.dumps(params))
    arrays = {
        f"layers.{layer}.feed_forward.w1.weight": np.zeros((77, 1), np.float32)
        for layer in range(params["n_layers"])
    }
    save_file({**arrays, "output.weight": np.zeros((1, 1), np.float32)}, folder / FILE)
    file, stored = open_consolidated(folder)
    try:
        return config_from_meta(folder, stored)
    finally:
        file.close()


@pytest.mark.parametrize("name", RELEASED)
def test_long_waves_are_stretched_as_in_the_published_configuration(
    tmp_path: Path, name: str
) -> None:
    """Llama 3.2 1B and 3B got the 8 of Llama 3.1: wrong answers from 80,000 tokens on."""
    sizes, factor = RELEASED[name]
    params = {**sizes, "vocab_size": 128256, "rope_theta": 500000.0, "use_scaled_rope": True}
    config = meta_config(tmp_path / "model", {**params, "norm_eps": 1e-5, "multiple_of": 256})
    published = LlamaConfig(
        hidden_size=sizes["dim"],
        num_attention_heads=sizes["n_heads"],
        max_position_embeddings=131072,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": factor,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    )
    expected, _ = ROPE_INIT_FUNCTIONS["llama3"](published, torch.device("cpu"))
    found = inverse_frequencies(config.ropes[0], config.head_width)
    assert ((found - expected).abs() / expected).max().item() <= TOLERANCE
    assert config.max_positions == 131072


def test_a_factor_in_the_file_is_taken(tmp_path: Path) -> None:
    sizes, _ = RELEASED["Llama-3.2-1B"]
    params = {**sizes, "vocab_size": 128256, "rope_theta": 500000.0, "use_scaled_rope": True}
    config = meta_config(tmp_path / "said", {**params, "rope_scaling_factor": 5.0})
    assert config.ropes[0].factor == 5.0
    # A model of that width with another vocabulary is no Llama 3.2.
    assert meta_config(tmp_path / "other", {**params, "vocab_size": 99}).ropes[0].factor == 8.0


def test_the_text_of_a_model_with_images_is_read(tmp_path: Path) -> None:
    """Released Llama 4 folders describe their image encoder, and were refused for it."""
    oracle = save_tiny("llama4", tmp_path / "huggingface")
    plain = save_tiny_meta(oracle, tmp_path / "plain")
    folder = save_tiny_meta(oracle, tmp_path / "images")
    params = json.loads((folder / "params.json").read_text())
    params["vision_args"] = {
        "image_size": {"height": 336, "width": 336},
        "patch_size": {"height": 14, "width": 14},
        "dim": 1408,
        "n_layers": 34,
        "n_heads": 16,
        "mlp_ratio": 4.0,
        "output_dim": 4096,
        "pixel_shuffle_ratio": 0.5,
    }
    (folder / "params.json").write_text(json.dumps(params))
    random = np.random.default_rng(5)
    images = {
        "vision_embeddings.vision_encoder.class_embedding": random.random(7, np.float32),
        "vision_embeddings.vision_encoder.conv1._linear.weight": random.random((7, 9), np.float32),
        "vision_embeddings.vision_adapter.mlp.c_fc.weight": random.random((5, 28), np.float32),
        "vision_projection.weight": random.random((48, 5), np.float32),
    }
    save_file({**load_file(folder / FILE), **images}, folder / FILE)
    with open_checkpoint(plain) as without, open_checkpoint(folder) as model:
        assert model.config == without.config
        assert model.config.vision is None
        assert model.tensors == without.tensors
        for name in model.tensors:
            assert np.array_equal(model.read_values(name), without.read_values(name)), name
