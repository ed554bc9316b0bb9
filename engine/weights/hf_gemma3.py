"""config.json of Gemma 3; of a folder with an image encoder, the text part alone.

In: settings. Out: a ModelConfig, not yet validated.

Source: transformers models/gemma3.
"""

from __future__ import annotations

from engine.model.config import Layer, ModelConfig, Rope
from engine.weights.hf_common import (
    Defaults,
    base_fields,
    kinds_of,
    num_layers_of,
    reaches_of,
    span_of,
)
from engine.weights.hf_rope import rope_from_settings
from engine.weights.json_settings import Settings

_GEMMA3_SIZES = {
    "hidden_size": 2304,
    "num_attention_heads": 8,
    "vocab_size": 262208,
    "max_position_embeddings": 131072,
}
_GEMMA3_NEUTRAL: dict[str, tuple[object, ...]] = {
    "use_bidirectional_attention": (False,),
    "attn_logit_softcapping": (),
}


def _gemma3_ropes(settings: Settings, max_positions: int) -> tuple[Rope, Rope]:
    """Frequencies of the full and of the sliding layers."""
    nested = settings.section("rope_parameters") or Settings(settings.path, {})
    full, sliding = nested.section("full_attention"), nested.section("sliding_attention")
    older = settings.section("rope_scaling")
    if older is not None and older.values:  # of the full layers alone, over what the new form says
        known = full.values if full is not None else {}
        full = Settings(settings.path, known | older.values, older.where)
    local = Settings(settings.path, {"rope_theta": settings.values.get("rope_local_base_freq")})
    return (
        rope_from_settings(settings, full, 1e6, max_positions),
        rope_from_settings(local, sliding, 10000.0, max_positions),
    )


def gemma3(settings: Settings) -> ModelConfig:
    """A folder of the text model, or of text and images."""
    outer, settings = settings, settings.section("text_config") or settings
    defaults = Defaults(
        num_kv_heads=4,
        head_width=256,
        activation_key="hidden_activation",
        activation="gelu_pytorch_tanh",
        sizes=_GEMMA3_SIZES,
    )
    base = base_fields(settings, defaults)
    base["is_head_tied"] = outer.flag("tie_word_embeddings", True)
    settings.refuse_unsupported(_GEMMA3_NEUTRAL)
    num_layers = num_layers_of(settings, 26)
    span = span_of(settings, "sliding_window", 4096)
    step = settings.between("sliding_window_pattern", 1, 1 << 30, 6)
    kinds = kinds_of(settings, num_layers, lambda n: (n + 1) % step != 0, "sliding_attention")
    width = settings.integer("intermediate_size", 9216)
    layers = tuple(
        Layer(mlp_width=width, rope=1, reach="sliding", span=span)
        if reach == "sliding"
        else Layer(mlp_width=width)
        for reach in reaches_of(settings, kinds, span)
    )
    query_scalar = settings.number("query_pre_attn_scalar", 256)
    if not 0 < query_scalar < float("inf"):
        raise settings.fail("query_pre_attn_scalar", f"{query_scalar} is not a positive number")
    has_bias = settings.flag("attention_bias", False)
    return ModelConfig(
        family="gemma3",
        layers=layers,
        ropes=_gemma3_ropes(settings, base["max_positions"]),
        has_qkv_bias=has_bias,
        has_output_bias=has_bias,
        qk_norm="weight",
        norm_adds_one=True,
        has_post_norms=True,
        embedding_scale=base["width"] ** 0.5,
        attention_scale=query_scalar**-0.5,
        logit_softcap=settings.number("final_logit_softcapping", 0.0),
        **base,
    )
