"""Old and new forms of config.json, and what is left out, are read as transformers reads them."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from engine.model.config import NO_ROPE, ModelConfig
from engine.weights.hf_config import config_from_huggingface
from tests.tiny_families import FAMILIES, save_tiny

_NEVER_LEFT_OUT = {"model_type", "text_config", "vision_config"}
# Of these families, sizes are never left out; a file without them is incomplete.
_SIZES = {
    "hidden_size",
    "intermediate_size",
    "max_position_embeddings",
    "num_attention_heads",
    "num_hidden_layers",
    "vocab_size",
}
# What lets the default of a key fit the rest of the file.
_COMPANIONS: dict[str, dict[str, int]] = {
    "head_dim": {"hidden_size": 120},
    "num_attention_heads": {"num_key_value_heads": 4, "hidden_size": 640},
    "num_key_value_heads": {"num_attention_heads": 32, "hidden_size": 640},
    "num_experts_per_tok": {"num_local_experts": 9},
}
_WITH_DEFAULT_SIZES = ("llama4", "gemma3", "llama4_vision", "gemma3_vision")


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """transformers warns of what these tests leave out on purpose."""
    logger = logging.getLogger("transformers")
    before = logger.level
    logger.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    logger.setLevel(before)


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for family in FAMILIES:
        folder = tmp_path_factory.mktemp(family)
        save_tiny(family, folder)
        found[family] = json.loads((folder / "config.json").read_text())
    return found


def write(folder: Path, values: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(values))
    return folder


def completed(folder: Path) -> ModelConfig:
    """What we read of the file that transformers writes after it has read this one."""
    theirs = transformers.AutoConfig.from_pretrained(folder)
    text = theirs.get_text_config()
    whole = theirs.to_dict()
    inner = whole.get("text_config", whole)
    # to_dict leaves the new form of RoPE to the object.
    inner["rope_parameters"] = text.rope_parameters
    inner.pop("rope_scaling", None)
    inner.pop("rope_theta", None)
    return config_from_huggingface(write(folder / "completed", json.loads(json.dumps(whole))))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_key_that_is_left_out_means_the_default_of_transformers(
    tmp_path: Path, originals: dict[str, dict[str, Any]], family: str
) -> None:
    keys = originals[family].get("text_config", originals[family]).keys() - _NEVER_LEFT_OUT
    if family not in _WITH_DEFAULT_SIZES:
        keys -= _SIZES
    seen = 0
    for key in sorted(keys):
        values = json.loads(json.dumps(originals[family]))
        inner = values.get("text_config", values)
        del inner[key]
        inner |= _COMPANIONS.get(key, {})
        if key in ("num_hidden_layers", "use_sliding_window"):
            for each in ("layer_types", "no_rope_layers", "moe_layers"):
                inner.pop(each, None)
        folder = write(tmp_path / key, values)
        assert config_from_huggingface(folder) == completed(folder), key
        seen += 1
    assert seen > 10


@pytest.mark.parametrize("family", FAMILIES)
def test_rules_stand_in_for_lists_of_layers(
    tmp_path: Path, originals: dict[str, dict[str, Any]], family: str
) -> None:
    values = json.loads(json.dumps(originals[family]))
    inner = values.get("text_config", values)
    for key in ("layer_types", "no_rope_layers", "moe_layers", "_sliding_window_pattern"):
        inner.pop(key, None)
    inner |= {"num_hidden_layers": 9, "max_window_layers": 4, "sliding_window_pattern": 3}
    inner |= {"no_rope_layer_interval": 3, "interleave_moe_layer_step": 2}
    inner |= {"decoder_sparse_step": 2, "mlp_only_layers": [3]}
    folder = write(tmp_path / "model", values)
    assert config_from_huggingface(folder) == completed(folder)


def _theirs(folder: Path) -> Any:
    return transformers.AutoConfig.from_pretrained(folder).get_text_config()


@pytest.mark.parametrize("family", FAMILIES)
def test_each_layer_sees_what_the_layer_of_transformers_sees(
    tmp_path: Path, originals: dict[str, dict[str, Any]], family: str
) -> None:
    folder = write(tmp_path / "model", originals[family])
    ours, theirs = config_from_huggingface(folder), _theirs(folder)
    window = getattr(theirs, "sliding_window", None)
    kinds = getattr(theirs, "layer_types", None)
    if kinds is None:
        kinds = ["sliding_attention" if window else "full_attention"] * theirs.num_hidden_layers
    spans = {
        "full_attention": ("full", 0),
        "sliding_attention": ("sliding", window),
        "chunked_attention": ("chunked", getattr(theirs, "attention_chunk_size", None)),
    }
    assert [(layer.reach, layer.span) for layer in ours.layers] == [spans[kind] for kind in kinds]
    uses_rope = getattr(theirs, "no_rope_layers", [1] * len(kinds))
    assert [layer.rope != NO_ROPE for layer in ours.layers] == [bool(flag) for flag in uses_rope]


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 3.0},
    "dynamic": {"rope_type": "dynamic", "factor": 3.0},
    "llama3": LLAMA3,
    "llama3, equal": LLAMA3 | {"high_freq_factor": 1.0},
    "llama3, no original": {k: v for k, v in LLAMA3.items() if not k.startswith("original")},
    "yarn": YARN,
    "yarn, betas": YARN | {"beta_fast": 20.0, "beta_slow": 2, "truncate": False},
    "yarn, zero betas": YARN | {"beta_fast": 0, "beta_slow": None},
    "yarn, attention": YARN | {"attention_factor": 1.25},
    "yarn, scales": YARN | {"mscale": 0.7, "mscale_all_dim": 0.9},
    "yarn, one scale": YARN | {"mscale": 0.7},
    "yarn, ratio": YARN | {"factor": None},
}


@pytest.mark.parametrize("form", ["old", "older", "new"])
@pytest.mark.parametrize("name", list(ROPES))
def test_rope_is_what_transformers_makes_of_it(
    tmp_path: Path, originals: dict[str, dict[str, Any]], name: str, form: str
) -> None:
    values, rope = dict(originals["llama"]), dict(ROPES[name])
    del values["rope_parameters"]
    if form == "new":
        values["rope_parameters"] = rope | {"rope_theta": 5000.0}
    else:
        values["rope_theta"] = 5000.0
        if form == "older":
            rope["type"] = rope.pop("rope_type")
        values["rope_scaling"] = rope
    folder = write(tmp_path / "model", values)
    (ours,) = config_from_huggingface(folder).ropes
    theirs = _theirs(folder)
    kind = rope.get("rope_type", rope.get("type"))
    assert (ours.kind, ours.theta) == (kind, 5000.0)
    assert theirs.rope_parameters["rope_theta"] == 5000.0
    if kind == "default":
        return
    expected = theirs.rope_parameters["factor"]
    if expected is None:
        expected = theirs.max_position_embeddings / 64
    assert ours.factor == expected
    if kind == "dynamic":
        assert ours.original_positions == theirs.max_position_embeddings
    if kind in ("llama3", "yarn"):
        original = theirs.rope_parameters["original_max_position_embeddings"]
        assert ours.original_positions == original
    if kind == "yarn":
        _, attention_factor = ROPE_INIT_FUNCTIONS["yarn"](theirs, torch.device("cpu"))
        assert ours.attention_factor == attention_factor
        assert ours.beta_fast == (rope.get("beta_fast") or 32)
        assert ours.beta_slow == (rope.get("beta_slow") or 1)
        assert ours.is_truncated == rope.get("truncate", True)


@pytest.mark.parametrize(
    "change",
    [
        {"rope_theta": 7e5, "rope_local_base_freq": 2e4},
        {"rope_theta": 7e5, "rope_scaling": {"factor": 8.0, "rope_type": "linear"}},
        {"rope_scaling": None, "rope_local_base_freq": 2e4},
        {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 3e5}}},
        {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0}}},
        {
            "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 3e5}},
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        },
        {},
    ],
)
@pytest.mark.parametrize("family", ["gemma3", "gemma3_vision"])
def test_the_two_tables_of_gemma_3_are_those_of_transformers(
    tmp_path: Path, originals: dict[str, dict[str, Any]], family: str, change: dict[str, Any]
) -> None:
    values = json.loads(json.dumps(originals[family]))
    inner = values.get("text_config", values)
    del inner["rope_parameters"]
    inner |= change
    folder = write(tmp_path / "model", values)
    ropes = config_from_huggingface(folder).ropes
    theirs = _theirs(folder).rope_parameters
    for ours, kind in zip(ropes, ("full_attention", "sliding_attention"), strict=True):
        expected = theirs[kind]
        assert (ours.kind, ours.theta) == (expected["rope_type"], expected["rope_theta"])
        assert ours.factor == expected.get("factor", 1.0)


def test_the_constants_of_gemma_3_are_those_of_its_layers(tmp_path: Path) -> None:
    oracle: Any = save_tiny("gemma3", tmp_path, final_logit_softcapping=30.0)
    ours = config_from_huggingface(tmp_path)
    layer = oracle.model.layers[0].self_attn
    assert ours.attention_scale == layer.scaling
    assert ours.embedding_scale == oracle.model.embed_tokens.scalar_embed_scale
    assert ours.logit_softcap == oracle.config.final_logit_softcapping


def test_no_head_width_is_the_width_shared_among_the_heads(
    tmp_path: Path, originals: dict[str, dict[str, Any]]
) -> None:
    """Null became the default of 128. transformers' check of types refuses null today, so that its
    rule for it is asked directly."""
    values = originals["llama4"] | {"head_dim": None, "hidden_size": 60}
    theirs = transformers.Llama4TextConfig(hidden_size=60, num_attention_heads=6)
    assert theirs.head_dim == 128
    object.__setattr__(theirs, "head_dim", None)
    theirs.__post_init__()
    ours = config_from_huggingface(write(tmp_path / "model", values))
    assert ours.head_width == theirs.head_dim


@pytest.mark.parametrize("form", ["old", "new"])
def test_both_names_of_the_number_of_experts_are_read(
    tmp_path: Path, originals: dict[str, dict[str, Any]], form: str
) -> None:
    values = dict(originals["qwen3_moe"])
    del values["num_local_experts"]
    values["num_experts" if form == "old" else "num_local_experts"] = 7
    folder = write(tmp_path / "model", values)
    experts = config_from_huggingface(folder).experts
    assert experts is not None
    assert experts.count == _theirs(folder).num_experts == 7


def test_the_number_four_is_true_for_temperature_tuning(
    tmp_path: Path, originals: dict[str, dict[str, Any]]
) -> None:
    """Early Llama 4 files say 4, which transformers takes for true."""
    for value, floor in ((4, 7), (True, 7), (0, 0), (False, 0)):
        values = originals["llama4"] | {"attn_temperature_tuning": value}
        assert config_from_huggingface(write(tmp_path / "model", values)).tuning_floor == floor
