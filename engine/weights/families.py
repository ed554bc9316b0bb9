"""The name tables of every family and source.

Only data: which of a file's tensors, or which part of one, is which of ours. `names` pairs them.

Source: the released checkpoints, the parameter names of transformers, and tensor_mapping.py of the
gguf package; the older names of Llama 4 are those of Meta's training files.
"""

from __future__ import annotations

import re
from dataclasses import replace

from engine.vision.names import HUGGING_FACE_NAMES
from engine.weights.name_rows import WHOLE, Family, NameRow, NameTable, Part

_L = "layers.{i}."
_EXPERT = _L + "experts.{e}."
_SHARED = _L + "shared."

# One matrix of a stack.
_ONE = Part(is_expert=True)


def _rows(ours: str, theirs: str, pairs: str, ending: str = "") -> tuple[NameRow, ...]:
    """Rows of a common beginning, from "ours=theirs" words."""
    found = [pair.split("=") for pair in pairs.split()]
    return tuple(NameRow(ours + left, theirs + right + ending) for left, right in found)


def _fused(
    axis: int, pieces: str, names: str, stored: str, part: Part = WHOLE
) -> tuple[NameRow, ...]:
    """Rows for tensors that one stored tensor holds one after the other."""
    return tuple(
        NameRow(name, stored, replace(part, axis=axis, pieces=pieces, index=index))
        for index, name in enumerate(names.split())
    )


# --- Hugging Face ---------------------------------------------------------------------------------

_H = "model.layers.{i}."
_HF_ENDS = (
    NameRow("embedding", "model.embed_tokens.weight"),
    NameRow("final_norm", "model.norm.weight"),
    NameRow("head", "lm_head.weight"),
)
_HF_NORMS = _rows(
    _L, _H, "attention_norm=input_layernorm mlp_norm=post_attention_layernorm", ".weight"
)
_HF_ATTENTION = (
    *_rows(_L, _H + "self_attn.", "q=q_proj k=k_proj v=v_proj o=o_proj", ".weight"),
    *_fused(0, "QKK", f"{_L}q {_L}k {_L}v", _H + "self_attn.qkv_proj.weight"),
)
_HF_QKV_BIASES = _rows(_L, _H + "self_attn.", "q_bias=q_proj k_bias=k_proj v_bias=v_proj", ".bias")
_HF_BIASES = (*_HF_QKV_BIASES, NameRow(_L + "o_bias", _H + "self_attn.o_proj.bias"))
_HF_QK_NORMS = _rows(_L, _H + "self_attn.", "q_norm=q_norm k_norm=k_norm", ".weight")
_HF_MLP = (
    *_rows(_L, _H + "mlp.", "gate=gate_proj up=up_proj down=down_proj", ".weight"),
    *_fused(0, "FF", f"{_L}gate {_L}up", _H + "mlp.gate_up_proj.weight"),
)
_HF_STACKS = (
    *_fused(0, "FF", f"{_EXPERT}gate {_EXPERT}up", _H + "mlp.experts.gate_up_proj", _ONE),
    NameRow(_EXPERT + "down", _H + "mlp.experts.down_proj", _ONE),
)
# Tables of inverse frequencies that old exports stored; they follow from the configuration.
_HF_IGNORED = r"(.*\.)?rotary_emb\.inv_freq|.*\._extra_state"


def _hf(*rows: NameRow, prefixes: tuple[tuple[str, str], ...] = (), ignored: str = "") -> NameTable:
    pattern = f"{_HF_IGNORED}|{ignored}" if ignored else _HF_IGNORED
    return NameTable((*_HF_ENDS, *rows), prefixes, re.compile(pattern))


_HF_DENSE = (*_HF_NORMS, *_HF_ATTENTION, *_HF_BIASES, *_HF_MLP)
_HF_TEXT_PREFIXES = (
    ("language_model.model.", "model."),
    ("language_model.lm_head.", "lm_head."),
    ("model.language_model.", "model."),
)

