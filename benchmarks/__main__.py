"""Run all benchmarks, one after the other: `python benchmarks`, or `python3 run.py bench`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPTS = ("speed.py", "quality.py", "reaction.py", "speculation.py", "exchange.py", "cluster.py")


def main() -> int:
    """Exit code of the first script that failed, or 0."""
    if sys.argv[1:]:
        print(
            f"usage: python benchmarks, without arguments; one alone: python benchmarks/{SCRIPTS[0]}"
        )
        return 2
    for script in SCRIPTS:
        print(f"== {script}", file=sys.stderr, flush=True)
        code = subprocess.run(
            [sys.executable, str(Path(__file__).parent / script)], check=False
        ).returncode
        if code:
            return code
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
