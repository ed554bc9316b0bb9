"""Finds and checks the safetensors files of a model folder, trusting nothing in them.

In: a folder with model.safetensors, or with model.safetensors.index.json and its shards. Out: the
place of every tensor. It gives tensors no meaning (see `names`) and reads no tensor data.

Source: the format's description in the safetensors README.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, cast

from engine.errors import CheckpointError
from engine.weights.formats import FORMATS, num_bytes
from engine.weights.json_settings import parse_json_object, read_json_object
from engine.weights.mapped import MappedFile, StoredTensor, one_line

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
MAX_HEADER_BYTES = 100_000_000
MAX_INDEX_BYTES = 100_000_000
MAX_DIMENSIONS = 8
MAX_SHARDS = 4096
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
_FORMAT_OF_DTYPE = {name: name for name in FORMATS if FORMATS[name].block_size == 1}


def convert_command(path: Path) -> str:
    """The command that turns the pickle checkpoint in a folder into safetensors."""
    return (
        'python -c "from transformers import AutoModelForCausalLM as M; '
        f"M.from_pretrained('{path}').save_pretrained('{path}-safetensors')\""
    )


def refuse_pickle(path: Path) -> None:
    """Raises: CheckpointError: the path is, or is a folder that only holds, pickle checkpoints."""
    if path.is_dir():
        names = sorted(entry.name for entry in path.iterdir() if entry.is_file())
        name = next((name for name in names if name.lower().endswith(_PICKLE_SUFFIXES)), None)
        folder = path
    else:
        name = path.name if path.name.lower().endswith(_PICKLE_SUFFIXES) else None
        folder = path.parent
    if name is not None:
        raise CheckpointError(
            f"{path}: {one_line(name)} is a pickle checkpoint, which can run code when it is read; "
            f"convert it to safetensors with: {convert_command(folder)}"
        )


def _tensor(
    file: MappedFile, name: str, entry: object, data_start: int
) -> tuple[StoredTensor, int]:
    """Check one entry of a header. Returns: the tensor, and its place in the data."""
    shown = one_line(name)
    if not isinstance(entry, dict) or set(cast("dict[str, Any]", entry)) != {
        "dtype",
        "shape",
        "data_offsets",
    }:
        raise CheckpointError(
            f"{file.path}: entry {shown!r} must have exactly dtype, shape and data_offsets"
        )
    fields = cast("dict[str, Any]", entry)
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    format = _FORMAT_OF_DTYPE.get(dtype) if isinstance(dtype, str) else None
    if format is None:
        raise CheckpointError(f"{file.path}: {shown!r} has unknown dtype {one_line(dtype)}")
    for what, numbers in (("shape", shape), ("data_offsets", offsets)):
        if not isinstance(numbers, list) or not all(
            type(number) is int and number >= 0 for number in cast("list[object]", numbers)
        ):
            raise CheckpointError(
                f"{file.path}: {what} {one_line(fields[what])} of {shown!r} is no list of numbers"
            )
    if len(shape) > MAX_DIMENSIONS or len(offsets) != 2:
        raise CheckpointError(
            f"{file.path}: {shown!r} has {len(shape)} dimensions and {len(offsets)} offsets "
            f"(at most {MAX_DIMENSIONS}, exactly 2)"
        )
    begin, end = offsets
    wanted = num_bytes(format, shape)
    if end - begin != wanted:
        raise CheckpointError(
            f"{file.path}: {shown!r} says {format}{one_line(shape)} = {wanted:,} bytes, "
            f"offsets give {end - begin:,}"
        )
    if data_start + end > file.size:
        raise CheckpointError(
            f"{file.path}: {shown!r} ends at {data_start + end:,}, file ends at {file.size:,}; "
            "the file is cut short, fetch it again"
        )
    return StoredTensor(file, name, format, tuple(shape), data_start + begin), begin


def read_header(file: MappedFile) -> dict[str, StoredTensor]:
    """Check a whole safetensors header.

    Args:
        file: the mapped file.
    Returns: tensor name to its place.
    Raises: CheckpointError: the header breaks the format, or tensors overlap or leave holes.
    """
    if file.size < 8:
        raise CheckpointError(f"{file.path}: {file.size} bytes, a safetensors file has 8 or more")
    length = int.from_bytes(file.bytes[:8], "little")
    data_start = 8 + length
    if length > MAX_HEADER_BYTES or data_start > file.size:
        raise CheckpointError(
            f"{file.path}: header of {length:,} bytes, file has {file.size:,} "
            f"(a header has at most {MAX_HEADER_BYTES:,})"
        )
    text = file.bytes[8:data_start]
    if text[:1] != b"{":
        raise CheckpointError(f"{file.path}: not a safetensors file: its header is no JSON object")
    header = parse_json_object(file.path, text, "the header")
    notes = header.pop("__metadata__", {})
    if not isinstance(notes, dict) or not all(
        isinstance(value, str) for value in cast("dict[str, object]", notes).values()
    ):
        raise CheckpointError(f"{file.path}: __metadata__ must hold strings only")
    tensors: dict[str, StoredTensor] = {}
    places: list[tuple[int, int, str]] = []
    for name, entry in header.items():
        tensor, begin = _tensor(file, name, entry, data_start)
        tensors[name] = tensor
        places.append((begin, begin + tensor.size_bytes, name))
    position = 0
    for begin, end, name in sorted(places):
        if begin != position:
            what = "overlaps" if begin < position else "leaves a hole behind"
            raise CheckpointError(
                f"{file.path}: {one_line(name)!r} at {begin:,} {what} the tensor before it"
            )
        position = end
    if data_start + position != file.size:
        raise CheckpointError(
            f"{file.path}: tensors end at {data_start + position:,}, file ends at {file.size:,}"
        )
    return tensors


def _shard_names(folder: Path) -> tuple[list[str], dict[str, str]]:
    """Returns: the files of a folder, and tensor name to file where there is an index."""
    path = folder / INDEX_NAME
    weight_map: object = read_json_object(path, MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: weight_map is missing or empty")
    table = cast("dict[str, object]", weight_map)
    checked: dict[str, str] = {}
    for tensor, name in table.items():
        # A plain file name only: no separator of any system, no drive, no parent.
        if not isinstance(name, str) or not re.fullmatch(r"[\w][\w.\- ]*\.safetensors", name):
            raise CheckpointError(
                f"{path}: shard path {one_line(name)!r} leaves the model folder or is no "
                "safetensors file; only plain file names are allowed"
            )
        checked[tensor] = name
    names = sorted(set(checked.values()))
    if len(names) > MAX_SHARDS:
        raise CheckpointError(f"{path}: {len(names)} shards, at most {MAX_SHARDS} are opened")
    return names, checked


def refuse_escape(folder: Path, path: Path) -> None:
    """Refuse a link that leads out of the folder.

    The cache of the Hugging Face hub links snapshots/REVISION/NAME to ../../blobs/HASH; that
    layout stays allowed, everything else must lie in the folder itself.

    Raises: CheckpointError: `path` is such a link.
    """
    root, real = folder.resolve(), path.resolve()
    allowed = [root]
    if root.parent.name == "snapshots":
        allowed.append(root.parent.parent / "blobs")
    if not any(real.is_relative_to(place) for place in allowed):
        raise CheckpointError(f"{path}: a link that leaves the model folder; put the file there")


def open_folder(folder: Path) -> tuple[list[MappedFile], dict[str, StoredTensor]]:
    """Open and check every safetensors file of a model.

    Args:
        folder: the model's folder.
    Returns: the mapped files, which the caller closes, and tensor name to its place.
    Raises: CheckpointError: a file is missing, malformed, outside the folder, or a tensor is
        doubled or not where the index says.
    """
    index: dict[str, str] | None = None
    if (folder / INDEX_NAME).is_file():
        names, index = _shard_names(folder)
    elif (folder / SINGLE_NAME).is_file():
        names = [SINGLE_NAME]
    else:
        refuse_pickle(folder)
        raise CheckpointError(f"{folder}: no {SINGLE_NAME} and no {INDEX_NAME} in this folder")
    files: list[MappedFile] = []
    tensors: dict[str, StoredTensor] = {}
    try:
        for position, name in enumerate(names):
            if not (folder / name).is_file():
                raise CheckpointError(
                    f"{folder / name}: part {position + 1} of {len(names)} is missing; "
                    "fetch the model again"
                )
        for name in names:
            path = folder / name
            refuse_escape(folder, path)
            files.append(MappedFile(path))
            for tensor, place in read_header(files[-1]).items():
                if tensor in tensors:
                    raise CheckpointError(f"{path}: tensor {one_line(tensor)!r} appears twice")
                if index is not None and index.get(tensor) != name:
                    raise CheckpointError(
                        f"{path}: tensor {one_line(tensor)!r} is not listed there in {INDEX_NAME}"
                    )
                tensors[tensor] = place
        for tensor in index or {}:
            if tensor not in tensors:
                raise CheckpointError(
                    f"{folder / INDEX_NAME}: tensor {one_line(tensor)!r} is in none of the files"
                )
    except BaseException:
        for file in files:
            file.close()
        raise
    return files, tensors
