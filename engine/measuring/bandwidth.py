"""How fast this computer's cores together read its memory: what bounds the speed of decoding.

In: a number of threads. Out: bytes per second, the best of many passes, since whatever else runs
only ever takes away. It measures this process's computer, not a node elsewhere.
"""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import psutil

# Far more than the caches between memory and cores hold.
BUFFER_BYTES = 512 << 20
# Pieces a thread takes at a time, so that a slow core holds nobody up.
PIECES_PER_THREAD = 16
MEASURING_SECONDS = 1.5


def usable_cores() -> int:
    """Cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def read_bandwidth(
    num_threads: int | None = None,
    *,
    num_bytes: int = BUFFER_BYTES,
    seconds: float = MEASURING_SECONDS,
) -> float:
    """Bytes per second at which threads read a large buffer once, together.

    Args:
        num_threads: None takes one for each core.
        num_bytes: of the buffer; less where little memory is free.
        seconds: how long to measure; at least one pass is made.
    """
    threads = num_threads or usable_cores()
    num_bytes = min(num_bytes, psutil.virtual_memory().available // 4)
    # A reduction to the largest number is what numpy does with the widest registers there are.
    numbers = np.ones(max(num_bytes // 4, threads * PIECES_PER_THREAD), np.int32)
    pieces = np.array_split(numbers, threads * PIECES_PER_THREAD)
    best = float("inf")
    with ThreadPoolExecutor(threads) as pool:
        end = time.perf_counter() + seconds
        while True:
            start = time.perf_counter()
            list(pool.map(np.max, pieces))
            now = time.perf_counter()
            best = min(best, now - start)
            if now >= end:
                return numbers.nbytes / max(best, 1e-9)


def ceiling_share(bytes_per_token: int, tokens_per_second: float, bandwidth: float) -> float:
    """Share of the memory's speed that decoding makes use of.

    Args:
        bytes_per_token: weights that every token reads, of all devices together.
        bandwidth: bytes per second, of all devices together.
    """
    return bytes_per_token * tokens_per_second / bandwidth
