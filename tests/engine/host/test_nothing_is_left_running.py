"""Whatever ends first, everything that it started ends with it, within 3 s."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from engine.session import Session, SessionOptions
from tests.processes import command_of, has_ended, processes_below

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
    alive = [process for process in there if not has_ended(process)]
    names = [command_of(p) for p in alive]
    for process in alive:
        process.kill()
    assert not alive, f"still there after {END_SECONDS} s: {names}"


def test_closing_ends_host_workers_and_runners(tiny_folder: Path) -> None:
    session = Session(SessionOptions(model=str(tiny_folder), num_workers=2))
    host = psutil.Process(session.client.host_pid)
    processes = [host, *host.children(recursive=True)]
    roles = [" ".join(command_of(p)) for p in processes]
    assert sum("shardmix-runner local-" in role for role in roles) == 2
    assert sum("shardmix-worker" in role for role in roles) == 3
    session.close()
    assert_gone(processes)


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL is a POSIX signal")
def test_killing_the_starter_ends_everything(tiny_folder: Path) -> None:
    command = [sys.executable, "-c", STARTER, str(tiny_folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as starter:
        try:
            assert starter.stdout is not None
            assert starter.stdout.readline().strip() == b"ready"
            children = psutil.Process(starter.pid).children(recursive=True)
        finally:
            starter.kill()
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
    (worker,) = processes_below(host, "shardmix-worker", "local-1")
    runners = worker.children(recursive=True)
    worker.kill()
    assert_gone(runners)


@pytest.mark.skipif(sys.platform == "win32", reason="SIGSTOP is a POSIX signal")
def test_closing_ends_a_frozen_runner_too(tiny_folder: Path) -> None:
    """Bug: its worker ended before it had the time to kill it."""
    session = Session(SessionOptions(model=str(tiny_folder), num_workers=2))
    host = psutil.Process(session.client.host_pid)
    processes = [host, *host.children(recursive=True)]
    (runner,) = processes_below(host, "shardmix-runner", "local-2/cpu")
    runner.suspend()
    session.close()
    assert_gone(processes)


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL is a POSIX signal")
def test_killing_the_starter_while_runners_start_ends_them_too(tiny_folder: Path) -> None:
    """Bug: a runner heard of its parent's end only after it had imported torch."""
    with subprocess.Popen([sys.executable, "-c", STARTER, str(tiny_folder)]) as starter:
        process = psutil.Process(starter.pid)
        deadline = time.monotonic() + 60
        try:
            while not processes_below(process, "shardmix-runner"):
                assert time.monotonic() < deadline, "no runner was started"
            children = process.children(recursive=True)
        finally:
            starter.kill()
    assert_gone(children)
