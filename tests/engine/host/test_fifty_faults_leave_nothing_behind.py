"""Fifty random faults in a row: every answer is right, nothing hangs, and the engine host has no
more processes, threads, open files and memory at the end than after the first few."""

from __future__ import annotations

import gc
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest

from engine.client import Event
from engine.host import messages as api
from engine.plan.plan import Plan, PlanShape
from engine.plan.presets import even, from_percentages, pipeline
from engine.session import Session, SessionOptions, simulated_devices
from tests.engine.host.conftest import runner_of

pytestmark = [
    pytest.mark.network,
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals"),
]

NUM_FAULTS = 50
# By then caches and thread pools have their size.
WARM_UP = 8
NUM_TOKENS = 48
SEED = 20
# The allocator keeps some of what it once had; a host that leaked weights or messages of each
# round would grow by more.
MAX_GROWTH_BYTES = 48 << 20


class Use(NamedTuple):
    """What a host holds."""

    processes: int
    threads: int
    files: int
    memory: int


@pytest.fixture
def session(tiny_folder: Path) -> Iterator[Session]:
    options = SessionOptions(model=str(tiny_folder), dtype="float32", num_workers=3)
    with Session(options) as opened:
        yield opened


def use_of(session: Session) -> Use:
    gc.collect()
    host = psutil.Process(session.client.host_pid)
    return Use(
        len(host.children(recursive=True)),
        host.num_threads(),
        host.num_fds(),
        host.memory_info().rss,
    )


def plans(shape: PlanShape) -> list[Plan]:
    devices = simulated_devices(3)
    return [
        even(shape, devices),
        pipeline(shape, devices, [1, 1, 1]),
        from_percentages(shape, devices, [50, 20, 30]),
    ]


def test_fifty_random_faults(session: Session) -> None:
    choose = random.Random(SEED)
    shape = PlanShape.from_config(session.model.config)
    prompt = "abcdefgh" * 20
    session.apply(plans(shape)[0])
    expected = session.generate(prompt, raw=True, max_tokens=NUM_TOKENS, ignore_eos=True)
    settled: Use | None = None
    said: list[str] = []

    def listen(message: object) -> None:
        if isinstance(message, api.PlanInterrupted | api.PlanLost):
            said.append(message.message)
        elif isinstance(message, api.PlanApplied):
            said.append(f"plan {message.epoch}: {message.note}")

    session.listen(listen)
    for number in range(NUM_FAULTS):
        session.apply(choose.choice(plans(shape)))
        if number == WARM_UP:
            settled = use_of(session)
        device = choose.choice(simulated_devices(3))
        fault = choose.choice(["terminate", "kill", "suspend", "kill the worker"])
        at = choose.randrange(NUM_TOKENS - 4)
        num_seen = 0

        def on_event(event: Event, device: str = device, fault: str = fault, at: int = at) -> None:
            nonlocal num_seen
            listen(event.message)
            if not isinstance(event.message, api.TokensGenerated):
                return
            if num_seen == at:
                assert session.plan.devices.index(device) in session.plan.used_devices(), said[-6:]
                runner = runner_of(session, device)
                if fault == "kill the worker":
                    runner.parent().kill()
                else:
                    getattr(runner, fault)()
            num_seen += 1

        call = api.Generate(
            request_id=session.client.next_request_id(),
            raw_prompt=prompt,
            max_tokens=NUM_TOKENS,
            sampling=api.SamplingSettings(temperature=0.0),
            ignore_eos=True,
            # With guesses the rest may come in the step under way, which needs no device any more.
            speculation="off",
        )
        finished = session.client.run(call, on_event, timeout_seconds=100)
        assert isinstance(finished, api.Finished)
        what = f"fault {number}: {fault} on {device} at token {at}"
        assert finished.token_ids == expected.token_ids, what
        assert num_seen == NUM_TOKENS, what
    session.apply(plans(shape)[0])
    final = use_of(session)
    assert settled is not None
    assert final.processes == settled.processes
    assert final.threads <= settled.threads + 2
    assert final.files <= settled.files + 8
    assert final.memory <= settled.memory + MAX_GROWTH_BYTES