_HF_MIXTRAL = _hf(
    *_HF_NORMS,
    *_HF_ATTENTION,
    NameRow(_L + "router", _H + "block_sparse_moe.gate.weight"),
    NameRow(_L + "router", _H + "mlp.gate.weight"),
    *_rows(_EXPERT, _H + "block_sparse_moe.experts.{e}.", "gate=w1 up=w3 down=w2", ".weight"),
    *_HF_STACKS,
)
_HF_QWEN3_MOE = _hf(
    *_HF_DENSE,
    *_HF_QK_NORMS,
    NameRow(_L + "router", _H + "mlp.gate.weight"),
    *_rows(_EXPERT, _H + "mlp.experts.{e}.", "gate=gate_proj up=up_proj down=down_proj", ".weight"),
    *_HF_STACKS,
)
_HF_LLAMA4 = _hf(
    *_HF_NORMS,
    *_HF_ATTENTION,
    *_HF_BIASES,
    *_rows(_L, _H + "feed_forward.", "gate=gate_proj up=up_proj down=down_proj", ".weight"),
    NameRow(_L + "router", _H + "feed_forward.router.weight"),
    # Used as x @ W: outputs are columns here.
    *_fused(
        1,
        "FF",
        f"{_EXPERT}gate {_EXPERT}up",
        _H + "feed_forward.experts.gate_up_proj",
        Part(is_expert=True, is_transposed=True),
    ),
    NameRow(
        _EXPERT + "down",
        _H + "feed_forward.experts.down_proj",
        Part(is_expert=True, is_transposed=True),
    ),
    *_rows(
        _SHARED,
        _H + "feed_forward.shared_expert.",
        "gate=gate_proj up=up_proj down=down_proj",
        ".weight",
    ),
    *(NameRow(ours, theirs) for ours, theirs in HUGGING_FACE_NAMES),
    prefixes=(
        *_HF_TEXT_PREFIXES,
        ("model.vision_model.", "vision_model."),
        ("model.multi_modal_projector.", "multi_modal_projector."),
    ),
)
_HF_GEMMA3 = _hf(
    *_rows(
        _L,
        _H,
        "attention_norm=input_layernorm attention_post_norm=post_attention_layernorm "
        "mlp_norm=pre_feedforward_layernorm mlp_post_norm=post_feedforward_layernorm",
        ".weight",
    ),
    *_HF_ATTENTION,
    *_HF_BIASES,
    *_HF_QK_NORMS,
    *_HF_MLP,
    prefixes=_HF_TEXT_PREFIXES,
    # Text only: the image encoder is not used.
    ignored=r"(model\.)?(vision_tower|multi_modal_projector)\..*",
)

# --- Meta -----------------------------------------------------------------------------------------

_M = _L + "feed_forward."
_META_ENDS = (
    NameRow("embedding", "tok_embeddings.weight"),
    NameRow("final_norm", "norm.weight"),
    NameRow("head", "output.weight"),
    NameRow("head", "lm_head.weight"),
)
_META_ATTENTION = (
    NameRow(_L + "attention_norm", _L + "attention_norm.weight"),
    NameRow(_L + "attention_norm", _L + "attention.wqkv.layer_norm_weight"),
    NameRow(_L + "attention_norm", _L + "attention.norm.weight"),
    *_rows(_L, _L + "attention.", "q=wq k=wk v=wv o=wo", ".weight"),
    *_fused(0, "QKK", f"{_L}q {_L}k {_L}v", _L + "attention.wqkv.weight"),
)
_META_MLP = (
    NameRow(_L + "mlp_norm", _L + "ffn_norm.weight"),
    *_rows(_L, _M, "gate=w1 up=w3 down=w2", ".weight"),
    NameRow(_L + "mlp_norm", _M + "mlp.layer_norm_weight"),
    NameRow(_L + "mlp_norm", _M + "mlp.layer_norm.weight"),
    *_fused(0, "FF", f"{_L}gate {_L}up", _M + "mlp.fc1_weight"),
    NameRow(_L + "down", _M + "mlp.fc2_weight"),
)
_META_IGNORED = re.compile(r"rope\.freqs|.*\._extra_state|.*\.running_gate_stats_3E")
_TURNED = Part(is_expert=True, is_transposed=True)
_META_LLAMA4 = NameTable(
    (
        *_META_ENDS,
        *_META_ATTENTION,
        *_META_MLP,
        NameRow(_L + "mlp_norm", _M + "norm.weight"),
        NameRow(_L + "router", _M + "router_DE", Part(is_transposed=True)),
        *(
            NameRow(_EXPERT + ours, _M + theirs, _TURNED)
            for ours, new, old in (
                ("gate", "w1", "moe_w_in_eD_F"),
                ("up", "w3", "moe_w_swiglu_eD_F"),
                ("down", "w2", "moe_w_out_eF_D"),
            )
            for theirs in (f"experts.{new}", f"experts.{old}", old)
        ),
        *_rows(_SHARED, _M + "shared_expert.", "gate=w1 up=w3 down=w2", ".weight"),
        *(
            row
            for ending in (".weight", "")
            for row in _rows(
                _SHARED, _M, "gate=w_in_shared_FD up=w_swiglu_FD down=w_out_shared_DF", ending
            )
        ),
    ),
    # Text only: the image encoder of this layout is not used.
    ignored=re.compile(_META_IGNORED.pattern + r"|vision_(embeddings|projection)\..*"),
)
_META_DENSE = NameTable((*_META_ENDS, *_META_ATTENTION, *_META_MLP), ignored=_META_IGNORED)

