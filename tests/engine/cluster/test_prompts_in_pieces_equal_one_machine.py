"""A prompt worked in pieces over many devices has the logits of one machine.

Real shards, real sockets, one thread per device: so that steps have the sizes that matter, which a
scheduler would choose by speed.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from engine.cluster import messages as m
from engine.cluster.collectives import hand_over_table, is_scattered
from engine.cluster.lockstep import Lockstep
from engine.cluster.pieces import num_pieces
from engine.cluster.stepping import Stepping
from engine.model.batch import Segment, StepKind
from engine.plan.plan import Plan, PlanShape
from engine.plan.presets import pipeline
from engine.weights.checkpoint import Checkpoint, open_checkpoint
from tests.engine.cluster.exchange_members import Member, Members
from tests.tiny_families import save_tiny
from tests.tiny_models import VOCAB_SIZE, save_tiny_llama

pytestmark = pytest.mark.network

# Wide enough that sums of a piece are worth two hops between five devices.
WIDTH = 204
# Of the largest logit: float32, where only the order of additions differs.
TOLERANCE = 1e-5


class NewTokens(NamedTuple):
    """What one slot gets in a step."""

    slot: int
    first_position: int
    ids: list[int]


def draw_ids(count: int, seed: int = 1) -> list[int]:
    """Random token ids."""
    return np.random.default_rng(seed).integers(3, 89, count).tolist()


def assert_close(found: NDArray[np.float32], expected: NDArray[np.float32]) -> None:
    """Compare logits."""
    difference = np.abs(found - expected)
    where = np.unravel_index(difference.argmax(), difference.shape)
    allowed = TOLERANCE * float(np.abs(expected).max())
    assert difference.max() <= allowed, f"{difference.max():.3g} > {allowed:.3g} at {where}"


class Machines:
    """A model on the devices of a plan, each in a thread."""

    def __init__(self, checkpoint: Checkpoint, plan: Plan) -> None:
        self.checkpoint, self.plan = checkpoint, plan
        # Lockstep loads the shards as runners do.
        self._loaded = Lockstep(checkpoint, plan)
        self._members = Members(plan, checkpoint.config.width, self._add)
        self._steppings = {
            index: Stepping(
                shard,
                self._members.members[index].exchange,
                torch.device("cpu"),
                lambda _row, _kind: None,
            )
            for index, shard in self._loaded.shards.items()
        }
        self._step_id = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._members.close()

    def _add(self, index: int, row: int, x: m.Array, total: m.Array) -> m.Array:
        parts = (torch.tensor(x), torch.tensor(total))
        return self._loaded.shards[index].add(row, *parts).numpy()

    def step(
        self, tokens: list[NewTokens], kind: StepKind, *, is_last_only: bool = False
    ) -> NDArray[np.float32]:
        """Logits of a step's tokens in order: of all, or of the last in each slot."""
        self._step_id += 1
        segments = tuple(
            Segment(
                slot=slot,
                first_position=first,
                token_count=len(ids),
                logit_offsets=tuple(range(len(ids)))[-1 if is_last_only else 0 :],
            )
            for slot, first, ids in tokens
        )
        step = m.Step(
            epoch=3,
            step_id=self._step_id,
            kind=kind,
            segments=segments,
            operations=(),
            logits=m.LogitsWanted(form="full"),
        )
        embeddings = self.checkpoint.embed([i for t in tokens for i in t.ids]).copy()

        def work(member: Member) -> list[m.Array]:
            if member.index not in self._steppings:
                return []
            stepping = self._steppings[member.index]
            stepping.exchange.begin_step(step.step_id, kind)
            has_first = member.index in self.plan.group(0)
            with torch.inference_mode():
                return stepping.compute(step, [embeddings] if has_first else [])

        answers = self._members.all_do(work)
        return np.concatenate([tensors[0] for tensors in answers if tensors], axis=1)


def conversation() -> list[tuple[list[NewTokens], StepKind]]:
    """Two slots: ragged prompts, one of them in two steps, then generated tokens."""
    first, second = draw_ids(390, 1), draw_ids(101, 2)
    return [
        ([NewTokens(0, 0, first[:230]), NewTokens(1, 0, second[:99])], "prompt"),
        ([NewTokens(0, 230, first[230:388])], "prompt"),
        ([NewTokens(0, 388, first[388:389]), NewTokens(1, 99, second[99:100])], "generated"),
        ([NewTokens(0, 389, first[389:]), NewTokens(1, 100, second[100:])], "generated"),
    ]


def random_groups(shape: PlanShape, num_devices: int, seed: int) -> Plan:
    """Another group at every row, cells as uneven as can be, zeros in between."""
    draw = np.random.default_rng(seed)
    rows: list[tuple[int, ...]] = []
    for row in range(shape.num_rows):
        weights = draw.integers(0, 3, num_devices) * draw.random(num_devices)
        weights[draw.integers(num_devices)] += 0.5
        cells = np.floor(weights / weights.sum() * shape.num_quanta(row)).astype(int)
        cells[int(weights.argmax())] += shape.num_quanta(row) - cells.sum()
        rows.append(tuple(cells.tolist()))
    return Plan(shape, names(num_devices), tuple(rows)).validate()


def names(count: int) -> tuple[str, ...]:
    """Devices of a plan."""
    return tuple(f"node-{index}/cpu" for index in range(count))


