"""Logits of the model equal transformers, in one pass, in pieces, and under any plan."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from engine.plan.plan import PlanShape
from engine.plan.presets import single
from engine.weights.checkpoint import Checkpoint, open_checkpoint
from tests.engine.model.conftest import any_plan, assert_close, oracle_logits
from tests.one_process import OneProcess
from tests.tiny_models import VOCAB_SIZE, save_tiny_llama

VARIANTS: dict[str, dict[str, Any]] = {
    "gqa": {},
    "mha": {"num_key_value_heads": 6},
    "mqa": {"num_key_value_heads": 1},
    "tied": {"tie_word_embeddings": True},
    "wide theta": {"rope_parameters": {"rope_theta": 500000.0, "rope_type": "default"}},
}
IDS = np.random.default_rng(3).integers(0, VOCAB_SIZE, 41).tolist()


@pytest.mark.parametrize("variant", VARIANTS)
def test_one_pass_equals_transformers(variant: str, tmp_path: Path) -> None:
    oracle = save_tiny_llama(tmp_path, **VARIANTS[variant])
    checkpoint = open_checkpoint(tmp_path)
    plan = single(PlanShape.from_config(checkpoint.config), "this/cpu")
    found = OneProcess(checkpoint, plan).logits(IDS)
    assert_close(found, oracle_logits(oracle, IDS))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Checkpoint, NDArray[Any]]]:
    """A tiny model and the oracle's logits for IDS."""
    folder = tmp_path_factory.mktemp("tiny")
    oracle = save_tiny_llama(folder)
    checkpoint = open_checkpoint(folder)
    yield checkpoint, oracle_logits(oracle, IDS)
    checkpoint.close()


@settings(deadline=None, max_examples=25)
@given(
    cuts=st.sets(st.integers(1, len(IDS) - 1)), later_kind=st.sampled_from(["prompt", "generated"])
)
def test_any_split_of_the_prompt_gives_the_same_logits(
    tiny: tuple[Checkpoint, NDArray[Any]], cuts: set[int], later_kind: Any
) -> None:
    checkpoint, expected = tiny
    plan = single(PlanShape.from_config(checkpoint.config), "this/cpu")
    model = OneProcess(checkpoint, plan)
    borders = [0, *sorted(cuts), len(IDS)]
    pieces = [
        model.logits(IDS[a:b], a, "prompt" if a == 0 else later_kind) for a, b in pairwise(borders)
    ]
    assert_close(np.concatenate(pieces), expected)


def test_token_by_token_gives_the_same_logits(tiny: tuple[Checkpoint, NDArray[Any]]) -> None:
    checkpoint, expected = tiny
    plan = single(PlanShape.from_config(checkpoint.config), "this/cpu")
    model = OneProcess(checkpoint, plan)
    rows = [model.logits([token], n, "generated") for n, token in enumerate(IDS)]
    assert_close(np.concatenate(rows), expected)


@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_any_plan_of_three_devices_gives_the_same_logits(
    tiny: tuple[Checkpoint, NDArray[Any]], data: st.DataObject
) -> None:
    checkpoint, expected = tiny
    plan = data.draw(any_plan(PlanShape.from_config(checkpoint.config)))
    model = OneProcess(checkpoint, plan)
    found = np.concatenate([model.logits(IDS[:17]), model.logits(IDS[17:], 17)])
    assert_close(found, expected)


def test_slots_do_not_see_each_other(tiny: tuple[Checkpoint, NDArray[Any]]) -> None:
    checkpoint, expected = tiny
    plan = single(PlanShape.from_config(checkpoint.config), "this/cpu")
    model = OneProcess(checkpoint, plan)
    model.logits(IDS[::-1], slot=4)
    first = model.logits(IDS[:20], slot=0)
    model.logits([5, 6, 7], len(IDS), slot=4)
    second = model.logits(IDS[20:], 20, slot=0)
    assert_close(np.concatenate([first, second]), expected)


def test_a_truncated_slot_goes_on_as_if_the_rest_had_never_been(
    tiny: tuple[Checkpoint, NDArray[Any]],
) -> None:
    checkpoint, expected = tiny
    plan = single(PlanShape.from_config(checkpoint.config), "this/cpu")
    model = OneProcess(checkpoint, plan)
    model.logits(IDS[:10])
    model.logits([7] * 12, 10)
    model.shards[0].cache.truncate(0, 10)
    assert_close(model.logits(IDS[10:], 10), expected[10:])


def test_a_freed_slot_holds_no_memory(tiny: tuple[Checkpoint, NDArray[Any]]) -> None:
    checkpoint, _ = tiny
    plan = single(PlanShape.from_config(checkpoint.config), "this/cpu")
    model = OneProcess(checkpoint, plan)
    model.logits(IDS)
    cache = model.shards[0].cache
    assert cache.num_bytes > 0
    cache.free(0)
    assert cache.num_bytes == 0
