"""Each token is chosen with exactly the probability that the definition gives it."""

from __future__ import annotations

import math

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from transformers.generation import logits_process as hf

from engine.host.messages import SamplingSettings
from engine.sampling.choice import all_candidates, choose, uniform
from engine.sampling.logit_changes import logit_changes
from tests.engine.sampling.distributions import (
    exact_distribution,
    measured_distribution,
    settings_for,
)

VOCABULARY = 33
PROMPT_LENGTH = 3
# A border is found to 1e-14; sums of 33 doubles in another order differ by less than this.
EXACT = 1e-12

tokens = st.lists(st.integers(0, VOCABULARY - 1), min_size=PROMPT_LENGTH, max_size=12)


def random_logits(seed: int, spread: float) -> NDArray[np.float32]:
    return (np.random.default_rng(seed).standard_normal(VOCABULARY) * spread).astype(np.float32)


def measure(
    logits: NDArray[np.float32],
    sampling: SamplingSettings,
    ids: list[int],
    forbidden: tuple[int, ...] = (),
) -> NDArray[np.float64]:
    candidates = all_candidates(logits)
    changes = logit_changes(sampling, ids, PROMPT_LENGTH, forbidden)
    return measured_distribution(
        lambda noise: choose(candidates, sampling, changes, noise), len(logits)
    )


