"""What a few logits of every vocabulary shard give is what all logits give, or an honest "unknown".

The shards' answers are made and put together by the very functions that runners and host use.
"""

from __future__ import annotations

import math
from itertools import pairwise

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from engine.cluster import messages as m
from engine.cluster.coordinator import DeviceAnswer
from engine.cluster.short_logits import check_wanted, short_form
from engine.decode.gather import gather_candidates, join_full_logits
from engine.errors import ProtocolError
from engine.host.messages import SamplingSettings
from engine.plan.plan import Plan, PlanShape
from engine.sampling.choice import (
    Candidates,
    ShardLogits,
    all_candidates,
    choose,
    merge_shards,
    token_logprobs,
    uniform,
)
from engine.sampling.logit_changes import LogitChanges, logit_changes
from tests.engine.sampling.distributions import exact_distribution, settings_for

SMALL = 99
LARGE = 1201
# Natural logarithms of float32 logits of order 10, sums in float64.
EXACT = 1e-10
SHAPE = PlanShape(num_layers=1, num_heads=3, num_kv_heads=1, mlp_width=75, vocab_size=LARGE)
HEADS = [(5, 0, 0), (2, 1, 2), (0, 1, 4), (1, 4, 0)]


def shards_of(
    logits: NDArray[np.float32], cuts: list[int], top: int, temperature: float, asked: list[int]
) -> Candidates:
    """What shards with borders anywhere would answer, with any number of largest logits."""
    shards: list[ShardLogits] = []
    for first, end in pairwise([0, *cuts, len(logits)]):
        part = logits[first:end]
        order = np.argsort(-part, kind="stable")[:top]
        scaled = part.astype(np.float64) / temperature
        scaled[[i - first for i in asked if first <= i < end]] = -np.inf
        shards.append(
            ShardLogits(
                (order + first).tolist(),
                part[order].tolist(),
                {i: float(logits[i]) for i in asked if first <= i < end},
                float(np.logaddexp.reduce(scaled)),
                len(order) == end - first,
                float(np.logaddexp.reduce(part.astype(np.float64))),
            )
        )
    return merge_shards(shards)


def plan_with(head: tuple[int, ...]) -> Plan:
    devices = ("a/cpu", "b/cpu", "c/cpu")
    return Plan(SHAPE, devices, ((3, 0, 0), (1, 1, 1), head)).validate()


def gathered(
    plan: Plan, logits_NV: NDArray[np.float32], wanted: m.LogitsWanted
) -> tuple[list[Candidates], NDArray[np.float32]]:
    """The short and the full road, as a step takes them."""
    check_wanted(wanted, len(logits_NV))
    row = plan.shape.head_row
    answer = m.StepAnswer(
        epoch=1,
        step_id=1,
        compute_ns=0,
        wait_ns=0,
        serialise_ns=0,
        sent_bytes=0,
        received_bytes=0,
        cache_bytes=0,
    )
    short: list[DeviceAnswer] = []
    full: list[DeviceAnswer] = []
    for index in plan.group(row):
        first, end = plan.unit_range(row, index)
        part = logits_NV[:, first:end]
        short.append(DeviceAnswer(index, answer, short_form(torch.tensor(part), wanted, first)))
        full.append(DeviceAnswer(index, answer, [part]))
    candidates = gather_candidates(plan, short, wanted.ids)
    return candidates, join_full_logits(plan, full, len(logits_NV))


def near_a_border(exact: NDArray[np.float64], place: int, steps: int) -> float:
    """Noise a few roundings from where one token's interval ends and the next begins."""
    ordered = np.sort(exact[exact > 0])[::-1]
    noise = float(np.cumsum(ordered)[place % ordered.size])
    return min(max(moved(noise, steps), 0.0), math.nextafter(1.0, 0.0))


def moved(number: float, steps: int) -> float:
    """The float so many places further."""
    for _ in range(abs(steps)):
        number = math.nextafter(number, math.copysign(2.0, steps))
    return number


