"""Sizes of models to train from nothing: tiny, small, medium, large.

In: a name and what shall differ. Out: a validated configuration of a Llama-style decoder. No torch.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from engine.errors import ConfigError
from engine.model.config import Layer, ModelConfig, Rope


class _Size(NamedTuple):
    width: int
    num_layers: int
    num_heads: int
    num_kv_heads: int


PRESETS: dict[str, _Size] = {
    "tiny": _Size(128, 4, 4, 1),
    "small": _Size(256, 8, 8, 2),
    "medium": _Size(512, 12, 8, 2),
    "large": _Size(768, 24, 12, 4),
}
_VOCAB_SIZE = 50304
_CONTEXT = 1024
_MLP_MULTIPLE = 256
# Not fields of a configuration, but easier to say than a tuple of layers.
_SHORT_FIELDS = ("num_layers", "mlp_width")


def default_mlp_width(width: int) -> int:
    """8/3 of the width, rounded up to a multiple of 256: as many weights as a plain MLP of 4x."""
    return -(-8 * width // (3 * _MLP_MULTIPLE)) * _MLP_MULTIPLE


def model_preset(name: str, **changes: Any) -> ModelConfig:
    """A configuration by name.

    Args:
        name: one of PRESETS.
        changes: fields of `ModelConfig`, or `num_layers` and `mlp_width`. What is not given
            follows: the MLP's width from the width, a head's from width and heads.
    Raises: ConfigError: no such preset or field, or a value that breaks a rule.
    """
    size = PRESETS.get(name)
    if size is None:
        raise ConfigError(f"no preset is called {name!r}; use one of {', '.join(PRESETS)}")
    fields = (*ModelConfig.__struct_fields__, *_SHORT_FIELDS)
    unknown = [field for field in changes if field not in fields]
    if unknown:
        raise ConfigError(
            f"a model has no {', '.join(unknown)}; preset {name} takes {', '.join(fields)}"
        )
    if "layers" in changes and not changes.keys().isdisjoint(_SHORT_FIELDS):
        raise ConfigError(
            f"preset {name}: layers are given, and {' or '.join(_SHORT_FIELDS)} too; leave one out"
        )
    num_layers = changes.pop("num_layers", size.num_layers)
    width = changes.get("width", size.width)
    num_heads = changes.get("num_heads", size.num_heads)
    for field, value in (("num_layers", num_layers), ("width", width), ("num_heads", num_heads)):
        if not isinstance(value, int) or value < 1:
            raise ConfigError(f"preset {name}: {field} {value!r} is not a whole number above 0")
    if "head_width" not in changes and width % num_heads:
        raise ConfigError(
            f"preset {name}: width {width} does not divide into {num_heads} heads; give head_width"
        )
    mlp_width = changes.pop("mlp_width", default_mlp_width(width))
    defaults: dict[str, Any] = {
        "family": "llama",
        "width": width,
        "layers": (Layer(mlp_width=mlp_width),) * num_layers,
        "num_heads": num_heads,
        "num_kv_heads": size.num_kv_heads,
        "head_width": width // num_heads,
        "vocab_size": _VOCAB_SIZE,
        "norm_epsilon": 1e-5,
        "ropes": (Rope(theta=10000.0),),
        "rope_layout": "half",
        "max_positions": _CONTEXT,
        "is_head_tied": True,
    }
    return ModelConfig(**{**defaults, **changes}).validate()
