"""The shape of a model from a Hugging Face config.json.

In: the folder of a model. Out: a validated ModelConfig. A missing key means what it means to
transformers. Whatever would change the arithmetic and is not supported is refused by name. It never
imports code that a model brings along.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from engine.errors import CheckpointError, ConfigError
from engine.model.config import ModelConfig
from engine.weights.hf_gemma3 import gemma3
from engine.weights.hf_llama4 import llama4
from engine.weights.hf_llama_like import llama, mistral, mixtral, qwen2, qwen3, qwen3_moe
from engine.weights.json_settings import Settings, read_json_object, refuse_own_code
from engine.weights.mapped import one_line

_READERS: dict[str, Callable[[Settings], ModelConfig]] = {
    "llama": llama,
    "mistral": mistral,
    "mixtral": mixtral,
    "qwen2": qwen2,
    "qwen3": qwen3,
    "qwen3_moe": qwen3_moe,
    "llama4": llama4,
    "llama4_text": llama4,
    "gemma3": gemma3,
    "gemma3_text": gemma3,
}
SUPPORTED_MODEL_TYPES = tuple(_READERS)


def config_from_huggingface(folder: Path) -> ModelConfig:
    """Read and validate config.json.

    Args:
        folder: the model's folder.
    Returns: a validated configuration.
    Raises:
        CheckpointError: config.json is missing, malformed or of an unsupported architecture.
        ConfigError: a size breaks a rule, or the model wants arithmetic that is not supported.
    """
    path = folder / "config.json"
    values = read_json_object(path)
    settings = Settings(path, values)
    for key in ("", "text_config", "vision_config"):
        section = settings.section(key) if key else settings
        if section is not None:
            refuse_own_code(path, section.values)
    kind = values.get("model_type")
    reader = _READERS.get(kind) if isinstance(kind, str) else None
    if reader is None:
        raise CheckpointError(
            f"{path}: model_type {one_line(kind)!r} is not supported "
            f"(supported: {', '.join(SUPPORTED_MODEL_TYPES)})"
        )
    try:
        return reader(settings).validate()
    except ConfigError as error:
        text, prefix = str(error), f"{path}: "
        raise ConfigError(text if text.startswith(prefix) else prefix + text) from error
