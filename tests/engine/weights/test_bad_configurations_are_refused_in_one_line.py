"""Every config.json and params.json that breaks a rule is told in one line, in every family."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine.errors import CheckpointError, ConfigError
from engine.weights.checkpoint import open_checkpoint
from engine.weights.hf_config import config_from_huggingface
from tests.tiny_families import FAMILIES, save_tiny, save_tiny_meta

Change = Callable[..., Path]


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """config.json of every family, and params.json of Meta's two."""
    found: dict[str, dict[str, Any]] = {}
    for family in FAMILIES:
        folder = tmp_path_factory.mktemp(family)
        oracle = save_tiny(family, folder)
        found[family] = json.loads((folder / "config.json").read_text())
        if family in ("llama", "llama4"):
            save_tiny_meta(oracle, folder / "meta")
            found[f"{family}, meta"] = json.loads((folder / "meta" / "params.json").read_text())
    return found


@pytest.fixture
def changed(tmp_path: Path, originals: dict[str, dict[str, Any]]) -> Change:
    """Write a family's config.json with changes; a value of `...` removes a key."""

    def write(family: str, changes: dict[str, Any]) -> Path:
        values = json.loads(json.dumps(originals[family]))
        inner = values.get("text_config", values)
        inner |= changes
        for key in [key for key, value in inner.items() if value is ...]:
            del inner[key]
        (tmp_path / "config.json").write_text(json.dumps(values))
        return tmp_path

    return write


GENERAL: list[tuple[str, dict[str, Any], str]] = [
    ("own code", {"auto_map": {"AutoModel": "evil.Model"}}, "asks to run its own code"),
    ("kv heads", {"num_key_value_heads": 5}, "num_kv_heads 5 does not divide num_heads 6"),
    ("no kv heads", {"num_key_value_heads": 0}, "num_kv_heads 0 is not between 1 and"),
    ("zero", {"num_hidden_layers": 0}, "num_layers 0 is not between 1 and"),
    ("many", {"num_hidden_layers": 10**9}, "num_layers 1000000000 is not between 1 and"),
    ("negative", {"vocab_size": -5}, "vocab_size -5 is not between"),
    ("no width", {"hidden_size": 0}, "width 0 or num_heads 6 is below 1"),
    ("float", {"hidden_size": 48.0}, "hidden_size 48.0 is not a whole number"),
    ("string", {"vocab_size": "99"}, "vocab_size 99 is not a whole number"),
    ("bool", {"num_attention_heads": True}, "num_attention_heads True is not a whole number"),
    ("list", {"max_position_embeddings": [1]}, r"max_position_embeddings \[1\] is not a whole"),
    ("10^30", {"vocab_size": 10**30}, "vocab_size is beyond 64 bits"),
    ("NaN", {"rms_norm_eps": float("nan")}, "norm_epsilon nan is not a positive number"),
    ("infinite", {"rms_norm_eps": float("inf")}, "norm_epsilon inf is not a positive number"),
    ("huge number", {"rms_norm_eps": 10**400}, "rms_norm_eps is too large for a number"),
    ("odd head", {"head_dim": 21}, "head_width 21 is odd; RoPE rotates pairs"),
    ("no heads", {"num_attention_heads": 0}, "num_heads 0 is below 1"),
    ("partial", {"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5 is not supported"),
    ("packed", {"quantization_config": {"quant_method": "awq"}}, "quantization_config .* is not"),
    ("rope", {"rope_parameters": [1]}, r"rope_parameters \[1\] is not an object"),
    (
        "unknown rope",
        {"rope_scaling": {"rope_type": "longrope", "factor": 2.0}, "rope_parameters": None},
        r"'longrope' is not supported \(default, linear, dynamic, llama3, yarn\)",
    ),
    (
        "rope type",
        {"rope_scaling": {"type": ["yarn"]}, "rope_parameters": None},
        "of type .*yarn.* is not supported",
    ),
]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("changes", "message"), [case[1:] for case in GENERAL], ids=[case[0] for case in GENERAL]
)
def test_what_no_family_can_have_is_refused(
    changed: Change, family: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        config_from_huggingface(changed(family, changes))
    assert "\n" not in str(caught.value)
    assert "config.json: " in str(caught.value)


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}


