"""Writes a model of a given shape with random weights, to measure sizes that nobody has to download.

`python benchmarks/make_random_model.py --shape 1b --format gguf --quantisation q4_0 --out 1b.gguf`

In: a shape, a format, a seed. Out: a LLaMA-style GGUF file, or a folder of bfloat16 safetensors,
with the tokenizer of the default model. The weights are drawn in the file's own format, block by
block, and never all held in memory. The same arguments give the same bytes. Activations and logits
have the size that a trained model's have, so arithmetic is as fast and as finite; what it says is
nonsense.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import struct
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import gguf
import numpy as np
from numpy.typing import NDArray

from engine.weights.gguf import GgufFile
from engine.weights.models import fetch_default_model

Bytes = NDArray[np.uint8]
Format = Literal["f16", "bf16", "q4_0", "q8_0"]

NORM_EPSILON = 1e-5
ROPE_THETA = 10_000.0
CONTEXT = 8192
BLOCK = 32
CHUNK = 1 << 22
CONTROL_TOKEN = 3
# Standard deviation of evenly drawn whole numbers from -7 to 7, and from -127 to 127.
INT4_DEVIATION = math.sqrt((15**2 - 1) / 12)
INT8_DEVIATION = math.sqrt((255**2 - 1) / 12)


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of a model; the vocabulary is the tokenizer's."""

    num_layers: int
    width: int
    num_heads: int
    num_kv_heads: int
    head_width: int
    mlp_width: int


SHAPES = {
    "tiny": Shape(3, 96, 6, 2, 16, 160),
    "1b": Shape(16, 2048, 32, 8, 64, 8192),
    "7b": Shape(32, 4096, 32, 32, 128, 11008),
}


@dataclass(frozen=True, slots=True)
class Weight:
    """One tensor; `deviation` 0 is a norm, which is all ones."""

    gguf_name: str
    hf_name: str
    rows: int
    columns: int
    deviation: float


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """A byte-level BPE tokenizer as GGUF stores it."""

    tokens: list[str]
    kinds: list[int]
    merges: list[str]
    pre: str
    begin_id: int
    end_id: int
    chat_template: str


def weights_of(shape: Shape, vocab_size: int) -> Iterator[Weight]:
    """All tensors in file order; the head is the embedding.

    A matrix keeps the size of what goes through it. The half layers together outweigh the embedding
    that they are added to, or the likeliest token would always be the one before.
    """
    width = shape.width
    queries, keys = (n * shape.head_width for n in (shape.num_heads, shape.num_kv_heads))
    # Logits of a deviation of 2, which is what a trained model's have.
    embedding = 2 / math.sqrt(width)
    yield Weight("token_embd", "model.embed_tokens", vocab_size, width, embedding)
    for layer in range(shape.num_layers):
        for gguf_name, hf_name, rows, columns in (
            ("attn_norm", "input_layernorm", 1, width),
            ("attn_q", "self_attn.q_proj", queries, width),
            ("attn_k", "self_attn.k_proj", keys, width),
            ("attn_v", "self_attn.v_proj", keys, width),
            ("attn_output", "self_attn.o_proj", width, queries),
            ("ffn_norm", "post_attention_layernorm", 1, width),
            ("ffn_gate", "mlp.gate_proj", shape.mlp_width, width),
            ("ffn_up", "mlp.up_proj", shape.mlp_width, width),
            ("ffn_down", "mlp.down_proj", width, shape.mlp_width),
        ):
            deviation = 0.0 if rows == 1 else 1 / math.sqrt(columns)
            names = (f"blk.{layer}.{gguf_name}", f"model.layers.{layer}.{hf_name}")
            yield Weight(*names, rows, columns, deviation)
    yield Weight("output_norm", "model.norm", 1, width, 0.0)


