"""The runner's process: `python -m engine.cluster.runner_process shardmix-runner DEVICE`.

Started by a worker. It watches its parent before it imports torch, which takes seconds: whoever is
killed in that time must not leave it behind.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
from pathlib import Path

from engine.cluster.processes import answer_address, end_with_parent, read_greeting
from engine.weights.models import cache_folder

CACHE_LIMIT_BYTES = 50_000_000_000
# "1" refuses hand-overs with numbers that are not finite, and names who sent them.
CHECK_NUMBERS_VARIABLE = "SHARDMIX_CHECK_NUMBERS"


def main() -> None:
    """Listen, tell the worker where, serve until asked to end."""
    logging.basicConfig(level=os.environ.get("SHARDMIX_LOG", "WARNING"), format="%(message)s")
    greeting = read_greeting()
    should_end = threading.Event()
    end_with_parent(should_end.set)

    from engine.cluster.runner import Runner

    exchange_endpoint = str(greeting.settings["exchange_endpoint"])
    slices_folder = greeting.settings.get("cache_dir") or cache_folder() / "slices"
    runner = Runner(
        sys.argv[2],
        greeting.parent_key.encode("ascii"),
        str(greeting.settings["control_endpoint"]),
        exchange_endpoint,
        should_end,
        exchange_endpoint if greeting.settings.get("transport") == "torch" else None,
        Path(str(slices_folder)),
        int(greeting.settings.get("cache_limit_bytes", CACHE_LIMIT_BYTES)),
        greeting.settings.get("is_host_here") is True,
        os.environ.get(CHECK_NUMBERS_VARIABLE) == "1",
    )
    endpoints = [runner.control_endpoint, runner.exchange_endpoint]
    if runner.rendezvous is not None:
        endpoints.append(runner.rendezvous.endpoint)
    answer_address(endpoints, runner.keys.public)
    try:
        runner.run()
    finally:
        runner.close()


if __name__ == "__main__":
    main()