def rope(base: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {"rope_parameters": base | changes}


OF_A_FAMILY: list[tuple[str, dict[str, Any], str]] = [
    ("llama", {"model_type": "mamba"}, r"'mamba' is not supported \(supported: llama, mistral"),
    ("llama", {"model_type": ...}, "model_type 'None' is not supported"),
    ("llama", {"model_type": {"a": 1}}, "model_type .* is not supported"),
    ("llama", {"hidden_size": ...}, "hidden_size is missing"),
    ("llama", {"intermediate_size": -5}, "mlp_width of layer 0 -5 is not between"),
    ("llama", {"hidden_act": "gelu"}, r"hidden_act gelu is not supported \(silu, swish, gelu_"),
    ("llama", {"hidden_act": ["silu"]}, "hidden_act .*silu.* is not supported"),
    ("llama", {"mlp_bias": True}, "mlp_bias True is not supported"),
    ("llama", {"sliding_window": 12}, "sliding_window 12 is not supported"),
    ("llama", {"attention_bias": 1}, "attention_bias 1 is not true or false"),
    ("llama", {"tie_word_embeddings": "yes"}, "tie_word_embeddings yes is not true or false"),
    (
        "llama",
        {"rope_parameters": None, "rope_theta": 0},
        "RoPE theta 0.0 is not between 0.001 and",
    ),
    ("llama", {"rope_parameters": None, "rope_theta": 10**400}, "is too large for a number"),
    ("llama", rope(LLAMA3, factor=0), "RoPE factor 0.0 is not between 0.001 and"),
    ("llama", rope(LLAMA3, factor="8"), "rope_parameters.factor 8 is not a number"),
    ("llama", rope(LLAMA3, factor=None), "rope_parameters.factor is missing"),
    ("llama", rope(LLAMA3, low_freq_factor=5.0), "low_factor 5.0 is above high_factor 4.0"),
    ("llama", rope(LLAMA3, low_freq_factor=0.0), "low_factor 0.0 is not between 0.001 and"),
    (
        "llama",
        rope(LLAMA3, original_max_position_embeddings=0),
        "original positions of RoPE llama3 0 is not between",
    ),
    ("llama", rope({"rope_type": "yarn"}), "rope_parameters.factor is missing"),
    ("llama", rope(YARN, original_max_position_embeddings=-1), "-1 is below 1"),
    ("llama", rope(YARN, factor=float("inf")), "factor inf is not a positive number"),
    ("llama", rope(YARN, rope_theta=1.0), "RoPE theta 1.0 must be above 1 for yarn"),
    ("llama", rope(YARN, truncate=1), "rope_parameters.truncate 1 is not true or false"),
    ("llama", rope(YARN, partial_rotary_factor=0.5), "partial_rotary_factor is not supported"),
    ("llama", {**rope({"rope_type": "dynamic", "factor": 2.0}), "head_dim": 2}, "below 4"),
    ("mistral", {"sliding_window": 0}, "sliding_window 0 is not between 1 and"),
    ("mistral", {"sliding_window": -4}, "sliding_window -4 is not between 1 and"),
    ("mistral", {"layer_types": ["full_attention"] * 4}, "layer_types of this architecture"),
    ("mixtral", {"num_experts_per_tok": 6}, "visits 6 experts, the layers have 5"),
    ("mixtral", {"num_experts_per_tok": 0}, "visits 0 experts, the layers have 5"),
    ("mixtral", {"num_local_experts": 0}, "num_local_experts 0 is not between 1 and 4,096"),
    ("mixtral", {"num_local_experts": 10**9}, "1000000000 is not between 1 and 4,096"),
    ("qwen2", {"layer_types": ["full_attention"] * 3}, "layer_types has 3 items, the model has 4"),
    ("qwen2", {"layer_types": "full"}, "layer_types full is not a list"),
    ("qwen2", {"layer_types": ["full_attention", 1, 1, 1]}, "layer_types holds 1, which is not"),
    ("qwen2", {"layer_types": ["chunked_attention"] * 4}, "holds 'chunked_attention', which is"),
    ("qwen2", {"use_sliding_window": False}, "'sliding_attention', but its window is not set"),
    ("qwen3", {"sliding_window": 1.5}, "sliding_window 1.5 is not a whole number"),
    ("qwen3_moe", {"decoder_sparse_step": 0}, "decoder_sparse_step 0 is not between 1 and"),
    ("qwen3_moe", {"mlp_only_layers": [1.5]}, "mlp_only_layers holds 1.5, which is not a whole"),
    ("qwen3_moe", {"moe_intermediate_size": 0}, "mlp_width of layer 0 0 is not between"),
    ("llama4", {"attention_chunk_size": 0}, "attention_chunk_size 0 is not between 1 and"),
    ("llama4", {"floor_scale": 0}, "floor_scale 0.0 is not a whole number from 1"),
    ("llama4", {"floor_scale": 0.5}, "floor_scale 0.5 is not a whole number from 1"),
    ("llama4", {"attn_scale": float("nan")}, "tuning_scale nan is not a number"),
    ("llama4", {"attn_temperature_tuning": "no"}, "attn_temperature_tuning no is not true or"),
    ("llama4", {"no_rope_layers": [1, 0]}, "no_rope_layers has 2 items, the model has 4 layers"),
    (
        "llama4",
        {"no_rope_layers": None, "no_rope_layer_interval": 0},
        "no_rope_layer_interval 0 is not between 1 and",
    ),
    ("llama4", {"moe_layers": [4]}, "moe_layers holds 4, the model has 4 layers"),
    (
        "llama4",
        {"moe_layers": None, "interleave_moe_layer_step": 0},
        "interleave_moe_layer_step 0 is not between 1 and",
    ),
    ("llama4", {"layer_types": ["sliding_attention"] * 4}, "'sliding_attention', which is not"),
    ("llama4_vision", {"num_experts_per_tok": 9}, "visits 9 experts, the layers have 5"),
    ("gemma3", {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar 0.0 is not a positive"),
    ("gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention True is not"),
    ("gemma3", {"attn_logit_softcapping": 5.0}, "attn_logit_softcapping 5.0 is not supported"),
    ("gemma3", {"final_logit_softcapping": -1.0}, "logit_softcap -1.0 is not a number >= 0"),
    ("gemma3", {"hidden_activation": "relu"}, "hidden_activation relu is not supported"),
    (
        "gemma3",
        {"layer_types": None, "sliding_window_pattern": 0},
        "sliding_window_pattern 0 is not between 1 and",
    ),
    ("gemma3_vision", {"sliding_window": None}, "'sliding_attention', but its window is not set"),
]


@pytest.mark.parametrize(
    ("family", "changes", "message"), OF_A_FAMILY, ids=[f"{c[0]}: {c[2]}"[:60] for c in OF_A_FAMILY]
)
def test_a_configuration_that_breaks_a_rule_of_its_family_is_refused(
    changed: Change, family: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises((ConfigError, CheckpointError), match=message) as caught:
        config_from_huggingface(changed(family, changes))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 30}, "vision patch_size 7 does not divide image_size 30"),
        ({"patch_size": 0}, "vision patch_size 0 is not between 1 and"),
        ({"num_channels": 4}, "vision num_channels 4 is not between 1 and 3"),
        ({"num_attention_heads": 5}, "vision width 24 is not 5 heads of a multiple of 4"),
        ({"pixel_shuffle_ratio": 0}, "pixel_shuffle_ratio 0.0 is not between 0.015625 and 1"),
        ({"pixel_shuffle_ratio": float("nan")}, "pixel_shuffle_ratio nan is not between"),
        ({"pixel_shuffle_ratio": 5e-324}, "pixel_shuffle_ratio 5e-324 is not between"),
        ({"intermediate_size": 97}, r"97 is not 24 x 2², the width after the pixel shuffle"),
        ({"projector_input_dim": 32}, "projector_input_dim differs from vision_output_dim 33"),
        ({"hidden_act": "relu"}, "vision_config.hidden_act relu is not supported"),
        ({"num_hidden_layers": 10**9}, "vision num_layers 1000000000 is not between 1 and"),
        ({"auto_map": {"a": "b"}}, "asks to run its own code"),
    ],
)
def test_an_image_encoder_that_breaks_a_rule_is_refused(
    tmp_path: Path,
    originals: dict[str, dict[str, Any]],
    changes: dict[str, Any],
    message: str,
) -> None:
    values = json.loads(json.dumps(originals["llama4_vision"]))
    values["vision_config"] |= changes
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ConfigError, match=message) as caught:
        config_from_huggingface(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("token", [-1, 99, 10**30])
def test_an_image_token_outside_the_vocabulary_is_refused(
    tmp_path: Path, originals: dict[str, dict[str, Any]], token: int
) -> None:
    values = originals["llama4_vision"] | {"image_token_index": token}
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ConfigError, match=r"image_token_(id|index)"):
        config_from_huggingface(tmp_path)


