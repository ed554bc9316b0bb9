"""`shardmix-worker run` serves whoever has its token, and nobody else."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import msgspec
import psutil
import pytest

from engine.cluster.join_token import JoinToken, decode_token
from engine.cluster.security import new_key_pair
from engine.errors import PeerRefused
from engine.plan.plan import PlanShape
from engine.plan.presets import from_percentages, single
from engine.session import Session, SessionOptions
from tests.processes import processes_below
from tests.tiny_models import save_tiny_llama
from tests.workers.worker_command import WorkerCommand

pytestmark = pytest.mark.network


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[tuple[int, str]]:
    """The process of a worker named box, of another installation than the desk's; and its token."""
    computer = WorkerCommand(tmp_path / "box")
    token = computer.run()
    assert computer.process is not None
    yield computer.process.pid, token
    code, errors = computer.signal(signal.SIGINT)
    assert code == 130, errors


def test_it_computes_its_share_and_frees_it_when_the_desk_closes(
    worker: tuple[int, str], tmp_path: Path
) -> None:
    pid, token = worker
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
        (runner,) = processes_below(psutil.Process(pid), "shardmix-runner")
    _, alive = psutil.wait_procs([runner], timeout=5)
    assert not alive


def test_the_desk_can_come_again(worker: tuple[int, str], tmp_path: Path) -> None:
    _, token = worker
    save_tiny_llama(tmp_path)
    answers: list[tuple[int, ...]] = []
    for _ in range(2):
        with Session(SessionOptions(model=str(tmp_path), nodes=(token,))) as session:
            session.apply(single(PlanShape.from_config(session.model.config), "box/cpu"))
            answers.append(session.generate("abc", raw=True, max_tokens=9).token_ids)
    assert answers[0] == answers[1]


def test_a_token_with_another_key_is_not_let_in(worker: tuple[int, str], tmp_path: Path) -> None:
    _, token = worker
    forged = msgspec.structs.replace(decode_token(token), guest=new_key_pair())
    save_tiny_llama(tmp_path)
    with pytest.raises(PeerRefused, match="box does not let this computer in"):
        Session(SessionOptions(model=str(tmp_path), nodes=(forged.encode(),)))


def test_a_damaged_token_is_refused() -> None:
    keys = new_key_pair()
    token = JoinToken("box", "tcp://127.0.0.1:47500", keys.public, keys, 0.0).encode()
    assert decode_token(f" {token}\n").name == "box"
    for damaged in (token[:-20], "shardmix2-", "hello", token[3:], token + "!"):
        with pytest.raises(PeerRefused, match="is not a join token"):
            decode_token(damaged)
