"""`shardmix-worker` as a person meets it: run, status, token, pair, unpair, and its end."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from typer.testing import CliRunner

from engine.cluster import messages as m
from engine.cluster.join_token import PREFIX, decode_token
from engine.cluster.security import new_key_pair
from tests.processes import processes_below
from tests.workers.hosts import PATIENCE_SECONDS, Host, PairingHost, wait_until
from tests.workers.worker_command import WorkerCommand
from workers.cli import app

pytestmark = [pytest.mark.network, pytest.mark.slow]

# Promised; a busy machine starts nothing in this time, but it ends things.
END_SECONDS = 3.0


@pytest.fixture
def box(tmp_path: Path) -> Iterator[WorkerCommand]:
    """A computer whose worker does not run yet."""
    computer = WorkerCommand(tmp_path)
    yield computer
    computer.close()


@pytest.mark.parametrize("command", [["status"], ["token"], ["pair"], ["unpair", "desk"]])
def test_without_a_worker_every_command_says_so_in_one_line(command: list[str]) -> None:
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 1
    # A service that does not run is one reason why there is no worker.
    assert result.stdout.startswith("service: " if command == ["status"] else "")
    assert result.stderr == (
        "shardmix-worker: no worker runs on this computer; start one with `shardmix-worker run`\n"
    )


def test_it_tells_who_it_is_and_ends_when_told(box: WorkerCommand) -> None:
    token = decode_token(box.run("--threads=1", "--memory-limit=1GB", "--trusted-network"))
    host_keys = new_key_pair()
    with Host(token.endpoint, token.public_key, token.guest) as guest:
        guest.say(m.Enroll(public_key=host_keys.public, host_name="kitchen"))
        guest.hear(m.Enrolled)
    with Host(token.endpoint, token.public_key, host_keys) as host:
        host.hello("kitchen")
        description = host.hear(m.NodeDescription)
        cpu = description.devices[0]
        assert (cpu.device, cpu.num_cores, cpu.memory_bytes) == ("box/cpu", 1, 10**9)
        assert description.trusted_network
        code, output, _ = box.command("status")
        assert code == 0
        for words in (
            rf"box \([0-9a-f:]+\) listens on {token.endpoint}",
            "used by kitchen",
            "lends 1 cores, 1.0 GB",
            "kitchen .*since",
            "exchanges without encryption allowed",
        ):
            assert re.search(words, output), output
        # A second worker of the same installation is one too many.
        code, _, errors = box.command("run", "--name=other", f"--port={box.port + 100}")
        assert code == 1
        assert "runs already" in errors
        assert errors.count("\n") == 1
        host.say(m.StartRunner(device="box/cpu", listen_address=""))
        assert box.process is not None
        worker = psutil.Process(box.process.pid)
        wait_until(
            lambda: bool(processes_below(worker, "shardmix-runner")), "a runner has begun to start"
        )
        # A measurement of speed runs too: figures of two cores say nothing of one.
        started = worker.children(recursive=True)
        before = time.monotonic()
        code, errors = box.signal(signal.SIGTERM)
        assert code == 0, errors
        assert time.monotonic() - before < END_SECONDS
        _, alive = psutil.wait_procs(started, timeout=END_SECONDS)
        assert not alive
    assert not (box.settings / "worker.json").exists()


def test_its_key_and_its_pairings_outlive_it(box: WorkerCommand) -> None:
    token = decode_token(box.run())
    host_keys = new_key_pair()
    with Host(token.endpoint, token.public_key, token.guest) as guest:
        guest.say(m.Enroll(public_key=host_keys.public, host_name="kitchen"))
        guest.hear(m.Enrolled)
    box.signal(signal.SIGKILL)
    # What it left behind says nothing: nobody holds its lock.
    assert (box.settings / "worker.json").exists()
    code, _, errors = box.command("status")
    assert (code, errors.count("\n")) == (1, 1)
    again = decode_token(box.run())
    assert again.public_key == token.public_key
    assert again.guest != token.guest
    with Host(again.endpoint, again.public_key, host_keys) as host:
        host.hello()
        host.hear(m.NodeDescription)
    assert box.command("unpair", "kitchen")[0] == 0
    with Host(again.endpoint, again.public_key, host_keys) as host:
        host.wait_for_refusal()
    code, _ = box.signal(signal.SIGINT)
    assert code == 130


@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_token_is_printed_where_a_person_reads_it_alone(
    box: WorkerCommand, is_terminal: bool
) -> None:
    """The output of a service is kept in a log."""
    near, far = os.openpty()
    output = far if is_terminal else subprocess.PIPE
    box.process = box.start(
        "run", "--name=box", "--host=127.0.0.1", f"--port={box.port}", stdout=output
    )
    os.close(far)
    assert box.process.stderr is not None
    line = box.process.stderr.readline()
    assert re.search("box listens on .*`shardmix-worker token`", line)
    if is_terminal:
        with open(near, encoding="ascii") as terminal:
            assert decode_token(terminal.readline()).name == "box"
            box.signal(signal.SIGTERM)
        return
    os.close(near)
    code, token, _ = box.command("token")
    assert (code, decode_token(token).name) == (0, "box")
    box.process.send_signal(signal.SIGTERM)
    said, errors = box.process.communicate(timeout=PATIENCE_SECONDS)
    assert said == ""
    assert PREFIX not in errors


def test_pairing_by_a_person(box: WorkerCommand) -> None:
    """Who reads the digits from the command, and answers it."""
    endpoint = decode_token(box.run()).endpoint
    with PairingHost(endpoint, name="kitchen") as desk:
        pairing = box.start("pair", stdin=subprocess.PIPE)
        code = _reach_code(desk, pairing)
        desk.judge(True)
        output, errors = pairing.communicate("y\n", timeout=PATIENCE_SECONDS)
    assert f"{code[:3]} {code[3:]}" in errors
    assert pairing.returncode == 0, errors
    assert output.startswith("Paired with kitchen (")


@pytest.mark.parametrize("is_same", [True, False])
def test_pairing_by_a_script(box: WorkerCommand, is_same: bool) -> None:
    """Which learns the digits from the other computer, and expects those, or others."""
    endpoint = decode_token(box.run()).endpoint
    with PairingHost(endpoint, name="kitchen") as desk:
        waiting = box.start("pair")
        code = _reach_code(desk, waiting)
        desk.judge(True)
        expected = code if is_same else f"{(int(code) + 1) % 10**6:06d}"
        exit_code, output, errors = box.command("pair", f"--yes-if={expected}")
        _, waiting_errors = waiting.communicate(timeout=PATIENCE_SECONDS)
    assert exit_code == waiting.returncode == (0 if is_same else 1)
    if is_same:
        assert output.startswith("Paired with kitchen (")
    else:
        assert "not paired: the codes were not the same" in errors
        assert "not paired: the codes were not the same" in waiting_errors


def _reach_code(desk: PairingHost, pairing: subprocess.Popen[str]) -> str:
    """Once the command waits, begin at the other end."""
    assert pairing.stderr is not None
    line = pairing.stderr.readline()
    assert line.startswith("Waiting 60 s for an engine host"), line
    return desk.reach_code()