def transformers_distribution(
    logits: NDArray[np.float32], sampling: SamplingSettings, ids: list[int], forbidden: list[int]
) -> NDArray[np.float64]:
    """What the processors and warpers of transformers make of the same request, in float64."""
    steps = hf.LogitsProcessorList()
    if sampling.logit_bias:
        steps.append(hf.SequenceBiasLogitsProcessor({(i,): b for i, b in sampling.logit_bias}))
    steps.append(hf.RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    if forbidden:
        steps.append(hf.SuppressTokensLogitsProcessor(forbidden))
    steps.append(hf.TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k:
        steps.append(hf.TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        steps.append(hf.TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        steps.append(hf.MinPLogitsWarper(sampling.min_p))
    scores = steps(torch.tensor([ids]), torch.from_numpy(logits.astype(np.float64))[None])
    return torch.softmax(scores[0], dim=-1).numpy()


@settings(max_examples=60)
@given(
    seed=st.integers(0, 10**6),
    spread=st.sampled_from([0.3, 2.0, 8.0]),
    sampling=settings_for(VOCABULARY),
    ids=tokens,
    forbidden=st.sets(st.integers(0, VOCABULARY - 1), max_size=3),
)
def test_the_noise_that_gives_a_token_is_as_wide_as_its_probability(
    seed: int, spread: float, sampling: SamplingSettings, ids: list[int], forbidden: set[int]
) -> None:
    logits = random_logits(seed, spread)
    exact = exact_distribution(
        logits.astype(np.float64), sampling, ids, PROMPT_LENGTH, sorted(forbidden)
    )
    found = measure(logits, sampling, ids, tuple(forbidden))
    np.testing.assert_allclose(found, exact, rtol=0, atol=EXACT)
    # Narrower than a probe: a token of 1e-15 may or may not be met.
    assert not found[exact == 0].any()
    assert found[exact > 1e-13].all()


@settings(max_examples=60)
@given(
    seed=st.integers(0, 10**6),
    spread=st.sampled_from([0.3, 2.0, 8.0]),
    sampling=settings_for(VOCABULARY),
    ids=tokens,
    forbidden=st.sets(st.integers(0, VOCABULARY - 1), max_size=3),
)
def test_the_distribution_is_that_of_transformers(
    seed: int, spread: float, sampling: SamplingSettings, ids: list[int], forbidden: set[int]
) -> None:
    """All but presence and frequency penalty, which transformers does not have."""
    sampling = msgspec.structs.replace(sampling, presence_penalty=0.0, frequency_penalty=0.0)
    logits = random_logits(seed, spread)
    expected = transformers_distribution(logits, sampling, ids, sorted(forbidden))
    found = measure(logits, sampling, ids, tuple(forbidden))
    np.testing.assert_allclose(found, expected, rtol=0, atol=EXACT)
    assert not found[expected == 0].any()


def test_presence_and_frequency_penalties_look_at_the_answer_alone() -> None:
    """OpenAI: logit - count * frequency - (count > 0) * presence, over generated tokens."""
    logits = np.zeros(VOCABULARY, dtype=np.float32)
    sampling = SamplingSettings(
        temperature=1.0, top_p=1.0, presence_penalty=0.5, frequency_penalty=0.25
    )
    # 7, 8, 9 are the prompt; the answer has 8 twice and 5 once.
    changed = logit_changes(sampling, [7, 8, 9, 8, 5, 8], PROMPT_LENGTH).apply(
        np.arange(VOCABULARY), logits.astype(np.float64)
    )
    assert {i: v for i, v in enumerate(changed.tolist()) if v} == {8: -1.0, 5: -0.75}


@given(
    seed=st.integers(0, 10**6),
    ids=tokens,
    repetition=st.floats(1, 100),
    presence=st.floats(0, 2),
    frequency=st.floats(0, 2),
)
def test_a_penalty_never_raises_a_repeated_token(
    seed: int, ids: list[int], repetition: float, presence: float, frequency: float
) -> None:
    logits = random_logits(seed, 4.0).astype(np.float64)
    sampling = SamplingSettings(
        repetition_penalty=repetition, presence_penalty=presence, frequency_penalty=frequency
    )
    changed = logit_changes(sampling, ids, PROMPT_LENGTH).apply(np.arange(VOCABULARY), logits)
    assert (changed <= logits).all()
    others = np.setdiff1d(np.arange(VOCABULARY), ids)
    np.testing.assert_array_equal(changed[others], logits[others])


def test_a_penalty_lowers_negative_logits_too() -> None:
    """Bug of the seed documents: a negative logit was divided, so a repeat became likelier."""
    logits = np.array([-2.0, -1.0, -1.5, -4.0], dtype=np.float32)
    sampling = SamplingSettings(temperature=0.0, repetition_penalty=2.0)
    changes = logit_changes(sampling, [1], 1)
    assert choose(all_candidates(logits), sampling, changes, 0.0) == 2


def test_equal_logits_go_to_the_smallest_id() -> None:
    logits = np.array([1.0, 3.0, 3.0, 3.0], dtype=np.float32)
    sampling = SamplingSettings(temperature=0.0)
    assert choose(all_candidates(logits), sampling, logit_changes(sampling, [], 0), 0.5) == 1


@pytest.mark.parametrize("temperature", [1e-320, 1e-100, 1e-9])
def test_a_tiny_temperature_is_greedy(temperature: float) -> None:
    sampling = SamplingSettings(temperature=temperature, top_p=1.0)
    logits = random_logits(4, 2.0)
    found = measure(logits, sampling, [1, 2, 3])
    assert found[logits.argmax()] == 1.0


def test_noise_depends_on_seed_sequence_and_position_alone() -> None:
    numbers = {uniform(seed, i, n) for seed in range(10) for i in range(5) for n in range(20)}
    assert len(numbers) == 1000
    assert all(0 <= number < 1 for number in numbers)
    assert uniform(3, 1, 9) == uniform(3, 1, 9)


def test_noise_is_evenly_spread() -> None:
    """The chain from noise to frequencies: 20,000 draws follow the exact distribution."""
    sampling = SamplingSettings(temperature=0.8, top_p=0.9)
    logits = random_logits(5, 2.0)
    exact = exact_distribution(logits.astype(np.float64), sampling)
    changes = logit_changes(sampling, [], 0)
    counts = np.zeros(VOCABULARY)
    draws = 20_000
    for position in range(draws):
        token = choose(all_candidates(logits), sampling, changes, uniform(7, 0, position))
        assert token is not None
        counts[token] += 1
    assert counts[exact == 0].sum() == 0
    expected = exact[exact > 0] * draws
    statistic = float((((counts[exact > 0] - expected) ** 2) / expected).sum())
    freedom = max(1, (exact > 0).sum() - 1)
    # Chi-square has mean f and deviation sqrt(2 f); the noise is fixed, so this cannot flake.
    assert statistic < freedom + 5 * math.sqrt(2 * freedom), statistic


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_logits_that_are_no_numbers_give_no_token(bad: float) -> None:
    logits = random_logits(1, 1.0)
    logits[8] = bad
    for temperature in (0.0, 1.0):
        sampling = SamplingSettings(temperature=temperature)
        changes = logit_changes(sampling, [], 0)
        assert choose(all_candidates(logits), sampling, changes, 0.5) is None
