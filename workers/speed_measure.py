"""Measuring a device and a disk, within about a second each.

In: a device, a folder. Out: figures. What they are good for is the cost model's business; they are
ceilings of simple work, not speeds of a model.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from workers.speed_file import MeasuredDevice, Speed

# For each figure of a device; at least one run is done, however long it takes.
FIGURE_SECONDS = 0.5
# Multiply-adds of 1024³ fill every core; GPUs need more to be busy.
CPU_WIDTH = 1024
GPU_WIDTH = 4096
# Far larger than any cache between memory and cores.
CPU_READ_BYTES = 256 << 20
GPU_READ_BYTES = 1 << 30
READ_WIDTH = 4096
DISK_BYTES = 64 << 20
DISK_CHUNK_BYTES = 4 << 20
DISK_SECONDS = 0.5


def measure_device(device: MeasuredDevice) -> Speed:
    """Throughput of a large float32 matrix product, and how fast memory is read."""
    is_gpu = device.device.startswith("cuda")
    place = torch.device("cuda", int(device.device.removeprefix("cuda"))) if is_gpu else "cpu"
    if not is_gpu:
        torch.set_num_threads(device.num_cores)
    width = GPU_WIDTH if is_gpu else CPU_WIDTH
    num_rows = (GPU_READ_BYTES if is_gpu else CPU_READ_BYTES) // (4 * READ_WIDTH)

    def finish() -> None:
        if is_gpu:
            torch.cuda.synchronize(place)

    left, right = (torch.ones(width, width, device=place) for _ in range(2))
    product_seconds = _best_seconds(lambda: torch.mm(left, right), finish)
    matrix = torch.ones(num_rows, READ_WIDTH, device=place)
    vector = torch.ones(READ_WIDTH, device=place)
    read_seconds = _best_seconds(lambda: torch.mv(matrix, vector), finish)
    return Speed(
        device=device.device,
        flops=2 * width**3 / product_seconds,
        memory_bytes_per_second=4 * matrix.numel() / read_seconds,
    )


def measure_disk(folder: Path) -> float | None:
    """Bytes a second that a new file in this folder takes and gives back.

    Returns: the slower of writing and reading; None where the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # It has no name: whoever ends this process leaves no file behind.
        with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
            # Random, so that a file system which compresses gains nothing.
            chunk = os.urandom(DISK_CHUNK_BYTES)
            start, num_bytes = time.perf_counter(), 0
            while num_bytes < DISK_BYTES and time.perf_counter() - start < DISK_SECONDS:
                num_bytes += file.write(chunk)
                os.fsync(file.fileno())
            write_seconds = time.perf_counter() - start
            if not hasattr(os, "posix_fadvise"):
                return num_bytes / write_seconds  # Reading would only show the system's cache.
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            file.seek(0)
            start = time.perf_counter()
            while file.read(DISK_CHUNK_BYTES):
                if time.perf_counter() - start > DISK_SECONDS:
                    break
            read_rate = file.tell() / (time.perf_counter() - start)
            return min(num_bytes / write_seconds, read_rate)
    except OSError:
        return None


def _best_seconds(work: Callable[[], object], finish: Callable[[], None]) -> float:
    """The shortest of several runs: what others do at the same time only ever adds."""
    for _ in range(2):  # Libraries choose their kernels and make their threads at the first.
        work()
        finish()
    best = float("inf")
    end = time.perf_counter() + FIGURE_SECONDS
    while True:
        start = time.perf_counter()
        work()
        finish()
        now = time.perf_counter()
        best = min(best, now - start)
        if now >= end:
            return max(best, 1e-9)
