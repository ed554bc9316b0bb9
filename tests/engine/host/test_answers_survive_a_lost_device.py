"""A device that dies or freezes is left out, and answers go on with the next token: the reader sees
a pause and a note, no error, and no repeated or missing word."""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import psutil
import pytest

from engine.cli_output import report
from engine.client import Event
from engine.host import messages as api
from engine.plan.plan import Plan, PlanShape
from engine.plan.presets import even, from_percentages, pipeline, single
from engine.session import Session, SessionOptions, simulated_devices
from tests.engine.host.conftest import runner_of
from tests.processes import processes_below
from tests.tiny_models import save_tiny_llama

pytestmark = [
    pytest.mark.network,
    pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals"),
]

# What is promised is 2 s for a dead runner, 5 s for a frozen one and 10 s to the next token; the rest
# is room for a busy machine, which benchmarks do not get.
NOTICED_SECONDS = 15.0
SHAPES = "abcabcabdefgh"


@pytest.fixture(scope="module")
def opened(tiny_folder: Path) -> Iterator[Session]:
    options = SessionOptions(
        model=str(tiny_folder), dtype="float32", num_workers=3, kv_window=100_000
    )
    with Session(options) as session:
        yield session


class Watch:
    """Hears what a session says while something happens to it."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.notes: list[api.PlanApplied] = []
        self.interruptions: list[str] = []
        self.texts: list[str] = []
        self.ids: list[int] = []

    def answer(
        self, prompt: str, num_tokens: int, act: Callable[[], None], when: Callable[[object], bool]
    ) -> api.Finished:
        """Answer greedily, and act once when an event says so."""
        has_acted = False

        def on_event(event: Event) -> None:
            nonlocal has_acted
            message = event.message
            if isinstance(message, api.PlanInterrupted):
                self.interruptions.append(message.message)
            if isinstance(message, api.PlanApplied):
                self.notes.append(message)
            if isinstance(message, api.TokensGenerated):
                self.texts.append(message.text)
                self.ids += message.token_ids
            if not has_acted and when(message):
                has_acted = True
                act()

        call = api.Generate(
            request_id=self.session.client.next_request_id(),
            raw_prompt=prompt,
            max_tokens=num_tokens,
            sampling=api.SamplingSettings(temperature=0.0),
            ignore_eos=True,
            speculation="off",  # So that the rest needs more than the step under way.
        )
        finished = self.session.client.run(call, on_event, timeout_seconds=100)
        assert has_acted
        assert isinstance(finished, api.Finished)
        assert "".join(self.texts) == finished.text
        assert tuple(self.ids) == finished.token_ids
        return finished


def after_tokens(count: int) -> Callable[[object], bool]:
    numbers = itertools.count(1)
    return lambda message: isinstance(message, api.TokensGenerated) and next(numbers) == count


def full_plan(session: Session) -> Plan:
    """Tensor parallel in the first layer, a stage of its own in the last."""
    shape = PlanShape.from_config(session.model.config)
    return even(shape, simulated_devices(3))


@pytest.mark.parametrize("fault", ["terminate", "kill", "suspend"])
def test_an_answer_goes_on_without_the_device(opened: Session, fault: str) -> None:
    opened.apply(full_plan(opened))
    expected = opened.generate(SHAPES, raw=True, max_tokens=60, ignore_eos=True)
    victim = runner_of(opened, "local-2/cpu")
    watch = Watch(opened)
    finished = watch.answer(SHAPES, 60, getattr(victim, fault), after_tokens(7))
    assert finished.token_ids == expected.token_ids
    assert len(watch.interruptions) == 1
    assert "local-2/cpu, which computes" in watch.interruptions[0]
    (applied,) = watch.notes
    assert "went to local-1/cpu, local-3/cpu" in applied.note
    assert not any(cells[1] for cells in applied.plan.cells)
    memory = {need.device: need for need in applied.memory}
    told = {device["name"]: device for device in report(finished, memory)["devices"]}
    assert told["local-1/cpu"]["weight_bytes"] > 0
    if "local-2/cpu" in told:
        assert told["local-2/cpu"]["weight_bytes"] is None
    assert opened.generate(SHAPES, raw=True, max_tokens=60, ignore_eos=True).text == finished.text


@pytest.mark.skipif(sys.platform == "win32", reason="SIGSTOP is a POSIX signal")
def test_a_device_that_freezes_with_a_prompt_on_its_way_is_done_without(tmp_path: Path) -> None:
    """Bug: a frame that it did not read kept heartbeats from telling that it was frozen.

    A piece of the prompt is 1.5 MB, more than a local socket holds.
    """
    save_tiny_llama(tmp_path, hidden_size=384)
    options = SessionOptions(model=str(tmp_path), dtype="float32", num_workers=3, kv_window=100_000)
    with Session(options) as session:
        session.apply(full_plan(session))
        # Pieces are long, once it is known how fast a prompt is read.
        session.generate("z" * 4000, raw=True, max_tokens=1)
        watch = Watch(session)
        runner_of(session, "local-2/cpu").suspend()
        started = time.monotonic()
        finished = watch.answer(SHAPES * 300, 20, lambda: None, lambda _message: True)
        assert time.monotonic() - started < NOTICED_SECONDS + 10.0
        assert len(watch.interruptions) == 1
        assert "local-2/cpu" in watch.interruptions[0]
        session.apply(full_plan(session))
        expected = session.generate(SHAPES * 300, raw=True, max_tokens=20, ignore_eos=True)
        assert finished.token_ids == expected.token_ids


def test_a_lone_device_is_started_again(opened: Session) -> None:
    shape = PlanShape.from_config(opened.model.config)
    opened.apply(single(shape, "local-1/cpu"))
    expected = opened.generate(SHAPES, raw=True, max_tokens=40, ignore_eos=True)
    victim = runner_of(opened, "local-1/cpu")
    watch = Watch(opened)
    finished = watch.answer(SHAPES, 40, victim.kill, after_tokens(5))
    assert finished.token_ids == expected.token_ids
    assert "killed by SIGKILL" in watch.interruptions[0]
    assert "started again" in watch.notes[-1].note
    assert runner_of(opened, "local-1/cpu").pid != victim.pid


def test_a_killed_worker_takes_its_runner_along_and_the_answer_goes_on(opened: Session) -> None:
    shape = PlanShape.from_config(opened.model.config)
    opened.apply(pipeline(shape, simulated_devices(2), [1, 2]))
    expected = opened.generate(SHAPES, raw=True, max_tokens=60, ignore_eos=True)
    host = psutil.Process(opened.client.host_pid)
    (worker,) = processes_below(host, "shardmix-worker", "local-1")
    watch = Watch(opened)
    finished = watch.answer(SHAPES, 60, worker.kill, after_tokens(5))
    assert finished.token_ids == expected.token_ids
    opened.apply(pipeline(shape, simulated_devices(2), [1, 2]))
    again = opened.generate(SHAPES, raw=True, max_tokens=60, ignore_eos=True)
    assert again.token_ids == expected.token_ids


def test_two_devices_lost_at_once(opened: Session) -> None:
    opened.apply(full_plan(opened))
    expected = opened.generate(SHAPES, raw=True, max_tokens=60, ignore_eos=True)
    victims = [runner_of(opened, f"local-{n}/cpu") for n in (1, 3)]
    watch = Watch(opened)

    def kill_both() -> None:
        for victim in victims:
            victim.kill()

    finished = watch.answer(SHAPES, 60, kill_both, after_tokens(7))
    assert finished.token_ids == expected.token_ids
    # Which loss is seen first is chance: the second runner may be missed only when the plan
    # without the first is applied, and is then started again instead of left out.
    used = set(watch.notes[-1].plan.used_devices())
    assert 1 in used
    assert used < {0, 1, 2}


def test_several_answers_and_a_sampled_one_go_on(opened: Session) -> None:
    opened.apply(full_plan(opened))
    sampling = api.SamplingSettings(temperature=0.9, seed=5)
    prompts = ["abc", "fedcba", "hhgg"]
    expected = opened.generate_batch(
        prompts, raw=True, sampling=sampling, max_tokens=40, ignore_eos=True
    )
    victim = runner_of(opened, "local-3/cpu")
    seen = 0

    def on_token(_index: int, _token: int, _text: str) -> None:
        nonlocal seen
        seen += 1
        if seen == 20:
            victim.kill()

    answers = opened.generate_batch(
        prompts,
        on_token=on_token,
        raw=True,
        sampling=sampling,
        max_tokens=40,
        ignore_eos=True,
    )
    assert seen == 120
    assert [a.token_ids for a in answers] == [e.token_ids for e in expected]


def test_a_device_lost_while_idle_is_replaced_before_the_next_question(opened: Session) -> None:
    opened.apply(full_plan(opened))
    expected = opened.generate(SHAPES, raw=True, max_tokens=20, ignore_eos=True)
    applied: list[api.PlanApplied] = []
    runner_of(opened, "local-1/cpu").kill()
    deadline = time.monotonic() + NOTICED_SECONDS
    while not applied and time.monotonic() < deadline:
        event = opened.client.receive(0.1)
        if event is not None and isinstance(event.message, api.PlanApplied):
            applied.append(event.message)
    assert applied and "local-1/cpu" in applied[0].note
    again = opened.generate(SHAPES, raw=True, max_tokens=20, ignore_eos=True)
    assert again.token_ids == expected.token_ids


def test_a_device_can_join_while_an_answer_runs(opened: Session) -> None:
    """Late join: the answer pauses, and goes on with the node's help."""
    shape = PlanShape.from_config(opened.model.config)
    opened.apply(single(shape, "local-1/cpu"))
    joined = from_percentages(shape, simulated_devices(2), [30, 70])
    watch = Watch(opened)
    request_id = opened.client.next_request_id() + 1

    def join() -> None:
        apply = api.ApplyPlan(request_id=opened.client.next_request_id(), plan=joined)
        opened.client.post(apply)

    def has_joined(message: object) -> bool:
        """Once it has; by then some tokens must have come from the new plan."""
        if isinstance(message, api.TokensGenerated):
            if len(watch.ids) == 3:
                join()
            if len(watch.notes) == 1:
                num_after.append(1)
        return len(num_after) == 30

    num_after: list[int] = []
    cancel = api.Cancel(request_id=request_id)
    finished = watch.answer(SHAPES, 90_000, lambda: opened.client.post(cancel), has_joined)
    assert finished.finish_reason == "cancelled"
    assert watch.notes[-1].plan == joined
    assert not watch.interruptions
    whole = opened.generate(SHAPES, raw=True, max_tokens=len(watch.ids), ignore_eos=True)
    assert whole.token_ids == finished.token_ids


def test_a_runner_that_is_started_anew_for_another_plan_is_not_a_lost_one(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bug: a plan with another transport restarts the runners; the plan before saw its devices
    lost, and the new plan came into force without them."""
    monkeypatch.setenv("SHARDMIX_TRUSTED_NETWORK", "1")
    watched: list[str] = []

    def listen(message: object) -> None:
        if isinstance(message, api.PlanInterrupted | api.PlanLost):
            watched.append(message.message)

    options = SessionOptions(model=str(tiny_folder), dtype="float32", num_workers=2)
    with Session(options, listen) as session:
        expected = session.generate(SHAPES, raw=True, max_tokens=20, ignore_eos=True)
        plan = msgspec.structs.replace(session.plan, transport="torch")
        session.apply(plan)
        assert session.plan == plan
        again = session.generate(SHAPES, raw=True, max_tokens=20, ignore_eos=True)
        assert again.token_ids == expected.token_ids
        assert not watched
