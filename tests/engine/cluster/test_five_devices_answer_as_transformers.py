"""Greedy tokens of three and five real processes, however the rows lie, are those of transformers."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from engine.plan.plan import Plan, PlanShape
from engine.session import Session, SessionOptions, simulated_devices
from tests.tiny_models import save_tiny_llama

pytestmark = [pytest.mark.slow, pytest.mark.network, pytest.mark.timeout(300)]

NUM_TOKENS = 12
# Long enough that a scheduler's later steps are cut into pieces.
PROMPT = "".join(np.random.default_rng(3).choice(list("abcdefgh"), 420).tolist())


class Answering:
    """A session on five simulated nodes, and what its answer must be."""

    def __init__(self, session: Session, expected: list[int]) -> None:
        self.session, self.expected = session, expected
        self.shape = PlanShape.from_config(session.model.config)

    def check(self, num_devices: int, rows: list[tuple[int, ...]]) -> None:
        """Apply a plan and answer."""
        devices = tuple(simulated_devices(5)[:num_devices])
        self.session.apply(Plan(self.shape, devices, tuple(rows)).validate())
        finished = self.session.generate(PROMPT, raw=True, max_tokens=NUM_TOKENS, ignore_eos=True)
        assert list(finished.token_ids) == self.expected


@pytest.fixture(scope="module")
def answering(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Answering]:
    """A tiny model with two KV heads, so that five devices are more."""
    folder = tmp_path_factory.mktemp("tiny")
    oracle = save_tiny_llama(folder, hidden_size=204, intermediate_size=171,
                             max_position_embeddings=600)  # fmt: skip
    options = SessionOptions(model=str(folder), dtype="float32", num_workers=5)
    with Session(options) as session:
        ids = list(Tokenizer.from_file(str(folder / "tokenizer.json")).encode(PROMPT).ids)
        for _ in range(NUM_TOKENS):
            with torch.no_grad():
                ids.append(int(oracle(torch.tensor([ids])).logits[0, -1].argmax()))
        yield Answering(session, ids[-NUM_TOKENS:])


def test_more_devices_than_kv_heads(answering: Answering) -> None:
    layer = [(2, 1, 1, 1, 1), (1, 2, 1, 1, 1)]
    answering.check(5, [*layer * 3, (0, 0, 0, 0, 1)])


def test_groups_that_change_at_every_row(answering: Answering) -> None:
    rows = [(3, 0, 3, 0, 0), (0, 2, 1, 0, 3), (1, 1, 0, 4, 0), (6, 0, 0, 0, 0),
            (0, 0, 2, 2, 2), (0, 5, 0, 1, 0), (1, 0, 0, 0, 0)]  # fmt: skip
    answering.check(5, rows)


def test_three_devices_with_a_stage_and_rows_without_a_share(answering: Answering) -> None:
    rows = [(4, 1, 1), (0, 3, 3), (0, 0, 6), (0, 0, 6), (0, 6, 0), (2, 2, 2), (0, 1, 0)]
    answering.check(3, rows)
