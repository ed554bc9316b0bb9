"""Slices in file format, dequantised, equal the same slice of the whole tensor."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import gguf
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import CheckpointError, PromptError
from engine.weights.checkpoint import Checkpoint, open_checkpoint
from engine.weights.formats import FORMATS, dequantize, num_bytes

KINDS = ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"]
OUR_NAMES = {
    "token_embd.weight": "embedding",
    "output_norm.weight": "final_norm",
    "output.weight": "head",
}
OUR_LAYER_NAMES = {
    "attn_norm": "attention_norm",
    "attn_q": "q",
    "attn_k": "k",
    "attn_v": "v",
    "attn_output": "o",
    "ffn_norm": "mlp_norm",
    "ffn_gate": "gate",
    "ffn_up": "up",
    "ffn_down": "down",
}


def our_name(name: str) -> str:
    parts = name.split(".")
    if parts[0] == "blk":
        return f"layers.{parts[1]}.{OUR_LAYER_NAMES[parts[2]]}"
    return OUR_NAMES[name]


def whole(model: Checkpoint, name: str) -> np.ndarray:
    info = model.tensors[name]
    return dequantize(info.format, model.read_slice(name, 0, 0, info.shape[0]), info.shape)


@pytest.mark.parametrize("kind", KINDS)
def test_every_tensor_of_a_gguf_file_comes_back_under_our_name(
    tmp_path: Path, make: SimpleNamespace, kind: str
) -> None:
    number = gguf.GGMLQuantizationType[kind]
    path = make.gguf(tmp_path / "tiny.gguf", number, is_tied=False)
    with open_checkpoint(path) as model:
        assert len(model.tensors) == len(make.arrays())
        for name, values in make.arrays().items():
            info = model.tensors[our_name(name)]
            expected = values
            if values.ndim == 2:
                expected = gguf.quants.dequantize(gguf.quants.quantize(values, number), number)
            assert (info.name, info.shape) == (our_name(name), values.shape)
            assert info.format == (kind if values.ndim == 2 else "F32")
            assert np.array_equal(whole(model, our_name(name)), expected)


@pytest.mark.parametrize("shards", [1, 3])
def test_every_tensor_of_a_folder_comes_back_under_our_name(
    tmp_path: Path, make: SimpleNamespace, shards: int
) -> None:
    folder = make.folder(tmp_path / "model", shards=shards, tie_word_embeddings=False)
    with open_checkpoint(folder) as model:
        assert not model.config.is_head_tied
        assert model.config.rope_layout == "half"
        for name, values in make.arrays().items():
            assert np.array_equal(whole(model, our_name(name)), values)


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q4_1", "Q8_0"])
@given(data=st.data())
def test_rows_and_columns_can_be_cut_anywhere_blocks_allow(
    tmp_path_factory: pytest.TempPathFactory, make: SimpleNamespace, kind: str, data: st.DataObject
) -> None:
    path = tmp_path_factory.getbasetemp() / f"{kind}.gguf"
    if not path.exists():
        make.gguf(path, gguf.GGMLQuantizationType[kind])
    block = FORMATS[kind].block_size
    with open_checkpoint(path) as model:
        name = data.draw(st.sampled_from(["layers.1.down", "layers.0.q", "embedding", "head"]))
        rows, columns = model.tensors[name].shape
        axis = data.draw(st.integers(0, 1))
        limit, unit = (rows, 1) if axis == 0 else (columns, block)
        start = unit * data.draw(st.integers(0, limit // unit))
        end = unit * data.draw(st.integers(start // unit, limit // unit))
        shape = (end - start, columns) if axis == 0 else (rows, end - start)
        raw = model.read_slice(name, axis, start, end)
        assert raw.dtype == np.uint8
        assert raw.flags.c_contiguous
        assert raw.nbytes == num_bytes(kind, shape)
        cut = slice(start, end)
        expected = whole(model, name)[cut] if axis == 0 else whole(model, name)[:, cut]
        assert np.array_equal(dequantize(kind, raw, shape), expected)


def test_a_vector_is_cut_along_axis_0(tmp_path: Path, make: SimpleNamespace) -> None:
    with open_checkpoint(make.gguf(tmp_path / "tiny.gguf")) as model:
        part = model.read_slice("final_norm", 0, 5, 17).view(np.float32)
        assert np.array_equal(part, make.arrays()["output_norm.weight"][5:17])
        with pytest.raises(CheckpointError, match="no axis 1"):
            model.read_slice("final_norm", 1, 0, 1)


def test_a_tied_head_is_the_embedding(tmp_path: Path, make: SimpleNamespace) -> None:
    for path in (make.gguf(tmp_path / "tiny.gguf"), make.folder(tmp_path / "model")):
        with open_checkpoint(path) as model:
            assert model.config.is_head_tied
            assert model.tensors["head"].shape == model.tensors["embedding"].shape
            assert model.tensors["head"].name == "head"
            rows = model.read_slice("head", 0, 40, 99)
            assert np.array_equal(rows, model.read_slice("embedding", 0, 40, 99))


def test_single_rows_are_the_embeddings_of_tokens(tmp_path: Path, make: SimpleNamespace) -> None:
    with open_checkpoint(make.gguf(tmp_path / "tiny.gguf")) as model:
        ids = [98, 0, 7, 7]
        rows = model.read_rows("embedding", ids)
        assert rows.dtype == np.float32
        assert np.array_equal(rows, whole(model, "embedding")[ids])
        assert model.read_rows("embedding", []).shape == (0, 96)
        for wrong in (99, -1):
            with pytest.raises(PromptError, match=f"token id {wrong} is not between 0 and 98"):
                model.read_rows("embedding", [3, wrong])


@pytest.mark.parametrize(
    ("axis", "start", "end", "message"),
    [
        (1, 1, 32, "cuts a Q4_1 block; use multiples of 32"),
        (1, 0, 33, "cuts a Q4_1 block"),
        (1, 0, 128, "leaves axis 1 of 96"),
        (0, 5, 4, "leaves axis 0"),
        (0, -1, 4, "leaves axis 0"),
        (2, 0, 1, "no axis 2"),
        (-1, 0, 1, "no axis -1"),
    ],
)
def test_a_slice_that_cannot_be_is_refused(
    tmp_path: Path, make: SimpleNamespace, axis: int, start: int, end: int, message: str
) -> None:
    with (
        open_checkpoint(make.gguf(tmp_path / "tiny.gguf")) as model,
        pytest.raises(CheckpointError, match=message),
    ):
        model.read_slice("layers.0.q", axis, start, end)


def test_slices_outlive_the_checkpoint(tmp_path: Path, make: SimpleNamespace) -> None:
    model = open_checkpoint(make.gguf(tmp_path / "tiny.gguf"))
    rows = model.read_slice("layers.0.q", 0, 0, 3)
    before = rows.copy()
    model.close()
    model.close()
    assert np.array_equal(rows, before)
    with pytest.raises(CheckpointError, match="after the model was closed"):
        model.read_slice("layers.0.q", 0, 0, 3)


def test_the_default_model_is_read_as_gguf_reads_it(default_model_path: Path) -> None:
    reader = gguf.GGUFReader(default_model_path)
    theirs = {tensor.name: tensor for tensor in reader.tensors}
    with open_checkpoint(default_model_path) as model:
        config = model.config
        assert (config.num_layers, config.num_heads, config.num_kv_heads) == (30, 9, 3)
        assert (config.width, config.layers[0].mlp_width, config.vocab_size) == (576, 1536, 49152)
        assert (config.ropes[0].theta, config.rope_layout) == (100000.0, "adjacent")
        assert config.is_head_tied
        for layer in (0, 29):
            tensor = theirs[f"blk.{layer}.ffn_down.weight"]
            values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            raw = model.read_slice(f"layers.{layer}.down", 1, 512, 1024)
            assert np.array_equal(dequantize("Q4_1", raw, (576, 512)), values[:, 512:1024])
        tensor = theirs["token_embd.weight"]
        ids = [49151, 0, 9]
        expected = gguf.quants.dequantize(tensor.data[ids], tensor.tensor_type)
        assert np.array_equal(model.read_rows("embedding", ids), expected)
