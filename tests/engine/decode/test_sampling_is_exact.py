"""The short form of the logits gives the very distribution that the full logits give."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from engine.decode.sampling import (
    ShardLogits,
    all_candidates,
    choose,
    merge_shards,
    uniform,
    validate_sampling,
)
from engine.errors import PromptError
from engine.host.messages import SamplingSettings

VOCABULARY = 99


def exact_distribution(
    logits: NDArray[np.float64], settings: SamplingSettings, repeated: set[int]
) -> NDArray[np.float64]:
    """The definition, written down plainly: penalty, temperature, top-k, then top-p."""
    values = logits.copy()
    for i in repeated:
        penalty = settings.repetition_penalty
        values[i] = values[i] / penalty if values[i] > 0 else values[i] * penalty
    order = sorted(range(len(values)), key=lambda i: (-values[i], i))
    if settings.temperature == 0:
        result = np.zeros(len(values))
        result[order[0]] = 1
        return result
    kept = order[: settings.top_k or None]
    weights = {i: math.exp((values[i] - values[order[0]]) / settings.temperature) for i in kept}
    total = sum(weights.values())
    result = np.zeros(len(values))
    mass = 0.0
    for i in kept:
        result[i] = weights[i] / total
        mass += result[i]
        if mass >= settings.top_p:
            break
    return result / result.sum()


def short_form(
    logits: NDArray[np.float32], cuts: list[int], top: int, temperature: float, asked: set[int]
) -> list[ShardLogits]:
    """What shards of the vocabulary would answer."""
    shards: list[ShardLogits] = []
    borders = [0, *cuts, len(logits)]
    for first, end in pairwise(borders):
        part = logits[first:end]
        order = np.argsort(-part, kind="stable")[:top]
        scaled = part.astype(np.float64) / (temperature or 1.0)
        scaled[[i - first for i in asked if first <= i < end]] = -np.inf
        shards.append(
            ShardLogits(
                order.astype(np.int64) + first,
                part[order],
                {i: float(logits[i]) for i in asked if first <= i < end},
                float(np.logaddexp.reduce(scaled)),
                len(order) == end - first,
            )
        )
    return shards


settings_strategy = st.builds(
    SamplingSettings,
    temperature=st.sampled_from([0.0, 0.3, 1.0, 2.5]),
    top_k=st.sampled_from([0, 1, 3, 40]),
    top_p=st.sampled_from([0.1, 0.5, 0.95, 1.0]),
    repetition_penalty=st.sampled_from([1.0, 1.3, 5.0]),
)


@settings(deadline=None, max_examples=300)
@given(
    seed=st.integers(0, 10**6),
    spread=st.sampled_from([0.3, 2.0, 8.0]),
    sampling=settings_strategy,
    cuts=st.sets(st.integers(1, VOCABULARY - 1), max_size=3),
    top=st.integers(1, VOCABULARY),
    repeated=st.sets(st.integers(0, VOCABULARY - 1), max_size=5),
    noise=st.floats(0, 1, exclude_max=True),
)
def test_a_choice_from_the_short_form_is_the_choice_from_all_logits(
    seed: int,
    spread: float,
    sampling: SamplingSettings,
    cuts: set[int],
    top: int,
    repeated: set[int],
    noise: float,
) -> None:
    logits = (np.random.default_rng(seed).standard_normal(VOCABULARY) * spread).astype(np.float32)
    asked = repeated if sampling.repetition_penalty != 1 else set[int]()
    shards = short_form(logits, sorted(cuts), top, sampling.temperature, asked)
    short = choose(merge_shards(shards), sampling, asked, noise)
    full = choose(all_candidates(logits), sampling, asked, noise)
    assert full is not None
    if short is not None and short != full:
        # Sums in another order may round a border of the distribution to either side.
        exact = exact_distribution(logits.astype(np.float64), sampling, asked)
        order = np.argsort(-exact, kind="stable")
        borders = np.cumsum(exact[order])
        assert np.abs(borders - noise).min() < 1e-6, f"{short} instead of {full}"


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingSettings(temperature=0.8, top_p=0.9),
        SamplingSettings(temperature=1.5, top_k=7),
        SamplingSettings(temperature=1.0, top_k=20, top_p=0.6, repetition_penalty=1.7),
        SamplingSettings(temperature=1.0, top_p=1.0),
    ],
)
def test_many_draws_follow_the_exact_distribution(sampling: SamplingSettings) -> None:
    logits = (np.random.default_rng(5).standard_normal(VOCABULARY) * 2).astype(np.float32)
    repeated = {3, 50, 51} if sampling.repetition_penalty != 1 else set[int]()
    exact = exact_distribution(logits.astype(np.float64), sampling, repeated)
    candidates = all_candidates(logits)
    draws = 20_000
    counts = np.zeros(VOCABULARY)
    for position in range(draws):
        token = choose(candidates, sampling, repeated, uniform(7, 0, position))
        assert token is not None
        counts[token] += 1
    assert counts[exact == 0].sum() == 0
    expected = exact[exact > 0] * draws
    statistic = float((((counts[exact > 0] - expected) ** 2) / expected).sum())
    freedom = max(1, (exact > 0).sum() - 1)
    # Chi-square has mean f and deviation sqrt(2 f); the noise is fixed, so this cannot flake.
    assert statistic < freedom + 5 * math.sqrt(2 * freedom), statistic


def test_a_penalty_never_raises_a_repeated_token() -> None:
    logits = np.array([-2.0, -1.0, -1.5, -4.0], dtype=np.float32)
    sampling = SamplingSettings(temperature=0.0, repetition_penalty=2.0)
    assert choose(all_candidates(logits), sampling, {1}, 0.0) == 2


def test_equal_logits_go_to_the_smallest_id() -> None:
    logits = np.array([1.0, 3.0, 3.0, 3.0], dtype=np.float32)
    assert choose(all_candidates(logits), SamplingSettings(temperature=0.0), (), 0.5) == 1


def test_noise_depends_on_seed_and_position_alone() -> None:
    numbers = {uniform(seed, 0, n) for seed in range(20) for n in range(50)}
    assert len(numbers) == 1000
    assert all(0 <= number < 1 for number in numbers)
    assert uniform(3, 0, 9) == uniform(3, 0, 9)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"top_p": 2.0}, "top_p must be a number above 0 and at most 1, got 2"),
        ({"top_p": 0.0}, "top_p must be"),
        ({"top_p": math.nan}, "top_p must be"),
        ({"temperature": -1.0}, "temperature must be a number at least 0"),
        ({"temperature": math.inf}, "temperature must be"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be a number above 0"),
        ({"top_k": -1}, "top_k must be 0"),
        ({"seed": 2**64}, "seed must be between"),
        ({"seed": -1}, "seed must be between"),
    ],
)
def test_settings_that_break_a_rule_are_named(change: dict[str, float], words: str) -> None:
    with pytest.raises(PromptError, match=words):
        validate_sampling(SamplingSettings(**change))  # type: ignore[arg-type]


def test_a_repeated_token_that_had_nearly_all_the_mass_cancels_no_digits() -> None:
    """Bug: its share was subtracted from a sum that it made up almost alone."""
    logits = np.full(VOCABULARY, -1.0, dtype=np.float32)
    logits[7] = 30.0
    sampling = SamplingSettings(temperature=0.2, top_p=0.9, repetition_penalty=30.0)
    candidates = merge_shards(short_form(logits, [40], 60, 0.2, {7}))
    for position in range(500):
        noise = uniform(1, 0, position)
        full = choose(all_candidates(logits), sampling, {7}, noise)
        assert choose(candidates, sampling, {7}, noise) in (None, full)


def test_logits_that_are_no_numbers_give_no_token() -> None:
    logits = np.full(VOCABULARY, np.nan, dtype=np.float32)
    for temperature in (0.0, 1.0):
        sampling = SamplingSettings(temperature=temperature)
        assert choose(all_candidates(logits), sampling, (), 0.5) is None
