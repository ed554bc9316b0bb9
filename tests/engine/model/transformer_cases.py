"""Configurations that have every feature of the model, random weights, and batches for them."""

from __future__ import annotations

from typing import Any

import msgspec
import torch
from torch import Tensor

from engine.model.config import (
    NO_ROPE,
    Experts,
    Layer,
    ModelConfig,
    Rope,
    VisionConfig,
)
from engine.model.transformer import Transformer

VOCAB = 99
IMAGE_TOKEN = 90
SPAN = 7

DENSE = ModelConfig(
    family="llama",
    width=48,
    layers=(Layer(mlp_width=75),) * 3,
    num_heads=6,
    num_kv_heads=2,
    head_width=20,
    vocab_size=VOCAB,
    norm_epsilon=1e-5,
    ropes=(Rope(theta=10000.0),),
    rope_layout="half",
    max_positions=64,
    is_head_tied=False,
)
SOFTMAX = Experts(
    count=5, used=2, router="softmax", is_normalized=True, weighs="output", has_shared=False
)
SIGMOID = Experts(
    count=5, used=1, router="sigmoid", is_normalized=False, weighs="input", has_shared=True
)
_VISION = VisionConfig(
    image_size=28,
    patch_size=7,
    num_channels=3,
    width=24,
    mlp_width=40,
    num_layers=2,
    num_heads=3,
    norm_epsilon=1e-5,
    rope_theta=10000.0,
    shuffle_ratio=0.5,
    adapter_width=31,
    output_width=33,
    image_token_id=IMAGE_TOKEN,
)


def dense_with(**changes: Any) -> ModelConfig:
    return msgspec.structs.replace(DENSE, **changes)


def _layers(**changes: Any) -> tuple[Layer, ...]:
    return (Layer(mlp_width=37, **changes),) * 2 + (Layer(mlp_width=75),)


CONFIGS: dict[str, ModelConfig] = {
    "dense": DENSE,
    "tied head, adjacent pairs": dense_with(is_head_tied=True, rope_layout="adjacent"),
    "one KV head": dense_with(num_kv_heads=1),
    "biases": dense_with(has_qkv_bias=True, has_output_bias=True),
    "head norms with weight": dense_with(qk_norm="weight"),
    "post norms": dense_with(
        has_post_norms=True, norm_adds_one=True, activation="gelu_tanh", embedding_scale=6.9
    ),
    "cap": dense_with(logit_softcap=2.0, attention_scale=0.2),
    "softmax experts": dense_with(layers=_layers(has_experts=True), experts=SOFTMAX),
    "sigmoid experts": dense_with(
        layers=_layers(has_experts=True), experts=SIGMOID, rope_layout="adjacent", qk_norm="l2"
    ),
    "chunks and no RoPE": dense_with(
        layers=(
            Layer(mlp_width=75, reach="chunked", span=SPAN),
            Layer(mlp_width=75, reach="sliding", span=SPAN),
            Layer(mlp_width=75, rope=NO_ROPE),
        ),
        tuning_floor=5,
        tuning_scale=0.3,
        qk_norm="l2",
    ),
    "images": dense_with(vision=_VISION),
}


def fresh(config: ModelConfig, seed: int = 5) -> Transformer:
    """A model whose every value is random, so that nothing cancels out."""
    generator = torch.Generator().manual_seed(seed)
    model = Transformer(config, generator=generator)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def batch_of(config: ModelConfig, length: int = 23) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Two sequences, their targets, and images where the model sees them."""
    generator = torch.Generator().manual_seed(8)
    tokens = torch.randint(0, IMAGE_TOKEN, (2, length), generator=generator)
    targets = torch.randint(0, VOCAB, (2, length), generator=generator)
    if config.vision is None:
        return tokens, targets, {}
    num_features = config.vision.tokens_per_tile
    tokens[:, 3 : 3 + num_features] = IMAGE_TOKEN
    return tokens, targets, {"tiles": torch.rand(2, 3, 28, 28, generator=generator) * 2 - 1}
