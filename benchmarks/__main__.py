"""Run all benchmarks, one after the other: `python benchmarks`, or `python3 run.py bench`."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

SCRIPTS = (
    "speed.py",
    "plot.py",
    "quality.py",
    "products.py",
    "native_steps.py",
    "reaction.py",
    "speculation.py",
    "exchange.py",
    "cluster.py",
)


def main() -> int:
    """Exit code of the first script that failed, or 0."""
    parser = argparse.ArgumentParser(
        prog="python3 run.py bench",
        description="Run all benchmarks; they print Markdown and keep it in benchmarks/results.",
        epilog=f"One alone, with options of its own: python benchmarks/{SCRIPTS[0]} --help",
    )
    parser.add_argument(
        "--quick", action="store_true", help="speed alone, one round of small sizes; keeps nothing"
    )
    parser.add_argument(
        "--llama-cpp", metavar="DIR", help="folder with llama-bench, if it is not on the PATH"
    )
    options = parser.parse_args()
    of_speed = [f"--llama-cpp={options.llama_cpp}"] if options.llama_cpp is not None else []
    of_speed += ["--quick"] if options.quick else []
    for script in SCRIPTS[:1] if options.quick else SCRIPTS:
        print(f"== {script}", file=sys.stderr, flush=True)
        code = subprocess.run(
            [
                *(sys.executable, str(Path(__file__).parent / script)),
                *(of_speed if script == "speed.py" else []),
            ],
            check=False,
        ).returncode
        if code:
            return code
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
