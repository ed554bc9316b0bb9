"""Rotary frequencies from a Hugging Face config.json, in the old or the new form.

In: the settings. Out: a `Rope`, in which everything that follows from other fields is resolved. The
frequencies themselves are `engine.model.rope`'s.

Source: transformers modeling_rope_utils.py, arXiv 2309.00071 (yarn).
"""

from __future__ import annotations

import math

from engine.errors import ConfigError
from engine.model.config import Rope
from engine.weights.json_settings import Settings
from engine.weights.mapped import one_line

_KINDS = ("default", "linear", "dynamic", "llama3", "yarn")


def rope_section(settings: Settings) -> Settings | None:
    """`rope_scaling` (old) or `rope_parameters` (new); an empty one counts as absent.

    Raises: ConfigError: it is not an object.
    """
    for key in ("rope_scaling", "rope_parameters"):
        section = settings.section(key)
        if section is not None and section.values:
            return section
    return None


def rope_from_settings(
    settings: Settings, section: Settings | None, default_theta: float, max_positions: int
) -> Rope:
    """One table of frequencies.

    Args:
        settings: of the text model; may hold `rope_theta`.
        section: the scaling, or None where there is none.
        default_theta: of the architecture, where the file says nothing.
        max_positions: of the model.
    Raises: ConfigError: an unknown kind, or a value of another type than its kind needs.
    """
    theta = settings.number("rope_theta", default_theta)
    if section is None:
        return Rope(theta=theta)
    kind = section.values.get("rope_type") or section.values.get("type") or "default"
    if kind not in _KINDS:
        raise ConfigError(
            f"{settings.path}: {section.where.rstrip('.')} of type {one_line(kind)!r} is not "
            f"supported ({', '.join(_KINDS)}); use a model with one of these"
        )
    if "partial_rotary_factor" in section and section.number("partial_rotary_factor") != 1:
        raise section.fail("partial_rotary_factor", "is not supported (1)")
    theta = section.number("rope_theta", theta)
    if kind == "default":
        return Rope(theta=theta)
    if kind == "linear":
        return Rope(theta=theta, kind="linear", factor=section.number("factor"))
    if kind == "dynamic":
        return Rope(
            theta=theta,
            kind="dynamic",
            factor=section.number("factor"),
            original_positions=max_positions,
        )
    original = settings.integer(
        "original_max_position_embeddings",
        section.integer("original_max_position_embeddings", max_positions),
    )
    if kind == "llama3":
        return Rope(
            theta=theta,
            kind="llama3",
            factor=section.number("factor"),
            original_positions=original,
            low_factor=section.number("low_freq_factor"),
            high_factor=section.number("high_freq_factor"),
        )
    if original < 1:
        raise section.fail("original_max_position_embeddings", f"{original} is below 1")
    # Null is the ratio; a file that says neither number is incomplete.
    ratio = max_positions / original if original != max_positions else None
    factor = section.number("factor", ratio)
    return Rope(
        theta=theta,
        kind="yarn",
        factor=factor,
        original_positions=original,
        beta_fast=section.number("beta_fast", 0.0) or 32.0,
        beta_slow=section.number("beta_slow", 0.0) or 1.0,
        is_truncated=section.flag("truncate", True),
        attention_factor=_attention_factor(section, factor),
    )


def yarn_magnitude(factor: float, scale: float = 1.0) -> float:
    """How much longer contexts need sharper attention: 0.1 · scale · ln(factor) + 1."""
    return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0


def _attention_factor(section: Settings, factor: float) -> float:
    if "attention_factor" in section:
        return section.number("attention_factor")
    if math.isinf(factor) or math.isnan(factor):
        raise section.fail("factor", f"{factor} is not a positive number")
    over, under = section.number("mscale", 0.0), section.number("mscale_all_dim", 0.0)
    if not over or not under:
        return yarn_magnitude(factor)
    divisor = yarn_magnitude(factor, under)
    if not divisor:
        raise section.fail("mscale_all_dim", f"{under} makes the attention factor infinite")
    return yarn_magnitude(factor, over) / divisor
