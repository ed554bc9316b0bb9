"""Whatever ends first, everything that it started ends with it, within 3 s."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from engine.session import Session, SessionOptions

pytestmark = pytest.mark.network

END_SECONDS = 3.0

STARTER = """
import sys, time
from engine.session import Session, SessionOptions
with Session(SessionOptions(model=sys.argv[1], num_workers=2)) as session:
    print("ready", flush=True)
    time.sleep(600)
"""


def assert_gone(processes: list[psutil.Process]) -> None:
    """Wait for all to end; names those that do not."""
    assert processes
    _, there = psutil.wait_procs(processes, timeout=END_SECONDS)
    # Where nobody reaps orphans (a container without init), an ended process stays listed.
    alive = [p for p in there if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
    names = [p.cmdline() for p in alive]
    for process in alive:
        process.kill()
    assert not alive, f"still there after {END_SECONDS} s: {names}"


def test_closing_ends_host_workers_and_runners(tiny_folder: Path) -> None:
    session = Session(SessionOptions(model=str(tiny_folder), num_workers=2))
    host = psutil.Process(session.client.host_pid)
    processes = [host, *host.children(recursive=True)]
    roles = [" ".join(p.cmdline()) for p in processes]
    assert sum("shardmix-runner local-" in role for role in roles) == 2
    assert sum("shardmix-worker" in role for role in roles) == 3
    session.close()
    assert_gone(processes)


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL is a POSIX signal")
def test_killing_the_starter_ends_everything(tiny_folder: Path) -> None:
    starter = subprocess.Popen(
        [sys.executable, "-c", STARTER, str(tiny_folder)], stdout=subprocess.PIPE
    )
    assert starter.stdout is not None
    assert starter.stdout.readline().strip() == b"ready"
    children = psutil.Process(starter.pid).children(recursive=True)
    starter.send_signal(signal.SIGKILL)
    starter.wait()
    starter.stdout.close()
    assert_gone(children)


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL is a POSIX signal")
def test_killing_the_host_ends_workers_and_runners(tiny_folder: Path) -> None:
    session = Session(SessionOptions(model=str(tiny_folder), num_workers=2))
    host = psutil.Process(session.client.host_pid)
    children = host.children(recursive=True)
    host.kill()
    assert_gone(children)
    session.close()


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL is a POSIX signal")
def test_killing_a_worker_ends_its_runner(session: Session) -> None:
    host = psutil.Process(session.client.host_pid)
    worker = next(p for p in host.children() if p.cmdline()[-1] == "local-1")
    runners = worker.children(recursive=True)
    worker.kill()
    assert_gone(runners)


@pytest.mark.skipif(sys.platform == "win32", reason="SIGSTOP is a POSIX signal")
def test_closing_ends_a_frozen_runner_too(tiny_folder: Path) -> None:
    """Bug: its worker ended before it had the time to kill it."""
    session = Session(SessionOptions(model=str(tiny_folder), num_workers=2))
    host = psutil.Process(session.client.host_pid)
    processes = [host, *host.children(recursive=True)]
    next(p for p in processes if p.cmdline()[-1] == "local-2/cpu").suspend()
    session.close()
    assert_gone(processes)


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL is a POSIX signal")
def test_killing_the_starter_while_runners_start_ends_them_too(tiny_folder: Path) -> None:
    """Bug: a runner heard of its parent's end only after it had imported torch."""
    starter = subprocess.Popen([sys.executable, "-c", STARTER, str(tiny_folder)])
    children: list[psutil.Process] = []
    deadline = time.monotonic() + 60
    while not any("shardmix-runner" in p.cmdline() for p in children if p.is_running()):
        assert time.monotonic() < deadline, "no runner was started"
        children = psutil.Process(starter.pid).children(recursive=True)
    starter.kill()
    starter.wait()
    assert_gone(children)
