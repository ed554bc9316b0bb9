"""config.json of Llama 4, with or without its image encoder.

In: settings. Out: a ModelConfig, not yet validated.

Source: transformers models/llama4.
"""

from __future__ import annotations

from engine.model.config import NO_ROPE, Layer, ModelConfig, QkNorm, VisionConfig
from engine.weights.hf_common import (
    MAX_SPAN,
    Defaults,
    base_fields,
    experts_of,
    kinds_of,
    num_layers_of,
    one_rope,
    reaches_of,
    span_of,
)
from engine.weights.hf_rope import rope_section
from engine.weights.json_settings import Settings
from engine.weights.mapped import one_line

_LEAST_RATIO = 1 / 64
_LLAMA4_SIZES = {
    "hidden_size": 5120,
    "num_attention_heads": 40,
    "vocab_size": 202048,
    "max_position_embeddings": 131072,
}


def _llama4_uses_rope(settings: Settings, num_layers: int) -> list[bool]:
    # 1 means that the layer has RoPE, whatever the key is called.
    flags = settings.integers("no_rope_layers")
    if not flags:
        step = settings.between("no_rope_layer_interval", 1, 1 << 30, 4)
        return [(layer + 1) % step != 0 for layer in range(num_layers)]
    if len(flags) < num_layers:
        raise settings.fail(
            "no_rope_layers", f"has {len(flags)} items, the model has {num_layers} layers"
        )
    return [bool(flag) for flag in flags[:num_layers]]


def _llama4_layers(settings: Settings) -> tuple[Layer, ...]:
    num_layers = num_layers_of(settings, 48)
    uses_rope = _llama4_uses_rope(settings, num_layers)
    span = span_of(settings, "attention_chunk_size", 8192)
    kinds = kinds_of(
        settings,
        num_layers,
        lambda layer: uses_rope[layer] and span > 0,
        "chunked_attention",
    )
    reaches = reaches_of(settings, kinds, span)
    given = settings.integers("moe_layers")
    if given is None:
        step = settings.between("interleave_moe_layer_step", 1, 1 << 30, 1)
        given = list(range(step - 1, num_layers, step))
    with_experts = set(given)
    for number in with_experts:
        if not 0 <= number < num_layers:
            shown = one_line(number)
            raise settings.fail("moe_layers", f"holds {shown}, the model has {num_layers} layers")
    expert_width = settings.integer("intermediate_size", 8192)
    dense_width = settings.integer("intermediate_size_mlp", 16384)
    return tuple(
        Layer(
            mlp_width=expert_width if layer in with_experts else dense_width,
            rope=0 if uses_rope[layer] else NO_ROPE,
            reach=reaches[layer],
            span=span if reaches[layer] != "full" else 0,
            has_experts=layer in with_experts,
        )
        for layer in range(num_layers)
    )


def llama4(settings: Settings) -> ModelConfig:
    """A folder of the text model, or of text and images."""
    outer, settings = settings, settings.section("text_config") or settings
    defaults = Defaults(
        num_kv_heads=8,
        # Null is the width shared among the heads; a missing key is this number.
        head_width=0 if "head_dim" in settings.values else 128,
        norm_epsilon=1e-5,
        rope_theta=500000.0,
        sizes=_LLAMA4_SIZES,
    )
    base = base_fields(settings, defaults)
    base["rope_layout"] = "adjacent"
    layers = _llama4_layers(settings)
    has_bias = settings.flag("attention_bias", False)
    qk_norm: QkNorm = "l2" if settings.flag("use_qk_norm", True) else "none"
    floor, scale = _tuning(settings)
    return ModelConfig(
        family="llama4",
        layers=layers,
        ropes=one_rope(settings, defaults, base["max_positions"]),
        has_qkv_bias=has_bias,
        has_output_bias=has_bias,
        qk_norm=qk_norm,
        tuning_floor=floor,
        tuning_scale=scale,
        experts=experts_of(settings, 16, 1, is_normalized=False, router="sigmoid")
        if any(layer.has_experts for layer in layers)
        else None,
        vision=_vision(outer),
        **base,
    )


def _tuning(settings: Settings) -> tuple[int, float]:
    """Floor and strength of the temperature of layers without RoPE; floor 0 is none."""
    wanted = settings.values.get("attn_temperature_tuning", True)
    if not isinstance(wanted, bool | int | None):  # early files store the number 4 for true
        shown = settings.shown("attn_temperature_tuning")
        raise settings.fail("attn_temperature_tuning", f"{shown} is not true or false")
    if not wanted:
        return 0, 0.0
    floor = settings.number("floor_scale", 8192)
    if not floor.is_integer() or not 1 <= floor <= MAX_SPAN:
        raise settings.fail("floor_scale", f"{floor} is not a whole number from 1")
    return int(floor), settings.number("attn_scale", 0.1)


def _vision(settings: Settings) -> VisionConfig | None:
    """The image encoder, or None where the folder is of the text model alone."""
    vision = settings.section("vision_config")
    if vision is None:
        return None
    vision.refuse_unsupported(
        {
            "hidden_act": ("gelu",),
            "multi_modal_projector_bias": (False,),
            "vision_feature_select_strategy": ("default",),
        }
    )
    rope = rope_section(vision)
    if rope is not None:
        rope.refuse_unsupported({"rope_type": ("default",), "type": ("default",)})
    width = vision.integer("hidden_size", 768)
    ratio = vision.number("pixel_shuffle_ratio", 0.5)
    mlp_width = vision.integer("intermediate_size", 5632)
    if not _LEAST_RATIO <= ratio <= 1:
        raise vision.fail("pixel_shuffle_ratio", f"{ratio} is not between {_LEAST_RATIO} and 1")
    # transformers has one number for both, and reads the adapter's widths as one.
    if mlp_width != width * round(1 / ratio) ** 2:
        raise vision.fail(
            "intermediate_size",
            f"{mlp_width} is not {width} x {round(1 / ratio)}², the width after the pixel shuffle",
        )
    output_width = vision.integer("vision_output_dim", 7680)
    for key in ("projector_input_dim", "projector_output_dim"):
        if vision.integer(key, 4096) != output_width:
            raise vision.fail(key, f"differs from vision_output_dim {output_width}")
    return VisionConfig(
        image_size=vision.integer("image_size", 448),
        patch_size=vision.integer("patch_size", 14),
        num_channels=vision.integer("num_channels", 3),
        width=width,
        mlp_width=mlp_width,
        num_layers=vision.integer("num_hidden_layers", 34),
        num_heads=vision.integer("num_attention_heads", 16),
        norm_epsilon=1e-5,  # of every norm, whatever the file's norm_eps says
        rope_theta=(rope or vision).number("rope_theta", 10000.0),
        shuffle_ratio=ratio,
        adapter_width=output_width,
        output_width=output_width,
        image_token_id=settings.integer("image_token_index", 200092),
    )
