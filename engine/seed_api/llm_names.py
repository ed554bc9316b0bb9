"""Checkpoint names of Llama 4 and of its older, fused forms, as one table.

In: a state under any of these names. Out: the same values under the names of an `LLM`. It decides
nothing about what is missing.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from engine.errors import CheckpointError
from engine.model.config import ModelConfig

# Old name to new, where the values stay; "*" is a layer's prefix.
RENAMED: tuple[tuple[str, str], ...] = (
    ("lm_head.weight", "output.weight"),
    ("*attention.wqkv.layer_norm_weight", "*attention_norm.weight"),
    ("*attention.norm.weight", "*attention_norm.weight"),
    ("*feed_forward.norm.weight", "*ffn_norm.weight"),
    ("*feed_forward.mlp.layer_norm_weight", "*ffn_norm.weight"),
    ("*feed_forward.mlp.fc2_weight", "*feed_forward.w2.weight"),
    ("*feed_forward.w_gate.weight", "*feed_forward.w1.weight"),
    ("*feed_forward.w_out.weight", "*feed_forward.w2.weight"),
    ("*feed_forward.w_value.weight", "*feed_forward.w3.weight"),
    ("*feed_forward.w_in_shared_FD.weight", "*feed_forward.shared_expert.w1.weight"),
    ("*feed_forward.w_out_shared_DF.weight", "*feed_forward.shared_expert.w2.weight"),
    ("*feed_forward.w_swiglu_FD.weight", "*feed_forward.shared_expert.w3.weight"),
)
# Old name to the new ones that its rows are cut into.
FUSED: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("*attention.wqkv.weight", tuple(f"*attention.w{name}.weight" for name in "qkv")),
    ("*feed_forward.mlp.fc1_weight", ("*feed_forward.w1.weight", "*feed_forward.w3.weight")),
)
# Old name to new; the experts lay below each other in one matrix.
STACKED: tuple[tuple[str, str], ...] = (
    ("*feed_forward.experts.moe_w_in_eD_F", "*feed_forward.experts.w1"),
    ("*feed_forward.experts.moe_w_out_eF_D", "*feed_forward.experts.w2"),
    ("*feed_forward.experts.moe_w_swiglu_eD_F", "*feed_forward.experts.w3"),
)
# Tables that follow from the configuration, and notes of other programs.
IGNORED = re.compile(r"(.*\.)?(rope\.freqs|freqs_cis|_extra_state)")
_LAYER = re.compile(r"layers\.\d+\.")

_Put = Callable[[str, Tensor], None]


def current_names(state: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Values under the names that an `LLM` has; what is unknown keeps its own.

    Raises: CheckpointError: a fused tensor cannot be cut as the configuration says, or one value
        comes under two names.
    """
    found: dict[str, Tensor] = {}

    def put(name: str, value: Tensor) -> None:
        if name in found:
            raise CheckpointError(
                f"{name} is in the checkpoint twice, under its own and an older name; remove one"
            )
        found[name] = value

    for name, value in state.items():
        if IGNORED.fullmatch(name):
            continue
        match = _LAYER.match(name)
        prefix = match.group() if match else ""
        _put_renamed("*" + name[len(prefix) :] if prefix else name, prefix, value, config, put)
    return found


def _put_renamed(pattern: str, prefix: str, value: Tensor, config: ModelConfig, put: _Put) -> None:
    fused = dict(FUSED).get(pattern)
    stacked = dict(STACKED).get(pattern)
    if fused is not None:
        sizes = _row_sizes(len(fused), value, config)
        if sum(sizes) != value.shape[0] or value.ndim != 2:
            raise CheckpointError(
                f"{pattern.replace('*', prefix)} {list(value.shape)} cannot be cut into "
                f"{' + '.join(map(str, sizes))} rows; the checkpoint is of another model"
            )
        for name, part in zip(fused, torch.split(value, sizes), strict=True):
            put(name.replace("*", prefix), part)
    elif stacked is not None:
        experts = 0 if config.experts is None else config.experts.count
        if not experts or value.ndim != 2 or value.shape[0] % experts:
            raise CheckpointError(
                f"{pattern.replace('*', prefix)} {list(value.shape)} cannot be cut into {experts} "
                "experts; the checkpoint is of another model"
            )
        put(stacked.replace("*", prefix), value.view(experts, -1, value.shape[1]))
    else:
        put(dict(RENAMED).get(pattern, pattern).replace("*", prefix), value)


def _row_sizes(num_parts: int, value: Tensor, config: ModelConfig) -> list[int]:
    if num_parts == 2:
        return [value.shape[0] // 2] * 2
    heads = (config.num_heads, config.num_kv_heads, config.num_kv_heads)
    return [count * config.head_width for count in heads]


def printable_table() -> str:
    """The table in two aligned columns: older names, names of an `LLM`."""
    rows = [("older name", "name"), *RENAMED, *STACKED]
    rows += [(old, " + ".join(new)) for old, new in FUSED]
    width = max(len(old) for old, _ in rows)
    return "\n".join(f"{old.ljust(width)}  {new}" for old, new in rows)
