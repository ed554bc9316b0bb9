"""Fused, stacked, prefixed and leftover tensors: the same model, or one line that lists them."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from engine.errors import CheckpointError
from engine.weights.checkpoint import Checkpoint, open_checkpoint
from engine.weights.families import FAMILIES as TABLES
from engine.weights.gguf import GgufFile
from engine.weights.names import printable_table
from tests.tiny_families import (
    FAMILIES,
    GGUF_CHANGES,
    META_FAMILIES,
    save_tiny,
    save_tiny_gguf,
    save_tiny_meta,
)

Arrays = dict[str, np.ndarray]
FILE = "model.safetensors"


def everything(model: Checkpoint) -> dict[str, bytes]:
    return {
        name: model.read_slice(name, 0, 0, info.shape[0]).tobytes()
        for name, info in model.tensors.items()
    }


def _stacked(arrays: Arrays) -> Arrays:
    """One tensor for all experts, gate above up, as transformers holds them in memory."""
    found: Arrays = {}
    groups: dict[str, dict[int, dict[str, np.ndarray]]] = {}
    kinds = {"w1": "gate", "w3": "up", "w2": "down"}
    for name, values in arrays.items():
        match = re.fullmatch(r"(.+\.experts)\.(\d+)\.(\w+)\.weight", name)
        if match is None:
            found[name.replace("block_sparse_moe", "mlp")] = values
            continue
        kind = kinds.get(match[3], match[3].removesuffix("_proj"))
        prefix = match[1].replace("block_sparse_moe", "mlp")
        groups.setdefault(prefix, {}).setdefault(int(match[2]), {})[kind] = values
    for prefix, experts in groups.items():
        pairs = [np.concatenate([e["gate"], e["up"]]) for _, e in sorted(experts.items())]
        found[f"{prefix}.gate_up_proj"] = np.stack(pairs)
        found[f"{prefix}.down_proj"] = np.stack([e["down"] for _, e in sorted(experts.items())])
    return found


def _fused(arrays: Arrays) -> Arrays:
    found = dict(arrays)
    for name in arrays:
        for first, others, fused in (
            ("q_proj", ("k_proj", "v_proj"), "qkv_proj"),
            ("gate_proj", ("up_proj",), "gate_up_proj"),
        ):
            if f".{first}.weight" in name:
                parts = [found.pop(name.replace(first, part)) for part in (first, *others)]
                found[name.replace(first, fused)] = np.concatenate(parts)
    return found


def _inside(arrays: Arrays) -> Arrays:
    """Everything under "model.", as newer transformers names composite models."""
    found: Arrays = {}
    for name, values in arrays.items():
        if name.startswith("language_model.lm_head"):
            found[name.removeprefix("language_model.")] = values
        else:
            found["model." + name.replace("language_model.model.", "language_model.")] = values
    return found


def _with_leftovers(arrays: Arrays) -> Arrays:
    extra = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(10, np.float32),
        "model.layers.1.self_attn._extra_state": np.ones(3, np.uint8),
        "lm_head.weight": np.zeros((99, 48), np.float32),
    }
    return extra | arrays


@pytest.mark.parametrize(
    ("family", "change"),
    [
        ("mixtral", _stacked),
        ("qwen3_moe", _stacked),
        ("llama", _fused),
        ("gemma3", _fused),
        ("llama4_vision", _inside),
        ("gemma3_vision", _inside),
        ("smollm", _with_leftovers),
        ("qwen2", _with_leftovers),
    ],
)
def test_the_same_weights_under_other_names_are_the_same_model(
    tmp_path: Path, family: str, change: Callable[[Arrays], Arrays]
) -> None:
    save_tiny(family, tmp_path)
    with open_checkpoint(tmp_path) as model:
        expected, config = everything(model), model.config
    before = load_file(tmp_path / FILE)
    after = change(before)
    assert after.keys() != before.keys()
    save_file(after, tmp_path / FILE)
    with open_checkpoint(tmp_path) as model:
        assert model.config == config
        assert everything(model) == expected


def _remove(part: str) -> Callable[[Arrays], Arrays]:
    return lambda arrays: {name: v for name, v in arrays.items() if part not in name}


def _add(**extra: np.ndarray) -> Callable[[Arrays], Arrays]:
    return lambda arrays: arrays | extra


def _shorten(part: str) -> Callable[[Arrays], Arrays]:
    return lambda arrays: {
        name: np.ascontiguousarray(v[:-1]) if part in name else v for name, v in arrays.items()
    }


def _twice(arrays: Arrays) -> Arrays:
    return arrays | {"model.language_model.norm.weight": arrays["language_model.model.norm.weight"]}


REFUSED: list[tuple[str, Callable[[Arrays], Arrays], str]] = [
    (
        "mixtral",
        _remove("layers.2.block_sparse_moe.experts.4"),
        r"missing: .*layers\.2\..*experts\.4\.w1.* \(3 of 91\)",
    ),
    (
        "llama4",
        _remove("feed_forward.experts"),
        r"missing: .*layers.1.feed_forward.experts.gate_up_proj, .*down_proj.*\(30 of 71\)",
    ),
    ("llama4_vision", _remove("vision_model"), r"missing: vision_model\..* \(41 of 113\)"),
    (
        "llama4",
        _add(**{"vision_model.x": np.ones(3, np.float32)}),
        r"unknown: vision_model.x \(1\)",
    ),
    ("gemma3", _add(foo=np.ones(3, np.float32)), r"unknown: foo \(1\)"),
    ("qwen2", _remove("k_proj.bias"), r"missing: .*layers\.0\.self_attn\.k_proj\.bias.*\(4 of 51"),
    ("qwen3", _remove("q_norm"), r"missing: .*layers\.0\.self_attn\.q_norm\.weight.*\(4 of 47\)"),
    (
        "llama",
        _add(**{"model.layers.0.self_attn.q_proj.bias": np.ones(120, np.float32)}),
        "unknown",
    ),
    ("llama4", _shorten("experts.gate_up_proj"), r"\[4, 48, 74\] is no stack of 5 matrices"),
    ("llama4", _shorten("norm.weight"), r"has shape \[47\], its configuration says \[48\]"),
    (
        "llama",
        lambda arrays: _shorten("qkv_proj")(_fused(arrays)),
        r"qkv_proj.weight \[199, 48\] does not hold 120 \+ 40 \+ 40 rows",
    ),
    (
        "llama4",
        lambda arrays: {n: v[..., :-2].copy() if "gate_up" in n else v for n, v in arrays.items()},
        r"gate_up_proj \[48, 72\] does not hold 37 \+ 37 columns",
    ),
    ("gemma3_vision", _twice, "are the same tensor; fetch the model again"),
]


@pytest.mark.parametrize(
    ("family", "change", "message"), REFUSED, ids=[f"{c[0]}: {c[2]}"[:50] for c in REFUSED]
)
def test_tensors_that_do_not_fit_are_listed(
    tmp_path: Path, family: str, change: Callable[[Arrays], Arrays], message: str
) -> None:
    save_tiny(family, tmp_path)
    save_file(change(load_file(tmp_path / FILE)), tmp_path / FILE)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(tmp_path)
    assert "\n" not in str(caught.value)


def test_blocks_of_several_elements_are_not_turned_over(
    tmp_path: Path, make: SimpleNamespace
) -> None:
    file = GgufFile(make.gguf(tmp_path / "tiny.gguf"))
    try:
        with pytest.raises(CheckpointError, match="is stored as Q4_1 with inputs as rows"):
            file.tensors["blk.0.ffn_up.weight"].transposed()
        with pytest.raises(CheckpointError, match="is no matrix"):
            file.tensors["output_norm.weight"].transposed()
    finally:
        file.close()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_printed_table_has_every_name_of_the_files(tmp_path: Path, family: str) -> None:
    oracle = save_tiny(family, tmp_path, **GGUF_CHANGES.get(family, {}))
    names = list(load_file(tmp_path / FILE))
    file = GgufFile(save_tiny_gguf(oracle, tmp_path / "tiny.gguf"))
    names += list(file.tensors)
    file.close()
    if family in META_FAMILIES:
        save_tiny_meta(oracle, tmp_path / "meta", is_fused=True)
        names += list(load_file(tmp_path / "meta" / "consolidated.safetensors"))
    title = {"smollm": "llama"}.get(family, family.removesuffix("_vision"))
    # Mistral's GGUF files call themselves llama.
    text = printable_table(title) + (printable_table("llama") if title == "mistral" else "")
    words = set(text.split())
    for name in names:
        if "rope" in name or (family == "gemma3_vision" and "language_model" not in name):
            continue  # ignored on purpose
        name = re.sub(r"^language_model\.(model\.)?", lambda m: m[1] or "", name)
        name = re.sub(r"\b(layers|blk)\.\d+\.", r"\1.{i}.", name)
        name = re.sub(r"\bexperts\.\d+\.", "experts.{e}.", name)
        assert name in words, name


def test_every_row_of_every_table_names_a_tensor_of_ours_once() -> None:
    for family in TABLES.values():
        for table in family.tables.values():
            pairs = [(row.canonical, row.stored) for row in table.rows]
            assert len(pairs) == len(set(pairs))
            assert not any(table.ignored.fullmatch(row.stored) for row in table.rows)
