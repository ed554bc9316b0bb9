"""Odd sizes on real processes: logits under any plan and wire, and what an applied plan moves."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from engine.cluster.messages import Message
from engine.host import messages as api
from engine.plan.plan import Plan, PlanShape
from engine.plan.presets import even, pipeline, single
from engine.session import Session, SessionOptions, simulated_devices
from engine.weights.checkpoint import open_checkpoint
from tests.one_process import OneProcess
from tests.tiny_models import VOCAB_SIZE, save_tiny_llama

pytestmark = pytest.mark.network

IDS = np.random.default_rng(8).integers(0, VOCAB_SIZE, 150).tolist()
# Float32, logits of order 1.
TOLERANCE = 1e-5
DEVICES = simulated_devices(3)


class Stack:
    """A session with a tiny model, its oracle, and the bytes that plans moved."""

    def __init__(self, session: Session, folder: Path, oracle: Any) -> None:
        self.session, self.folder, self.oracle = session, folder, oracle
        self.shape = PlanShape.from_config(session.model.config)
        self.moved: dict[str, int] = {}
        session.listen(self._listen)

    def apply(self, plan: Plan) -> dict[str, int]:
        """Put a plan in force; returns bytes of weights sent, by device."""
        self.moved = {}
        self.session.apply(plan)
        return self.moved

    def _listen(self, message: Message) -> None:
        if isinstance(message, api.Progress) and message.phase == "weights":
            self.moved[message.subject] = message.total


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """Three simulated nodes."""
    folder = tmp_path_factory.mktemp("tiny")
    oracle = save_tiny_llama(folder)
    options = SessionOptions(model=str(folder), dtype="float32", num_workers=3)
    with Session(options) as session:
        yield Stack(session, folder, oracle)


def odd_plan(shape: PlanShape) -> Plan:
    """Cut KV heads, a pipeline row, a device that leaves and comes back."""
    rows: list[tuple[int, ...]] = [
        (1, 4, 1), (0, 3, 0), (0, 0, 6), (1, 1, 1), (5, 0, 1), (2, 1, 0), (0, 1, 0),
    ]  # fmt: skip
    return Plan(shape, tuple(DEVICES), tuple(rows)).validate()


PLANS = {
    "one runner": lambda shape: single(shape, "this/cpu"),
    "even": lambda shape: even(shape, DEVICES),
    "pipeline": lambda shape: pipeline(shape, DEVICES),
    "odd": odd_plan,
}


@pytest.mark.parametrize("name", PLANS)
def test_logits_equal_transformers(name: str, stack: Stack) -> None:
    stack.apply(PLANS[name](stack.shape))
    found = stack.session.logits(IDS)
    with torch.no_grad():
        expected: NDArray[np.float32] = stack.oracle(torch.tensor([IDS])).logits[0].numpy()
    difference = np.abs(found - expected)
    where = np.unravel_index(difference.argmax(), difference.shape)
    assert difference.max() <= TOLERANCE, f"{difference.max():.3g} at {where}"


@pytest.mark.parametrize("wire", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["even", "pipeline", "odd"])
def test_a_narrow_wire_rounds_as_the_hand_over_rule_says(
    name: str, wire: str, stack: Stack
) -> None:
    """Everyone rounds, the sender too; so one process that rounds likewise is the oracle."""
    plan = msgspec.structs.replace(PLANS[name](stack.shape), wire=wire)
    stack.apply(plan)
    found = stack.session.logits(IDS[:40])
    checkpoint = open_checkpoint(stack.folder)
    expected = OneProcess(checkpoint, plan).logits(IDS[:40])
    checkpoint.close()
    np.testing.assert_allclose(found, expected, atol=TOLERANCE, rtol=0)


def test_an_unchanged_plan_moves_no_weights(stack: Stack) -> None:
    stack.apply(single(stack.shape, "this/cpu"))
    assert sum(stack.apply(odd_plan(stack.shape)).values()) > 0
    assert sum(stack.apply(odd_plan(stack.shape)).values()) == 0


def test_a_plan_moves_only_the_rows_that_changed(stack: Stack) -> None:
    stack.apply(pipeline(stack.shape, DEVICES, [1, 1, 1]))
    moved = stack.apply(pipeline(stack.shape, DEVICES, [1, 2, 0]))
    assert moved.get("local-1/cpu", 0) == 0
    layer_and_head = moved["local-2/cpu"]
    stack.apply(single(stack.shape, "local-3/cpu"))
    whole = stack.moved["local-3/cpu"]
    assert 0 < layer_and_head < whole / 2


def test_sampling_with_a_seed_is_the_same_under_any_plan(stack: Stack) -> None:
    sampling = api.SamplingSettings(temperature=1.3, top_p=0.9, repetition_penalty=1.2, seed=12345)
    answers: set[tuple[int, ...]] = set()
    for make in PLANS.values():
        stack.apply(make(stack.shape))
        finished = stack.session.generate("abc", raw=True, max_tokens=40, sampling=sampling)
        answers.add(finished.token_ids)
    assert len(answers) == 1
