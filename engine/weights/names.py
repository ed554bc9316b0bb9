"""Pairs our names with a file's tensors, by the tables of `families`.

In: a checked configuration and the tensors a file has. Out: the shape each of ours must have, the
part of a stored tensor that each is, or one error that lists what is missing and what is left over.
It opens no file and reads no tensor data.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from engine.errors import CheckpointError
from engine.model.config import ModelConfig
from engine.vision.names import vision_shapes
from engine.weights.families import FAMILIES
from engine.weights.formats import FORMATS, weight_format_names
from engine.weights.mapped import StoredTensor, one_line
from engine.weights.name_rows import LETTERS, SOURCE_TITLES, NameRow, Source

MAX_LISTED = 4
MAX_COUNTED = 1000
# More than any model has: the largest mixtures have some 70,000.
MAX_TENSORS = 1 << 18


@dataclass(frozen=True, slots=True)
class _Ours:
    """One of our tensors: its name in a table and in full."""

    row: str
    layer: int
    expert: int | None
    shape: tuple[int, ...]

    def filled(self, text: str) -> str:
        """A name of a table for this tensor's layer and expert."""
        return text.replace("{i}", str(self.layer)).replace("{e}", str(self.expert))


def _sizes(config: ModelConfig, layer: int) -> dict[str, int]:
    """Letters of a table to numbers; LETTERS says what they are."""
    return {
        "V": config.vocab_size,
        "M": config.width,
        "Q": config.num_heads * config.head_width,
        "K": config.num_kv_heads * config.head_width,
        "D": config.head_width,
        "F": config.layers[layer].mlp_width,
        "E": config.experts.count if config.experts else 0,
    }


def _attention_tensors(config: ModelConfig) -> list[tuple[str, str]]:
    tensors = [("attention_norm", "M"), ("q", "QM"), ("k", "KM"), ("v", "KM"), ("o", "MQ")]
    if config.has_qkv_bias:
        tensors += [("q_bias", "Q"), ("k_bias", "K"), ("v_bias", "K")]
    if config.has_output_bias:
        tensors.append(("o_bias", "M"))
    if config.qk_norm == "weight":
        tensors += [("q_norm", "D"), ("k_norm", "D")]
    if config.has_post_norms:
        tensors.append(("attention_post_norm", "M"))
    return tensors


_MLP = (("gate", "FM"), ("up", "FM"), ("down", "MF"))


def _layer_tensors(config: ModelConfig, layer: int) -> Iterator[tuple[str, int | None, str]]:
    """Name in a table, expert, shape in letters."""
    for name, letters in _attention_tensors(config):
        yield "layers.{i}." + name, None, letters
    yield "layers.{i}.mlp_norm", None, "M"
    if config.has_post_norms:
        yield "layers.{i}.mlp_post_norm", None, "M"
    experts = config.experts if config.layers[layer].has_experts else None
    if experts is None:
        yield from (("layers.{i}." + name, None, letters) for name, letters in _MLP)
        return
    yield "layers.{i}.router", None, "EM"
    for expert in range(experts.count):
        for name, letters in _MLP:
            yield "layers.{i}.experts.{e}." + name, expert, letters
    if experts.has_shared:
        yield from (("layers.{i}.shared." + name, None, letters) for name, letters in _MLP)


def _all_tensors(config: ModelConfig) -> Iterator[_Ours]:
    """Every tensor in the order of computation."""
    vocabulary = (config.vocab_size, config.width)
    yield _Ours("embedding", 0, None, vocabulary)
    for layer in range(config.num_layers):
        sizes = _sizes(config, layer)
        for row, expert, letters in _layer_tensors(config, layer):
            yield _Ours(row, layer, expert, tuple(sizes[letter] for letter in letters))
    yield _Ours("final_norm", 0, None, (config.width,))
    yield _Ours("head", 0, None, vocabulary)
    if config.vision is not None:
        for name, shape in vision_shapes(config.vision, config.width).items():
            before, found, after = name.partition("vision.layers.")
            number, _, rest = after.partition(".")
            row = f"{before}{found}{{i}}.{rest}" if found else name
            yield _Ours(row, int(number) if found else 0, None, shape)


