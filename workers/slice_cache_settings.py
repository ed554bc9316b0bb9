"""Where runners of this node keep slices of weights, and how much of the disk they may take.

In: flags, the environment. Out: settings for runners. The cache itself is kept by the runners.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import NamedTuple

from engine.errors import ConfigError
from engine.weights.models import cache_folder

DEFAULT_LIMIT_BYTES = 50 * 10**9
# Of the free disk, by default: somebody else's computer is not to be filled up.
DEFAULT_SHARE = 0.1


class CacheSettings(NamedTuple):
    """A folder, "" for none, and the most that it may hold."""

    folder: str
    limit_bytes: int


def choose_cache(folder: str | None = None, limit_bytes: int | None = None) -> CacheSettings:
    """The cache of this computer.

    Args:
        folder: None is "slices" in the user's cache folder, or in SHARDMIX_CACHE.
        limit_bytes: 0 keeps nothing; None is 50 GB, and at most a tenth of what is free now and
            of what the cache holds already.
    Raises: ConfigError: the folder cannot be made.
    """
    if limit_bytes == 0:
        return CacheSettings("", 0)
    path = Path(folder).expanduser().absolute() if folder else cache_folder() / "slices"
    try:
        path.mkdir(parents=True, exist_ok=True)
        free_bytes = shutil.disk_usage(path).free
        held_bytes = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    except OSError as error:
        if folder is None:
            return CacheSettings("", 0)  # A full or read-only home computes all the same.
        raise ConfigError(
            f"--cache-dir {folder}: {error.strerror}. Choose a folder that can be written"
        ) from None
    if limit_bytes is None:
        limit_bytes = min(DEFAULT_LIMIT_BYTES, int((free_bytes + held_bytes) * DEFAULT_SHARE))
    return CacheSettings(str(path), limit_bytes)
