"""Makers of tiny model files, well-formed by the reference writers or broken byte by byte."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest
from safetensors.numpy import save_file

Arrays = dict[str, np.ndarray]

# Odd on purpose: 3 query heads per KV head, a vocabulary that is no power of two.
VOCABULARY = 99
WIDTH = 96
MLP = 160
LAYERS = 2
HEADS = 3
HEAD_WIDTH = 32


class RawGguf:
    """A GGUF file written field by field, so that every field can be wrong."""

    def __init__(self) -> None:
        self.magic = b"GGUF"
        self.version = 3
        self.num_tensors: int | None = None
        self.num_keys: int | None = None
        self.keys: list[bytes] = []
        self.tensors: list[bytes] = []
        self.data = b""
        self.alignment = 32

    @staticmethod
    def string(text: str | bytes) -> bytes:
        data = text.encode() if isinstance(text, str) else text
        return struct.pack("<Q", len(data)) + data

    def key(self, name: str | bytes, kind: int, value: bytes) -> RawGguf:
        self.keys.append(self.string(name) + struct.pack("<I", kind) + value)
        return self

    def tensor(
        self, name: str | bytes, dimensions: list[int], kind: int = 0, offset: int = 0
    ) -> RawGguf:
        sizes = b"".join(struct.pack("<Q", size % (1 << 64)) for size in dimensions)
        count = struct.pack("<I", len(dimensions))
        self.tensors.append(
            self.string(name) + count + sizes + struct.pack("<IQ", kind, offset % (1 << 64))
        )
        return self

    def build(self) -> bytes:
        num_tensors = len(self.tensors) if self.num_tensors is None else self.num_tensors
        num_keys = len(self.keys) if self.num_keys is None else self.num_keys
        head = self.magic + struct.pack("<IQQ", self.version, num_tensors, num_keys)
        body = head + b"".join(self.keys) + b"".join(self.tensors)
        return body + b"\0" * (-len(body) % self.alignment) + self.data

    def write(self, path: Path) -> Path:
        path.write_bytes(self.build())
        return path


def tiny_arrays(seed: int = 7) -> Arrays:
    """float32 weights by GGUF names, in torch order."""
    random = np.random.default_rng(seed)
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (VOCABULARY, WIDTH),
        "output_norm.weight": (WIDTH,),
        "output.weight": (VOCABULARY, WIDTH),
    }
    for layer in range(LAYERS):
        block = f"blk.{layer}."
        shapes |= {
            block + "attn_norm.weight": (WIDTH,),
            block + "attn_q.weight": (HEADS * HEAD_WIDTH, WIDTH),
            block + "attn_k.weight": (HEAD_WIDTH, WIDTH),
            block + "attn_v.weight": (HEAD_WIDTH, WIDTH),
            block + "attn_output.weight": (WIDTH, HEADS * HEAD_WIDTH),
            block + "ffn_norm.weight": (WIDTH,),
            block + "ffn_gate.weight": (MLP, WIDTH),
            block + "ffn_up.weight": (MLP, WIDTH),
            block + "ffn_down.weight": (WIDTH, MLP),
        }
    return {name: random.standard_normal(shape, np.float32) for name, shape in shapes.items()}


def write_tiny_gguf(
    path: Path,
    kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.Q4_1,
    *,
    arrays: Arrays | None = None,
    is_tied: bool = True,
    architecture: str = "llama",
    change: Callable[[gguf.GGUFWriter], None] | None = None,
    **numbers: int,
) -> Path:
    """A whole tiny model, by the reference writer; vectors stay float32."""
    sizes = {
        "block_count": LAYERS,
        "head_count": HEADS,
        "head_count_kv": 1,
        "vocab_size": VOCABULARY,
        **numbers,
    }
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(sizes["block_count"])
    writer.add_feed_forward_length(MLP)
    writer.add_head_count(sizes["head_count"])
    writer.add_head_count_kv(sizes["head_count_kv"])
    writer.add_vocab_size(sizes["vocab_size"])
    writer.add_context_length(64)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(5000.0)
    if change is not None:
        change(writer)
    for name, values in (tiny_arrays() if arrays is None else arrays).items():
        if name == "output.weight" and is_tied:
            continue
        if values.ndim == 1:
            writer.add_tensor(name, values)
        else:
            writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


_HF_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def hf_name(name: str) -> str:
    """The Hugging Face name of a GGUF name."""
    parts = name.split(".")
    if parts[0] == "blk":
        return f"model.layers.{parts[1]}.{_HF_NAMES[parts[2]]}.weight"
    return f"{_HF_NAMES[parts[0]]}.weight"


def hf_config(**changes: Any) -> dict[str, Any]:
    """config.json of the tiny model; a value of `...` removes a key."""
    config = {
        "model_type": "llama",
        "hidden_size": WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": 1,
        "intermediate_size": MLP,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
        "rope_theta": 5000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        **changes,
    }
    return {key: value for key, value in config.items() if value is not ...}


def write_tiny_folder(folder: Path, *, shards: int = 1, **changes: Any) -> Path:
    """The same tiny model as a Hugging Face folder, float32, tied unless `changes` say else."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(hf_config(**changes)))
    arrays = {
        hf_name(name): values
        for name, values in tiny_arrays().items()
        if name != "output.weight" or changes.get("tie_word_embeddings") is False
    }
    if shards == 1:
        save_file(arrays, folder / "model.safetensors")
        return folder
    weight_map: dict[str, str] = {}
    for shard in range(shards):
        name = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        mine = {key: arrays[key] for key in sorted(arrays)[shard::shards]}
        save_file(mine, folder / name)
        weight_map |= dict.fromkeys(mine, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def raw_safetensors(header: bytes | dict[str, Any], data: bytes = b"") -> bytes:
    """A safetensors file with any header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


@pytest.fixture(scope="session")
def make() -> SimpleNamespace:
    """The makers above, for tests that cannot import this file."""
    return SimpleNamespace(
        RawGguf=RawGguf,
        arrays=tiny_arrays,
        gguf=write_tiny_gguf,
        folder=write_tiny_folder,
        hf_name=hf_name,
        hf_config=hf_config,
        raw_safetensors=raw_safetensors,
    )
