"""The shape of a model from the metadata of a GGUF file.

In: a checked header. Out: a validated ModelConfig. Whatever would change the arithmetic and is not
supported is refused here by name, so that no file computes something else than it says.
"""

from __future__ import annotations

import re

from engine.errors import CheckpointError, ConfigError
from engine.model.config import ModelConfig
from engine.weights.gguf import GgufFile
from engine.weights.mapped import one_line

SUPPORTED_ARCHITECTURES = ("llama",)

# Key of the architecture's section -> the values that change nothing.
_NEUTRAL: dict[str, tuple[object, ...]] = {
    "rope.scaling.type": ("none", ""),
    "rope.scaling.factor": (0, 1),
    "rope.scale_linear": (0, 1),
    "rope.scaling.attn_factor": (1,),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "expert_shared_count": (0,),
    "attention.sliding_window": (0,),
    "attention.clamp_kqv": (0,),
    "attention.max_alibi_bias": (0,),
    "attention.scale": (0,),
    "attention.causal": (True,),
    "attn_logit_softcapping": (0,),
    "final_logit_softcapping": (0,),
    "logit_scale": (0, 1),
    "embedding_scale": (0, 1),
    "residual_scale": (0, 1),
    "use_parallel_residual": (False,),
}
_LAYER_OF_NAME = re.compile(r"blk\.(\d{1,9})\.")


class _Section:
    """Typed access to the keys of one architecture."""

    def __init__(self, file: GgufFile, architecture: str) -> None:
        self.file = file
        self.architecture = architecture

    def integer(self, key: str, default: int | None = None) -> int:
        """A whole number, or the default where the key is absent."""
        full = f"{self.architecture}.{key}"
        value = self.file.metadata.get(full, default)
        if value is None:
            raise ConfigError(f"{self.file.path}: {full} is missing; the file is incomplete")
        if isinstance(value, bool) or not isinstance(value, int):
            raise ConfigError(
                f"{self.file.path}: {full} must be one integer, found {self.file.type_of(full)}"
            )
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A real number, or the default where the key is absent."""
        full = f"{self.architecture}.{key}"
        value = self.file.metadata.get(full, default)
        if value is None:
            raise ConfigError(f"{self.file.path}: {full} is missing; the file is incomplete")
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ConfigError(
                f"{self.file.path}: {full} must be one number, found {self.file.type_of(full)}"
            )
        return float(value)

    def refuse_unsupported(self) -> None:
        """Refuse keys that change the arithmetic in a way that is not built."""
        for key, neutral in _NEUTRAL.items():
            full = f"{self.architecture}.{key}"
            value = self.file.metadata.get(full)
            if value is not None and (
                not isinstance(value, str | int | float) or value not in neutral
            ):
                raise ConfigError(
                    f"{self.file.path}: {full} = {one_line(value)} is not supported yet; "
                    "use a model without it"
                )


def gguf_architecture(file: GgufFile) -> str:
    """The architecture, if it is one we compute.

    Raises: CheckpointError: it is missing, foreign, or the file is one part of several.
    """
    parts = file.metadata.get("split.count", 0)
    if not isinstance(parts, int) or parts > 1:
        raise CheckpointError(
            f"{file.path}: one part of a model in {one_line(parts)} files, which is not supported "
            "yet; join them with `llama-gguf-split --merge`"
        )
    name = file.metadata.get("general.architecture")
    if not isinstance(name, str) or name not in SUPPORTED_ARCHITECTURES:
        found = f"architecture {one_line(name)!r}" if name is not None else "no architecture"
        raise CheckpointError(
            f"{file.path}: {found} is not supported "
            f"(supported: {', '.join(SUPPORTED_ARCHITECTURES)})"
        )
    return name


def config_from_gguf(file: GgufFile) -> ModelConfig:
    """Read and validate the sizes of a model.

    Args:
        file: a checked header.
    Returns: a validated configuration with adjacent RoPE pairs, because the converter reorders
        the rows of q and k for this architecture.
    Raises:
        CheckpointError: architecture not supported.
        ConfigError: a size breaks a rule, or the file wants arithmetic that is not supported.
    """
    section = _Section(file, gguf_architecture(file))
    section.refuse_unsupported()
    if "rope_freqs.weight" in file.tensors:
        raise ConfigError(
            f"{file.path}: rope_freqs.weight means Llama 3 RoPE scaling, which is not supported "
            "yet; use a model without RoPE scaling"
        )
    num_layers = section.integer("block_count")
    numbers = [int(found[1]) for name in file.tensors if (found := _LAYER_OF_NAME.match(name))]
    if numbers and num_layers != max(numbers) + 1:
        raise ConfigError(
            f"{file.path}: block_count {num_layers}, but the file has layers 0-{max(numbers)}"
        )
    width = section.integer("embedding_length")
    num_heads = section.integer("attention.head_count")
    if width < 1 or num_heads < 1:
        raise ConfigError(f"{file.path}: width {width} or num_heads {num_heads} is below 1")
    has_head_width = f"{section.architecture}.attention.key_length" in file.metadata
    if not has_head_width and width % num_heads:
        raise ConfigError(f"{file.path}: num_heads {num_heads} does not divide width {width}")
    head_width = section.integer("attention.key_length", width // num_heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if section.integer(key, head_width) != head_width:
            raise ConfigError(
                f"{file.path}: {key} {section.integer(key)} differs from head width {head_width}, "
                "which is not supported yet"
            )
    embedding = file.tensors.get("token_embd.weight")
    rows = embedding.shape[0] if embedding else 0
    try:
        return ModelConfig(
            family="llama",
            width=width,
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=section.integer("attention.head_count_kv", num_heads),
            head_width=head_width,
            mlp_width=section.integer("feed_forward_length"),
            vocab_size=section.integer("vocab_size", rows),
            norm_epsilon=section.number("attention.layer_norm_rms_epsilon"),
            rope_theta=section.number("rope.freq_base", 10000.0),
            rope_layout="adjacent",
            max_positions=section.integer("context_length"),
            is_head_tied="output.weight" not in file.tensors,
        ).validate()
    except ConfigError as error:
        text = str(error)
        prefix = f"{file.path}: "
        raise ConfigError(text if text.startswith(prefix) else prefix + text) from error
