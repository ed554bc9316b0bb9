"""`shardmix-worker run` serves whoever has its token, and nobody else."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import psutil
import pytest

from engine.cluster.join_token import JoinToken, decode_token
from engine.cluster.security import new_key_pair
from engine.errors import EngineError, PeerRefused
from engine.plan.plan import PlanShape
from engine.plan.presets import from_percentages, single
from engine.session import Session, SessionOptions
from tests.tiny_models import save_tiny_llama

pytestmark = pytest.mark.network


def free_port() -> int:
    """A port with room for the runners' ports after it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return min(int(probe.getsockname()[1]), 64000)


@pytest.fixture
def worker() -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A worker named box, and its token."""
    arguments = ["run", "--name", "box", "--host", "127.0.0.1", "--port", str(free_port())]
    process = subprocess.Popen(
        [sys.executable, "-m", "workers.cli", *arguments], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    yield process, process.stdout.readline().strip()
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 130
    process.stdout.close()


def test_it_computes_its_share_and_frees_it_when_the_desk_closes(
    worker: tuple[subprocess.Popen[str], str], tmp_path: Path
) -> None:
    process, token = worker
    save_tiny_llama(tmp_path)
    options = SessionOptions(model=str(tmp_path), dtype="float32", nodes=(token,))
    with Session(options) as session:
        alone = session.generate("abc", raw=True, max_tokens=20)
        shape = PlanShape.from_config(session.model.config)
        plan = from_percentages(shape, ["this/cpu", "box/cpu"], [40, 60])
        session.apply(plan)
        together = session.generate("abc", raw=True, max_tokens=20)
        assert together.token_ids == alone.token_ids
        assert {d.device for d in together.devices} == {"this/cpu", "box/cpu"}
        runners = psutil.Process(process.pid).children(recursive=True)
        assert any("shardmix-runner" in runner.cmdline() for runner in runners)
    _, alive = psutil.wait_procs(runners, timeout=5)
    assert not alive


def test_the_desk_can_come_again(worker: tuple[subprocess.Popen[str], str], tmp_path: Path) -> None:
    _process, token = worker
    save_tiny_llama(tmp_path)
    answers: list[tuple[int, ...]] = []
    for _ in range(2):
        with Session(SessionOptions(model=str(tmp_path), nodes=(token,))) as session:
            session.apply(single(PlanShape.from_config(session.model.config), "box/cpu"))
            answers.append(session.generate("abc", raw=True, max_tokens=9).token_ids)
    assert answers[0] == answers[1]


def test_a_token_with_another_key_is_not_let_in(
    worker: tuple[subprocess.Popen[str], str], tmp_path: Path
) -> None:
    _process, token = worker
    forged = msgspec.structs.replace(decode_token(token), guest=new_key_pair())
    save_tiny_llama(tmp_path)
    with Session(SessionOptions(model=str(tmp_path), nodes=(forged.encode(),))) as session:
        plan = single(PlanShape.from_config(session.model.config), "box/cpu")
        with pytest.raises(
            EngineError, match="box/cpu cannot take part: it does not let this computer in"
        ):
            session.apply(plan)


def test_a_damaged_token_is_refused() -> None:
    keys = new_key_pair()
    token = JoinToken("box", "tcp://127.0.0.1:47500", keys.public, keys, 0.0).encode()
    assert decode_token(f" {token}\n").name == "box"
    for damaged in (token[:-20], "shardmix2-", "hello", token[3:], token + "!"):
        with pytest.raises(PeerRefused, match="is not a join token"):
            decode_token(damaged)
