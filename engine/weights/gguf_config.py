"""The shape of a model from the metadata of a GGUF file.

In: checked headers. Out: a validated ModelConfig. Where a file says nothing, the defaults are those
of llama.cpp. Whatever would change the arithmetic and is not supported is refused here by name, so
that no file computes something else than it says.

Source: constants.py of the gguf package; the converter and the model files of llama.cpp.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from engine.errors import CheckpointError, ConfigError
from engine.model.config import (
    MAX_EXPERTS,
    MAX_LAYERS,
    NO_ROPE,
    Activation,
    Experts,
    Layer,
    ModelConfig,
    QkNorm,
    Reach,
    RopeLayout,
)
from engine.weights.gguf_neutral import NEUTRAL
from engine.weights.gguf_rope import ropes_from_gguf
from engine.weights.gguf_section import Section
from engine.weights.gguf_split import GgufModel
from engine.weights.mapped import one_line

# What must be the width of a head, where a file says it; "swa" is of the layers with a window.
_HEAD_WIDTHS = (
    "attention.value_length",
    "attention.key_length_swa",
    "attention.value_length_swa",
    "rope.dimension_count",
    "rope.dimension_count_swa",
)
_LAYER_OF_NAME = re.compile(r"blk\.(\d{1,9})\.")
_CONTROL_VECTOR = re.compile(r"direction\.(\d{1,18})")
_LLAMA4_CHUNK = 8192


@dataclass(frozen=True, slots=True, kw_only=True)
class _Architecture:
    """What the name of an architecture says.

    Attributes:
        family, expert_family: without and with experts; "" where it has none.
        rope_layout: "adjacent" where the converter reorders the rows of q and k, or where the model
            was made so.
        has_sigmoid: Llama 4: its router, its shared expert, its chunks.
        pattern: every such layer sees everything, where the file has a window and says no pattern;
            0: all layers have the window.
        is_gemma: scaled embeddings, norms after attention and MLP, two tables of frequencies.
    """

    family: str
    expert_family: str = ""
    rope_layout: RopeLayout = "half"
    qk_norm: QkNorm = "none"
    has_sigmoid: bool = False
    pattern: int = 0
    activation: Activation = "silu"
    is_gemma: bool = False


_ARCHITECTURES = {
    "llama": _Architecture(family="llama", expert_family="mixtral", rope_layout="adjacent"),
    "llama4": _Architecture(
        family="llama4",
        expert_family="llama4",
        rope_layout="adjacent",
        qk_norm="l2",
        has_sigmoid=True,
        pattern=4,
    ),
    "qwen2": _Architecture(family="qwen2"),
    "qwen3": _Architecture(family="qwen3", qk_norm="weight"),
    "qwen3moe": _Architecture(family="qwen3_moe", expert_family="qwen3_moe", qk_norm="weight"),
    "gemma3": _Architecture(
        family="gemma3", qk_norm="weight", pattern=6, activation="gelu_tanh", is_gemma=True
    ),
}
SUPPORTED_ARCHITECTURES = tuple(_ARCHITECTURES)


def gguf_architecture(file: GgufModel) -> str:
    """The architecture, if it is one we compute.

    Raises: CheckpointError: it is missing or foreign.
    """
    name = file.metadata.get("general.architecture")
    if not isinstance(name, str) or name not in _ARCHITECTURES:
        found = f"architecture {one_line(name)!r}" if name is not None else "no architecture"
        raise CheckpointError(
            f"{file.path}: {found} is not supported "
            f"(supported: {', '.join(SUPPORTED_ARCHITECTURES)})"
        )
    return name


def config_from_gguf(file: GgufModel) -> ModelConfig:
    """Read and validate the sizes of a model.

    Args:
        file: checked headers.
    Returns: a validated configuration.
    Raises:
        CheckpointError: architecture not supported, or layers beyond the announced number.
        ConfigError: a size breaks a rule, or the file wants arithmetic that is not supported.
    """
    name = gguf_architecture(file)
    section = Section(file, name)
    section.refuse_unsupported(NEUTRAL)
    try:
        return _config(section, _ARCHITECTURES[name]).validate()
    except ConfigError as error:
        text = str(error)
        prefix = f"{file.path}: "
        raise ConfigError(text if text.startswith(prefix) else prefix + text) from error


def _config(section: Section, architecture: _Architecture) -> ModelConfig:
    path, tensors = section.path, section.file.tensors
    num_layers = _num_layers(section)
    width = section.integer("embedding_length")
    if section.integer("embedding_length_out", width) not in (0, width):
        raise section.fail("embedding_length_out", f"differs from {width}; use another model")
    num_heads = section.integer("attention.head_count")
    head_width = _head_width(section, width, num_heads)
    embedding = tensors.get("token_embd.weight")
    rows = embedding.shape[0] if embedding else 0
    experts = _experts(section, architecture)
    qk_norm = architecture.qk_norm
    if qk_norm == "l2" and experts is not None and experts.count == 128:
        qk_norm = "none"  # as llama.cpp does: the larger Llama 4 was trained without it
    span, locals_ = _windows(section, architecture, num_layers)
    ropes = ropes_from_gguf(section, head_width, has_two=architecture.is_gemma)
    layers = tuple(
        _layer(section, architecture, number, locals_[number], span, experts, len(ropes))
        for number in range(num_layers)
    )
    scale = section.number("attention.scale", 0.0)
    if architecture.is_gemma and not scale and num_layers == 62:
        scale = (width / num_heads) ** -0.5  # the 27B model, as llama.cpp knows it
    is_llama4 = architecture.has_sigmoid and any(layer.rope == NO_ROPE for layer in layers)
    if "output.bias" in tensors:
        raise ConfigError(f"{path}: output.bias is not supported; use a model without it")
    return ModelConfig(
        family=architecture.expert_family if experts else architecture.family,
        width=width,
        layers=layers,
        num_heads=num_heads,
        num_kv_heads=section.integer("attention.head_count_kv", num_heads),
        head_width=head_width,
        vocab_size=section.integer("vocab_size", rows),
        norm_epsilon=section.number("attention.layer_norm_rms_epsilon"),
        ropes=ropes,
        rope_layout=architecture.rope_layout,
        max_positions=section.integer("context_length"),
        is_head_tied="output.weight" not in tensors,
        activation=architecture.activation,
        has_qkv_bias="blk.0.attn_q.bias" in tensors,
        has_output_bias="blk.0.attn_output.bias" in tensors,
        qk_norm=qk_norm,
        has_post_norms=architecture.is_gemma,
        embedding_scale=_root(width) if architecture.is_gemma else 1.0,
        attention_scale=scale,
        logit_softcap=section.number("final_logit_softcapping", 0.0),
        tuning_floor=_LLAMA4_CHUNK if is_llama4 else 0,
        tuning_scale=0.1 if is_llama4 else 0.0,
        experts=experts,
    )


def _root(width: int) -> float:
    return max(width, 0) ** 0.5


def _num_layers(section: Section) -> int:
    path = section.path
    num_layers = section.integer("block_count")
    for name in section.file.tensors:
        found = _CONTROL_VECTOR.fullmatch(name)
        if found is not None:
            raise CheckpointError(
                f"{path}: layer {found[1]} in {one_line(name)!r} is out of range (0 to "
                f"{num_layers - 1}): a control vector, which is no model; give a model's file"
            )
    numbers = [
        int(found[1]) for name in section.file.tensors if (found := _LAYER_OF_NAME.match(name))
    ]
    if numbers and num_layers != max(numbers) + 1:
        raise ConfigError(
            f"{path}: block_count {num_layers}, but the file has layers 0-{max(numbers)}"
        )
    if not 1 <= num_layers <= MAX_LAYERS:
        raise ConfigError(f"{path}: num_layers {num_layers} is not between 1 and {MAX_LAYERS:,}")
    return num_layers


def _head_width(section: Section, width: int, num_heads: int) -> int:
    if width < 1 or num_heads < 1:
        raise ConfigError(f"{section.path}: width {width} or num_heads {num_heads} is below 1")
    if not section.has("attention.key_length") and width % num_heads:
        raise ConfigError(f"{section.path}: num_heads {num_heads} does not divide width {width}")
    head_width = section.integer("attention.key_length", width // num_heads)
    for key in _HEAD_WIDTHS:
        if section.integer(key, head_width) != head_width:
            raise ConfigError(
                f"{section.path}: {key} {section.integer(key)} differs from head width "
                f"{head_width}, which is not supported; use a model where they are equal"
            )
    return head_width


def _experts(section: Section, architecture: _Architecture) -> Experts | None:
    count = section.integer("expert_count", 0)
    if not count:
        return None
    if not architecture.expert_family:
        raise section.fail("expert_count", f"= {count} is not supported by this architecture")
    if not 1 <= count <= MAX_EXPERTS:
        raise section.fail("expert_count", f"{count} is not between 1 and {MAX_EXPERTS:,}")
    gate = 2 if architecture.has_sigmoid else 1
    if section.integer("expert_gating_func", gate) not in (0, gate):
        raise section.fail(
            "expert_gating_func",
            f"= {section.integer('expert_gating_func')} is not supported ({gate})",
        )
    used = section.integer("expert_used_count")
    if not 1 <= used <= count:
        raise section.fail("expert_used_count", f"{used} is not between 1 and expert_count {count}")
    return Experts(
        count=count,
        used=used,
        router="sigmoid" if architecture.has_sigmoid else "softmax",
        is_normalized=section.flag("expert_weights_norm", True) and not architecture.has_sigmoid,
        weighs="input" if architecture.has_sigmoid else "output",
        has_shared=architecture.has_sigmoid,
    )


def _windows(
    section: Section, architecture: _Architecture, num_layers: int
) -> tuple[int, list[bool]]:
    """The span of local attention, and which layers have it."""
    if architecture.has_sigmoid:
        # A window of 0 means RoPE everywhere and no chunks; any other is the chunk of Llama 4.
        has_chunks = section.integer("attention.sliding_window", _LLAMA4_CHUNK) != 0
        span = _LLAMA4_CHUNK if has_chunks else 0
    else:
        span = section.integer("attention.sliding_window", 0)
    if span < 0 or span > 1 << 30:
        raise section.fail("attention.sliding_window", f"{span} is not between 0 and 1,073,741,824")
    if not span:
        return 0, [False] * num_layers
    flags = section.flags("attention.sliding_window_pattern")
    if flags is not None:
        if len(flags) < num_layers:
            raise section.fail(
                "attention.sliding_window_pattern",
                f"has {len(flags)} items, the model has {num_layers} layers",
            )
        return span, flags[:num_layers]
    step = section.integer("attention.sliding_window_pattern", architecture.pattern)
    return span, [step < 1 or layer % step < step - 1 for layer in range(num_layers)]


def _layer(
    section: Section,
    architecture: _Architecture,
    number: int,
    is_local: bool,
    span: int,
    experts: Experts | None,
    num_ropes: int,
) -> Layer:
    has_experts = experts is not None and _has_router(section, architecture, number)
    width = section.integer("feed_forward_length", 0 if has_experts else None)
    if has_experts and experts is not None:
        # The one number of a Mixtral file is the width of its experts.
        is_one_number = architecture.family == "llama"
        width = section.integer("expert_feed_forward_length", width if is_one_number else None)
        if section.integer("expert_shared_feed_forward_length", width) not in (0, width):
            raise section.fail("expert_shared_feed_forward_length", f"differs from {width}")
    rope = 1 if is_local and num_ropes == 2 else 0
    reach: Reach = "full"
    if is_local:
        reach = "chunked" if architecture.has_sigmoid else "sliding"
    elif architecture.has_sigmoid and span:
        rope = NO_ROPE
    return Layer(
        mlp_width=width,
        rope=rope,
        reach=reach,
        span=span if is_local else 0,
        has_experts=has_experts,
    )


def _has_router(section: Section, architecture: _Architecture, number: int) -> bool:
    if architecture.has_sigmoid and section.has("interleave_moe_layer_step"):
        step = section.integer("interleave_moe_layer_step")
        return step > 0 and (number + 1) % step == 0
    return f"blk.{number}.ffn_gate_inp.weight" in section.file.tensors