@settings(max_examples=400)
@given(
    seed=st.integers(0, 10**6),
    spread=st.sampled_from([0.0, 0.3, 2.0, 8.0]),
    sampling=settings_for(SMALL),
    is_greedy=st.booleans(),
    cuts=st.sets(st.integers(1, SMALL - 1), max_size=3),
    top=st.integers(1, SMALL),
    ids=st.lists(st.integers(0, SMALL - 1), max_size=9),
    place=st.integers(0, SMALL),
    steps=st.integers(-3, 3),
    noise=st.none() | st.floats(0, 1, exclude_max=True),
)
def test_a_choice_from_the_short_form_is_the_choice_from_all_logits(
    seed: int,
    spread: float,
    sampling: SamplingSettings,
    is_greedy: bool,
    cuts: set[int],
    top: int,
    ids: list[int],
    place: int,
    steps: int,
    noise: float | None,
) -> None:
    """No tolerance: where the two roads might round to different tokens, the short one says so."""
    logits = (np.random.default_rng(seed).standard_normal(SMALL) * spread).astype(np.float32)
    if is_greedy:
        sampling = msgspec.structs.replace(sampling, temperature=0.0)
    changes = logit_changes(sampling, ids, len(ids) // 2)
    candidates = shards_of(
        logits, sorted(cuts), top, sampling.temperature or 1.0, changes.ids.tolist()
    )
    if noise is None:
        exact = exact_distribution(logits.astype(np.float64), sampling, ids, len(ids) // 2)
        noise = near_a_border(exact, place, steps)
    full = choose(all_candidates(logits), sampling, changes, noise)
    assert full is not None
    assert choose(candidates, sampling, changes, noise) in (None, full)


@settings(max_examples=200)
@given(
    seed=st.integers(0, 10**6),
    cut=st.integers(1, SMALL - 1),
    place=st.integers(1, 9),
    steps=st.integers(-8, 8),
    temperature=st.sampled_from([0.7, 0.01]),
)
def test_rounding_at_a_border_is_never_decided_by_the_short_form(
    seed: int, cut: int, place: int, steps: int, temperature: float
) -> None:
    """The two roads add the same numbers in another order: noise, or top-p, right on a sum."""
    random = np.random.default_rng(seed)
    # At the lower temperature exponents are in the thousands, and so is their rounding.
    logits = (random.standard_normal(SMALL) * 2 * temperature + 30).astype(np.float32)
    every = SamplingSettings(temperature=temperature, top_p=1.0)
    exact = np.sort(exact_distribution(logits.astype(np.float64), every))[::-1]
    border = moved(float(np.cumsum(exact)[place]), steps)
    nucleus = msgspec.structs.replace(every, top_p=border)
    changes = logit_changes(every, [], 0)
    candidates = shards_of(logits, [cut], 40, temperature, [])
    for sampling, noise in ((every, border), (nucleus, math.nextafter(1.0, 0.0) - 1e-6)):
        full = choose(all_candidates(logits), sampling, changes, noise)
        assert choose(candidates, sampling, changes, noise) in (None, full)


def test_tokens_as_likely_as_those_left_out_are_not_taken_for_the_likeliest() -> None:
    """All equal, 2 of each shard known: the third of all is 2, which nobody sent."""
    logits = np.ones(SMALL, dtype=np.float32)
    candidates = shards_of(logits, [50], 2, 1.0, [])
    for sampling in (SamplingSettings(temperature=1.0, top_k=3), SamplingSettings(temperature=0.0)):
        changes = logit_changes(sampling, [], 0)
        for noise in (0.1, 0.5, 0.9):
            full = choose(all_candidates(logits), sampling, changes, noise)
            assert full in (0, 1, 2)
            assert choose(candidates, sampling, changes, noise) in (None, full)


@settings(max_examples=100)
@given(
    seed=st.integers(0, 10**6),
    spread=st.sampled_from([0.5, 3.0]),
    head=st.sampled_from(HEADS),
    requests=st.lists(
        st.tuples(
            settings_for(LARGE),
            st.lists(st.integers(0, LARGE - 1), max_size=30),
            st.floats(0, 1, exclude_max=True),
        ),
        min_size=1,
        max_size=3,
    ),
)
def test_answers_of_real_shards_give_each_request_its_token_and_its_logprobs(
    seed: int,
    spread: float,
    head: tuple[int, ...],
    requests: list[tuple[SamplingSettings, list[int], float]],
) -> None:
    count = len(requests)
    random = np.random.default_rng(seed)
    logits_NV = (random.standard_normal((count, LARGE)) * spread).astype(np.float32)
    changes = [logit_changes(s, ids, len(ids) // 2) for s, ids, _ in requests]
    wanted = m.LogitsWanted(
        form="top",
        ids=tuple(tuple(c.ids.tolist()) for c in changes),
        temperatures=tuple(s.temperature for s, _, _ in requests),
        raw_sums=(True,) * count,
    )
    candidates, joined = gathered(plan_with(head), logits_NV, wanted)
    np.testing.assert_array_equal(joined, logits_NV)
    oracle = torch.log_softmax(torch.tensor(logits_NV).double(), dim=-1).numpy()
    for n, (sampling, _ids, noise) in enumerate(requests):
        full = choose(all_candidates(logits_NV[n]), sampling, changes[n], noise)
        assert full is not None
        assert choose(candidates[n], sampling, changes[n], noise) in (None, full)
        for road in (candidates[n], all_candidates(logits_NV[n])):
            known = int(road.ids[road.ids.size // 2])
            told = token_logprobs(road, known, 20)
            assert told is not None
            assert abs(told.logprob - oracle[n, known]) < EXACT
            order = np.argsort(-logits_NV[n], kind="stable")[:20]
            assert [i for i, _ in told.top] == order.tolist()
            np.testing.assert_allclose([f for _, f in told.top], oracle[n][order], atol=EXACT)


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingSettings(temperature=0.0),
        SamplingSettings(temperature=0.7, top_p=0.9),
        SamplingSettings(temperature=1.0, top_p=1.0, min_p=0.05),
        SamplingSettings(temperature=1.0, top_p=0.95, top_k=40, repetition_penalty=1.1),
        SamplingSettings(temperature=0.8, presence_penalty=1.0, logit_bias=((77, -100.0),)),
    ],
)
def test_usual_requests_need_no_full_logits(sampling: SamplingSettings) -> None:
    """Else the short form would be right and useless: logits as steep as a language model's."""
    random = np.random.default_rng(3)
    logits_NV = (random.standard_normal((1, LARGE)) * 2 + 8 * (random.random(LARGE) < 0.01)).astype(
        np.float32
    )
    changes = logit_changes(sampling, [5, 600, 1200], 1)
    wanted = m.LogitsWanted(
        form="top",
        ids=(tuple(changes.ids.tolist()),),
        temperatures=(sampling.temperature,),
        raw_sums=(False,),
    )
    (candidates,), _ = gathered(plan_with((2, 1, 2)), logits_NV, wanted)
    for position in range(200):
        noise = uniform(5, 0, position)
        full = choose(all_candidates(logits_NV[0]), sampling, changes, noise)
        assert choose(candidates, sampling, changes, noise) == full


def test_a_token_outside_the_short_form_is_not_guessed() -> None:
    """All tokens equally likely: most of the mass lies outside what the shards sent."""
    logits = np.zeros((1, LARGE), dtype=np.float32)
    sampling = SamplingSettings(temperature=1.0, top_p=1.0)
    changes = logit_changes(sampling, [], 0)
    wanted = m.LogitsWanted(form="top", ids=((),), temperatures=(1.0,), raw_sums=(True,))
    (candidates,), _ = gathered(plan_with((2, 1, 2)), logits, wanted)
    assert choose(candidates, sampling, changes, 0.9) is None
    assert token_logprobs(candidates, int(candidates.ids[0]), 20) is None


def test_a_repeated_token_that_had_nearly_all_the_mass_cancels_no_digits() -> None:
    """Bug: its share was subtracted from a sum that it made up almost alone."""
    logits = np.full(SMALL, -1.0, dtype=np.float32)
    logits[7] = 30.0
    sampling = SamplingSettings(temperature=0.2, top_p=0.9, repetition_penalty=30.0)
    changes: LogitChanges = logit_changes(sampling, [7], 1)
    candidates = shards_of(logits, [40], 60, 0.2, [7])
    for position in range(500):
        noise = uniform(1, 0, position)
        full = choose(all_candidates(logits), sampling, changes, noise)
        assert choose(candidates, sampling, changes, noise) in (None, full)


@pytest.mark.parametrize("temperature", [1e-320, 1e-100, 1e-9])
def test_a_tiny_temperature_fetches_the_full_logits_rather_than_overflow(
    temperature: float,
) -> None:
    logits = np.random.default_rng(2).standard_normal((1, LARGE)).astype(np.float32)
    sampling = SamplingSettings(temperature=temperature, presence_penalty=1.0)
    changes = logit_changes(sampling, [4, 5], 1)
    wanted = m.LogitsWanted(form="top", ids=((5,),), temperatures=(temperature,), raw_sums=(False,))
    (candidates,), _ = gathered(plan_with((2, 1, 2)), logits, wanted)
    full = choose(all_candidates(logits[0]), sampling, changes, 0.3)
    assert full == int(logits.argmax())
    assert choose(candidates, sampling, changes, 0.3) in (None, full)


@pytest.mark.parametrize("field", ["ids", "temperatures", "raw_sums"])
def test_a_step_that_asks_for_another_number_of_positions_is_refused(field: str) -> None:
    wanted = m.LogitsWanted(
        form="top", ids=((), ()), temperatures=(0.0, 0.0), raw_sums=(True, True)
    )
    check_wanted(wanted, 2)
    shorter = msgspec.structs.replace(wanted, **{field: getattr(wanted, field)[:1]})
    with pytest.raises(ProtocolError, match="2 positions need logits"):
        check_wanted(shorter, 2)
