"""One model in several GGUF files: finds the parts and checks that they belong together.

In: the path of a GGUF file, or of the first of several parts. Out: the same view of all of them as
of one file. Parts are named PREFIX-00001-of-0000N.gguf; the first holds the metadata.

Source: llama.cpp tools/gguf-split, constants.py of the gguf package (Keys.Split).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from engine.errors import CheckpointError
from engine.weights.gguf import GgufFile, Value
from engine.weights.mapped import StoredTensor, one_line

_NUMBER, _COUNT, _TENSORS = "split.no", "split.count", "split.tensors.count"
_PART_NAME = re.compile(r"(?P<prefix>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)
MAX_PARTS = 4096


def part_name(prefix: str, number: int, count: int) -> str:
    """File name of a part; `number` counts from 1."""
    return f"{prefix}-{number:05}-of-{count:05}.gguf"


def gguf_in_folder(folder: Path) -> Path | None:
    """The one GGUF model of a folder: its file, or the first of its parts.

    Args:
        folder: is not searched below.
    Returns: None where there is no GGUF file, or more than one model.
    """
    models: dict[str, Path] = {}
    for path in sorted(entry for entry in folder.iterdir() if entry.suffix == ".gguf"):
        found = _PART_NAME.fullmatch(path.name)
        if found is None:
            models[path.name] = path
            continue
        first = part_name(found["prefix"], 1, int(found["count"]))
        models[first] = folder / first
    return next(iter(models.values())) if len(models) == 1 else None


class GgufModel:
    """The checked headers of all parts of a model.

    Attributes:
        path: as given: the only file, or the first part.
        metadata: of the first part.
        tensors: of all parts.
    """

    def __init__(self, path: Path) -> None:
        """Open and check every part.

        Raises: CheckpointError: a header is damaged, a part is missing, out of order or of another
            model, or the path is not the first part.
        """
        self.path = path
        self._files = [GgufFile(path)]
        try:
            self.metadata: Mapping[str, Value] = self._files[0].metadata
            self.tensors: Mapping[str, StoredTensor] = self._files[0].tensors
            count = self._whole(self._files[0], _COUNT, 0)
            if count > 1:
                self._open_others(count)
        except BaseException:
            self.close()
            raise

    @property
    def paths(self) -> tuple[Path, ...]:
        """All parts, in their order."""
        return tuple(file.path for file in self._files)

    def type_of(self, key: str) -> str:
        """How a key of the first part is stored; "nothing" where it is absent."""
        return self._files[0].type_of(key)

    def close(self) -> None:
        """Unmap all parts; the metadata stays readable."""
        for file in self._files:
            file.close()

    def _open_others(self, count: int) -> None:
        if count > MAX_PARTS:
            raise CheckpointError(
                f"{self.path}: one of {count:,} parts, at most {MAX_PARTS:,} are opened; "
                "join them with `llama-gguf-split --merge`"
            )
        found = _PART_NAME.fullmatch(self.path.name)
        number = self._whole(self._files[0], _NUMBER, 0) + 1
        if found is None or int(found["count"]) != count:
            raise CheckpointError(
                f"{self.path}: part {number} of {count}, whose name must end in "
                f"{part_name('', number, count)}; give the parts their names back"
            )
        if number != 1 or int(found["number"]) != 1:
            first = part_name(found["prefix"], 1, count)
            raise CheckpointError(
                f"{self.path}: part {number} of {count}; give the first part, {first}"
            )
        paths = [
            self.path.with_name(part_name(found["prefix"], k, count)) for k in range(2, count + 1)
        ]
        for position, path in enumerate(paths, 2):
            if not path.is_file():
                raise CheckpointError(
                    f"{path}: part {position} of {count} is missing; fetch the model again"
                )
        tensors = dict(self._files[0].tensors)
        for position, path in enumerate(paths, 2):
            self._files.append(GgufFile(path))
            self._check_part(self._files[-1], position, count)
            for name, tensor in self._files[-1].tensors.items():
                if name in tensors:
                    raise CheckpointError(
                        f"{path}: tensor {one_line(name)!r} is in an earlier part, too; the parts "
                        "are of different models"
                    )
                tensors[name] = tensor
        total = self._whole(self._files[0], _TENSORS, len(tensors))
        if total != len(tensors):
            raise CheckpointError(
                f"{self.path}: {total} tensors are announced, the {count} parts hold "
                f"{len(tensors)}; the parts are of different models"
            )
        self.tensors = tensors

    def _check_part(self, file: GgufFile, position: int, count: int) -> None:
        number, found = self._whole(file, _NUMBER, -1) + 1, self._whole(file, _COUNT, 0)
        if number != position or found != count:
            what = f"calls itself part {number} of {found}" if found else "is no part of a model"
            raise CheckpointError(
                f"{file.path}: {what}, part {position} of {count} is expected; "
                "fetch the model again"
            )
        for key, value in file.metadata.items():
            if key in (_NUMBER, "general.alignment") or key not in self.metadata:
                continue
            if not _is_same(value, self.metadata[key]):
                raise CheckpointError(
                    f"{file.path}: {one_line(key)} differs from that of part 1; the parts are of "
                    "different models"
                )

    @staticmethod
    def _whole(file: GgufFile, key: str, default: int) -> int:
        value = file.metadata.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int):
            raise CheckpointError(
                f"{file.path}: {key} must be one integer, found {file.type_of(key)}"
            )
        return value


def _is_same(left: Value, right: Value) -> bool:
    if isinstance(left, np.ndarray) and isinstance(right, np.ndarray):
        return left.dtype == right.dtype and left.tobytes() == right.tobytes()
    return type(left) is type(right) and left == right