def five_devices(shape: PlanShape) -> Plan:
    """More devices than KV heads (two), all in every row of the layers."""
    rows: list[tuple[int, ...]] = []
    for row in range(shape.num_rows):
        total = shape.num_quanta(row)
        rows.append((0, 0, total, 0, 0) if total < 5 else (total - 4, 1, 1, 1, 1))
    return Plan(shape, names(5), tuple(rows)).validate()


def three_devices(shape: PlanShape) -> Plan:
    """Uneven; the last has nothing in the MLP of layer 0 and all of the attention of layer 2."""
    rows: list[tuple[int, ...]] = []
    for row in range(shape.num_rows):
        total = shape.num_quanta(row)
        rows.append((1, total - 2, 1) if total > 2 else (0, total, 0))
    rows[1] = (1, shape.num_quanta(1) - 1, 0)
    rows[4] = (0, 0, shape.num_quanta(4))
    return Plan(shape, names(3), tuple(rows)).validate()


PLANS = {
    "three devices": three_devices,
    "five devices": five_devices,
    "a pipeline": lambda shape: pipeline(shape, list(names(3))),
    "groups that change at every row": lambda shape: random_groups(shape, 3, 7),
    "five devices that come and go": lambda shape: random_groups(shape, 5, 4),
}


def open_wide(folder: Path, **changes: Any) -> tuple[Checkpoint, Any]:
    """A model whose MLP rows have enough quanta for five devices."""
    oracle = save_tiny_llama(
        folder,
        hidden_size=WIDTH,
        intermediate_size=171,
        max_position_embeddings=600,
        **changes,
    )
    return open_checkpoint(folder), oracle


@pytest.mark.parametrize("name", PLANS)
def test_logits_equal_transformers(name: str, tmp_path: Path) -> None:
    checkpoint, oracle = open_wide(tmp_path)
    with checkpoint:
        plan = PLANS[name](PlanShape.from_config(checkpoint.config))
        with Machines(checkpoint, plan) as machines:
            found = [machines.step(tokens, kind) for tokens, kind in conversation()]
    ids: dict[int, list[int]] = {0: [], 1: []}
    for tokens, _kind in conversation():
        for slot, _first, new in tokens:
            ids[slot] += new
    with torch.no_grad():
        expected = {s: oracle(torch.tensor([i])).logits[0].numpy() for s, i in ids.items()}
    for (tokens, _kind), logits in zip(conversation(), found, strict=True):
        wanted = [expected[slot][first : first + len(new)] for slot, first, new in tokens]
        assert_close(logits, np.concatenate(wanted))


def test_the_plans_are_of_every_kind(tmp_path: Path) -> None:
    """Without this, sizes and rules could drift until nothing is cut or scattered."""
    checkpoint, _ = open_wide(tmp_path)
    with checkpoint:
        shape = PlanShape.from_config(checkpoint.config)
    scattered: dict[str, bool] = {}
    for name, make in PLANS.items():
        plan = make(shape)
        count = num_pieces(plan, "prompt", 329)
        assert count >= 3, name
        scattered[name] = any(
            is_scattered(table, 329 // count, WIDTH, "float32")
            for table in hand_over_table(plan, 0)
        )
    assert scattered["five devices"]
    assert not scattered["a pipeline"]
    come_and_go = PLANS["five devices that come and go"](shape)
    groups = [come_and_go.group(row) for row in range(shape.num_rows)]
    assert all(a != b for a, b in pairwise(groups))
    assert any(0 in cells for cells in come_and_go.cells)


@pytest.mark.parametrize("family", ["gemma3", "llama4", "mistral"])
def test_windows_experts_and_norms_of_sums_see_no_pieces(family: str, tmp_path: Path) -> None:
    save_tiny(family, tmp_path)
    with open_checkpoint(tmp_path) as checkpoint:
        plan = random_groups(PlanShape.from_config(checkpoint.config), 3, 7)
        whole = Lockstep(checkpoint, plan)
        length = min(checkpoint.config.max_positions, 300)
        ids = draw_ids(length)
        steps: list[tuple[list[NewTokens], StepKind]] = [
            ([NewTokens(0, 0, ids[: length - 20])], "prompt"),
            ([NewTokens(0, length - 20, ids[length - 20 :])], "prompt"),
        ]
        assert num_pieces(plan, "prompt", length - 20) > 1
        with Machines(checkpoint, plan) as machines:
            for tokens, kind in steps:
                (expected,) = whole.step(tokens, kind)
                assert_close(machines.step(tokens, kind), expected)


def test_only_the_wanted_logits_come_back_from_pieces_without_any(tmp_path: Path) -> None:
    """The last token of a prompt alone: earlier pieces end before the last MLP."""
    checkpoint, oracle = open_wide(tmp_path)
    ids = draw_ids(257)
    with checkpoint:
        plan = five_devices(PlanShape.from_config(checkpoint.config))
        with Machines(checkpoint, plan) as machines:
            found = machines.step([NewTokens(0, 0, ids)], "prompt", is_last_only=True)
    with torch.no_grad():
        expected = oracle(torch.tensor([ids])).logits[0, -1:].numpy()
    assert found.shape == (1, VOCAB_SIZE)
    assert_close(found, expected)
