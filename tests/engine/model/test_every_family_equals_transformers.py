"""Logits of every family equal transformers: whole, token by token, in pieces, ragged, split."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from engine.plan.plan import Plan, PlanShape
from engine.plan.presets import single
from engine.weights.checkpoint import Checkpoint, open_checkpoint
from tests.engine.model.conftest import any_plan, assert_close, oracle_logits
from tests.one_process import OneProcess
from tests.tiny_families import FAMILIES, save_tiny
from tests.tiny_models import VOCAB_SIZE

# More than two windows or chunks of 12 positions.
IDS = np.random.default_rng(5).integers(3, 89, 41).tolist()
OTHER_IDS = np.random.default_rng(6).integers(3, 89, 29).tolist()
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{family: (family, {}) for family in FAMILIES if family != "llama4_vision"},
    "llama with one KV head": ("llama", {"num_key_value_heads": 1}),
    "llama without grouping": ("llama", {"num_key_value_heads": 6}),
    "llama with biases": ("llama", {"attention_bias": True}),
    "mistral without a window": ("mistral", {"sliding_window": None}),
    "mixtral with a window": ("mixtral", {"sliding_window": 12}),
    "qwen3_moe unnormalised": ("qwen3_moe", {"norm_topk_prob": False, "mlp_only_layers": []}),
    "llama4 with two experts": ("llama4", {"num_experts_per_tok": 2}),
    "llama4 without qk norm": ("llama4", {"use_qk_norm": False}),
    "llama4 without tuning": ("llama4", {"attn_temperature_tuning": False}),
    "gemma3 with a cap": ("gemma3", {"final_logit_softcapping": 2.0}),
}


@dataclass(frozen=True)
class Tiny:
    """An open model, what the oracle says of IDS and OTHER_IDS, and the plan on one device."""

    checkpoint: Checkpoint
    expected: NDArray[np.float32]
    other: NDArray[np.float32]

    @property
    def single(self) -> Plan:
        return single(PlanShape.from_config(self.checkpoint.config), "this/cpu")


@pytest.fixture(scope="module", params=VARIANTS)
def tiny(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Tiny]:
    folder = tmp_path_factory.mktemp("tiny")
    family, changes = VARIANTS[request.param]
    oracle = save_tiny(family, folder, **changes)
    checkpoint = open_checkpoint(folder)
    yield Tiny(checkpoint, oracle_logits(oracle, IDS), oracle_logits(oracle, OTHER_IDS))
    checkpoint.close()


def test_the_oracle_is_no_constant(tiny: Tiny) -> None:
    assert tiny.expected.shape == (len(IDS), VOCAB_SIZE)
    assert 0.3 < tiny.expected.std() < 30
    assert np.abs(np.diff(tiny.expected, axis=0)).max(axis=1).min() > 0.1


def test_one_pass(tiny: Tiny) -> None:
    assert_close(OneProcess(tiny.checkpoint, tiny.single).logits(IDS), tiny.expected)


def test_token_by_token(tiny: Tiny) -> None:
    model = OneProcess(tiny.checkpoint, tiny.single)
    rows = [model.logits([token], n, "generated") for n, token in enumerate(IDS)]
    assert_close(np.concatenate(rows), tiny.expected)


@settings(deadline=None, max_examples=8)
@given(
    cuts=st.sets(st.integers(1, len(IDS) - 1), min_size=1),
    later=st.sampled_from(["prompt", "generated"]),
)
def test_any_pieces(tiny: Tiny, cuts: set[int], later: Any) -> None:
    model = OneProcess(tiny.checkpoint, tiny.single)
    borders = [0, *sorted(cuts), len(IDS)]
    pieces = [
        model.logits(IDS[a:b], a, "prompt" if a == 0 else later) for a, b in pairwise(borders)
    ]
    assert_close(np.concatenate(pieces), tiny.expected)


@settings(deadline=None, max_examples=5)
@given(first=st.integers(1, len(IDS) - 1), second=st.integers(1, len(OTHER_IDS) - 1))
def test_a_ragged_batch(tiny: Tiny, first: int, second: int) -> None:
    model = OneProcess(tiny.checkpoint, tiny.single)
    begun = model.step([(3, 0, OTHER_IDS[:second]), (0, 0, IDS[:first])])
    ended = model.step([(0, first, IDS[first:]), (3, second, OTHER_IDS[second:])])
    assert_close(np.concatenate([begun[1], ended[0]]), tiny.expected)
    assert_close(np.concatenate([begun[0], ended[1]]), tiny.other)


@settings(deadline=None, max_examples=5, suppress_health_check=[HealthCheck.data_too_large])
@given(data=st.data())
def test_any_plan_of_three_devices(tiny: Tiny, data: st.DataObject) -> None:
    plan = data.draw(any_plan(PlanShape.from_config(tiny.checkpoint.config)))
    model = OneProcess(tiny.checkpoint, plan)
    pieces = [model.logits(IDS[:17]), model.logits(IDS[17:34], 17)]
    pieces += [model.logits([IDS[n]], n, "generated") for n in range(34, len(IDS))]
    assert_close(np.concatenate(pieces), tiny.expected)
