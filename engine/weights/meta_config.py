"""Models in Meta's layout: params.json beside one consolidated safetensors file.

In: a folder. Out: its tensors under Meta's names, and a validated ModelConfig. Sizes that the file
does not say follow from the shapes of the tensors. Pairs of q and k lie side by side.

Source: the args.py and checkpoint files of llama-models; params.json of released models.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from engine.errors import CheckpointError, ConfigError
from engine.model.config import (
    MAX_EXPERTS,
    MAX_LAYERS,
    NO_ROPE,
    Experts,
    Layer,
    ModelConfig,
    Reach,
    Rope,
)
from engine.weights.json_settings import Settings, read_json_object
from engine.weights.mapped import MappedFile, StoredTensor, one_line
from engine.weights.safetensors import read_header, refuse_escape, refuse_pickle

PARAMS_NAME = "params.json"
_FILE_NAMES = ("consolidated.safetensors", "consolidated.00.safetensors")
_MAX_SPAN = 1 << 30
_SMALL_LLAMA32_WIDTHS = (2048, 3072)  # of 1B and 3B
_LLAMA3_VOCABULARY = 128256

# Keys whose values are read, or that say nothing about the arithmetic.
_KNOWN = frozenset(
    (
        *("dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "hidden_dim", "vocab_size"),
        *("norm_eps", "rope_theta", "use_scaled_rope", "rope_scaling_factor"),
        *("rope_high_freq_factor", "sliding_window", "nope_layer_interval"),
        *("attention_chunk_size", "use_qk_norm", "attn_temperature_tuning", "floor_scale"),
        *("attn_scale", "moe_args", "ffn_dim_multiplier", "multiple_of", "ffn_exp"),
        *("max_batch_size", "max_seq_len", "model_parallel_size", "model_type"),
        "vision_args",  # of the image encoder, which is not used: the text model is the same
    )
)
_KNOWN_OF_EXPERTS = frozenset(
    (
        *("num_experts", "top_k", "interleave_moe_layer_step"),
        *("capacity_factor", "auto_scale_F", "dim", "hidden_dim"),
    )
)


def open_consolidated(folder: Path) -> tuple[MappedFile, dict[str, StoredTensor]]:
    """Map and check the one file of a model.

    Args:
        folder: the model's folder.
    Returns: the mapped file, which the caller closes, and tensor name to its place.
    Raises: CheckpointError: there is none, there are several, or it is malformed.
    """
    parts = sorted(entry.name for entry in folder.glob("consolidated*.safetensors"))
    if not parts:
        refuse_pickle(folder)
        raise CheckpointError(f"{folder}: {PARAMS_NAME}, but no {_FILE_NAMES[0]} in this folder")
    if len(parts) > 1 or parts[0] not in _FILE_NAMES:
        raise CheckpointError(
            f"{folder}: {len(parts)} consolidated files ({', '.join(map(one_line, parts[:3]))}), "
            "each with a share of every tensor; only one whole file is read: fetch the model's "
            "Hugging Face folder, or join the shares (wo, w2 and the embedding along axis 1, norms "
            f"from one of them, the rest along axis 0) into {_FILE_NAMES[0]}"
        )
    refuse_escape(folder, folder / parts[0])
    file = MappedFile(folder / parts[0])
    try:
        return file, read_header(file)
    except BaseException:
        file.close()
        raise


def config_from_meta(folder: Path, stored: Mapping[str, StoredTensor]) -> ModelConfig:
    """Read and validate params.json.

    Args:
        folder: the model's folder.
        stored: its tensors, for the widths that params.json leaves out.
    Raises:
        CheckpointError: params.json is missing or malformed.
        ConfigError: a size breaks a rule, or the model wants arithmetic that is not supported.
    """
    path = folder / PARAMS_NAME
    settings = Settings(path, read_json_object(path))
    for key in settings.values:
        if key not in _KNOWN and key in settings:
            raise settings.fail(
                one_line(key), "is not supported; use the model's Hugging Face folder"
            )
    try:
        return _config(settings, stored).validate()
    except ConfigError as error:
        text, prefix = str(error), f"{path}: "
        raise ConfigError(text if text.startswith(prefix) else prefix + text) from error


def _config(settings: Settings, stored: Mapping[str, StoredTensor]) -> ModelConfig:
    width, num_heads = settings.integer("dim"), settings.integer("n_heads")
    if width < 1 or num_heads < 1:
        raise ConfigError(f"{settings.path}: width {width} or num_heads {num_heads} is below 1")
    if "head_dim" not in settings and width % num_heads:
        raise ConfigError(f"{settings.path}: num_heads {num_heads} does not divide width {width}")
    experts = _experts(settings)
    is_llama4 = experts is not None or any(
        key in settings for key in ("nope_layer_interval", "attention_chunk_size", "use_qk_norm")
    )
    vocab_size = settings.integer("vocab_size", -1)
    if vocab_size == -1:  # Llama 1 and 2 leave it to their tokenizer
        vocab_size = _size(stored, "tok_embeddings.weight", 0)
    layers = _layers(settings, stored, experts)
    has_tuning = settings.flag("attn_temperature_tuning", False)
    floor = settings.number("floor_scale", 8192.0)
    if has_tuning and (not floor.is_integer() or not 1 <= floor <= _MAX_SPAN):
        raise settings.fail("floor_scale", f"{floor} is not a whole number from 1")
    rope = _rope(settings, _scaling_factor(is_llama4, width, vocab_size), is_llama4)
    has_head = "output.weight" in stored or "lm_head.weight" in stored
    family = "mistral" if "sliding_window" in settings else "llama"
    return ModelConfig(
        family="llama4" if is_llama4 else family,
        width=width,
        layers=layers,
        num_heads=num_heads,
        num_kv_heads=settings.integer("n_kv_heads", num_heads),
        head_width=settings.integer("head_dim", width // num_heads),
        vocab_size=vocab_size,
        norm_epsilon=settings.number("norm_eps", 1e-5),
        ropes=(rope,),
        rope_layout="adjacent",
        max_positions=settings.integer("max_seq_len", _trained_positions(rope)),
        is_head_tied=not has_head,
        qk_norm="l2" if settings.flag("use_qk_norm", False) else "none",
        tuning_floor=int(floor) if has_tuning else 0,
        tuning_scale=settings.number("attn_scale", 0.1) if has_tuning else 0.0,
        experts=experts,
    )


def _trained_positions(rope: Rope) -> int:
    """The context of the released models with such frequencies; the file does not say it."""
    if rope.kind != "default":
        return 131072
    return 8192 if rope.theta > 10000 else 4096


def _scaling_factor(is_llama4: bool, width: int, vocab_size: int) -> float:
    """By which a released model stretches long waves; its params.json does not say it.

    Source: config.json of the published Llama 3.1, 3.2 and 4; llama-models issues 166 and 241: the
        reference code has 8 for all of Llama 3, with which Llama 3.2 1B and 3B fail in long texts.
    """
    if is_llama4:
        return 16.0
    is_small = width in _SMALL_LLAMA32_WIDTHS and vocab_size == _LLAMA3_VOCABULARY
    return 32.0 if is_small else 8.0


def _rope(settings: Settings, factor: float, is_llama4: bool) -> Rope:
    theta = settings.number("rope_theta", 10000.0)
    if not settings.flag("use_scaled_rope", False):
        return Rope(theta=theta)
    return Rope(
        theta=theta,
        kind="llama3",
        factor=settings.number("rope_scaling_factor", factor),
        original_positions=8192,
        low_factor=1.0,
        high_factor=settings.number("rope_high_freq_factor", 1.0 if is_llama4 else 4.0),
    )


def _experts(settings: Settings) -> Experts | None:
    section = settings.section("moe_args")
    if section is None:
        return None
    for key in section.values:
        if key not in _KNOWN_OF_EXPERTS and key in section:
            raise section.fail(one_line(key), "is not supported; use another model")
    return Experts(
        count=section.between("num_experts", 1, MAX_EXPERTS),
        used=section.integer("top_k", 1),
        router="sigmoid",
        is_normalized=False,
        weighs="input",
        has_shared=True,
    )


def _layers(
    settings: Settings, stored: Mapping[str, StoredTensor], experts: Experts | None
) -> tuple[Layer, ...]:
    num_layers = settings.integer("n_layers")
    if not 1 <= num_layers <= MAX_LAYERS:
        raise ConfigError(
            f"{settings.path}: num_layers {num_layers} is not between 1 and {MAX_LAYERS:,}"
        )
    window, chunk = (
        settings.between(key, 1, _MAX_SPAN) if key in settings else 0
        for key in ("sliding_window", "attention_chunk_size")
    )
    if window and chunk:
        raise settings.fail("sliding_window", "and attention_chunk_size exclude each other")
    without_rope = 0
    if "nope_layer_interval" in settings:
        without_rope = settings.between("nope_layer_interval", 1, _MAX_SPAN)
    section = settings.section("moe_args")
    step = section.between("interleave_moe_layer_step", 1, _MAX_SPAN, 1) if section else 0
    found: list[Layer] = []
    for number in range(num_layers):
        has_rope = not without_rope or (number + 1) % without_rope != 0
        span = chunk if has_rope else 0
        reach: Reach = "chunked" if span else "full"
        if window:
            span, reach = window, "sliding"
        has_experts = experts is not None and (number + 1) % step == 0
        found.append(
            Layer(
                mlp_width=_mlp_width(settings, stored, number, experts if has_experts else None),
                rope=0 if has_rope else NO_ROPE,
                reach=reach,
                span=span,
                has_experts=has_experts,
            )
        )
    return tuple(found)


def _size(stored: Mapping[str, StoredTensor], name: str, axis: int) -> int:
    tensor = stored.get(name)
    return tensor.shape[axis] if tensor is not None and -len(tensor.shape) <= axis < 1 else 0


def _mlp_width(
    settings: Settings,
    stored: Mapping[str, StoredTensor],
    number: int,
    experts: Experts | None,
) -> int:
    """Intermediate columns of a layer, from its tensors: the rules of Meta's files do not fit all."""
    prefix = f"layers.{number}.feed_forward."
    if experts is not None:
        names = ("experts.w1", "experts.moe_w_in_eD_F", "moe_w_in_eD_F")
        widths = [_size(stored, prefix + name, -1) for name in names]
    else:
        widths = [
            _size(stored, prefix + "w1.weight", 0),
            _size(stored, prefix + "mlp.fc1_weight", 0) // 2,
        ]
    width = next((width for width in widths if width), 0)
    if not width:
        raise CheckpointError(
            f"{settings.path}: no first matrix of layer {number}'s MLP among the tensors, which "
            "would say its width; fetch the whole model again"
        )
    return width