def expected_shapes(config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Our name and the shape of every tensor of a model, in the order of computation.

    Args: config: validated; it decides how many there are.
    """
    return ((ours.filled(ours.row), ours.shape) for ours in _all_tensors(config))


def _listed(names: list[str]) -> str:
    shown = ", ".join(one_line(name, 70) for name in names[:MAX_LISTED])
    more = len(names) - MAX_LISTED
    return f"{shown} and {more} more" if more > 0 else shown


def _count(config: ModelConfig) -> int:
    """About how many tensors of ours a model has, without naming them."""
    per_expert, rest = len(_MLP), 3 + 16
    layers = sum(rest + per_expert * config.num_experts(n) for n in range(config.num_layers))
    vision = rest * config.vision.num_layers if config.vision else 0
    return layers + vision


def _by_table_name(
    path: Path, config: ModelConfig, source: Source, stored: Mapping[str, StoredTensor]
) -> dict[str, StoredTensor]:
    table = FAMILIES[config.family].tables[source]
    found: dict[str, StoredTensor] = {}
    for name, tensor in stored.items():
        known = table.read_as(name)
        if known in found:
            raise CheckpointError(
                f"{path}: {one_line(name)} and {one_line(found[known].name)} are the same tensor; "
                "fetch the model again"
            )
        found[known] = tensor
    return found


def bind_tensors(
    path: Path, config: ModelConfig, source: Source, stored: Mapping[str, StoredTensor]
) -> dict[str, StoredTensor]:
    """Find each of our tensors in a file.

    Args:
        path: for messages.
        config: validated; its family has a table for `source`.
        source: whose names `stored` are.
        stored: every tensor of the file by its name.
    Returns: our name to the stored tensor or the part of one that it is, complete; a tied `head`
        is the embedding under a second name.
    Raises: CheckpointError: one error that lists missing and unknown names; or a tensor has another
        shape than the configuration says, or a format that is not supported.
    """
    if _count(config) > MAX_TENSORS:
        raise CheckpointError(
            f"{path}: {config.num_layers} layers with up to "
            f"{max(map(config.num_experts, range(config.num_layers)))} MLPs are more than "
            f"{MAX_TENSORS:,} tensors; the configuration is damaged"
        )
    table = FAMILIES[config.family].tables[source]
    rows: dict[str, list[NameRow]] = {}
    for row in table.rows:
        rows.setdefault(row.canonical, []).append(row)
    known = _by_table_name(path, config, source, stored)
    left = dict.fromkeys(known)
    missing: dict[str, None] = {}  # cut at MAX_COUNTED: a damaged size must not fill the memory
    num_missing = total = 0
    for ours in _all_tensors(config):
        candidates = [ours.filled(row.stored) for row in rows.get(ours.row, ())]
        if ours.row == "head" and config.is_head_tied:
            for name in candidates:
                left.pop(name, None)  # a stored copy of a tied head is not used
            continue
        total += 1
        name = next((name for name in candidates if name in known), None)
        if name is not None:
            left.pop(name, None)
            continue
        num_missing += 1
        if len(missing) < MAX_COUNTED:
            missing[candidates[0] if candidates else ours.filled(ours.row)] = None
    unknown = [known[name].name for name in left if not table.ignored.fullmatch(name)]
    if missing or unknown:
        parts: list[str] = []
        if missing:
            parts.append(f"missing: {_listed(list(missing))} ({num_missing} of {total})")
        if unknown:
            parts.append(f"unknown: {_listed(unknown)} ({len(unknown)})")
        raise CheckpointError(
            f"{path}: the tensors do not fit a {config.family} model of {config.num_layers} "
            f"layers; {'; '.join(parts)}; fetch the whole model again"
        )
    bound: dict[str, StoredTensor] = {}
    for ours in _all_tensors(config):
        if ours.row == "head" and config.is_head_tied:
            bound["head"] = bound["embedding"]
            continue
        pairs = ((row, ours.filled(row.stored)) for row in rows[ours.row])
        row, name = next((row, name) for row, name in pairs if name in known)
        bound[ours.filled(ours.row)] = _part(path, config, ours, row, known[name])
    return bound


def _part(
    path: Path, config: ModelConfig, ours: _Ours, row: NameRow, stored: StoredTensor
) -> StoredTensor:
    if not FORMATS[stored.format].is_weight:
        raise CheckpointError(
            f"{path}: {one_line(stored.name)} is stored as {stored.format}, which is not "
            f"supported; use one of {weight_format_names()}"
        )
    layer = ours.layer if ours.row.startswith("layers.") else 0
    tensor = row.part.of(stored, _sizes(config, layer), ours.expert)
    if tensor.shape != ours.shape:
        part = f" ({row.part})" if str(row.part) else ""
        raise CheckpointError(
            f"{path}: {one_line(stored.name)}{part} has shape {list(tensor.shape)}, its "
            f"configuration says {list(ours.shape)}; the file is damaged or mixed from two models"
        )
    return tensor


def printable_table(family: str) -> str:
    """The tables of a family, one block of aligned columns for each source."""
    blocks: list[str] = []
    for source, table in FAMILIES[family].tables.items():
        cells = [("shardmix", SOURCE_TITLES[source], "part")]
        cells += [(row.canonical, row.stored, str(row.part)) for row in table.rows]
        widths = [max(len(row[column]) for row in cells) for column in range(3)]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in cells
        ]
        lines += [f"{left}*  is read as  {right}*" for left, right in table.prefixes]
        blocks.append("\n".join(lines))
    used = {letter for table in FAMILIES[family].tables.values() for row in table.rows
            for letter in row.part.pieces}  # fmt: skip
    blocks.append("\n".join(f"{letter}: {LETTERS[letter]}" for letter in LETTERS if letter in used))
    return "\n\n".join(blocks)
