"""A runner that dies or freezes in the middle of an answer ends it with an error that names the
device and its layers; the host lives and can go on."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from engine.client import Event
from engine.errors import EngineError, WorkerLost
from engine.host import messages as api
from engine.plan.plan import PlanShape
from engine.plan.presets import pipeline
from engine.session import Session, SessionOptions, simulated_devices
from tests.engine.host.conftest import runner_of

pytestmark = [
    pytest.mark.network,
    pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals"),
]


@pytest.fixture
def session(tiny_folder: Path) -> Iterator[Session]:
    """One for each test: what these tests start anew must end with them."""
    options = SessionOptions(
        model=str(tiny_folder), dtype="float32", num_workers=2, kv_window=100_000
    )
    with Session(options) as opened:
        yield opened


# A killed runner must be named within 5 s, a frozen one too; the rest is room for a busy machine.
NAMED_SECONDS = 10.0


def interrupt_answer(session: Session, act: Callable[[], None]) -> EngineError:
    """Start an endless answer, act after some tokens, and return the error that ends it."""
    call = api.Generate(
        request_id=session.client.next_request_id(),
        raw_prompt="abc",
        max_tokens=90_000,
        sampling=api.SamplingSettings(temperature=0.0),
        ignore_eos=True,
    )
    seen = 0

    def on_event(event: Event) -> None:
        nonlocal seen
        if isinstance(event.message, api.TokensGenerated):
            seen += 1
            if seen == 5:
                act()

    with pytest.raises(WorkerLost) as caught:
        session.client.run(call, on_event, timeout_seconds=60)
    return caught.value


def test_a_killed_runner_is_named_with_its_layers_and_the_cause(session: Session) -> None:
    shape = PlanShape.from_config(session.model.config)
    session.apply(pipeline(shape, simulated_devices(2), [1, 2]))
    victim = runner_of(session, "local-1/cpu")
    killed_at = 0.0

    def kill() -> None:
        nonlocal killed_at
        killed_at = time.monotonic()
        victim.kill()

    error = interrupt_answer(session, kill)
    assert time.monotonic() - killed_at < NAMED_SECONDS
    assert "local-1/cpu, which computes layer 0, was lost: killed by SIGKILL" in str(error)


def test_the_host_lives_and_serves_the_same_plan_again(session: Session) -> None:
    before = session.generate("abc", raw=True, max_tokens=12)
    interrupt_answer(session, runner_of(session, "local-2/cpu").kill)
    session.apply(session.plan)
    assert session.generate("abc", raw=True, max_tokens=12).token_ids == before.token_ids


def test_a_frozen_runner_is_named_and_replaced(session: Session) -> None:
    """Bug: the frozen process stayed the device's runner, and the next plan waited for it."""
    before = session.generate("abc", raw=True, max_tokens=12)
    victim = runner_of(session, "local-2/cpu")
    error = interrupt_answer(session, victim.suspend)
    assert "local-2/cpu" in str(error)
    assert "no longer answers" in str(error)
    session.apply(session.plan)
    assert session.generate("abc", raw=True, max_tokens=12).token_ids == before.token_ids
    assert runner_of(session, "local-2/cpu").pid != victim.pid


def test_a_runner_killed_while_idle_ends_the_plan(tiny_folder: Path) -> None:
    lost: list[str] = []

    def listen(message: object) -> None:
        if isinstance(message, api.PlanLost):
            lost.append(message.message)

    with Session(SessionOptions(model=str(tiny_folder)), listen) as session:
        runner_of(session, "this/cpu").kill()
        deadline = time.monotonic() + NAMED_SECONDS
        while not lost and time.monotonic() < deadline:
            event = session.client.receive(0.1)
            if event is not None:
                listen(event.message)
        assert lost
        assert "this/cpu, which computes layers 0-2 and the output head" in lost[0]
        with pytest.raises(EngineError, match="no plan is in force"):
            session.generate("abc", raw=True)


def test_a_killed_worker_is_reported_and_comes_back_with_the_next_plan(session: Session) -> None:
    host = psutil.Process(session.client.host_pid)
    before = session.generate("abc", raw=True, max_tokens=8)
    worker = next(p for p in host.children() if p.cmdline()[-1] == "local-1")
    error = interrupt_answer(session, worker.kill)
    assert "local-1/cpu" in str(error)
    session.apply(session.plan)
    assert session.generate("abc", raw=True, max_tokens=8).token_ids == before.token_ids
