"""Opens a model, whatever its file format, under our own tensor names.

In: a path: a GGUF file, the first of several, or a folder: of safetensors with config.json
(Hugging Face) or params.json (Meta), or of one GGUF model. Out: its configuration, the files it is
in, a description of every tensor, and slices of them in the file's own format. It keeps no tensor
in memory and computes nothing but the float32 values of single rows.
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
from engine.weights.formats import TensorInfo, dequantize
from engine.weights.gguf import metadata_strings
from engine.weights.gguf_config import config_from_gguf
from engine.weights.gguf_split import GgufModel, gguf_in_folder
from engine.weights.hf_config import config_from_huggingface
from engine.weights.mapped import MappedFile, StoredTensor, one_line
from engine.weights.meta_config import PARAMS_NAME, config_from_meta, open_consolidated
from engine.weights.names import bind_tensors
from engine.weights.safetensors import open_folder, refuse_pickle


class Checkpoint:
    """An open model. Reading is safe from several threads; `close` ends it.

    Attributes:
        path: as given to `open_checkpoint`, or the GGUF file of such a folder.
        files: those with tensors, all open: every part of a GGUF model in their order; of a folder,
            the safetensors files that its index names, or its only one.
        config: validated.
        tensors: our name to description; `head` is there also where it is tied to the embedding.
    """

    def __init__(
        self,
        path: Path,
        files: Sequence[Path],
        config: ModelConfig,
        stored: Mapping[str, StoredTensor],
        close_files: Callable[[], None],
    ) -> None:
        """Use `open_checkpoint`; `stored` has our names and is complete."""
        self.path = path
        self.files = tuple(files)
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

    def read_values(self, name: str) -> NDArray[np.float32]:
        """A whole tensor as float32, in its shape.

        Raises: CheckpointError: no such tensor.
        """
        tensor = self._tensor(name)
        raw = tensor.read(0, 0, tensor.shape[0])
        return dequantize(tensor.format, raw, tensor.shape)

    def embed(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """What the first layer sees of tokens: their rows of the embedding, scaled.

        Args:
            ids: token ids, any order, repeats allowed.
        Returns: float32 [len(ids), width].
        Raises: PromptError: an id outside the vocabulary.
        """
        rows = self.read_rows("embedding", ids)
        scale = np.float32(self.config.embedding_scale)
        return rows if scale == 1 else rows * scale

    def close(self) -> None:
        """Release the files; a second call does nothing."""
        if not self._is_closed:
            self._is_closed = True
            self._close_files()


def _open_gguf(path: Path) -> Checkpoint:
    file = GgufModel(path)
    try:
        config = config_from_gguf(file)
        tokens = metadata_strings(path, file.metadata, "tokenizer.ggml.tokens")
        if tokens is not None and len(tokens) > config.vocab_size:
            raise CheckpointError(
                f"{path}: {len(tokens):,} tokens, but the embedding has {config.vocab_size:,} rows"
            )
        bound = bind_tensors(path, config, "gguf", file.tensors)
        return Checkpoint(path, file.paths, config, bound, file.close)
    except BaseException:
        file.close()
        raise


def _closer(files: Sequence[MappedFile]) -> Callable[[], None]:
    def close_files() -> None:
        for file in files:
            file.close()

    return close_files


def _open_huggingface(folder: Path) -> Checkpoint:
    config = config_from_huggingface(folder)
    files, stored = open_folder(folder)
    close_files = _closer(files)
    try:
        bound = bind_tensors(folder, config, "huggingface", stored)
    except BaseException:
        close_files()
        raise
    paths = [file.path for file in files]
    return Checkpoint(folder, paths, config, bound, close_files)


def _open_meta(folder: Path) -> Checkpoint:
    file, stored = open_consolidated(folder)
    try:
        config = config_from_meta(folder, stored)
        bound = bind_tensors(folder, config, "meta", stored)
    except BaseException:
        file.close()
        raise
    return Checkpoint(folder, [file.path], config, bound, file.close)


def open_checkpoint(path: Path) -> Checkpoint:
    """Open and check a model.

    Args:
        path: a GGUF file, the first of several parts, or a model's folder.
    Returns: the open model; the caller closes it.
    Raises:
        CheckpointError: missing, damaged, foreign or unsupported, in one line.
        ConfigError: a size or setting of the model breaks a rule.
    """
    if path.is_dir():
        if (path / "config.json").is_file():
            return _open_huggingface(path)
        if (path / PARAMS_NAME).is_file():
            return _open_meta(path)
        inside = gguf_in_folder(path)
        if inside is None:
            several = any(entry.suffix == ".gguf" for entry in path.iterdir())
            advice = "give one of its .gguf files" if several else "give a model's folder"
            raise CheckpointError(f"{path}: the folder has no config.json; {advice}")
        path = inside
    refuse_pickle(path)
    if path.suffix == ".safetensors":
        raise CheckpointError(f"{path}: give the folder with config.json instead: {path.parent}")
    return _open_gguf(path)