META: list[tuple[str, dict[str, Any], str]] = [
    ("llama", {"dim": 0}, "width 0 or num_heads 6 is below 1"),
    ("llama", {"dim": 47, "head_dim": ...}, "num_heads 6 does not divide width 47"),
    ("llama", {"n_layers": 10**30}, "n_layers is beyond 64 bits"),
    ("llama", {"n_layers": 4}, "no first matrix of layer 3's MLP"),
    ("llama", {"n_layers": 2}, "unknown: layers.2"),
    ("llama", {"n_kv_heads": 4}, "num_kv_heads 4 does not divide num_heads 6"),
    ("llama", {"norm_eps": float("nan")}, "norm_epsilon nan is not a positive number"),
    ("llama", {"vocab_size": 98}, r"has shape \[99, 48\], its configuration says \[98, 48\]"),
    ("llama", {"quantization_args": {"scheme": "int4"}}, "quantization_args is not supported"),
    ("llama", {"sliding_window": 0}, "sliding_window 0 is not between 1 and"),
    ("llama4", {"lora_args": {"rank": 3}}, "lora_args is not supported; use the model's Hugging"),
    ("llama4", {"attention_chunk_size": 0}, "attention_chunk_size 0 is not between 1 and"),
    ("llama4", {"floor_scale": 0}, "floor_scale 0.0 is not a whole number from 1"),
    ("llama4", {"nope_layer_interval": 0}, "nope_layer_interval 0 is not between 1 and"),
    ("llama4", {"sliding_window": 5}, "and attention_chunk_size exclude each other"),
    ("llama4", {"moe_args": {"num_experts": 0}}, "moe_args.num_experts 0 is not between"),
    (
        "llama4",
        {"moe_args": {"num_experts": 5, "top_k": 6, "interleave_moe_layer_step": 2}},
        "visits 6 experts, the layers have 5",
    ),
    ("llama4", {"moe_args": {"num_experts": 5, "x": 1}}, "moe_args.x is not supported"),
    (
        "llama4",
        {"moe_args": {"num_experts": 5, "interleave_moe_layer_step": 0}},
        "interleave_moe_layer_step 0 is not between 1 and",
    ),
    (
        "llama4",
        {"moe_args": {"num_experts": 3, "interleave_moe_layer_step": 2}},
        r"router_DE \(transposed\) has shape \[5, 48\], its configuration says \[3, 48\]",
    ),
]


