"""The weights of a transformers model as GGUF and Meta files, as the converters write them.

The oracle of what must come back is the model itself; nothing here is read by the engine.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from safetensors.numpy import save_file
from transformers import PreTrainedModel

Arrays = dict[str, np.ndarray]

ARCHITECTURES = {
    "llama": "llama",
    "mistral": "llama",
    "mixtral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3moe",
    "llama4_text": "llama4",
    "gemma3_text": "gemma3",
}
_GGUF_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
    "gate_proj": "ffn_gate",
    "up_proj": "ffn_up",
    "down_proj": "ffn_down",
    "gate": "ffn_gate_inp",
    "router": "ffn_gate_inp",
    "shared_expert.gate_proj": "ffn_gate_shexp",
    "shared_expert.up_proj": "ffn_up_shexp",
    "shared_expert.down_proj": "ffn_down_shexp",
}


def text_config(oracle: PreTrainedModel) -> Any:
    """The configuration of the text decoder."""
    return oracle.config.get_text_config()


def text_arrays(oracle: PreTrainedModel) -> Arrays:
    """float32 weights of the text decoder, named as if it were alone."""
    found: Arrays = {}
    for name, value in oracle.state_dict().items():
        if "vision" in name or "multi_modal" in name:
            continue
        alone = name.removeprefix("language_model.").replace("model.language_model.", "model.")
        found[alone] = value.float().numpy()
    if text_config(oracle).tie_word_embeddings:
        found.pop("lm_head.weight", None)
    return found


def adjacent_pairs(rows: np.ndarray, head_width: int) -> np.ndarray:
    """Rows of q or k for half-split pairs, reordered for adjacent pairs, head by head."""
    halves = rows.reshape(-1, 2, head_width // 2, *rows.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(rows.shape)


def split_experts(name: str, stack: np.ndarray, is_turned: bool) -> Arrays:
    """gate, up and down of all experts as [E, outputs, inputs].

    Args:
        name: of the stack, `gate_up_proj` or `down_proj`.
        is_turned: whether the stack is [E, inputs, outputs], as Llama 4 has it.
    """
    if is_turned:
        stack = stack.swapaxes(1, 2)
    if name == "down_proj":
        return {"down": np.ascontiguousarray(stack)}
    gate, up = np.split(stack, 2, axis=1)
    return {"gate": np.ascontiguousarray(gate), "up": np.ascontiguousarray(up)}


def gguf_arrays(
    oracle: PreTrainedModel, *, has_separate_experts: bool = False, has_fused_experts: bool = False
) -> Arrays:
    """The text decoder's weights under GGUF names, reordered as the converter does."""
    config = text_config(oracle)
    architecture = ARCHITECTURES[config.model_type]
    is_gemma, is_llama4 = architecture == "gemma3", architecture == "llama4"
    found: Arrays = {}
    for name, values in text_arrays(oracle).items():
        if is_gemma and "norm" in name:
            values = values + np.float32(1)
        layer = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", name)
        if layer is None:
            found[_top_level(name)] = values
            continue
        block, rest = f"blk.{layer[1]}.", layer[2]
        if "experts." in rest:
            parts = split_experts(rest.split(".")[-1], values, is_llama4)
            if has_fused_experts and "gate" in parts:
                parts = {"gate_up": np.concatenate((parts["gate"], parts["up"]), axis=1)}
            for part, stack in parts.items():
                if has_separate_experts:
                    for number, matrix in enumerate(stack):
                        found[f"{block}ffn_{part}.{number}.weight"] = matrix
                else:
                    found[f"{block}ffn_{part}_exps.weight"] = stack
            continue
        if architecture == "llama" and re.match(r"self_attn\.[qk]_proj", rest):
            values = adjacent_pairs(values, config.head_dim)
        rest, _, ending = rest.rpartition(".")
        rest = rest.removeprefix("mlp.").removeprefix("feed_forward.")
        ours = _GGUF_NAMES[rest]
        if is_gemma and rest == "post_attention_layernorm":
            ours = "post_attention_norm"
        found[f"{block}{ours}.{ending}"] = values
    return found


def _top_level(name: str) -> str:
    return {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }[name]


def rope_divisors(rope: dict[str, Any], head_width: int) -> np.ndarray:
    """What a llama3 rope divides each frequency by; float32 [head_width / 2]."""
    pairs = np.arange(0, head_width, 2, dtype=np.float64)
    turns = 2 * math.pi * rope["rope_theta"] ** (pairs / head_width)
    per_context = rope["original_max_position_embeddings"] / turns
    low, high, factor = (rope[k] for k in ("low_freq_factor", "high_freq_factor", "factor"))
    if low == high:
        divisors = np.where(per_context < low, factor, 1.0)
    else:
        smooth = np.clip((per_context - low) / (high - low), 0, 1)
        divisors = 1 / ((1 - smooth) / factor + smooth)
    return divisors.astype(np.float32)


