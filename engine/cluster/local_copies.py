"""A copy of the engine host's model on the computer of a runner.

In: what the engine host says of its files. Out: the open copy, where there is one, and whether it
is proven to be the same. It compares names, sizes and times; content hashes are compared by whoever
reads.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path

from engine.cluster import messages as m
from engine.errors import EngineError
from engine.weights.checkpoint import Checkpoint, open_checkpoint
from engine.weights.models import cache_folder

logger = logging.getLogger(__name__)

# "off" lets runners ignore copies: every byte then comes from the cache or over the wire.
LOCAL_FILES_VARIABLE = "SHARDMIX_LOCAL_FILES"


class LocalCopy:
    """An open copy.

    Attributes:
        is_proven: whether it is the engine host's own file; else any unit may differ.
    """

    def __init__(self, checkpoint: Checkpoint, is_proven: bool) -> None:
        """Args: checkpoint: has the same tensors; closed by `close`."""
        self._checkpoint = checkpoint
        self.is_proven = is_proven

    def read(self, name: str, axis: int, start: int, end: int) -> m.Array:
        """Bytes of elements [start, end) along an axis, in file format.

        Raises: CheckpointError: the range leaves the tensor or cuts a block.
        """
        return self._checkpoint.read_slice(name, axis, start, end)

    def close(self) -> None:
        """Release the files."""
        self._checkpoint.close()


def describe_files(files: Sequence[Path], is_same_computer: bool) -> tuple[m.LocalFile, ...]:
    """What the engine host says of its checkpoint's files; nothing where one is gone.

    Args:
        is_same_computer: whether the runner that hears it can open the same paths.
    """
    try:
        found = [(path.resolve(), path.stat()) for path in files]
    except OSError:
        return ()
    return tuple(
        m.LocalFile(
            path=str(path),
            num_bytes=status.st_size,
            modified_ns=status.st_mtime_ns,
            is_same_computer=is_same_computer,
        )
        for path, status in found
    )


def open_local_copy(load: m.Load, is_host_here: bool) -> LocalCopy | None:
    """The best copy of a load's checkpoint on this computer.

    First the very files, if path, size and time are theirs; then files of the same names and sizes
    where this computer keeps its models.

    Args:
        is_host_here: whether this computer's own engine host asks. No other one's paths are looked
            at: it could have any file tried, and what it says of them proves nothing.
    Returns: the open copy; None where there is none, or where copies are to be ignored.
    """
    if os.environ.get(LOCAL_FILES_VARIABLE, "").lower() == "off" or not load.files:
        return None
    tensors = {info.name: info for info in load.tensors}
    if is_host_here and _are_the_same(load.files):
        checkpoint = _open(Path(load.files[0].path), tensors)
        if checkpoint is not None:
            return LocalCopy(checkpoint, is_proven=True)
    candidate = _find_candidate(load.files, cache_folder() / "models")
    if candidate is not None:
        checkpoint = _open(candidate, tensors)
        if checkpoint is not None:
            return LocalCopy(checkpoint, is_proven=False)
    return None


def _are_the_same(files: Sequence[m.LocalFile]) -> bool:
    try:
        for file in files:
            if not file.is_same_computer:
                return False
            status = Path(file.path).stat()
            if not stat.S_ISREG(status.st_mode):
                return False  # Opening a pipe would wait for somebody to write.
            if (status.st_size, status.st_mtime_ns) != (file.num_bytes, file.modified_ns):
                return False
    except (OSError, ValueError):  # Not there, or not a path this system can have.
        return False
    return True


def _find_candidate(files: Sequence[m.LocalFile], models: Path) -> Path | None:
    """The first of files with the same names and sizes, in the folder or one of its folders."""
    # A peer's path may be of another system; only its last two names are used here.
    parts = [re.split(r"[\\/]", file.path)[-2:] for file in files]
    if any(len(p) != 2 or not {".", "..", ""}.isdisjoint(p) for p in parts):
        return None
    for folder in (models, models / parts[0][0]):
        with contextlib.suppress(OSError, ValueError):
            paths = [folder / name for _parent, name in parts]
            if all(p.stat().st_size == f.num_bytes for p, f in zip(paths, files, strict=True)):
                return paths[0]
    return None


def _open(first_file: Path, tensors: Mapping[str, m.TensorInfo]) -> Checkpoint | None:
    """The checkpoint that a file belongs to, if it has exactly these tensors."""
    # Only a folder knows what the tensors of its safetensors files are.
    path = first_file.parent if first_file.suffix == ".safetensors" else first_file
    try:
        checkpoint = open_checkpoint(path)
    except EngineError as error:
        logger.info("the copy %s is not used: %s", path, error)
        return None
    if dict(checkpoint.tensors) == dict(tensors):
        return checkpoint
    logger.info("the copy %s has other tensors", path)
    checkpoint.close()
    return None
