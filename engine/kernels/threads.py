"""How many threads of this process compute."""

from __future__ import annotations

import os

import torch

from engine.kernels.native_library import native_library


def set_num_threads(num_threads: int) -> None:
    """Compute with so many threads from now on, at most one a core: torch and native kernels each.

    The two do not compute at the same time, and the native threads sleep while torch's do.

    Raises: ConfigError: SHARDMIX_KERNELS asks for what cannot be had here.
    """
    num_threads = max(1, min(num_threads, os.cpu_count() or 1))
    torch.set_num_threads(num_threads)
    library = native_library()
    if library is not None:
        library.set_num_threads(num_threads)
