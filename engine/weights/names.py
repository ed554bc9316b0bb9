"""The name tables: what every tensor is called by us, in GGUF and by Hugging Face.

In: a checked configuration and the names a file has. Out: our name for each, the shape each must
have, or one error that lists what is missing and what is left over. It opens no file.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from engine.errors import CheckpointError
from engine.model.config import ModelConfig
from engine.weights.mapped import one_line

Source = Literal["gguf", "huggingface"]
MAX_LISTED = 4


@dataclass(frozen=True, slots=True)
class NameRow:
    """One line of the table; `{i}` stands for the layer. `shape` is in letters, see `_sizes`."""

    canonical: str
    gguf: str
    huggingface: str
    shape: str


@dataclass(frozen=True, slots=True)
class Family:
    """A model family: its tensors, and the names in its files that carry no weights of use."""

    rows: tuple[NameRow, ...]
    ignored: dict[Source, re.Pattern[str]] = field(default_factory=dict[Source, "re.Pattern[str]"])


_HF = "model.layers.{i}."
LLAMA = Family(
    rows=(
        NameRow("embedding", "token_embd.weight", "model.embed_tokens.weight", "VM"),
        NameRow("layers.{i}.attention_norm", "blk.{i}.attn_norm.weight",
                _HF + "input_layernorm.weight", "M"),
        NameRow("layers.{i}.q", "blk.{i}.attn_q.weight", _HF + "self_attn.q_proj.weight", "QM"),
        NameRow("layers.{i}.k", "blk.{i}.attn_k.weight", _HF + "self_attn.k_proj.weight", "KM"),
        NameRow("layers.{i}.v", "blk.{i}.attn_v.weight", _HF + "self_attn.v_proj.weight", "KM"),
        NameRow("layers.{i}.o", "blk.{i}.attn_output.weight",
                _HF + "self_attn.o_proj.weight", "MQ"),
        NameRow("layers.{i}.mlp_norm", "blk.{i}.ffn_norm.weight",
                _HF + "post_attention_layernorm.weight", "M"),
        NameRow("layers.{i}.gate", "blk.{i}.ffn_gate.weight", _HF + "mlp.gate_proj.weight", "FM"),
        NameRow("layers.{i}.up", "blk.{i}.ffn_up.weight", _HF + "mlp.up_proj.weight", "FM"),
        NameRow("layers.{i}.down", "blk.{i}.ffn_down.weight", _HF + "mlp.down_proj.weight", "MF"),
        NameRow("final_norm", "output_norm.weight", "model.norm.weight", "M"),
        NameRow("head", "output.weight", "lm_head.weight", "VM"),
    ),
    # Tables of inverse frequencies that old exports stored; they follow from the configuration.
    ignored={"huggingface": re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")},
)  # fmt: skip

FAMILIES = {"llama": LLAMA}


def _sizes(config: ModelConfig) -> dict[str, int]:
    return {
        "V": config.vocab_size,
        "M": config.width,
        "F": config.mlp_width,
        "Q": config.num_heads * config.head_width,
        "K": config.num_kv_heads * config.head_width,
    }


def _expanded(config: ModelConfig) -> Iterable[tuple[NameRow, str]]:
    """Every row of the family's table with every layer number, in the order of computation."""
    rows = FAMILIES[config.family].rows
    first_layer_row = next(k for k, row in enumerate(rows) if "{i}" in row.canonical)
    layer_rows = [row for row in rows if "{i}" in row.canonical]
    for row in rows[:first_layer_row]:
        yield row, ""
    for layer in range(config.num_layers):
        for row in layer_rows:
            yield row, str(layer)
    for row in rows[first_layer_row + len(layer_rows) :]:
        yield row, ""


def canonical_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Our name of every tensor of a model, `head` included, with its shape in torch order."""
    sizes = _sizes(config)
    return {
        row.canonical.replace("{i}", layer): tuple(sizes[letter] for letter in row.shape)
        for row, layer in _expanded(config)
    }


def _listed(names: list[str]) -> str:
    shown = ", ".join(one_line(name, 70) for name in names[:MAX_LISTED])
    more = len(names) - MAX_LISTED
    return f"{shown} and {more} more" if more > 0 else shown


def match_names(
    path: Path, config: ModelConfig, source: Source, stored: Iterable[str]
) -> dict[str, str]:
    """Pair our names with a file's names.

    Args:
        path: for the message.
        config: validated.
        source: whose names `stored` are.
        stored: every tensor name of the file.
    Returns: our name to the file's name, complete; `head` is absent where it is tied.
    Raises: CheckpointError: one error that lists missing and unknown names.
    """
    family = FAMILIES[config.family]
    left = dict.fromkeys(stored)
    found: dict[str, str] = {}
    missing: list[str] = []
    total = 0
    for row, layer in _expanded(config):
        name = (row.gguf if source == "gguf" else row.huggingface).replace("{i}", layer)
        if row.canonical == "head" and config.is_head_tied:
            left.pop(name, None)  # a stored copy of a tied head is not used
            continue
        total += 1
        if name in left:
            del left[name]
            found[row.canonical.replace("{i}", layer)] = name
        else:
            missing.append(name)
    ignored = family.ignored.get(source)
    unknown = [name for name in left if not (ignored and ignored.fullmatch(name))]
    if missing or unknown:
        parts: list[str] = []
        if missing:
            parts.append(f"missing: {_listed(missing)} ({len(missing)} of {total})")
        if unknown:
            parts.append(f"unknown: {_listed(unknown)} ({len(unknown)})")
        raise CheckpointError(
            f"{path}: the tensors do not fit a {config.family} model of {config.num_layers} "
            f"layers; {'; '.join(parts)}"
        )
    return found


def printable_table(family: str) -> str:
    """The table of a family in three aligned columns: ours, GGUF, Hugging Face."""
    rows = [("shardmix", "GGUF", "Hugging Face")]
    rows += [(row.canonical, row.gguf, row.huggingface) for row in FAMILIES[family].rows]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = (
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )
    return "\n".join(lines)
