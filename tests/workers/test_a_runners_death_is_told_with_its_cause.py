"""Exit code, signal, out of memory, last words: whatever ended a process, its worker says it."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import psutil
import pytest

from engine.cluster import messages as m
from engine.cluster.processes import Child, Greeting, describe_exit
from engine.cluster.security import new_key_pair
from tests.workers.hosts import PATIENCE_SECONDS, Host, running_worker, wait_until
from workers.out_of_memory import KillCounter, counter_files

HOST = new_key_pair()
# Promised: how soon the engine host hears of it.
DEATH_SECONDS = 2.0
START_SECONDS = 60.0


@pytest.mark.network
@pytest.mark.slow
def test_a_real_runner(tmp_path: Path) -> None:
    with running_worker(tmp_path, HOST) as worker, worker.host(HOST) as host:
        host.hello(telemetry_hz=5.0)
        host.hear(m.NodeDescription)
        first = _start(host)
        pid = _start(host)  # A host that came back knows nothing of the first.
        assert not psutil.pid_exists(first)
        assert "shardmix-runner" in psutil.Process(pid).cmdline()
        _wait_for_usage(host, pid)
        os.kill(pid, signal.SIGKILL)
        before = time.monotonic()
        exited = host.hear(m.RunnerExited)  # Of this one alone: the first was told to end.
        assert time.monotonic() - before < DEATH_SECONDS
        assert (exited.device, exited.pid) == ("box/cpu", pid)
        assert exited.cause.startswith("killed by SIGKILL")
        stopped = _start(host)
        host.say(m.StopRunner(device="box/cpu"))
        wait_until(lambda: not psutil.pid_exists(stopped), "the runner is gone")
        left = [host.channel.receive(100) for _ in range(3)]
        assert not [r for r in left if r is not None and isinstance(r.message, m.RunnerExited)]


def _start(host: Host) -> int:
    """Start the runner of the CPU; its process id, once it listens."""
    host.say(m.StartRunner(device="box/cpu", listen_address=""))
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        host.hello(telemetry_hz=5.0)
        received = host.channel.receive(1000)
        if received is not None and isinstance(received.message, m.RunnerStarted):
            return received.message.pid
        assert received is None or not isinstance(received.message, m.RunnerExited), received
    raise AssertionError("the runner did not start")


def _wait_for_usage(host: Host, pid: int) -> None:
    """Until telemetry tells what the runner uses."""

    def is_told() -> bool:
        processes = host.hear(m.Telemetry).processes
        return any(usage.pid == pid and usage.role == "runner box/cpu" for usage in processes)

    wait_until(is_told, "telemetry of the runner")


@pytest.mark.parametrize(
    ("asked", "cause"),
    [
        (
            m.StartRunner(device="box/cuda7", listen_address=""),
            "this node does not lend a device 'box/cuda7'",
        ),
        (
            m.StartRunner(device="box/cpu", listen_address="", transport="torch"),
            "needs --trusted-network on every node; box was started without it",
        ),
    ],
)
@pytest.mark.network
def test_a_runner_that_may_not_start_has_a_cause_too(
    tmp_path: Path, asked: m.StartRunner, cause: str
) -> None:
    with running_worker(tmp_path, HOST) as worker, worker.host(HOST) as host:
        host.hello()
        host.say(asked)
        exited = host.hear(m.RunnerExited)
        assert (exited.device, exited.pid) == (asked.device, 0)
        assert cause in exited.cause


@pytest.mark.parametrize(
    ("program", "cause"),
    [
        ("raise SystemExit(3)", "exit code 3"),
        ("import os; os.abort()", "killed by SIGABRT"),
        ("import os; os.kill(os.getpid(), 9)", "killed by SIGKILL (ended by someone, or out"),
        ("import os; os.kill(os.getpid(), 11)", "killed by SIGSEGV"),
        ("raise ValueError('no such tensor')", "/ ValueError: no such tensor"),
        ("raise MemoryError('4 GB wanted')", "out of memory, exit code 1; last words: "),
    ],
)
def test_any_process_of_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str, cause: str
) -> None:
    """A real process that dies as runners can."""
    (tmp_path / "dying.py").write_text(program, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    told: list[str] = []
    is_over = threading.Event()

    def on_exit(child: Child) -> None:
        told.append(child.cause())
        is_over.set()

    child = Child("dying", [], Greeting("", {}), on_exit=on_exit)
    try:
        assert is_over.wait(PATIENCE_SECONDS)
        assert cause in told[0]
        assert "\n" not in told[0]
    finally:
        child.end(0)


def test_the_last_three_lines_are_told() -> None:
    words = ["first", "", "second", "  third ", "fourth " + "x" * 1000, ""]
    told = describe_exit(1, words, is_out_of_memory=False)
    assert told.startswith("exit code 1; last words: second / third / fourth xxx")
    assert len(told) < 400


def test_last_words_cannot_steer_a_terminal() -> None:
    told = describe_exit(1, ["\x1b[2J\x1b]0;title\x07red\r\u202ealert", "\x1b\x00"], False)
    assert told == "exit code 1; last words: [2J ]0;title red alert"


def test_the_kernel_is_believed_when_it_says_that_memory_ran_out(tmp_path: Path) -> None:
    events = tmp_path / "memory.events"
    events.write_text("low 0\nhigh 0\nmax 7\noom 2\noom_kill 4\noom_group_kill 0\n")
    counter = KillCounter([tmp_path / "hidden", events])
    assert not counter.has_risen()
    events.write_text("low 0\nhigh 0\nmax 9\noom 3\noom_kill 5\noom_group_kill 0\n")
    assert counter.has_risen()
    told = describe_exit(-signal.SIGKILL, [], is_out_of_memory=True)
    assert told == "out of memory: the system killed it by SIGKILL"
    # Another process was meant: this one ended otherwise.
    assert describe_exit(1, [], is_out_of_memory=True) == "exit code 1"


def test_the_counters_of_both_kinds_of_control_groups_are_found(tmp_path: Path) -> None:
    first = "9:name=systemd:/\n4:memory:/lent/box\n0::/\n"
    second = "0::/user.slice/worker.service\n"
    assert counter_files(first, tmp_path)[:2] == [
        tmp_path / "memory" / "lent" / "box" / "memory.oom_control",
        tmp_path / "memory.events",
    ]
    found = counter_files(second, tmp_path)
    assert found[0] == tmp_path / "user.slice" / "worker.service" / "memory.events"
    assert found[-1] == Path("/proc/vmstat")
