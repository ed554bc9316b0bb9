"""Every tensor of every family, from every kind of file, equals the parameter of transformers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedModel

from engine.vision.names import HUGGING_FACE_NAMES
from engine.weights.checkpoint import Checkpoint, open_checkpoint
from engine.weights.formats import dequantize
from tests.tiny_families import (
    FAMILIES,
    GGUF_CHANGES,
    META_FAMILIES,
    save_tiny,
    save_tiny_gguf,
    save_tiny_meta,
)
from tests.tiny_files import adjacent_pairs, text_config

Arrays = dict[str, np.ndarray]
Maker = Callable[[str], "Saved"]

_SOURCES: dict[str, Callable[[PreTrainedModel, Path], Path]] = {
    "huggingface": lambda oracle, folder: folder / "huggingface",
    "gguf": lambda oracle, folder: save_tiny_gguf(oracle, folder / "whole.gguf"),
    "gguf, separate experts": lambda oracle, folder: save_tiny_gguf(
        oracle, folder / "separate.gguf", has_separate_experts=True
    ),
    "gguf, fused experts": lambda oracle, folder: save_tiny_gguf(
        oracle, folder / "fused.gguf", has_fused_experts=True
    ),
    "gguf, parts": lambda oracle, folder: save_tiny_gguf(
        oracle, folder / "parts.gguf", max_tensors_per_part=7
    ),
    "meta": lambda oracle, folder: save_tiny_meta(oracle, folder / "meta"),
    "meta, fused": lambda oracle, folder: save_tiny_meta(oracle, folder / "fused", is_fused=True),
}
CASES = [
    (family, source)
    for family in FAMILIES
    for source in _SOURCES
    if not source.startswith("meta") or family in META_FAMILIES
]


@dataclass(frozen=True)
class Saved:
    """A model as transformers holds it, and the folder with its files."""

    oracle: PreTrainedModel
    folder: Path

    def path(self, source: str) -> Path:
        """The file or folder of a source, written when first asked for."""
        return _SOURCES[source](self.oracle, self.folder)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Maker:
    found: dict[str, Saved] = {}

    def make(family: str) -> Saved:
        if family not in found:
            folder = tmp_path_factory.mktemp(family)
            changes = GGUF_CHANGES.get(family, {})
            found[family] = Saved(save_tiny(family, folder / "huggingface", **changes), folder)
        return found[family]

    return make


def _array(value: torch.Tensor) -> np.ndarray:
    return value.detach().float().numpy()


def _decoder(oracle: Any) -> Any:
    if hasattr(oracle, "language_model"):
        return oracle.language_model.model
    return getattr(oracle.model, "language_model", oracle.model)


def _experts(block: Any, is_turned: bool) -> Arrays:
    """Matrices of a mixture as [outputs, inputs]; Llama 4 keeps them the other way round."""
    stack, down = _array(block.experts.gate_up_proj), _array(block.experts.down_proj)
    if is_turned:
        stack, down = stack.swapaxes(1, 2), down.swapaxes(1, 2)
    half = stack.shape[1] // 2
    found: Arrays = {}
    for number in range(len(stack)):
        found[f"experts.{number}.gate"] = stack[number, :half]
        found[f"experts.{number}.up"] = stack[number, half:]
        found[f"experts.{number}.down"] = down[number]
    return found


def _mlp(block: Any, prefix: str = "") -> Arrays:
    return {
        prefix + name: _array(getattr(block, f"{name}_proj").weight)
        for name in ("gate", "up", "down")
    }


def _layer_arrays(layer: Any, is_llama4: bool) -> Arrays:
    attention = layer.self_attn
    found: Arrays = {"attention_norm": _array(layer.input_layernorm.weight)}
    for name in "qkvo":
        projection = getattr(attention, f"{name}_proj")
        found[name] = _array(projection.weight)
        if projection.bias is not None:
            found[f"{name}_bias"] = _array(projection.bias)
    if hasattr(attention, "q_norm"):
        found["q_norm"] = _array(attention.q_norm.weight)
        found["k_norm"] = _array(attention.k_norm.weight)
    if hasattr(layer, "pre_feedforward_layernorm"):
        found["attention_post_norm"] = _array(layer.post_attention_layernorm.weight)
        found["mlp_norm"] = _array(layer.pre_feedforward_layernorm.weight)
        found["mlp_post_norm"] = _array(layer.post_feedforward_layernorm.weight)
    else:
        found["mlp_norm"] = _array(layer.post_attention_layernorm.weight)
    block = layer.feed_forward if is_llama4 else layer.mlp
    if not hasattr(block, "experts"):
        return found | _mlp(block)
    if hasattr(block, "shared_expert"):
        found |= _mlp(block.shared_expert, "shared.")
    router = block.router.weight if is_llama4 else block.gate.weight
    return found | _experts(block, is_llama4) | {"router": _array(router)}


def expected_tensors(oracle: PreTrainedModel, source: str) -> Arrays:
    """What our names must give, taken from the modules of transformers."""
    config, decoder = text_config(oracle), _decoder(oracle)
    is_llama4, is_gguf = config.model_type == "llama4_text", source.startswith("gguf")
    found: Arrays = {
        "embedding": _array(decoder.embed_tokens.weight),
        "final_norm": _array(decoder.norm.weight),
        "head": _array(oracle.get_output_embeddings().weight),
    }
    for number, layer in enumerate(decoder.layers):
        for name, values in _layer_arrays(layer, is_llama4).items():
            found[f"layers.{number}.{name}"] = values
    if config.model_type == "gemma3_text" and is_gguf:
        found = {name: v + np.float32(1) if "norm" in name else v for name, v in found.items()}
    is_reordered = config.model_type in ("llama", "mistral", "mixtral") and source != "huggingface"
    if is_reordered:
        for name in [name for name in found if name.endswith((".q", ".k", ".q_bias", ".k_bias"))]:
            found[name] = adjacent_pairs(found[name], config.head_dim)
    if is_llama4 and source == "huggingface" and hasattr(oracle, "vision_model"):
        weights = oracle.state_dict()
        for ours, theirs in HUGGING_FACE_NAMES:
            for number in range(2) if "{i}" in ours else [0]:
                values = weights[theirs.replace("{i}", str(number))]
                found[ours.replace("{i}", str(number))] = _array(values)
    return found


def whole(model: Checkpoint, name: str) -> np.ndarray:
    info = model.tensors[name]
    return dequantize(info.format, model.read_slice(name, 0, 0, info.shape[0]), info.shape)


@pytest.mark.parametrize(("family", "source"), CASES)
def test_every_tensor_equals_the_parameter(saved: Maker, family: str, source: str) -> None:
    model_files = saved(family)
    expected = expected_tensors(model_files.oracle, source)
    assert all(values.any() for values in expected.values())
    with open_checkpoint(model_files.path(source)) as model:
        assert set(model.tensors) == set(expected)
        for name, values in expected.items():
            info = model.tensors[name]
            assert (info.name, info.format, info.shape) == (name, "F32", values.shape)
            assert np.array_equal(whole(model, name), values), name


VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"attention_bias": True}),
    ("llama", {"num_key_value_heads": 6}),
    ("llama", {"num_key_value_heads": 1, "head_dim": 8}),
    ("qwen2", {"tie_word_embeddings": True}),
    ("qwen3", {"attention_bias": True}),
    ("qwen3_moe", {"mlp_only_layers": [], "decoder_sparse_step": 2}),
    ("llama4", {"num_experts_per_tok": 2, "interleave_moe_layer_step": 1}),
    ("llama4", {"interleave_moe_layer_step": 9}),
    ("llama4", {"attention_bias": True, "use_qk_norm": False, "tie_word_embeddings": True}),
    ("gemma3", {"attention_bias": True, "num_key_value_heads": 1}),
]


@pytest.mark.parametrize("source", ["huggingface", "gguf"])
@pytest.mark.parametrize(("family", "changes"), VARIANTS)
def test_every_tensor_of_a_variant_equals_the_parameter(
    tmp_path: Path, family: str, changes: dict[str, Any], source: str
) -> None:
    changes = GGUF_CHANGES.get(family, {}) | changes
    saved = Saved(save_tiny(family, tmp_path / "huggingface", **changes), tmp_path)
    expected = expected_tensors(saved.oracle, source)
    with open_checkpoint(saved.path(source)) as model:
        assert set(model.tensors) == set(expected)
        for name, values in expected.items():
            assert np.array_equal(whole(model, name), values), name


@pytest.mark.parametrize("source", list(_SOURCES))
@given(data=st.data())
def test_any_slice_of_a_part_is_the_slice_of_the_whole(
    saved: Maker, source: str, data: st.DataObject
) -> None:
    model_files = saved("llama4")
    path = model_files.folder / f"{source}.opened"
    if not path.exists():
        path.symlink_to(model_files.path(source))
    with open_checkpoint(path.resolve()) as model:
        name = data.draw(st.sampled_from(sorted(model.tensors)))
        shape = model.tensors[name].shape
        axis = data.draw(st.integers(0, len(shape) - 1))
        start = data.draw(st.integers(0, shape[axis]))
        end = data.draw(st.integers(start, shape[axis]))
        raw = model.read_slice(name, axis, start, end)
        assert raw.flags.c_contiguous
        assert raw.flags.writeable  # a copy of its own, not the mapped file
        expected = whole(model, name).take(range(start, end), axis)
        assert np.array_equal(raw.view(np.float32).reshape(expected.shape), expected)
        if len(shape) == 2:
            rows = data.draw(st.lists(st.integers(0, shape[0] - 1), max_size=4))
            assert np.array_equal(model.read_rows(name, rows), whole(model, name)[rows])


@pytest.mark.parametrize("family", ["gemma3", "qwen2"])
@pytest.mark.parametrize("source", ["huggingface", "gguf"])
def test_embeddings_are_those_that_transformers_gives_the_first_layer(
    saved: Maker, family: str, source: str
) -> None:
    model_files = saved(family)
    ids = [98, 0, 7, 7]
    expected = model_files.oracle.get_input_embeddings()(torch.tensor(ids))
    with open_checkpoint(model_files.path(source)) as model:
        found = model.embed(ids)
        assert found.dtype == np.float32
        assert np.array_equal(found, _array(expected))
