"""What every family reads from config.json in the same way.

In: settings. Out: parts of a ModelConfig. A missing key means what it means to transformers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from engine.errors import ConfigError
from engine.model.config import MAX_EXPERTS, MAX_LAYERS, Activation, Experts, Reach, Rope
from engine.weights.hf_rope import rope_from_settings, rope_section
from engine.weights.json_settings import Settings
from engine.weights.mapped import one_line

# Key -> the values that change nothing; null and a missing key are neutral too.
_NEUTRAL: dict[str, tuple[object, ...]] = {
    "mlp_bias": (False,),
    "partial_rotary_factor": (1,),
    "quantization_config": (),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
}
_ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
}
_REACHES: dict[str, Reach] = {
    "full_attention": "full",
    "sliding_attention": "sliding",
    "chunked_attention": "chunked",
}
MAX_SPAN = 1 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Defaults:
    """What a missing key means; 0 where the key must be there, or follows from others."""

    num_kv_heads: int = 0
    head_width: int = 0
    norm_epsilon: float = 1e-6
    rope_theta: float = 10000.0
    is_head_tied: bool = False
    activation_key: str = "hidden_act"
    activation: str = "silu"
    sizes: dict[str, int] = field(default_factory=dict[str, int])


def base_fields(settings: Settings, defaults: Defaults) -> dict[str, Any]:
    """The fields of ModelConfig that every family reads the same way.

    Raises: ConfigError: a size is missing or no whole number, heads do not divide the width, or the
        file wants arithmetic that no family has.
    """
    settings.refuse_unsupported(_NEUTRAL)

    def size(key: str) -> int:
        return settings.integer(key, defaults.sizes.get(key))

    width, num_heads = size("hidden_size"), size("num_attention_heads")
    if width < 1 or num_heads < 1:
        raise ConfigError(f"{settings.path}: width {width} or num_heads {num_heads} is below 1")
    head_width = settings.integer("head_dim", defaults.head_width)
    if not head_width and width % num_heads:
        raise ConfigError(f"{settings.path}: num_heads {num_heads} does not divide width {width}")
    # Null is one KV head per query head; a missing key is the architecture's number.
    is_given = "num_key_value_heads" in settings.values
    num_kv_heads = num_heads if is_given else defaults.num_kv_heads or num_heads
    key = defaults.activation_key
    activation = _ACTIVATIONS.get(str(settings.values.get(key) or defaults.activation))
    if activation is None:
        raise settings.fail(
            key, f"{settings.shown(key)} is not supported ({', '.join(_ACTIVATIONS)})"
        )
    return {
        "width": width,
        "num_heads": num_heads,
        "num_kv_heads": settings.integer("num_key_value_heads", num_kv_heads),
        "head_width": head_width or width // num_heads,
        "vocab_size": size("vocab_size"),
        "norm_epsilon": settings.number("rms_norm_eps", defaults.norm_epsilon),
        "max_positions": size("max_position_embeddings"),
        "is_head_tied": settings.flag("tie_word_embeddings", defaults.is_head_tied),
        "activation": activation,
        "rope_layout": "half",
    }


def num_layers_of(settings: Settings, default: int | None = None) -> int:
    """The number of layers, checked before anything is made for each.

    Raises: ConfigError: it is no number from 1 to MAX_LAYERS.
    """
    number = settings.integer("num_hidden_layers", default)
    if not 1 <= number <= MAX_LAYERS:
        raise ConfigError(
            f"{settings.path}: num_layers {number} is not between 1 and {MAX_LAYERS:,}"
        )
    return number


def one_rope(settings: Settings, defaults: Defaults, max_positions: int) -> tuple[Rope]:
    """The frequencies that all layers share."""
    section = rope_section(settings)
    return (rope_from_settings(settings, section, defaults.rope_theta, max_positions),)


def span_of(settings: Settings, key: str, default: int | None) -> int:
    """A window or chunk in tokens; 0 where the file says null, or nothing and there is no default.

    Raises: ConfigError: it is not a positive whole number.
    """
    if settings.values.get(key, default) is None:
        return 0
    return settings.between(key, 1, MAX_SPAN, default)


def reaches_of(settings: Settings, kinds: list[str], span: int) -> list[Reach]:
    """The reach of every layer from the names that transformers gives them.

    Raises: ConfigError: a layer is local, and there is no span.
    """
    local = next((kind for kind in kinds if kind != "full_attention"), None)
    if local is not None and not span:
        raise settings.fail("layer_types", f"holds {local!r}, but its window is not set")
    return [_REACHES[kind] for kind in kinds]


def kinds_of(
    settings: Settings, num_layers: int, default: Callable[[int], bool], local: str
) -> list[str]:
    """What transformers calls the attention of every layer.

    Args:
        default: where the file has no `layer_types`: whether a layer is local.
        local: the one name beside "full_attention" that the family has.
    Raises: ConfigError: a list of another length, or another name in it.
    """
    kinds = settings.strings("layer_types", num_layers)
    if kinds is not None:
        other = next((kind for kind in kinds if kind not in ("full_attention", local)), None)
        if other is not None:
            raise settings.fail("layer_types", f"holds {one_line(other)!r}, which is not supported")
        return kinds
    return [local if default(layer) else "full_attention" for layer in range(num_layers)]


def experts_of(
    settings: Settings,
    count: int,
    used: int,
    *,
    is_normalized: bool = True,
    router: Literal["softmax", "sigmoid"] = "softmax",
) -> Experts:
    """Settings of the experts, with the names that old and new files give their number.

    Args:
        count, used: what the architecture assumes where the file says nothing.
    """
    key = "num_experts" if "num_experts" in settings else "num_local_experts"
    return Experts(
        count=settings.between(key, 1, MAX_EXPERTS, count),
        used=settings.integer("num_experts_per_tok", used),
        router=router,
        is_normalized=is_normalized,
        weighs="input" if router == "sigmoid" else "output",
        has_shared=router == "sigmoid",
    )
