"""`Checkpoint.files` are the files with the model's tensors: all of them, and no others."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import gguf
from safetensors.numpy import load_file

from engine.weights.checkpoint import open_checkpoint
from tests.tiny_families import save_tiny, save_tiny_gguf, save_tiny_meta
from tests.tiny_files import gguf_arrays


def files_of(path: Path) -> list[str]:
    with open_checkpoint(path) as model:
        folder = path if path.is_dir() else path.parent
        assert all(file.parent == folder for file in model.files)
        return [file.name for file in model.files]


def test_a_folder_names_the_shards_of_its_index_only(tmp_path: Path, make: SimpleNamespace) -> None:
    """A consolidated copy beside the shards was counted as part of the model."""
    for shards in (1, 3):
        folder = make.folder(tmp_path / str(shards), shards=shards)
        expected = sorted(path.name for path in folder.glob("*.safetensors"))
        (folder / "consolidated.safetensors").write_bytes(b"another form of the same model")
        (folder / "model-00001-of-00009.safetensors").write_bytes(b"left over from a download")
        assert files_of(folder) == expected
        stored = {name for file in expected for name in load_file(folder / file)}
        assert stored == {make.hf_name(n) for n in make.arrays() if n != "output.weight"}


def test_a_folder_of_meta_names_its_one_file(tmp_path: Path) -> None:
    folder = save_tiny_meta(save_tiny("llama", tmp_path / "huggingface"), tmp_path / "meta")
    expected = [path.name for path in folder.glob("*.safetensors")]
    (folder / "other.safetensors").write_bytes(b"of another program")
    assert files_of(folder) == expected


def test_a_gguf_model_names_all_its_parts_in_order(tmp_path: Path, make: SimpleNamespace) -> None:
    """The size of a model in several parts was that of the first."""
    oracle = save_tiny("llama", tmp_path / "huggingface")
    save_tiny_gguf(oracle, tmp_path / "a.gguf", max_tensors_per_part=9)
    parts = sorted(path.name for path in tmp_path.glob("a-*.gguf"))
    assert len(parts) == 4
    assert files_of(tmp_path / parts[0]) == parts
    assert files_of(tmp_path) == parts
    stored = [tensor.name for name in parts for tensor in gguf.GGUFReader(tmp_path / name).tensors]
    assert sorted(stored) == sorted(gguf_arrays(oracle))


def test_a_gguf_file_names_itself(tmp_path: Path, make: SimpleNamespace) -> None:
    path = make.gguf(tmp_path / "whole.gguf")
    assert files_of(path) == ["whole.gguf"]