def _write_rope(writer: gguf.GGUFWriter, rope: dict[str, Any], head_width: int) -> None:
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_rope_dimension_count(head_width)
    kind = rope["rope_type"]
    if kind == "llama3":
        writer.add_tensor("rope_freqs.weight", rope_divisors(rope, head_width))
    elif kind != "default":
        writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
        writer.add_rope_scaling_factor(rope["factor"])
    if kind == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        for key, add in (
            ("beta_fast", writer.add_rope_scaling_yarn_beta_fast),
            ("beta_slow", writer.add_rope_scaling_yarn_beta_slow),
        ):
            if rope.get(key):
                add(rope[key])


def _write_settings(writer: gguf.GGUFWriter, config: Any) -> None:
    architecture = ARCHITECTURES[config.model_type]
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    dense_width = config.intermediate_size
    if architecture == "llama4":
        dense_width = config.intermediate_size_mlp
        writer.add_expert_feed_forward_length(config.intermediate_size)
        writer.add_interleave_moe_layer_step(config.interleave_moe_layer_step)
    elif architecture == "qwen3moe":
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    writer.add_feed_forward_length(dense_width)
    if getattr(config, "num_experts_per_tok", None):
        writer.add_expert_count(config.num_local_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
    rope = config.rope_parameters
    if architecture == "gemma3":
        writer.add_rope_freq_base_swa(rope["sliding_attention"]["rope_theta"])
        rope = rope["full_attention"]
    _write_rope(writer, rope, config.head_dim)
    window = getattr(config, "sliding_window", None)
    if window:
        writer.add_sliding_window(window)
        kinds = [kind == "sliding_attention" for kind in getattr(config, "layer_types", None) or []]
        if len(set(kinds)) > 1:
            writer.add_sliding_window_pattern(kinds)
    if getattr(config, "final_logit_softcapping", None):
        writer.add_final_logit_softcapping(config.final_logit_softcapping)


def save_tiny_gguf(
    oracle: PreTrainedModel,
    path: Path,
    *,
    has_separate_experts: bool = False,
    has_fused_experts: bool = False,
    max_tensors_per_part: int = 0,
    kind: gguf.GGMLQuantizationType | None = None,
    change: Callable[[gguf.GGUFWriter], None] | None = None,
) -> Path:
    """Write the text decoder of a model as a GGUF file, as the converter does.

    Args:
        oracle: with the settings of `tiny_families.GGUF_CHANGES`, where the family has any.
        path: of the file.
        has_separate_experts: one tensor per expert, as older files have.
        has_fused_experts: gate and up of all experts in one tensor, as newer files may have.
        max_tensors_per_part: 0 for one file.
        kind: of the matrices; None for float32.
        change: writes more keys; a `layer_types` of one kind only is left out for it.
    Returns: the file, or the first of its parts.
    """
    config = text_config(oracle)
    writer = gguf.GGUFWriter(
        path, ARCHITECTURES[config.model_type], split_max_tensors=max_tensors_per_part
    )
    _write_settings(writer, config)
    if change is not None:
        change(writer)
    arrays = gguf_arrays(
        oracle, has_separate_experts=has_separate_experts, has_fused_experts=has_fused_experts
    )
    for name, values in arrays.items():
        if kind is None or values.ndim < 2:
            writer.add_tensor(name, values)
        else:
            writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    if not max_tensors_per_part:
        return path
    return next(path.parent.glob(f"{path.stem}-00001-of-*.gguf"))


def save_tiny_meta(oracle: PreTrainedModel, folder: Path, *, is_fused: bool = False) -> Path:
    """Write a Llama's text decoder in Meta's layout: params.json, consolidated.safetensors.

    Args:
        is_fused: the older names of Llama 4's training files, with q, k and v in one tensor.
    """
    config = text_config(oracle)
    folder.mkdir(parents=True, exist_ok=True)
    rope = config.rope_parameters
    params: dict[str, Any] = {
        "dim": config.hidden_size,
        "n_layers": config.num_hidden_layers,
        "n_heads": config.num_attention_heads,
        "n_kv_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab_size,
        "norm_eps": config.rms_norm_eps,
        "rope_theta": rope["rope_theta"],
        "multiple_of": 256,
    }
    if rope["rope_type"] == "llama3":
        params |= {
            "use_scaled_rope": True,
            "rope_scaling_factor": rope["factor"],
            "rope_high_freq_factor": rope["high_freq_factor"],
        }
    if getattr(config, "sliding_window", None):
        params |= {"sliding_window": config.sliding_window, "hidden_dim": config.intermediate_size}
    if config.model_type == "llama4_text":
        params |= {
            "nope_layer_interval": config.no_rope_layer_interval,
            "attention_chunk_size": config.attention_chunk_size,
            "use_qk_norm": config.use_qk_norm,
            "attn_temperature_tuning": config.attn_temperature_tuning,
            "floor_scale": config.floor_scale,
            "attn_scale": config.attn_scale,
            "moe_args": {
                "num_experts": config.num_local_experts,
                "top_k": config.num_experts_per_tok,
                "interleave_moe_layer_step": config.interleave_moe_layer_step,
                "auto_scale_F": True,
            },
        }
    (folder / "params.json").write_text(json.dumps(params))
    arrays = _meta_arrays(oracle, is_fused)
    arrays["rope.freqs"] = np.ones(config.head_dim // 2, np.float32)
    save_file(arrays, folder / "consolidated.safetensors")
    return folder


_META_NAMES = {
    "input_layernorm.weight": "attention_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "self_attn.q_proj.weight": "attention.wq.weight",
    "self_attn.k_proj.weight": "attention.wk.weight",
    "self_attn.v_proj.weight": "attention.wv.weight",
    "self_attn.o_proj.weight": "attention.wo.weight",
    "gate_proj.weight": "feed_forward.w1.weight",
    "up_proj.weight": "feed_forward.w3.weight",
    "down_proj.weight": "feed_forward.w2.weight",
    "shared_expert.gate_proj.weight": "feed_forward.shared_expert.w1.weight",
    "shared_expert.up_proj.weight": "feed_forward.shared_expert.w3.weight",
    "shared_expert.down_proj.weight": "feed_forward.shared_expert.w2.weight",
}
_FUSED_NAMES = {
    "attention_norm.weight": "attention.wqkv.layer_norm_weight",
    "feed_forward.shared_expert.w1.weight": "feed_forward.w_in_shared_FD.weight",
    "feed_forward.shared_expert.w3.weight": "feed_forward.w_swiglu_FD.weight",
    "feed_forward.shared_expert.w2.weight": "feed_forward.w_out_shared_DF.weight",
    "feed_forward.experts.w1": "feed_forward.experts.moe_w_in_eD_F",
    "feed_forward.experts.w3": "feed_forward.experts.moe_w_swiglu_eD_F",
    "feed_forward.experts.w2": "feed_forward.experts.moe_w_out_eF_D",
}


def _meta_arrays(oracle: PreTrainedModel, is_fused: bool) -> Arrays:
    config = text_config(oracle)
    is_llama4 = config.model_type == "llama4_text"
    found: Arrays = {}
    for name, values in text_arrays(oracle).items():
        layer = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", name)
        if layer is None:
            plain = {
                "model.embed_tokens.weight": "tok_embeddings.weight",
                "model.norm.weight": "norm.weight",
                "lm_head.weight": "output.weight",
            }
            found[plain[name]] = values
            continue
        block, rest = f"layers.{layer[1]}.", layer[2]
        rest = rest.removeprefix("mlp.").removeprefix("feed_forward.")
        if rest == "router.weight":
            found[f"{block}feed_forward.router_DE"] = np.ascontiguousarray(values.T)
        elif rest.startswith("experts."):
            parts = split_experts(rest.split(".")[-1], values, is_llama4)
            for part, stack in parts.items():
                letter = {"gate": "w1", "up": "w3", "down": "w2"}[part]
                turned = np.ascontiguousarray(stack.swapaxes(1, 2))
                found[f"{block}feed_forward.experts.{letter}"] = turned
        else:
            if not is_llama4 and re.match(r"self_attn\.[qk]_proj", rest):
                values = adjacent_pairs(values, config.head_dim)
            found[block + _META_NAMES[rest]] = values
    return _fused(found, config.num_hidden_layers) if is_fused else found


def _fused(arrays: Arrays, num_layers: int) -> Arrays:
    found: Arrays = {}
    for name, values in arrays.items():
        layer = re.fullmatch(r"(layers\.\d+\.)(.+)", name)
        ours = _FUSED_NAMES.get(layer[2], layer[2]) if layer else name
        if "experts." in ours:  # one tall matrix instead of a stack
            values = values.reshape(-1, values.shape[-1])
        found[(layer[1] if layer else "") + ours] = values
    for number in range(num_layers):
        block = f"layers.{number}."
        parts = [found.pop(f"{block}attention.w{letter}.weight") for letter in "qkv"]
        found[f"{block}attention.wqkv.weight"] = np.concatenate(parts)
        mlp = f"{block}feed_forward."
        has_experts = mlp + "router_DE" in found
        norm = found.pop(f"{block}ffn_norm.weight")
        found[mlp + ("norm.weight" if has_experts else "mlp.layer_norm_weight")] = norm
        if not has_experts:
            parts = [found.pop(f"{mlp}w{k}.weight") for k in (1, 3)]
            found[mlp + "mlp.fc1_weight"] = np.concatenate(parts)
            found[mlp + "mlp.fc2_weight"] = found.pop(f"{mlp}w2.weight")
    return found
