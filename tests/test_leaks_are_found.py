"""The fixture that all tests share fails a test which leaves something running, and only that."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

CONFTEST = Path(__file__).with_name("conftest.py")
CASES = """\
import subprocess, sys, threading, time
import pytest

SLEEP = [sys.executable, "-c", "import time; time.sleep(60)"]
kept = []

@pytest.fixture(scope="module")
def server():
    process = subprocess.Popen(SLEEP)
    yield process
    process.kill()
    process.wait()

@pytest.fixture
def helper():
    process = subprocess.Popen(SLEEP)
    yield process
    process.kill()
    process.wait()

def test_wider_fixture(server): pass

def test_own_fixture(server, helper): pass

def test_ends_soon():
    threading.Thread(target=time.sleep, args=(0.5,)).start()

def test_leaks_process():
    kept.append(subprocess.Popen(SLEEP))

def test_after_it(): pass

def test_leaks_thread():
    threading.Thread(target=time.sleep, args=(5,), name="the-left-one").start()

def test_daemon_thread():
    threading.Thread(target=time.sleep, args=(5,), daemon=True).start()
"""
INTERRUPTED = """\
def test_interrupted():
    raise KeyboardInterrupt
"""


def run_pytest(folder: Path, source: str) -> subprocess.CompletedProcess[str]:
    """Run a test file with this folder's conftest."""
    shutil.copy(CONFTEST, folder)
    (folder / "test_cases.py").write_text(source)
    (folder / "pytest.ini").write_text("[pytest]\n")
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-rA", "-p", "no:cacheprovider", str(folder)],
        cwd=folder,
        env=dict(os.environ, NO_COLOR="1", COLUMNS="300"),
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


def test_a_left_process_or_thread_fails_its_own_test(tmp_path: Path) -> None:
    done = run_pytest(tmp_path, CASES)
    summary = done.stdout[done.stdout.index("short test summary") :].splitlines()
    errors = [line for line in summary if line.startswith("ERROR")]
    assert len(errors) == 2, done.stdout
    assert "::test_leaks_process" in errors[0]
    assert "time.sleep(60)" in errors[0]
    assert "::test_leaks_thread" in errors[1]
    assert "thread the-left-one" in errors[1]
    assert sum(line.startswith("PASSED") for line in summary) == 7


def test_ctrl_c_ends_a_test_run_with_130(tmp_path: Path) -> None:
    assert run_pytest(tmp_path, INTERRUPTED).returncode == 130
