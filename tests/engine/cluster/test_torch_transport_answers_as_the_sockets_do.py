"""A plan with transport torch, on real processes, has the logits and tokens of one with sockets."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import msgspec
import numpy as np
import psutil
import pytest

from engine.client import Event
from engine.errors import EngineError
from engine.host import messages as api
from engine.plan.plan import Plan, PlanShape
from engine.plan.presets import even, single
from engine.session import Session, SessionOptions, simulated_devices
from tests.engine.host.conftest import runner_of
from tests.tiny_models import VOCAB_SIZE, save_tiny_llama

pytestmark = [pytest.mark.network, pytest.mark.slow]

IDS = np.random.default_rng(8).integers(0, VOCAB_SIZE, 150).tolist()
DEVICES = simulated_devices(3)
MAX_TOKENS = 24


def over_torch(plan: Plan) -> Plan:
    """The same cells, another transport."""
    return msgspec.structs.replace(plan, transport="torch")


def odd_plan(shape: PlanShape) -> Plan:
    """Tensor and pipeline parts: cut KV heads, a pipeline row, a device that leaves and returns."""
    rows: list[tuple[int, ...]] = [
        (1, 4, 1), (0, 3, 0), (0, 0, 6), (1, 1, 1), (5, 0, 1), (2, 1, 0), (0, 1, 0),
    ]  # fmt: skip
    return Plan(shape, tuple(DEVICES), tuple(rows)).validate()


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Session]:
    """Three simulated nodes of a computer whose network is trusted."""
    folder = tmp_path_factory.mktemp("tiny")
    save_tiny_llama(folder)
    options = SessionOptions(model=str(folder), dtype="float32", num_workers=3, kv_window=100_000)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SHARDMIX_TRUSTED_NETWORK", "1")
        with Session(options) as opened:
            yield opened


@pytest.fixture(scope="module")
def one_runner(session: Session) -> tuple[int, ...]:
    """Greedy tokens of one process."""
    session.apply(single(PlanShape.from_config(session.model.config), DEVICES[0]))
    return session.generate("abc", raw=True, max_tokens=MAX_TOKENS).token_ids


@pytest.mark.parametrize("kind", ["two devices", "three devices, bfloat16", "odd"])
def test_logits_and_tokens_are_those_of_the_sockets(
    kind: str, session: Session, one_runner: tuple[int, ...]
) -> None:
    shape = PlanShape.from_config(session.model.config)
    plan = {
        "two devices": even(shape, DEVICES[:2]),
        "three devices, bfloat16": msgspec.structs.replace(even(shape, DEVICES), wire="bfloat16"),
        "odd": odd_plan(shape),
    }[kind]
    session.apply(plan)
    expected = session.logits(IDS)
    session.apply(over_torch(plan))
    np.testing.assert_array_equal(session.logits(IDS), expected)
    if plan.wire == "float32":
        found = session.generate("abc", raw=True, max_tokens=MAX_TOKENS).token_ids
        assert found == one_runner


def test_a_cancelled_answer_leaves_the_plan_usable(
    session: Session, one_runner: tuple[int, ...]
) -> None:
    """A step that was given up leaves messages under way; the next step must not take them."""
    session.apply(over_torch(odd_plan(PlanShape.from_config(session.model.config))))
    for _ in range(3):
        call = api.Generate(
            request_id=session.client.next_request_id(),
            raw_prompt="abc" * 3000,
            max_tokens=90_000,
            sampling=api.SamplingSettings(temperature=0.0),
            ignore_eos=True,
        )

        def on_event(event: Event, call: api.Generate = call) -> None:
            if isinstance(event.message, api.TokensGenerated | api.Progress):
                session.client.send(api.Cancel(request_id=call.request_id))

        session.client.run(call, on_event, timeout_seconds=60)
    found = session.generate("abc", raw=True, max_tokens=MAX_TOKENS).token_ids
    assert found == one_runner


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
@pytest.mark.parametrize("act", [psutil.Process.kill, psutil.Process.suspend])
@pytest.mark.parametrize("device", ["local-1/cpu", "local-2/cpu"])
def test_a_lost_runner_ends_no_more_than_its_group(
    device: str, act: object, session: Session, one_runner: tuple[int, ...]
) -> None:
    """The first device, where the others meet, or another; dead or frozen."""
    plan = over_torch(even(PlanShape.from_config(session.model.config), DEVICES[:2]))
    session.apply(plan)
    victim = runner_of(session, device)
    call = api.Generate(
        request_id=session.client.next_request_id(),
        raw_prompt="abc",
        max_tokens=200,
        sampling=api.SamplingSettings(temperature=0.0),
        ignore_eos=True,
    )
    seen = 0

    def on_event(event: Event) -> None:
        nonlocal seen
        if isinstance(event.message, api.TokensGenerated):
            seen += 1
            if seen == 5:
                assert callable(act)
                act(victim)

    # The answer goes on without the device where it can; else one line says who was lost.
    try:
        session.client.run(call, on_event, timeout_seconds=60)
    except EngineError as error:
        assert device in str(error)
        assert "\n" not in str(error)
    session.apply(plan)
    found = session.generate("abc", raw=True, max_tokens=MAX_TOKENS).token_ids
    assert found == one_runner
    assert runner_of(session, device).pid != victim.pid