def draw(weight: Weight, kind: Format, seed: int, number: int) -> Bytes:
    """The bytes of a matrix in file format, a function of the arguments alone."""
    random = np.random.Generator(np.random.SFC64([seed, number]))
    count = weight.rows * weight.columns
    if kind in ("f16", "bf16"):
        halves = np.empty(count, np.uint16)
        reach = np.float32(2 * math.sqrt(3) * weight.deviation)
        for start in range(0, count, CHUNK):
            values = random.random(min(CHUNK, count - start), dtype=np.float32)
            values -= np.float32(0.5)
            values *= reach
            bits = (
                values.astype(np.float16).view(np.uint16)
                if kind == "f16"
                else (values.view(np.uint32) >> np.uint32(16)).astype(np.uint16)
            )
            halves[start : start + len(values)] = bits
        return halves.view(np.uint8)
    num_blocks = count // BLOCK
    per_block, deviation = (16, INT4_DEVIATION) if kind == "q4_0" else (32, INT8_DEVIATION)
    blocks = np.empty((num_blocks, 2 + per_block), np.uint8)
    for start in range(0, num_blocks, CHUNK // BLOCK):
        part = blocks[start : start + CHUNK // BLOCK]
        # Scales differ, as those of trained weights do.
        scales = (0.75 + 0.5 * random.random((len(part), 1), dtype=np.float32)) * np.float32(
            weight.deviation / deviation
        )
        part[:, :2] = scales.astype(np.float16).view(np.uint8)
        size = len(part) * per_block
        drawn = random.integers(0, 1 << 64, -(-size // 8), np.uint64).view(np.uint8)[:size]
        values = drawn.reshape(len(part), per_block)
        part[:, 2:] = _PAIRS[values] if kind == "q4_0" else _without_minimum(values)
    return blocks.reshape(-1)


def _pairs_of_int4() -> Bytes:
    """For every byte a byte of two 4-bit numbers from 1 to 15, which stand for -7 to 7.

    The numbers of a row must not have a mean: it would drown everything else. So the 31 pairs that
    come twice lie around the middle one, 8 and 8.
    """
    pairs = [low | high << 4 for low in range(1, 16) for high in range(1, 16)]
    middle = len(pairs) // 2
    return np.array(pairs + pairs[middle - 15 : middle + 16], np.uint8)


_PAIRS = _pairs_of_int4()


def _without_minimum(values: Bytes) -> Bytes:
    """Bytes as signed numbers from -127 to 127, without a mean."""
    return np.where(values == 0x80, np.uint8(0), values)


def read_vocabulary() -> Vocabulary:
    """The default model's; it is fetched on first use."""
    file = GgufFile(fetch_default_model(lambda _done, _total: None))
    try:
        values: dict[str, Any] = {
            key.removeprefix("tokenizer."): value
            for key, value in file.metadata.items()
            if key.startswith("tokenizer.")
        }
        return Vocabulary(
            tokens=list(values["ggml.tokens"]),
            kinds=[int(kind) for kind in values["ggml.token_type"]],
            merges=list(values["ggml.merges"]),
            pre=values["ggml.pre"],
            begin_id=int(values["ggml.bos_token_id"]),
            end_id=int(values["ggml.eos_token_id"]),
            chat_template=values["chat_template"],
        )
    finally:
        file.close()


def write_gguf(path: Path, shape: Shape, vocabulary: Vocabulary, kind: Format, seed: int) -> None:
    """Write a GGUF file; norms are float32, everything else is of `kind`."""
    file_types = {"f16": "MOSTLY_F16", "q4_0": "MOSTLY_Q4_0", "q8_0": "MOSTLY_Q8_0"}
    unfinished = path.with_name(f"{path.name}.unfinished")
    writer = gguf.GGUFWriter(unfinished, "llama")
    writer.add_name(f"random weights, seed {seed}")
    writer.add_file_type(gguf.LlamaFileType[file_types[kind]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_block_count(shape.num_layers)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(shape.width)
    writer.add_feed_forward_length(shape.mlp_width)
    writer.add_head_count(shape.num_heads)
    writer.add_head_count_kv(shape.num_kv_heads)
    writer.add_key_length(shape.head_width)
    writer.add_value_length(shape.head_width)
    writer.add_rope_freq_base(ROPE_THETA)
    writer.add_rope_dimension_count(shape.head_width)
    writer.add_layer_norm_rms_eps(NORM_EPSILON)
    writer.add_vocab_size(len(vocabulary.tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.kinds)
    writer.add_token_merges(vocabulary.merges)
    writer.add_bos_token_id(vocabulary.begin_id)
    writer.add_eos_token_id(vocabulary.end_id)
    writer.add_add_bos_token(False)
    writer.add_chat_template(vocabulary.chat_template)
    weights = list(weights_of(shape, len(vocabulary.tokens)))
    stored = gguf.GGMLQuantizationType[kind.upper()]
    values_per_block, block_bytes = gguf.GGML_QUANT_SIZES[stored]
    for weight in weights:
        name = f"{weight.gguf_name}.weight"
        if not weight.deviation:
            size = weight.columns * 4
            writer.add_tensor_info(name, (weight.columns,), np.dtype(np.float32), size)
            continue
        row_bytes = weight.columns // values_per_block * block_bytes
        writer.add_tensor_info(
            name,
            (weight.rows, row_bytes),
            np.dtype(np.uint8),
            weight.rows * row_bytes,
            stored,
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for number, weight in enumerate(weights):
        if weight.deviation:
            data = draw(weight, kind, seed, number)
        else:
            data = np.ones(weight.columns, np.float32).view(np.uint8)
        writer.write_tensor_data(data)
    writer.close()
    os.replace(unfinished, path)


def write_folder(folder: Path, shape: Shape, vocabulary: Vocabulary, seed: int) -> None:
    """Write config.json, tokenizer files and model.safetensors in bfloat16."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(vocabulary.tokens),
        "hidden_size": shape.width,
        "intermediate_size": shape.mlp_width,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_width,
        "hidden_act": "silu",
        "max_position_embeddings": CONTEXT,
        "rms_norm_eps": NORM_EPSILON,
        "rope_theta": ROPE_THETA,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": vocabulary.begin_id,
        "eos_token_id": vocabulary.end_id,
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    _write_tokenizer(folder, vocabulary)
    weights = list(weights_of(shape, len(vocabulary.tokens)))
    places: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for weight in weights:
        dimensions = [weight.rows, weight.columns] if weight.deviation else [weight.columns]
        end = offset + 2 * weight.rows * weight.columns
        places[f"{weight.hf_name}.weight"] = {
            "dtype": "BF16",
            "shape": dimensions,
            "data_offsets": [offset, end],
        }
        offset = end
    header = json.dumps(places).encode()
    header += b" " * (-len(header) % 8)
    # The library's writer wants all tensors in memory.
    unfinished = folder / "model.safetensors.unfinished"
    with unfinished.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        for number, weight in enumerate(weights):
            if weight.deviation:
                file.write(draw(weight, "bf16", seed, number).data)
            else:
                file.write(struct.pack("<H", 0x3F80) * weight.columns)
    os.replace(unfinished, folder / "model.safetensors")


def _write_tokenizer(folder: Path, vocabulary: Vocabulary) -> None:
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    ids = {token: number for number, token in enumerate(vocabulary.tokens)}
    merges: list[Any] = [tuple(merge.split(" ")) for merge in vocabulary.merges]
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=ids, merges=merges))
    # What GGUF calls "smollm".
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [
            token
            for token, kind in zip(vocabulary.tokens, vocabulary.kinds, strict=True)
            if kind == CONTROL_TOKEN
        ]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": vocabulary.tokens[vocabulary.begin_id],
        "eos_token": vocabulary.tokens[vocabulary.end_id],
        "add_bos_token": False,
        "chat_template": vocabulary.chat_template,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1), encoding="utf-8")


def main() -> int:
    """Write what the arguments ask for."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="1b")
    parser.add_argument("--format", choices=("gguf", "safetensors"), default="gguf")
    parser.add_argument(
        "--quantisation", choices=("f16", "q4_0", "q8_0"), default="q4_0", help="of a GGUF file"
    )
    parser.add_argument("--out", type=Path, required=True, help="file, or folder of safetensors")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    vocabulary = read_vocabulary()
    shape = SHAPES[options.shape]
    if options.format == "gguf":
        write_gguf(options.out, shape, vocabulary, options.quantisation, options.seed)
        size = options.out.stat().st_size
    else:
        write_folder(options.out, shape, vocabulary, options.seed)
        size = (options.out / "model.safetensors").stat().st_size
    print(f"{options.out}: {size:,} bytes", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
