"""Tiny random models of every supported family, as transformers makes and saves them.

Sizes are odd, so that a swapped axis or half cannot pass; windows and chunks are short, so that 41
tokens pass more than two of them. The same weights as GGUF and Meta files: `tiny_files`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from tests.tiny_files import save_tiny_gguf, save_tiny_meta
from tests.tiny_models import VOCAB_SIZE, save_letter_tokenizer

__all__ = [
    "FAMILIES",
    "GGUF_CHANGES",
    "META_FAMILIES",
    "save_tiny",
    "save_tiny_gguf",
    "save_tiny_meta",
]

WINDOW = 12
IMAGE_TOKEN = 90

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 48,
    "intermediate_size": 75,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 20,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "initializer_range": 0.1,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
_LLAMA4: dict[str, Any] = {
    **_ROPE,
    "intermediate_size": 37,
    "intermediate_size_mlp": 75,
    "num_local_experts": 5,
    "num_experts_per_tok": 1,
    "interleave_moe_layer_step": 2,
    "no_rope_layer_interval": 3,
    "attention_chunk_size": WINDOW,
    "floor_scale": 7,
    "attn_scale": 0.3,
}
_GEMMA3: dict[str, Any] = {
    "tie_word_embeddings": True,
    "rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 100000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    },
    "sliding_window": WINDOW,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "query_pre_attn_scalar": 23,
}
_LLAMA4_VISION: dict[str, Any] = {
    "image_size": 28,
    "patch_size": 7,
    "num_channels": 3,
    "hidden_size": 24,
    "intermediate_size": 96,  # transformers takes it for the width after the pixel shuffle, too
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "pixel_shuffle_ratio": 0.5,
    "projector_input_dim": 33,
    "projector_output_dim": 33,
    "vision_output_dim": 33,
}
_GEMMA3_VISION: dict[str, Any] = {
    "image_size": 28,
    "patch_size": 7,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 1,
    "num_attention_heads": 3,
}
_TEXT: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", {**_ROPE, "num_hidden_layers": 3}),
    "smollm": (
        "LlamaConfig",
        "LlamaForCausalLM",
        {**_ROPE, "num_hidden_layers": 3, "tie_word_embeddings": True},
    ),
    "mistral": ("MistralConfig", "MistralForCausalLM", {**_ROPE, "sliding_window": WINDOW}),
    "mixtral": (
        "MixtralConfig",
        "MixtralForCausalLM",
        {**_ROPE, "num_local_experts": 5, "num_experts_per_tok": 2},
    ),
    "qwen2": (
        "Qwen2Config",
        "Qwen2ForCausalLM",
        {**_ROPE, "use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 2},
    ),
    "qwen3": (
        "Qwen3Config",
        "Qwen3ForCausalLM",
        {
            **_ROPE,
            "use_sliding_window": True,
            "sliding_window": WINDOW,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
    ),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        "Qwen3MoeForCausalLM",
        {
            **_ROPE,
            "num_experts": 5,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 37,
            "norm_topk_prob": True,
            "mlp_only_layers": [1],
        },
    ),
    "llama4": ("Llama4TextConfig", "Llama4ForCausalLM", _LLAMA4),
    "gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM", _GEMMA3),
}

FAMILIES = [*_TEXT, "llama4_vision", "gemma3_vision"]
META_FAMILIES = ["llama", "smollm", "mistral", "llama4"]
# What a GGUF file cannot say of a family: constants of the readers, and how many layers have which.
GGUF_CHANGES: dict[str, dict[str, Any]] = {
    "llama4": {
        "no_rope_layer_interval": 4,
        "attention_chunk_size": 8192,
        "floor_scale": 8192,
        "attn_scale": 0.1,
    },
    "gemma3": {"query_pre_attn_scalar": 20},
}
for _family in ("llama4", "gemma3"):
    GGUF_CHANGES[f"{_family}_vision"] = GGUF_CHANGES[_family]


def save_tiny(family: str, folder: Path, **changes: Any) -> PreTrainedModel:
    """Write a random model's folder: config.json, safetensors, the letter tokenizer.

    Args:
        family: one of FAMILIES; the last two have a vision part beside their text part.
        folder: is made.
        changes: fields of the text configuration.
    Returns: the float32 oracle, in eval mode, with eager attention. Every parameter is random,
        norms, biases, experts and routers included; its logits are of order one.
    """
    torch.manual_seed(11)
    library: Any = transformers
    if family in _TEXT:
        config_class, model_class, settings = _TEXT[family]
        config = getattr(library, config_class)(**{**_COMMON, **settings, **changes})
    elif family == "llama4_vision":
        model_class = "Llama4ForConditionalGeneration"
        config = transformers.Llama4Config(
            text_config={**_COMMON, **_LLAMA4, **changes},
            vision_config=_LLAMA4_VISION,
            image_token_index=IMAGE_TOKEN,
        )
    else:
        model_class = "Gemma3ForConditionalGeneration"
        config = transformers.Gemma3Config(
            text_config={**_COMMON, **_GEMMA3, **changes},
            vision_config={**_GEMMA3_VISION, "model_type": "siglip_vision_model"},
            mm_tokens_per_image=4,
            image_token_index=IMAGE_TOKEN,
        )
    model: Any = getattr(library, model_class)(config).eval()
    model.set_attn_implementation("eager")
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # the grouped kernel wants widths of whole blocks
    _randomise(model, torch.Generator().manual_seed(12))
    model.save_pretrained(folder)
    save_letter_tokenizer(folder)
    return model


def _randomise(model: PreTrainedModel, generator: torch.Generator) -> None:
    """Give norms, biases and whatever transformers fills with constants values of their own."""
    with torch.no_grad():
        for value in model.parameters():
            if value.ndim == 1 or bool((value == value.flatten()[0]).all()):
                value.add_(0.1 * torch.randn(value.shape, generator=generator))
