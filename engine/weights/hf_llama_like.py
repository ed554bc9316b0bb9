"""config.json of the families that are Llama with few changes.

Llama, Mistral, Mixtral, Qwen 2, Qwen 3, Qwen 3 with experts. In: settings. Out: a ModelConfig, not
yet validated.

Source: configuration and modelling files of transformers.
"""

from __future__ import annotations

from typing import Any

from engine.model.config import Layer, ModelConfig
from engine.weights.hf_common import (
    Defaults,
    base_fields,
    experts_of,
    kinds_of,
    num_layers_of,
    one_rope,
    reaches_of,
    span_of,
)
from engine.weights.json_settings import Settings


def llama(settings: Settings) -> ModelConfig:
    """Llama 1 to 3, SmolLM."""
    defaults = Defaults()
    base = base_fields(settings, defaults)
    layer = Layer(mlp_width=settings.integer("intermediate_size"))
    has_bias = settings.flag("attention_bias", False)
    settings.refuse_unsupported({"sliding_window": ()})
    return ModelConfig(
        family="llama",
        layers=(layer,) * num_layers_of(settings),
        ropes=one_rope(settings, defaults, base["max_positions"]),
        has_qkv_bias=has_bias,
        has_output_bias=has_bias,
        **base,
    )


def _window_everywhere(settings: Settings, default: int | None, **fields: Any) -> tuple[Layer, ...]:
    """Layers that all see the same window, or everything where there is none."""
    num_layers = num_layers_of(settings)
    span = span_of(settings, "sliding_window", default)
    kind = "sliding_attention" if span else "full_attention"
    kinds = settings.strings("layer_types", num_layers)
    if kinds is not None and any(name != kind for name in kinds):
        raise settings.fail("layer_types", f"of this architecture can only be {kind!r}")
    layer = Layer(
        mlp_width=settings.integer("intermediate_size"),
        reach="sliding" if span else "full",
        span=span,
        **fields,
    )
    return (layer,) * num_layers


def mistral(settings: Settings) -> ModelConfig:
    """Mistral: one window everywhere."""
    defaults = Defaults(num_kv_heads=8)
    base = base_fields(settings, defaults)
    settings.refuse_unsupported({"attention_bias": (False,)})
    return ModelConfig(
        family="mistral",
        layers=_window_everywhere(settings, 4096),
        ropes=one_rope(settings, defaults, base["max_positions"]),
        **base,
    )


def mixtral(settings: Settings) -> ModelConfig:
    """Mixtral: experts in every layer."""
    defaults = Defaults(num_kv_heads=8, norm_epsilon=1e-5, rope_theta=1e6)
    base = base_fields(settings, defaults)
    settings.refuse_unsupported({"attention_bias": (False,)})
    return ModelConfig(
        family="mixtral",
        layers=_window_everywhere(settings, None, has_experts=True),
        ropes=one_rope(settings, defaults, base["max_positions"]),
        experts=experts_of(settings, 8, 2),
        **base,
    )


def _qwen_layers(settings: Settings) -> tuple[Layer, ...]:
    """Qwen 2 and 3: the upper layers may have a window."""
    num_layers = num_layers_of(settings)
    span = 0
    if settings.flag("use_sliding_window", False):
        span = span_of(settings, "sliding_window", 4096)
    first = settings.integer("max_window_layers", 28)
    kinds = kinds_of(
        settings, num_layers, lambda layer: bool(span) and layer >= first, "sliding_attention"
    )
    width = settings.integer("intermediate_size")
    return tuple(
        Layer(mlp_width=width, reach=reach, span=span if reach != "full" else 0)
        for reach in reaches_of(settings, kinds, span)
    )


def qwen2(settings: Settings) -> ModelConfig:
    """Qwen 2: bias on q, k and v."""
    defaults = Defaults(num_kv_heads=32)
    base = base_fields(settings, defaults)
    return ModelConfig(
        family="qwen2",
        layers=_qwen_layers(settings),
        ropes=one_rope(settings, defaults, base["max_positions"]),
        has_qkv_bias=True,
        **base,
    )


def qwen3(settings: Settings) -> ModelConfig:
    """Qwen 3: norms on q and k."""
    defaults = Defaults(num_kv_heads=32, head_width=128)
    base = base_fields(settings, defaults)
    has_bias = settings.flag("attention_bias", False)
    return ModelConfig(
        family="qwen3",
        layers=_qwen_layers(settings),
        ropes=one_rope(settings, defaults, base["max_positions"]),
        has_qkv_bias=has_bias,
        has_output_bias=has_bias,
        qk_norm="weight",
        **base,
    )


def qwen3_moe(settings: Settings) -> ModelConfig:
    """Qwen 3 with experts in most layers."""
    defaults = Defaults(num_kv_heads=4)
    base = base_fields(settings, defaults)
    has_bias = settings.flag("attention_bias", False)
    if not settings.flag("use_sliding_window", False):
        settings.values["sliding_window"] = None
    dense = set(settings.integers("mlp_only_layers") or [])
    step = settings.between("decoder_sparse_step", 1, 1 << 30, 1)
    expert_width = settings.integer("moe_intermediate_size", 768)
    layers = tuple(
        Layer(mlp_width=expert_width, reach=layer.reach, span=layer.span, has_experts=True)
        if number not in dense and (number + 1) % step == 0
        else layer
        for number, layer in enumerate(_window_everywhere(settings, 4096))
    )
    has_experts = any(layer.has_experts for layer in layers)
    is_normalized = settings.flag("norm_topk_prob", False)
    return ModelConfig(
        family="qwen3_moe",
        layers=layers,
        ropes=one_rope(settings, defaults, base["max_positions"]),
        has_qkv_bias=has_bias,
        has_output_bias=has_bias,
        qk_norm="weight",
        experts=experts_of(settings, 128, 8, is_normalized=is_normalized) if has_experts else None,
        **base,
    )
