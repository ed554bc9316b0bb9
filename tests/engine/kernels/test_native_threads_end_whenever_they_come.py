"""Helpers of the native kernels end, also those that come too late for the last work."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from engine.kernels.build_native import SOURCES

PROGRAM = Path(__file__).with_name("end_helpers.cpp")
# One that looked for its end before it read the turn hung within 10,000 times, on two cores.
TIMES, WATCHED_TIMES = 10_000, 500


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        timeout=200,
        check=False,
    )


def _build(compiler: list[str], program: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    sources = [str(PROGRAM), str(SOURCES / "thread_team.cpp")]
    options = ["-std=c++17", "-O2", "-pthread", f"-I{SOURCES}", *flags]
    return _run([*compiler, *options, *sources, "-o", str(program)])


@pytest.mark.slow
@pytest.mark.timeout(500)
def test_helpers_end_right_after_work(compiler: list[str], tmp_path: Path) -> None:
    program = tmp_path / "end_helpers"
    built = _build(compiler, program)
    assert built.returncode == 0, built.stdout + built.stderr
    assert _run([str(program), str(TIMES)]).stdout == "ended\n"


@pytest.mark.slow
@pytest.mark.timeout(500)
def test_no_thread_of_the_team_races_with_another(compiler: list[str], tmp_path: Path) -> None:
    program = tmp_path / "end_helpers"
    built = _build(compiler, program, "-g", "-fsanitize=thread")
    if built.returncode:
        pytest.skip(f"{compiler[0]} has no thread sanitizer: {built.stderr.splitlines()[-1]}")
    done = _run([str(program), str(WATCHED_TIMES)])
    if "unexpected memory mapping" in done.stderr:
        pytest.skip("the thread sanitizer cannot run with this system's layout of memory")
    assert (done.returncode, done.stdout) == (0, "ended\n"), done.stderr[-4000:]
