"""Opens a model, whatever its file format, under our own tensor names.

In: a path: a GGUF file, or a folder of safetensors with config.json. Out: its configuration, a
description of every tensor, and slices of them in the file's own format. It keeps no tensor in
memory and computes nothing but the float32 values of single rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from engine.errors import CheckpointError, PromptError
from engine.model.config import ModelConfig
from engine.weights.formats import FORMATS, TensorInfo, dequantize, weight_format_names
from engine.weights.gguf import GgufFile, metadata_strings
from engine.weights.gguf_config import config_from_gguf
from engine.weights.hf_config import config_from_huggingface
from engine.weights.mapped import StoredTensor, one_line
from engine.weights.names import Source, canonical_shapes, match_names
from engine.weights.safetensors import open_folder, refuse_pickle


class Checkpoint:
    """An open model. Reading is safe from several threads; `close` ends it.

    Attributes:
        path: as given to `open_checkpoint`.
        config: validated.
        tensors: our name to description; `head` is there also where it is tied to the embedding.
    """

    def __init__(
        self,
        path: Path,
        config: ModelConfig,
        stored: Mapping[str, StoredTensor],
        close_files: Callable[[], None],
    ) -> None:
        """Use `open_checkpoint`; `stored` has our names and is complete."""
        self.path = path
        self.config = config
        self.tensors: Mapping[str, TensorInfo] = {
            name: TensorInfo(name, tensor.format, tensor.shape) for name, tensor in stored.items()
        }
        self._stored = stored
        self._close_files = close_files
        self._is_closed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _tensor(self, name: str) -> StoredTensor:
        if self._is_closed:
            raise CheckpointError(f"{self.path}: {name!r} was asked for after the model was closed")
        found = self._stored.get(name)
        if found is None:
            raise CheckpointError(f"{self.path}: has no tensor {one_line(name)!r}")
        return found

    def read_slice(self, name: str, axis: int, start: int, end: int) -> NDArray[np.uint8]:
        """Copy a range of rows or columns in the file's format.

        Args:
            name: one of `tensors`.
            axis: 0 for rows, or for the elements of a vector; 1 for columns.
            start: first, inclusive.
            end: last, exclusive. Bounds along the contiguous axis must be whole blocks.
        Returns: uint8 [num_bytes(format, sliced shape)], contiguous, owned by the caller.
        Raises: CheckpointError: no such tensor, range outside it, or a block would be cut.
        """
        return self._tensor(name).read(axis, start, end)

    def read_rows(self, name: str, row_ids: Sequence[int]) -> NDArray[np.float32]:
        """Values of single rows, such as the embeddings of a few tokens.

        Args:
            name: a matrix of `tensors`.
            row_ids: any order, repeats allowed.
        Returns: float32 [len(row_ids), columns].
        Raises:
            CheckpointError: no such matrix.
            PromptError: a row outside the matrix.
        """
        tensor = self._tensor(name)
        if len(tensor.shape) != 2:
            raise CheckpointError(f"{self.path}: {name} {list(tensor.shape)} is not a matrix")
        rows, columns = tensor.shape
        for row in row_ids:
            if not 0 <= row < rows:
                raise PromptError(f"token id {row} is not between 0 and {rows - 1:,}")
        raw = tensor.read_rows(np.asarray(row_ids, dtype=np.int64))
        return dequantize(tensor.format, raw, (len(row_ids), columns))

    def close(self) -> None:
        """Release the files; a second call does nothing."""
        if not self._is_closed:
            self._is_closed = True
            self._close_files()


def _bind(
    path: Path, config: ModelConfig, source: Source, stored: Mapping[str, StoredTensor]
) -> dict[str, StoredTensor]:
    """Give every stored tensor our name, and check its shape and format."""
    names = match_names(path, config, source, stored)
    bound: dict[str, StoredTensor] = {}
    for name, shape in canonical_shapes(config).items():
        # A tied head is the embedding under a second name.
        tensor = stored[names[name if name in names else "embedding"]]
        if tensor.shape != shape:
            raise CheckpointError(
                f"{path}: {one_line(tensor.name)} has shape {list(tensor.shape)}, its "
                f"configuration says {list(shape)}; the file is damaged or mixed from two models"
            )
        if not FORMATS[tensor.format].is_weight:
            raise CheckpointError(
                f"{path}: {one_line(tensor.name)} is stored as {tensor.format}, which is not "
                f"supported; use one of {weight_format_names()}"
            )
        bound[name] = tensor
    return bound


def _open_gguf(path: Path) -> Checkpoint:
    file = GgufFile(path)
    try:
        config = config_from_gguf(file)
        tokens = metadata_strings(path, file.metadata, "tokenizer.ggml.tokens")
        if tokens is not None and len(tokens) > config.vocab_size:
            raise CheckpointError(
                f"{path}: {len(tokens):,} tokens, but the embedding has {config.vocab_size:,} rows"
            )
        return Checkpoint(path, config, _bind(path, config, "gguf", file.tensors), file.close)
    except BaseException:
        file.close()
        raise


def _open_huggingface(folder: Path) -> Checkpoint:
    config_path = folder / "config.json"
    if not config_path.is_file():
        inside = sorted(entry.name for entry in folder.iterdir() if entry.suffix == ".gguf")
        advice = f"give the file {folder / inside[0]}" if inside else "give a model's folder"
        raise CheckpointError(f"{folder}: the folder has no config.json; {advice}")
    config = config_from_huggingface(folder)
    files, stored = open_folder(folder)

    def close_files() -> None:
        for file in files:
            file.close()

    try:
        bound = _bind(folder, config, "huggingface", stored)
    except BaseException:
        close_files()
        raise
    return Checkpoint(folder, config, bound, close_files)


def open_checkpoint(path: Path) -> Checkpoint:
    """Open and check a model.

    Args:
        path: a GGUF file, or a folder with config.json and safetensors.
    Returns: the open model; the caller closes it.
    Raises:
        CheckpointError: missing, damaged, foreign or unsupported, in one line.
        ConfigError: a size or setting of the model breaks a rule.
    """
    if path.is_dir():
        return _open_huggingface(path)
    refuse_pickle(path)
    if path.suffix == ".safetensors":
        raise CheckpointError(f"{path}: give the folder with config.json instead: {path.parent}")
    return _open_gguf(path)
