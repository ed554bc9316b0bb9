"""Greedy tokens and logits of the real model, on real processes, under any plan, are those of
transformers running the same dequantised weights in float32."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from engine.plan.plan import Plan, PlanShape
from engine.plan.presets import even, pipeline, single
from engine.session import Session, SessionOptions
from tests.real_model import PROMPTS, chat_ids, greedy_ids, oracle_logits

pytestmark = [pytest.mark.slow, pytest.mark.network, pytest.mark.timeout(600)]

MAX_TOKENS = 32
# At a first difference both candidates must lie this close in the oracle's logits.
NEAR_TIE = 1e-3
# Of the largest logit: float32 with additions in another order.
RELATIVE_TOLERANCE = 1e-5
DEVICES = ["local-1/cpu", "local-2/cpu", "local-3/cpu"]


@pytest.fixture(scope="module")
def session(default_model_path: Path) -> Iterator[Session]:
    """Three simulated nodes and this computer, in float32."""
    options = SessionOptions(model=str(default_model_path), dtype="float32", num_workers=3)
    with Session(options) as opened:
        yield opened


@pytest.fixture(scope="module")
def expected(default_model_path: Path) -> dict[str, list[int]]:
    """The oracle's answer to each prompt."""
    return {
        prompt: greedy_ids(default_model_path, chat_ids(default_model_path, prompt), MAX_TOKENS)
        for prompt in PROMPTS
    }


def assert_same_answer(session: Session, path: Path, prompt: str, expected: list[int]) -> None:
    """Equal tokens, or a near-tie at the first difference."""
    found = list(session.generate(prompt, max_tokens=len(expected)).token_ids)
    if found == expected:
        return
    at = next(n for n, pair in enumerate(zip(found, expected, strict=False)) if pair[0] != pair[1])
    logits = oracle_logits(path, chat_ids(path, prompt) + expected[:at])[-1]
    gap = float(logits[expected[at]] - logits[found[at]])
    assert gap <= NEAR_TIE, f"token {at}: {found[at]} instead of {expected[at]}, {gap:.3g} apart"


def test_one_runner_answers_ten_prompts_as_transformers(
    session: Session, default_model_path: Path, expected: dict[str, list[int]]
) -> None:
    session.apply(single(PlanShape.from_config(session.model.config), "this/cpu"))
    for prompt in PROMPTS:
        assert_same_answer(session, default_model_path, prompt, expected[prompt])
    assert "Paris" in session.generate(PROMPTS[0], max_tokens=MAX_TOKENS).text


@pytest.mark.parametrize("count", [2, 3])
def test_simulated_nodes_answer_ten_prompts_as_transformers(
    count: int, session: Session, default_model_path: Path, expected: dict[str, list[int]]
) -> None:
    session.apply(even(PlanShape.from_config(session.model.config), DEVICES[:count]))
    for prompt in PROMPTS:
        assert_same_answer(session, default_model_path, prompt, expected[prompt])


def random_plan(seed: int, shape: PlanShape) -> Plan:
    """An uneven plan: pipelines, mixtures, cut KV heads, devices that come and go."""
    draw = random.Random(seed)
    devices = ["this/cpu", *DEVICES[:2]] if seed % 2 else DEVICES[: draw.choice([2, 3])]
    if seed % 5 == 0:
        cuts = sorted(draw.sample(range(1, shape.num_layers), len(devices) - 1))
        borders = [0, *cuts, shape.num_layers]
        layers = [b - a for a, b in pairwise(borders)]
        return pipeline(shape, devices, layers)
    rows: list[tuple[int, ...]] = []
    group = devices
    for row in range(shape.num_rows):
        if row == 0 or draw.random() < (0.9 if seed % 5 == 1 else 0.15):
            group = draw.sample(devices, draw.randint(1, len(devices)))
        total = shape.num_quanta(row)
        cuts = sorted(draw.randint(0, total) for _ in group[1:])
        borders = [0, *cuts, total]
        share = {d: b - a for d, (a, b) in zip(group, pairwise(borders), strict=True)}
        rows.append(tuple(share.get(device, 0) for device in devices))
    return Plan(shape, tuple(devices), tuple(rows)).validate()


@pytest.mark.parametrize("seed", range(20))
def test_a_random_uneven_plan_answers_as_transformers(
    seed: int, session: Session, default_model_path: Path, expected: dict[str, list[int]]
) -> None:
    session.apply(random_plan(seed, PlanShape.from_config(session.model.config)))
    prompt = PROMPTS[seed % len(PROMPTS)]
    assert_same_answer(session, default_model_path, prompt, expected[prompt])


def test_the_random_plans_are_of_every_kind(session: Session) -> None:
    """Without this, the seeds could drift into plans of one kind."""
    shape = PlanShape.from_config(session.model.config)
    plans = [random_plan(seed, shape) for seed in range(20)]
    attention = [
        [p.unit_range(r, i) for r in range(0, shape.head_row, 2) for i in p.group(r)] for p in plans
    ]
    assert any(border % shape.heads_per_kv for p in attention for r in p for border in r)
    assert any(all(len(p.group(r)) == 1 for r in range(shape.num_rows)) for p in plans)
    assert any(len({len(p.group(r)) for r in range(shape.num_rows)}) > 1 for p in plans)
    assert any(any(p.group(r) != p.group(r + 1) for r in range(shape.head_row)) for p in plans)


@pytest.mark.parametrize("kind", ["one runner", "cut in three"])
def test_logits_of_the_whole_stack_equal_transformers(
    kind: str, session: Session, default_model_path: Path
) -> None:
    shape = PlanShape.from_config(session.model.config)
    one = kind == "one runner"
    session.apply(single(shape, "this/cpu") if one else random_plan(7, shape))
    ids = chat_ids(default_model_path, PROMPTS[2])
    found = session.logits(ids)
    expected = oracle_logits(default_model_path, ids)
    difference = np.abs(found - expected)
    where = np.unravel_index(difference.argmax(), difference.shape)
    allowed = RELATIVE_TOLERANCE * np.abs(expected).max()
    assert difference.max() <= allowed, f"{difference.max():.3g} at {where}, allowed {allowed:.3g}"
