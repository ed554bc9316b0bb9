"""Rotary frequencies from the metadata of a GGUF file, and from its tensor of divisors.

In: a section. Out: one or two `Rope`s. The defaults are those of llama.cpp.

Source: constants.py of the gguf package (Keys.Rope); arXiv 2309.00071 (yarn).
"""

from __future__ import annotations

from dataclasses import dataclass

from engine.errors import ConfigError
from engine.model.config import Rope
from engine.weights.formats import FORMATS, dequantize
from engine.weights.gguf_section import Section
from engine.weights.hf_rope import yarn_magnitude

DIVISORS = "rope_freqs.weight"
_KINDS = ("none", "linear", "yarn")


@dataclass(frozen=True, slots=True)
class _Scaling:
    kind: str
    factor: float


def _scaling(section: Section) -> _Scaling:
    kind = section.text("rope.scaling.type", "linear") or "none"
    if kind not in _KINDS:
        raise section.fail(
            "rope.scaling.type", f"= {kind[:40]!r} is not supported ({', '.join(_KINDS)})"
        )
    old = section.number("rope.scale_linear", 0.0)
    factor = section.number("rope.scaling.factor", old) or 1.0
    if kind == "linear" and factor == 1:
        kind = "none"
    return _Scaling(kind, factor)


def ropes_from_gguf(section: Section, head_width: int, *, has_two: bool) -> tuple[Rope, ...]:
    """The tables of frequencies of a model.

    Args:
        section: the architecture's keys.
        head_width: of the model, for the number of divisors.
        has_two: whether sliding layers have a table of their own, unscaled.
    Returns: the table of all layers; or of the full ones, then of the sliding ones.
    Raises: ConfigError: an unknown kind of scaling, or divisors of the wrong number or format.
    """
    theta = section.number("rope.freq_base", 10000.0)
    rope = _rope(section, theta, head_width)
    if has_two:
        theta = section.number("rope.freq_base_swa", 10000.0)
        return rope, Rope(theta=theta, attention_factor=_magnitude(section))
    if section.number("rope.freq_base_swa", theta) != theta:
        raise section.fail("rope.freq_base_swa", "is not supported by this architecture")
    return (rope,)


def _rope(section: Section, theta: float, head_width: int) -> Rope:
    scaling = _scaling(section)
    divisors = _divisors(section, head_width)
    if divisors:
        if scaling.kind == "yarn":
            raise ConfigError(
                f"{section.path}: {DIVISORS} together with rope.scaling.type = yarn is not "
                "supported; use a model with one of them"
            )
        factor = scaling.factor if scaling.kind == "linear" else 1.0
        return Rope(
            theta=theta,
            kind="factors",
            factors=tuple(value * factor for value in divisors),
            attention_factor=_magnitude(section),
        )
    if scaling.kind == "none":
        return Rope(theta=theta, attention_factor=_magnitude(section))
    if scaling.kind == "linear":
        return Rope(
            theta=theta,
            kind="linear",
            factor=scaling.factor,
            attention_factor=_magnitude(section),
        )
    magnitude = yarn_magnitude(scaling.factor)
    multiplier = section.number("rope.scaling.yarn_log_multiplier", 0.0)
    if multiplier:
        divisor = yarn_magnitude(scaling.factor, multiplier)
        if not divisor:
            raise section.fail("rope.scaling.yarn_log_multiplier", "makes attention infinite")
        magnitude /= divisor
    return Rope(
        theta=theta,
        kind="yarn",
        factor=scaling.factor,
        original_positions=section.integer(
            "rope.scaling.original_context_length", section.integer("context_length")
        ),
        beta_fast=section.number("rope.scaling.yarn_beta_fast", 32.0),
        beta_slow=section.number("rope.scaling.yarn_beta_slow", 1.0),
        attention_factor=magnitude * _magnitude(section),
    )


def _magnitude(section: Section) -> float:
    """What a file multiplies cosine and sine by, with every kind of scaling and without."""
    return section.number("rope.scaling.attn_factor", 1.0)


def _divisors(section: Section, head_width: int) -> tuple[float, ...]:
    """One number per pair of a head, or none where the file has no such tensor."""
    tensor = section.file.tensors.get(DIVISORS)
    if tensor is None:
        return ()
    if tensor.shape != (head_width // 2,) or not FORMATS[tensor.format].is_weight:
        raise ConfigError(
            f"{section.path}: {DIVISORS} is {tensor.format} {list(tensor.shape)}, its heads need "
            f"[{head_width // 2}] numbers; the file is damaged"
        )
    values = dequantize(tensor.format, tensor.read(0, 0, tensor.shape[0]), tensor.shape)
    return tuple(float(value) for value in values)
