"""A plan with transport torch, on real processes, has the logits and tokens of one with sockets."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator

import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray

from engine.client import Event
from engine.errors import EngineError, WorkerLost
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
# Until a lost runner is known to the engine host, with room for a busy machine.
KNOWN_SECONDS = 20.0


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


KINDS = {
    "two devices": lambda shape: even(shape, DEVICES[:2]),
    "three devices, bfloat16": lambda shape: msgspec.structs.replace(
        even(shape, DEVICES), wire="bfloat16"
    ),
    "odd": odd_plan,
}


@pytest.fixture(scope="module")
def over_sockets(session: Session) -> dict[str, NDArray[np.float32]]:
    """Logits under each plan; all at once, because another transport needs other runners."""
    shape = PlanShape.from_config(session.model.config)
    logits: dict[str, NDArray[np.float32]] = {}
    for kind, make in KINDS.items():
        session.apply(make(shape))
        logits[kind] = session.logits(IDS)
    return logits


@pytest.fixture(scope="module")
def one_runner(session: Session) -> tuple[int, ...]:
    """Greedy tokens of one process."""
    session.apply(single(PlanShape.from_config(session.model.config), DEVICES[0]))
    return session.generate("abc", raw=True, max_tokens=MAX_TOKENS).token_ids


@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_tokens_are_those_of_the_sockets(
    kind: str,
    session: Session,
    one_runner: tuple[int, ...],
    over_sockets: dict[str, NDArray[np.float32]],
) -> None:
    plan = over_torch(KINDS[kind](PlanShape.from_config(session.model.config)))
    session.apply(plan)
    np.testing.assert_array_equal(session.logits(IDS), over_sockets[kind])
    if plan.wire == "float32":
        found = session.generate("abc", raw=True, max_tokens=MAX_TOKENS).token_ids
        assert found == one_runner


def test_a_cancelled_answer_leaves_the_plan_usable(
    session: Session, one_runner: tuple[int, ...]
) -> None:
    """A prompt that is given up leaves messages under way; the next step must not take them."""
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
            if isinstance(event.message, api.Progress | api.TokensGenerated):
                session.client.post(api.Cancel(request_id=call.request_id))

        session.client.run(call, on_event, timeout_seconds=60)
    found = session.generate("abc", raw=True, max_tokens=MAX_TOKENS).token_ids
    assert found == one_runner


def apply_again(session: Session, plan: Plan) -> None:
    """Put a plan in force; a peer may tell of a death before the worker of the dead does."""
    deadline = time.monotonic() + KNOWN_SECONDS
    while True:
        try:
            session.apply(plan)
        except WorkerLost:
            if time.monotonic() > deadline:
                raise
        else:
            return


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
@pytest.mark.parametrize(
    ("device", "act"),
    [("local-1/cpu", "kill"), ("local-2/cpu", "kill"), ("local-2/cpu", "suspend")],
)
def test_a_lost_runner_ends_no_more_than_its_group(
    device: str, act: str, session: Session, one_runner: tuple[int, ...]
) -> None:
    """The first device, where the others meet, or another; dead or frozen."""
    plan = over_torch(even(PlanShape.from_config(session.model.config), DEVICES[:2]))
    session.apply(plan)
    victim = runner_of(session, device)
    call = api.Generate(
        request_id=session.client.next_request_id(),
        raw_prompt="abc",
        max_tokens=MAX_TOKENS,
        sampling=api.SamplingSettings(temperature=0.0),
    )
    has_acted = False

    def on_event(event: Event) -> None:
        nonlocal has_acted
        if isinstance(event.message, api.TokensGenerated) and not has_acted:
            has_acted = True
            getattr(victim, act)()

    # The answer goes on where a plan fits without the device; else one line says who was lost.
    try:
        finished = session.client.run(call, on_event, timeout_seconds=60)
    except EngineError as error:
        assert device in str(error)
        assert "\n" not in str(error)
    else:
        assert isinstance(finished, api.Finished)
        assert finished.token_ids == one_runner
    assert has_acted
    apply_again(session, plan)
    found = session.generate("abc", raw=True, max_tokens=MAX_TOKENS).token_ids
    assert found == one_runner
    assert runner_of(session, device).pid != victim.pid
