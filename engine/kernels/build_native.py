"""Builds the native kernels with the system's C++ compiler: `python -m engine.kernels.build_native`.

In: the sources in `native/`. Out: one shared library beside them, which names the sources it was
made from; that folder is no package, so nobody takes it for a module. It imports nothing but the
standard library: setup.py runs it, by its path, where nothing is installed yet.
"""

from __future__ import annotations

import concurrent.futures
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

SOURCES = Path(__file__).resolve().parent / "native"
LIBRARY_NAME = "shardmix_native.dll" if os.name == "nt" else "shardmix_native.so"
COMPILER_SECONDS = 300

# Contracting a * b + c as the compiler likes would let a result depend on the tile it is in.
FLAGS = (
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-fvisibility=hidden",
    "-ffp-contract=off",
    "-Wall",
    "-Wextra",
)
# Checks of what arithmetic on pointers and integers can get wrong; all of them take minutes to compile.
_CHECKS = "address,bounds,shift,integer-divide-by-zero,signed-integer-overflow,float-cast-overflow"
SANITIZER_FLAGS = (
    *("-O1", "-fno-omit-frame-pointer"),
    *(f"-fsanitize={_CHECKS}", "-fno-sanitize-recover=all"),
)
# Only these files may use what not every machine has: they are called after a look at the machine.
X86_FLAGS = {
    "kernels_avx2.cpp": ("-mavx2", "-mfma", "-mf16c"),
    "kernels_avx512vnni.cpp": (
        *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni"),
        *("-mavx2", "-mfma", "-mf16c"),
        # GCC's own headers leave values undefined on purpose, and GCC warns of them.
        *("-Wno-uninitialized", "-Wno-maybe-uninitialized"),
    ),
}
ARM_FLAGS = {"kernels_neon.cpp": ("-march=armv8.2-a+dotprod",)}


class BuildError(Exception):
    """There is no compiler, or it failed; the text is one line, or what the compiler said."""


def source_hash(folder: Path = SOURCES) -> str:
    """A digest of all sources: a library made from others must not be called."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.cpp")) + sorted(folder.glob("*.h")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def find_compiler() -> list[str]:
    """The C++ compiler's command: $CXX, else what is on the path.

    Raises: BuildError: there is none.
    """
    command = shlex.split(os.environ.get("CXX", ""))
    candidates = [command] if command else [[name] for name in ("c++", "g++", "clang++")]
    for candidate in candidates:
        if shutil.which(candidate[0]):
            return candidate
    names = ", ".join(candidate[0] for candidate in candidates)
    raise BuildError(f"no C++ compiler was found ({names}). Install g++ or clang++")


def build(
    output: Path, is_sanitized: bool = False, compiler: Sequence[str] = (), machine: str = ""
) -> None:
    """Compile and link; replaces `output` only by a whole library.

    Args:
        is_sanitized: stop at the first wrong access or undefined operation.
        compiler: its command; found where empty.
        machine: what the compiler compiles for; this one where empty.
    Raises: BuildError: there is no compiler, or it failed.
    """
    command = list(compiler) or find_compiler()
    machine = machine or platform.machine().lower()
    special = X86_FLAGS if machine in ("x86_64", "amd64") else {}
    special = ARM_FLAGS if machine in ("aarch64", "arm64") else special
    flags = [*FLAGS, *(SANITIZER_FLAGS if is_sanitized else ())]
    flags.append(f'-DSHARDMIX_SOURCE_HASH="{source_hash()}"')
    threads = [] if os.name == "nt" or sys.platform == "darwin" else ["-pthread"]
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=".build-") as folder:
        sources = sorted(SOURCES.glob("*.cpp"))
        objects = [str(Path(folder) / f"{source.stem}.o") for source in sources]
        steps = [
            [
                *command,
                *flags,
                *threads,
                *special.get(source.name, ()),
                "-c",
                str(source),
                "-o",
                path,
            ]
            for source, path in zip(sources, objects, strict=True)
        ]
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            list(pool.map(_run, steps))
        library = str(Path(folder) / LIBRARY_NAME)
        sanitizers = [flag for flag in flags if flag.startswith("-fsanitize")]
        _run([*command, "-shared", *threads, *sanitizers, *objects, "-o", library])
        os.replace(library, output)


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
            timeout=COMPILER_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{command[0]} did not run: {error}") from None
    if done.returncode:
        raise BuildError(f"{shlex.join(command)}\n{done.stdout}")
    if done.stdout:
        sys.stderr.write(done.stdout)


def main() -> int:
    """Build in place.

    Returns: the exit code.
    """
    try:
        build(SOURCES / LIBRARY_NAME)
    except BuildError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
