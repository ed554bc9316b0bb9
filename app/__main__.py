"""`python -m app`: the window from the command line."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from app.settings import default_settings_path

MAX_DEMO_WORKERS = 8


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line and show the window.

    Returns: the exit code: 0, or 2 for wrong usage.
    """
    parsed = make_parser().parse_args(arguments)
    level = logging.DEBUG if parsed.verbose else logging.WARNING
    logging.basicConfig(level=level, format="%(levelname)s %(name)s: %(message)s")
    # Qt comes only after the arguments are known to be right.
    from app.application import run
    from app.settings import Settings
    from app.stages import StartOptions

    settings_path: Path = parsed.settings
    options = StartOptions(
        model=parsed.model or Settings(settings_path).last_model,
        dtype=parsed.dtype,
        kv_window=parsed.kv_window,
        num_threads=parsed.threads,
        demo_workers=parsed.demo_workers,
        join_tokens=tuple(parsed.node),
    )
    return run(options, settings_path)


def make_parser() -> argparse.ArgumentParser:
    """The options of the window."""
    parser = argparse.ArgumentParser(prog="shardmix", description="The Shardmix window.")
    parser.add_argument("--model", metavar="PATH", help="a GGUF file or a safetensors folder")
    parser.add_argument(
        "--demo-workers",
        type=_worker_count,
        default=0,
        metavar="N",
        help="start N simulated nodes on this computer",
    )
    parser.add_argument(
        "--node", action="append", default=[], metavar="TOKEN", help="join token of a worker"
    )
    dtypes = ("auto", "float32", "bfloat16", "int8", "int4")
    parser.add_argument("--dtype", choices=dtypes, default="auto")
    parser.add_argument("--threads", type=_positive, metavar="N", help="threads per runner")
    parser.add_argument("--kv-window", type=_positive, metavar="N", help="positions per answer")
    parser.add_argument("--settings", type=Path, default=default_settings_path(), metavar="FILE")
    parser.add_argument("--verbose", action="store_true", help="log to stderr")
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return value


def _worker_count(text: str) -> int:
    value = int(text)
    if not 0 <= value <= MAX_DEMO_WORKERS:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and {MAX_DEMO_WORKERS}")
    return value


if __name__ == "__main__":
    sys.exit(main())
