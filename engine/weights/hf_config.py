"""The shape of a model from a Hugging Face config.json.

In: the folder of a model. Out: a validated ModelConfig. Whatever would change the arithmetic and is
not supported is refused by name. It never imports code that a model brings along.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

from engine.errors import CheckpointError, ConfigError
from engine.model.config import ModelConfig
from engine.weights.mapped import one_line

MAX_CONFIG_BYTES = 1 << 24
SUPPORTED_MODEL_TYPES = ("llama", "mistral")

# Key -> the values that change nothing; a missing key is neutral too.
_NEUTRAL: dict[str, tuple[object, ...]] = {
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "sliding_window": (None,),
    "partial_rotary_factor": (1, None),
    "quantization_config": (None,),
    "num_local_experts": (None, 0),
    "is_encoder_decoder": (False, None),
    "add_cross_attention": (False, None),
}
_MISSING = object()


def _object_without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"{one_line(key)!r} appears twice")
        found[key] = value
    return found


def parse_json_object(path: Path, text: bytes, what: str) -> dict[str, Any]:
    """One JSON object whose keys are unique.

    Args:
        path: for the message.
        text: UTF-8.
        what: names the text in the message.
    Raises: CheckpointError: not UTF-8, not JSON, nested too deeply, not an object, a key twice.
    """
    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=_object_without_duplicates)
    except (ValueError, RecursionError) as error:
        reason = one_line(str(error), 200)
        raise CheckpointError(f"{path}: {what} cannot be read: {reason}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: {what} is not a JSON object")
    return cast("dict[str, Any]", value)


def read_json_object(path: Path, max_bytes: int = MAX_CONFIG_BYTES) -> dict[str, Any]:
    """Read a JSON file of a model folder.

    Raises: CheckpointError: it is missing, too large or malformed.
    """
    try:
        size = path.stat().st_size
        if size > max_bytes:
            raise CheckpointError(f"{path}: {size:,} bytes of JSON, at most {max_bytes:,} are read")
        text = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error
    return parse_json_object(path, text, "the JSON")


def refuse_own_code(path: Path, settings: dict[str, Any]) -> None:
    """Raises: ConfigError: the file names Python code of its own."""
    for key in ("auto_map", "trust_remote_code"):
        if settings.get(key):
            raise ConfigError(
                f"{path}: {key}: the model asks to run its own code, which is not supported; "
                "use a model of a built-in architecture"
            )


class _Settings:
    """Typed access to config.json."""

    def __init__(self, path: Path, values: dict[str, Any]) -> None:
        self.path = path
        self.values = values

    def integer(self, key: str, default: int | None = None) -> int:
        """A whole number; null counts as absent."""
        value = self.values.get(key)
        if value is None:
            if default is None:
                raise ConfigError(f"{self.path}: {key} is missing; it must be a whole number")
            return default
        if isinstance(value, bool) or not isinstance(value, int):
            raise ConfigError(f"{self.path}: {key} {one_line(value)} is not a whole number")
        if abs(value) >= 1 << 63:
            raise ConfigError(f"{self.path}: {key} is beyond 64 bits")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A real number; null counts as absent."""
        value = self.values.get(key, default)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ConfigError(f"{self.path}: {key} {one_line(value)} is not a number")
        try:
            return float(value)
        except OverflowError as error:
            raise ConfigError(f"{self.path}: {key} is too large for a number") from error

    def flag(self, key: str, default: bool) -> bool:
        """True or false; null counts as absent."""
        value = self.values.get(key)
        if value is not None and not isinstance(value, bool):
            raise ConfigError(f"{self.path}: {key} {one_line(value)} is not true or false")
        return default if value is None else value


def _rope_theta(settings: _Settings) -> float:
    """The base of the RoPE frequencies, from either of the two places it can be in."""
    theta: object = settings.values.get("rope_theta")
    for section in ("rope_scaling", "rope_parameters"):
        value = settings.values.get(section)
        if value is None:
            continue
        if not isinstance(value, dict):
            raise ConfigError(f"{settings.path}: {section} {one_line(value)} is not an object")
        rope = cast("dict[str, Any]", value)
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind != "default":
            raise ConfigError(
                f"{settings.path}: {section} of type {one_line(kind)!r} is not supported yet "
                "(default); use a model without RoPE scaling"
            )
        if rope.get("partial_rotary_factor", 1) not in (1, None):
            raise ConfigError(f"{settings.path}: partial_rotary_factor is not supported yet (1)")
        theta = rope.get("rope_theta", theta)
    return _Settings(settings.path, {"rope_theta": theta}).number("rope_theta", 10000.0)


def config_from_huggingface(folder: Path) -> ModelConfig:
    """Read and validate config.json.

    Args:
        folder: the model's folder.
    Returns: a validated configuration with half-split RoPE pairs.
    Raises:
        CheckpointError: config.json is missing, malformed or of an unsupported architecture.
        ConfigError: a size breaks a rule, or the model wants arithmetic that is not supported.
    """
    path = folder / "config.json"
    values = read_json_object(path)
    refuse_own_code(path, values)
    kind = values.get("model_type")
    if kind not in SUPPORTED_MODEL_TYPES:
        raise CheckpointError(
            f"{path}: model_type {one_line(kind)!r} is not supported "
            f"(supported: {', '.join(SUPPORTED_MODEL_TYPES)})"
        )
    if kind == "mistral" and "sliding_window" not in values:
        values["sliding_window"] = 4096  # the architecture's own default
    for key, neutral in _NEUTRAL.items():
        value = values.get(key, _MISSING)
        if value is not _MISSING and value not in neutral:
            raise ConfigError(
                f"{path}: {key} {one_line(value)} is not supported yet; use a model without it"
            )
    settings = _Settings(path, values)
    width, num_heads = settings.integer("hidden_size"), settings.integer("num_attention_heads")
    if width < 1 or num_heads < 1:
        raise ConfigError(f"{path}: width {width} or num_heads {num_heads} is below 1")
    head_width = settings.integer("head_dim", 0)
    if not head_width and width % num_heads:
        raise ConfigError(f"{path}: num_heads {num_heads} does not divide width {width}")
    config = ModelConfig(
        family="llama",
        width=width,
        num_layers=settings.integer("num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=settings.integer("num_key_value_heads", num_heads),
        head_width=head_width or width // num_heads,
        mlp_width=settings.integer("intermediate_size"),
        vocab_size=settings.integer("vocab_size"),
        norm_epsilon=settings.number("rms_norm_eps", 1e-6),
        rope_theta=_rope_theta(settings),
        rope_layout="half",
        max_positions=settings.integer("max_position_embeddings"),
        is_head_tied=settings.flag("tie_word_embeddings", False),
    )
    try:
        return config.validate()
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
