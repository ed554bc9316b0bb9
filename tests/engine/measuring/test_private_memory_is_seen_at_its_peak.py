"""A process's own memory counts at its peak; pages of a file that it maps do not."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from engine.measuring.private_memory import MemoryWatch, private_bytes

SIZE = 96 << 20
DEADLINE_SECONDS = 60.0
# Reads a mapped file, then has as much for itself, then gives that back: a line at each stage.
CODE = f"""
import mmap, sys
file = open(sys.argv[1], "rb")
mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
total = sum(mapped[i] for i in range(0, len(mapped), 4096))
print("mapped", flush=True)
sys.stdin.readline()
own = bytearray(b"x") * {SIZE}
print("own", flush=True)
sys.stdin.readline()
del own
print("freed", flush=True)
sys.stdin.readline()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere psutil decides what is shared")
def test_own_memory_counts_and_mapped_files_do_not(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(SIZE))
    with MemoryWatch() as watch:
        process = subprocess.Popen(
            [sys.executable, "-c", CODE, str(path), "shardmix-runner", "here/cpu"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        with process:
            assert process.stdin is not None
            assert process.stdout is not None

            def go_on() -> None:
                assert process.stdin is not None
                process.stdin.write("\n")
                process.stdin.flush()

            assert process.stdout.readline() == "mapped\n"
            watch.settle()
            before = private_bytes(process.pid)
            assert 0 < before < SIZE
            go_on()
            assert process.stdout.readline() == "own\n"
            deadline = time.monotonic() + DEADLINE_SECONDS
            while watch.peak("runner") < SIZE:
                assert time.monotonic() < deadline, watch.peak("runner")
                time.sleep(0.01)
            go_on()
            assert process.stdout.readline() == "freed\n"
            assert private_bytes(process.pid) < SIZE
            go_on()
    assert SIZE <= watch.peak("runner") < before + SIZE + (16 << 20)
    assert watch.peak("host") == 0


def test_a_process_that_is_gone_has_nothing() -> None:
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    assert private_bytes(done.pid) == 0
