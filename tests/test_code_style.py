"""The sources pass ruff, pyright and the import contracts, as configured in pyproject.toml."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def _program(name: str) -> str:
    """A console script of the environment that runs the tests."""
    suffix = ".exe" if os.name == "nt" else ""
    return str(Path(sysconfig.get_path("scripts")) / f"{name}{suffix}")


def _check(command: list[str]) -> None:
    # Pyright would ask the package index for a newer version of itself.
    environment = dict(os.environ, PYRIGHT_PYTHON_IGNORE_WARNINGS="1", NO_COLOR="1")
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        timeout=280,
        check=False,
    )
    if done.returncode:
        pytest.fail(f"{' '.join(command)}\n{done.stdout}\n{done.stderr}", pytrace=False)


def test_ruff_finds_nothing() -> None:
    _check([sys.executable, "-m", "ruff", "check", "."])


def test_every_file_is_formatted() -> None:
    _check([sys.executable, "-m", "ruff", "format", "--check", "."])


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_types_hold() -> None:
    _check([sys.executable, "-m", "pyright"])


def test_imports_point_one_way() -> None:
    _check([_program("lint-imports")])
