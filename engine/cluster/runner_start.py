"""Starting a runner's process: what it is told, and the environment it computes in.

In: a device and whom to obey. Out: a child process, which says where it listens. It neither talks
to the runner nor imports torch.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from engine.cluster.processes import Child, Greeting

# Threads that wait for each other inside an operator spin briefly, then sleep: sleeping at once
# slows decoding on an idle machine, spinning as long as libgomp likes to slows it on a busy one.
OMP_SPINS = "10000"
# glibc gives large pieces back to the system as soon as they are free, and gets them again page by
# page: an eighth of a prompt's time where torch multiplies it. Up to so many bytes are kept; other
# systems know no such words.
MALLOC_SETTINGS = {
    "MALLOC_MMAP_THRESHOLD_": str(128 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(256 << 20),
}


def start_runner(device: str, greeting: Greeting, on_exit: Callable[[Child], None]) -> Child:
    """Start the process of a device's runner.

    Args:
        greeting: with `runner_settings`.
        on_exit: called once from a thread of its own when the process has ended.
    Raises: OSError: it cannot be started.
    """
    return Child(
        "engine.cluster.runner_process",
        ["shardmix-runner", device],
        greeting,
        environment={
            "GOMP_SPINCOUNT": os.environ.get("GOMP_SPINCOUNT", OMP_SPINS),
            **{name: os.environ.get(name, value) for name, value in MALLOC_SETTINGS.items()},
            "CUDA_DEVICE_ORDER": "PCI_BUS_ID",  # As the driver numbers the GPUs of a node.
        },
        on_exit=on_exit,
    )


def runner_settings(
    control_endpoint: str,
    exchange_endpoint: str,
    transport: str,
    cache_folder: str,
    cache_limit_bytes: int,
    is_host_here: bool,
) -> dict[str, Any]:
    """What a runner is told at its start, beside its device and whom to obey."""
    return {
        "control_endpoint": control_endpoint,
        "exchange_endpoint": exchange_endpoint,
        "transport": transport,
        "cache_dir": cache_folder,
        "cache_limit_bytes": cache_limit_bytes,
        "is_host_here": is_host_here,
    }
