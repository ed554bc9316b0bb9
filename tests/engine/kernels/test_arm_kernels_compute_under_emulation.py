"""The kernels for ARM compute what the portable ones do, on an emulated processor."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from engine.kernels.build_native import SOURCES, build

COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
SYSTEM = "/usr/aarch64-linux-gnu"
DRIVER = Path(__file__).with_name("compare_instruction_sets.cpp")


@pytest.mark.slow
@pytest.mark.skipif(
    not (shutil.which(COMPILER) and shutil.which(EMULATOR)),
    reason=f"needs {COMPILER} and {EMULATOR} (Debian: g++-aarch64-linux-gnu, qemu-user)",
)
def test_the_dot_product_kernels_agree_with_the_portable_ones(tmp_path: Path) -> None:
    library, program = tmp_path / "shardmix_native.so", tmp_path / "compare"
    build(library, compiler=[COMPILER], machine="aarch64")
    paths = [f"-I{SOURCES}", str(DRIVER), str(library), f"-Wl,-rpath,{tmp_path}"]
    _run([COMPILER, "-std=c++17", "-pthread", *paths, "-o", str(program)])
    output = _run([EMULATOR, "-L", SYSTEM, str(program)])
    assert output == "compared neon\n"


def _run(command: list[str]) -> str:
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