@pytest.mark.parametrize(
    ("family", "changes", "message"), META, ids=[f"{c[0]}: {c[2]}"[:60] for c in META]
)
def test_params_that_break_a_rule_are_refused(
    tmp_path: Path, family: str, changes: dict[str, Any], message: str
) -> None:
    save_tiny_meta(save_tiny(family, tmp_path / "hf"), tmp_path / "meta")
    path = tmp_path / "meta" / "params.json"
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not ...}))
    with pytest.raises((ConfigError, CheckpointError), match=message) as caught:
        open_checkpoint(tmp_path / "meta")
    assert "\n" not in str(caught.value)


def test_several_consolidated_files_are_refused_with_advice(tmp_path: Path) -> None:
    folder = save_tiny_meta(save_tiny("llama", tmp_path / "hf"), tmp_path / "meta")
    first = folder / "consolidated.safetensors"
    first.rename(folder / "consolidated.00.safetensors")
    open_checkpoint(folder).close()
    data = (folder / "consolidated.00.safetensors").read_bytes()
    (folder / "consolidated.01.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"2 consolidated files .*fetch the model's Hugging"):
        open_checkpoint(folder)
    for path in folder.glob("*.safetensors"):
        path.unlink()
    with pytest.raises(CheckpointError, match=r"but no consolidated\.safetensors in this folder"):
        open_checkpoint(folder)
    (folder / "consolidated.00.pth").write_bytes(b"\x80\x04")
    with pytest.raises(CheckpointError, match="is a pickle checkpoint"):
        open_checkpoint(folder)
