"""The worker installs and runs where there is no Qt.

Every process of these tests refuses to import Qt, and so do all processes that they start.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.tiny_models import save_tiny_llama

ROOT = Path(__file__).resolve().parents[2]
RUN_SECONDS = 110
# What DESIGN § 9 promises of a tiny model in float32.
LOGIT_TOLERANCE = 1e-5
# Of distributions; "pyside6-essentials" begins with one of them.
QT_PACKAGES = ("pyside", "shiboken", "pyqt", "superqt", "qtawesome", "qtpy")

REFUSE = """
import os, sys

class NoQt:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0].lower() in {
            "pyside6", "shiboken6", "pyqtgraph", "superqt", "qtawesome", "app"
        }:
            raise ModuleNotFoundError(f"{name} is not installed here", name=name)

sys.meta_path.insert(0, NoQt())
with open(os.environ["REFUSING_PROCESSES"], "a") as log:
    print(*sys.orig_argv, file=log)
"""

IMPORT_ALL = """
import importlib, pkgutil, engine, workers
names = [
    module.name
    for package in (engine, workers)
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + ".")
]
for name in names:
    importlib.import_module(name)
print(len(names))
"""


class WithoutQt:
    """Runs Python where Qt cannot be imported."""

    def __init__(self, folder: Path) -> None:
        (folder / "sitecustomize.py").write_text(REFUSE, encoding="utf-8")
        self._log = folder / "processes"
        self._environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)]),
            "REFUSING_PROCESSES": str(self._log),
        }

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-P", *arguments],
            env=self._environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            timeout=RUN_SECONDS,
            check=False,
        )

    def processes(self) -> str:
        """Command lines of all processes that refused Qt."""
        return self._log.read_text(encoding="utf-8")


@pytest.fixture
def without_qt(tmp_path: Path) -> WithoutQt:
    return WithoutQt(tmp_path)


def test_no_package_that_the_worker_needs_brings_qt() -> None:
    """Walks the requirements of the installed packages, as pip would without any extra."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    seen: set[str] = set()
    open_requirements = [Requirement(text) for text in project["dependencies"]]
    while open_requirements:
        requirement = open_requirements.pop()
        name = canonicalize_name(requirement.name)
        if name in seen or (requirement.marker and not requirement.marker.evaluate({"extra": ""})):
            continue
        seen.add(name)
        try:
            texts = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue  # Not for this system.
        open_requirements += [Requirement(text) for text in texts]
    assert {"torch", "pyzmq", "psutil", "zeroconf"} <= seen
    assert [name for name in sorted(seen) if name.startswith(QT_PACKAGES)] == []


def test_refusing_refuses(without_qt: WithoutQt) -> None:
    done = without_qt.run("-c", "import PySide6")
    assert done.returncode == 1 and "PySide6 is not installed here" in done.stderr


def test_every_module_of_engine_and_workers_imports(without_qt: WithoutQt) -> None:
    done = without_qt.run("-W", "ignore", "-c", IMPORT_ALL)
    assert done.returncode == 0, done.stderr
    num_files = sum(
        1
        for package in ("engine", "workers")
        for path in (ROOT / package).rglob("*.py")
        if path.parent != ROOT / package or path.name != "__init__.py"
    )
    assert int(done.stdout.splitlines()[-1]) == num_files


def test_the_commands_show_their_help(without_qt: WithoutQt) -> None:
    done = without_qt.run("-m", "workers.cli", "--help")
    assert done.returncode == 0, done.stderr
    for command in ("run", "install", "uninstall"):
        assert command in done.stdout


@pytest.mark.slow
@pytest.mark.network
def test_a_worker_and_its_runner_compute(without_qt: WithoutQt, tmp_path: Path) -> None:
    oracle = save_tiny_llama(tmp_path / "model")
    out = tmp_path / "logits.npy"
    done = without_qt.run(
        *("-m", "engine.cli", "logits", "--ids", "1,2,3", "--out", str(out)),
        *("--model", str(tmp_path / "model"), "--workers", "1", "--dtype", "float32"),
    )
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        expected = oracle(torch.tensor([[1, 2, 3]])).logits[0].numpy()
    np.testing.assert_allclose(np.load(out), expected, rtol=0, atol=LOGIT_TOLERANCE)
    processes = without_qt.processes()
    assert "shardmix-worker" in processes and "shardmix-runner" in processes
