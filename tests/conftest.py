"""What all tests share: an offscreen window system, the default model, and a check for leaks."""

from __future__ import annotations

import hashlib
import os
import signal
import threading
import time
from collections.abc import Generator, Iterator
from pathlib import Path

import psutil
import pytest
from hypothesis import HealthCheck, settings

# A shell that starts the tests in the background lets them, and so all their children, ignore
# Ctrl+C; with a handler here the children begin with the system's own answer to it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Tests find nobody, and nobody finds them, unless they ask for an interface.
os.environ["SHARDMIX_DISCOVERY"] = "off"

# Before anything imports Qt.
os.environ.setdefault("QT_QPA_PLATFORM", "offscreen")

settings.register_profile(
    "shardmix",
    deadline=None,  # two busy cores say nothing about an example's time
    max_examples=60,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("shardmix")

LEAK_GRACE_SECONDS = 3.0
_POLL_SECONDS = 0.02
# Helpers that the standard library starts once per process and ends with it.
_STANDARD_HELPERS = ("multiprocessing.resource_tracker", "multiprocessing.forkserver")
EXIT_INTERRUPTED = 130

_interrupts: list[BaseException] = []


@pytest.fixture(scope="session", autouse=True)
def settings_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Keys and trusted computers of what wider fixtures start; never those of the person here."""
    folder = tmp_path_factory.mktemp("settings")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SHARDMIX_CONFIG", str(folder))
        yield folder


@pytest.fixture(autouse=True)
def own_settings(
    settings_folder: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """An installation of its own for every test: what one pairs with, the next does not know."""
    folder = settings_folder / hashlib.sha256(request.node.nodeid.encode()).hexdigest()[:16]
    monkeypatch.setenv("SHARDMIX_CONFIG", str(folder))
    return folder


@pytest.fixture(scope="session")
def default_model_path() -> Path:
    """The default model's file, fetched on first use."""
    from engine.weights.models import fetch_default_model

    return fetch_default_model(lambda done, total: None)


@pytest.fixture(autouse=True)
def nothing_leaks() -> Iterator[None]:
    """Fail a test that leaves a child process or a non-daemon thread behind.

    What fixtures of a wider scope started earlier does not count, nor what those processes start.
    """
    processes_before = _child_processes()
    threads_before = set(threading.enumerate())
    yield
    deadline = time.monotonic() + LEAK_GRACE_SECONDS
    while True:
        processes = {
            process
            for process in _child_processes() - processes_before
            if not _has_parent_in(process, processes_before)
        }
        threads = {
            thread
            for thread in threading.enumerate()
            if thread not in threads_before and not thread.daemon and thread.is_alive()
        }
        if processes:
            processes = {process for process in processes if not _is_helper_or_gone(process)}
        if not processes and not threads:
            return
        if time.monotonic() >= deadline:
            break
        time.sleep(_POLL_SECONDS)
    names = [f"process {process.pid} {_command(process)}" for process in processes]
    names += [f"thread {thread.name}" for thread in threads]
    for process in processes:
        process.kill()
    pytest.fail(f"left behind {LEAK_GRACE_SECONDS} s after the test: {'; '.join(names)}")


def _has_parent_in(process: psutil.Process, owners: set[psutil.Process]) -> bool:
    """Whether one of `owners` started this process, directly or not."""
    try:
        return not owners.isdisjoint(process.parents())
    except psutil.Error:
        return True  # It ended meanwhile.


def _child_processes() -> set[psutil.Process]:
    """All descendants of this process, zombies included."""
    if not _may_have_children():
        return set()
    return set(psutil.Process().children(recursive=True))


def _may_have_children() -> bool:
    """False only where there are none; psutil would read every process of the machine."""
    try:
        return any((task / "children").read_bytes() for task in Path("/proc/self/task").iterdir())
    except OSError:  # not Linux, a kernel without this file, or a thread that just ended
        return True


def _is_helper_or_gone(process: psutil.Process) -> bool:
    if not process.is_running():
        return True
    command = _command(process)
    return any(helper in command for helper in _STANDARD_HELPERS)


def _command(process: psutil.Process) -> str:
    try:
        if process.status() == psutil.STATUS_ZOMBIE:
            return "(a zombie: nobody waited for it)"
        return " ".join(process.cmdline())
    except psutil.Error:
        return "(gone)"


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what needs a CUDA device where there is none."""
    if item.get_closest_marker("gpu") is not None:
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")


def pytest_keyboard_interrupt(excinfo: pytest.ExceptionInfo[BaseException]) -> None:
    """Remember Ctrl+C: pytest's exit code for it is that of a failed collection too."""
    if isinstance(excinfo.value, KeyboardInterrupt):
        _interrupts.append(excinfo.value)


@pytest.hookimpl(wrapper=True)
def pytest_sessionfinish(session: pytest.Session) -> Generator[None]:
    """End with 130 after Ctrl+C, as the commands do."""
    yield
    if _interrupts:
        session.exitstatus = EXIT_INTERRUPTED
