"""Every broken or hostile safetensors file, index or config.json is told in one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from engine.errors import CheckpointError
from engine.weights.checkpoint import open_checkpoint
from engine.weights.mapped import MappedFile
from engine.weights.safetensors import read_header


def entry(dtype: object, shape: object, begin: object, end: object) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


F4 = entry("F32", [1], 0, 4)
HEADERS: list[tuple[str, bytes | dict[str, Any], int, str]] = [
    ("no object", b"[1]", 0, "its header is no JSON object"),
    ("UTF-8", b'{"\xff":1}', 0, "the header cannot be read"),
    ("JSON", b'{"a":', 0, "the header cannot be read"),
    ("deep", b'{"a":' + b"[" * 100_000, 0, "the header cannot be read"),
    (
        "twice",
        b"{" + b",".join([b'"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'] * 2) + b"}",
        4,
        "'w' appears twice",
    ),
    ("reversed", {"w": entry("F32", [1], 4, 0)}, 4, r"= 4 bytes, offsets give -4"),
    ("overlap", {"a": F4, "b": entry("F32", [1], 2, 6)}, 6, "'b' at 2 overlaps"),
    ("hole", {"a": F4, "b": entry("F32", [1], 8, 12)}, 12, "'b' at 8 leaves a hole"),
    ("begin", {"a": entry("F32", [1], 4, 8)}, 8, "'a' at 4 leaves a hole"),
    ("past end", {"a": entry("F32", [2], 0, 8)}, 4, "'a' ends at .*, file ends at"),
    ("longer file", {"a": F4}, 5, "tensors end at .*, file ends at"),
    (
        "size",
        {"w": entry("F32", [1000, 1000], 0, 4)},
        4,
        r"'w' says F32\[1000, 1000\] = 4,000,000 bytes, offsets give 4",
    ),
    (
        "wraps",
        {"w": entry("F32", [4194305, 4194305, 211106198978564], 0, 16)},
        16,
        "offsets give 16",
    ),
    ("dtype", {"w": entry("F99", [1], 0, 4)}, 4, "'w' has unknown dtype F99"),
    ("dtype list", {"w": entry([], [1], 0, 4)}, 4, "unknown dtype"),
    ("block dtype", {"w": entry("Q4_0", [32], 0, 18)}, 18, "unknown dtype Q4_0"),
    ("negative", {"w": entry("F32", [-1], 0, 4)}, 4, "is no list of numbers"),
    ("float", {"w": entry("F32", [1.0], 0, 4)}, 4, "is no list of numbers"),
    ("bool", {"w": entry("F32", [True], 0, 4)}, 4, "is no list of numbers"),
    ("fields", {"w": {"dtype": "F32", "shape": [1]}}, 4, "must have exactly dtype"),
    ("no dict", {"w": 5}, 4, "must have exactly dtype"),
    ("dimensions", {"w": entry("F32", [1] * 9, 0, 4)}, 4, "9 dimensions"),
    ("notes", {"__metadata__": {"a": 1}, "w": F4}, 4, "__metadata__ must hold strings only"),
]


@pytest.mark.parametrize(
    ("header", "num_data", "message"), [case[1:] for case in HEADERS], ids=[c[0] for c in HEADERS]
)
def test_a_broken_header_is_refused(
    tmp_path: Path,
    make: SimpleNamespace,
    header: bytes | dict[str, Any],
    num_data: int,
    message: str,
) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(make.raw_safetensors(header, bytes(num_data)))
    file = MappedFile(path)
    try:
        with pytest.raises(CheckpointError, match=message) as caught:
            read_header(file)
    finally:
        file.close()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"short", "5 bytes, a safetensors file has 8 or more"),
        ((1 << 63).to_bytes(8, "little") + b"{}", "header of 9,223,372,036,854,775,808 bytes"),
        ((3).to_bytes(8, "little") + b"{}", "header of 3 bytes, file has 10"),
    ],
)
def test_an_impossible_length_is_refused(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(data)
    file = MappedFile(path)
    try:
        with pytest.raises(CheckpointError, match=message):
            read_header(file)
    finally:
        file.close()


def _evil_index(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "model.safetensors.index.json"
        index = json.loads(path.read_text())
        first = next(iter(index["weight_map"]))
        index["weight_map"][first] = name
        path.write_text(json.dumps(index))

    return change


def _remove_shard(folder: Path) -> None:
    (folder / "model-00002-of-00003.safetensors").unlink()


def _double_tensor(folder: Path) -> None:
    name = "model.norm.weight"
    for shard in folder.glob("*.safetensors"):
        if name.encode() not in shard.read_bytes():
            save_file({name: np.ones(96, np.float32)}, shard)


def _empty_index(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text("{}")


def _link_out(folder: Path) -> None:
    shard = folder / "model-00001-of-00003.safetensors"
    shard.replace(folder.parent / "elsewhere")
    shard.symlink_to(folder.parent / "elsewhere")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_evil_index("../../etc/passwd"), "leaves the model folder"),
        (_evil_index("/etc/passwd"), "leaves the model folder"),
        (_evil_index("C:\\x.safetensors"), "leaves the model folder"),
        (_evil_index("a/b.safetensors"), "leaves the model folder"),
        (_evil_index("model.bin"), "is no safetensors file"),
        (_evil_index("other.safetensors"), "is missing; fetch the model again"),
        (_evil_index("model-00003-of-00003.safetensors"), "is not listed there"),
        (_remove_shard, "part 2 of 3 is missing"),
        (_double_tensor, "appears twice|is not listed there"),
        (_empty_index, "weight_map is missing or empty"),
        (_link_out, "a link that leaves the model folder"),
    ],
)
def test_an_index_that_does_not_fit_its_shards_is_refused(
    tmp_path: Path, make: SimpleNamespace, change: Callable[[Path], None], message: str
) -> None:
    folder = make.folder(tmp_path / "model", shards=3)
    change(folder)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(folder)
    assert "\n" not in str(caught.value)


def test_the_links_of_the_hub_cache_are_followed(tmp_path: Path, make: SimpleNamespace) -> None:
    real = make.folder(tmp_path / "real")
    blobs, snapshot = tmp_path / "hub" / "blobs", tmp_path / "hub" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for file in real.iterdir():
        file.replace(blobs / file.name)
        (snapshot / file.name).symlink_to(blobs / file.name)
    open_checkpoint(snapshot).close()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickle_checkpoints_are_refused_with_the_command_that_converts_them(
    tmp_path: Path, make: SimpleNamespace, name: str
) -> None:
    folder = make.folder(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(b"\x80\x04")
    for path in (folder, folder / name):
        with pytest.raises(CheckpointError, match=r"is a pickle checkpoint.*save_pretrained"):
            open_checkpoint(path)


def test_a_folder_that_is_no_model_says_what_is_missing(
    tmp_path: Path, make: SimpleNamespace
) -> None:
    with pytest.raises(CheckpointError, match=r"no config.json; give a model's folder"):
        open_checkpoint(tmp_path)
    make.gguf(tmp_path / "tiny.gguf")
    make.gguf(tmp_path / "other.gguf")
    with pytest.raises(CheckpointError, match=r"no config.json; give one of its .gguf files"):
        open_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="no such file"):
        open_checkpoint(tmp_path / "nothing.gguf")
    with pytest.raises(CheckpointError, match=r"give the folder with config\.json instead"):
        open_checkpoint(make.folder(tmp_path / "model") / "model.safetensors")


def test_a_tensor_of_another_kind_is_refused(tmp_path: Path, make: SimpleNamespace) -> None:
    folder = make.folder(tmp_path / "model")
    arrays = {make.hf_name(n): v for n, v in make.arrays().items() if n != "output.weight"}
    arrays["model.norm.weight"] = arrays["model.norm.weight"].astype(np.int8)
    save_file(arrays, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight is stored as I8"):
        open_checkpoint(folder)