# --- GGUF -----------------------------------------------------------------------------------------

_G = "blk.{i}."
_GGUF_ENDS = (
    NameRow("embedding", "token_embd.weight"),
    NameRow("final_norm", "output_norm.weight"),
    NameRow("head", "output.weight"),
)
_GGUF_ATTENTION = (
    NameRow(_L + "attention_norm", _G + "attn_norm.weight"),
    *_rows(_L, _G, "q=attn_q k=attn_k v=attn_v o=attn_output", ".weight"),
    *_fused(0, "QKK", f"{_L}q {_L}k {_L}v", _G + "attn_qkv.weight"),
    *_rows(_L, _G, "q_bias=attn_q k_bias=attn_k v_bias=attn_v o_bias=attn_output", ".bias"),
)
_GGUF_MLP = (
    NameRow(_L + "mlp_norm", _G + "ffn_norm.weight"),
    *_rows(_L, _G, "gate=ffn_gate up=ffn_up down=ffn_down", ".weight"),
)
_GGUF_QK_NORMS = _rows(_L, _G, "q_norm=attn_q_norm k_norm=attn_k_norm", ".weight")
_GGUF_POST_NORMS = _rows(
    _L, _G, "attention_post_norm=post_attention_norm mlp_post_norm=post_ffw_norm", ".weight"
)
_GGUF_EXPERTS = (
    NameRow(_L + "router", _G + "ffn_gate_inp.weight"),
    *_fused(0, "FF", f"{_EXPERT}gate {_EXPERT}up", _G + "ffn_gate_up_exps.weight", _ONE),
    *(
        row
        for name in ("gate", "up", "down")
        for row in (
            NameRow(_EXPERT + name, f"{_G}ffn_{name}_exps.weight", _ONE),
            NameRow(_EXPERT + name, f"{_G}ffn_{name}.{{e}}.weight"),
        )
    ),
)
_GGUF_SHARED = _rows(
    _SHARED, _G, "gate=ffn_gate_shexp up=ffn_up_shexp down=ffn_down_shexp", ".weight"
)


def _gguf(*rows: NameRow) -> NameTable:
    # The frequencies' divisors are read into the configuration.
    ignored = re.compile(r"rope_freqs\.weight|blk\.\d+\.attn_rot_embd\.weight")
    return NameTable((*_GGUF_ENDS, *_GGUF_ATTENTION, *rows), ignored=ignored)


_ALL = (
    Family(
        "llama",
        {"huggingface": _hf(*_HF_DENSE), "meta": _META_DENSE, "gguf": _gguf(*_GGUF_MLP)},
    ),
    Family("mistral", {"huggingface": _hf(*_HF_DENSE), "meta": _META_DENSE}),
    Family("mixtral", {"huggingface": _HF_MIXTRAL, "gguf": _gguf(*_GGUF_MLP, *_GGUF_EXPERTS)}),
    Family("qwen2", {"huggingface": _hf(*_HF_DENSE), "gguf": _gguf(*_GGUF_MLP)}),
    Family(
        "qwen3",
        {
            "huggingface": _hf(*_HF_DENSE, *_HF_QK_NORMS),
            "gguf": _gguf(*_GGUF_MLP, *_GGUF_QK_NORMS),
        },
    ),
    Family(
        "qwen3_moe",
        {
            "huggingface": _HF_QWEN3_MOE,
            "gguf": _gguf(*_GGUF_MLP, *_GGUF_QK_NORMS, *_GGUF_EXPERTS),
        },
    ),
    Family(
        "llama4",
        {
            "huggingface": _HF_LLAMA4,
            "meta": _META_LLAMA4,
            "gguf": _gguf(*_GGUF_MLP, *_GGUF_EXPERTS, *_GGUF_SHARED),
        },
    ),
    Family(
        "gemma3",
        {
            "huggingface": _HF_GEMMA3,
            "gguf": _gguf(*_GGUF_MLP, *_GGUF_QK_NORMS, *_GGUF_POST_NORMS),
        },
    ),
)
FAMILIES = {family.name: family for family in _ALL}
