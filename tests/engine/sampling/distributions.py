"""The distribution of the next token by two independent roads, and settings to try them with."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

from engine.host.messages import SamplingSettings

PROBE_WIDTH = 1e-14


def exact_distribution(
    logits: NDArray[np.float64],
    settings: SamplingSettings,
    ids: Sequence[int] = (),
    num_prompt: int = 0,
    forbidden: Sequence[int] = (),
) -> NDArray[np.float64]:
    """The definition, written down plainly, one token at a time."""
    values = [float(v) for v in logits]
    for i, bias in settings.logit_bias:
        values[i] += bias
    for i in set(ids):
        penalty = settings.repetition_penalty
        values[i] = values[i] / penalty if values[i] > 0 else values[i] * penalty
    answer = list(ids[num_prompt:])
    for i in set(answer):
        values[i] -= settings.frequency_penalty * answer.count(i) + settings.presence_penalty
    for i in forbidden:
        values[i] = -math.inf
    order = sorted(range(len(values)), key=lambda i: (-values[i], i))
    result = np.zeros(len(values))
    if settings.temperature == 0:
        result[order[0]] = 1
        return result
    kept = order[: settings.top_k or None]
    weights = {i: math.exp((values[i] - values[order[0]]) / settings.temperature) for i in kept}
    total = math.fsum(weights.values())
    nucleus: list[int] = []
    mass = 0.0
    for i in kept:
        nucleus.append(i)
        mass += weights[i] / total
        if settings.top_p < 1 and mass >= settings.top_p:
            break
    for i in nucleus:
        if weights[i] >= settings.min_p * weights[order[0]]:
            result[i] = weights[i]
    return result / math.fsum(result)


def measured_distribution(
    pick: Callable[[float], int | None], num_tokens: int
) -> NDArray[np.float64]:
    """Lengths of the intervals of noise that give each token, found by halving.

    Args:
        pick: the token for a noise in [0, 1).
    """
    result = np.zeros(num_tokens)
    low = 0.0
    while low < 1:
        token = pick(low)
        assert token is not None
        assert not result[token], f"token {token} has a second interval at {low}"
        inside, outside = low, 1.0
        if pick(math.nextafter(1.0, 0.0)) == token:
            inside = outside
        while outside - inside > PROBE_WIDTH:
            middle = (inside + outside) / 2
            if pick(middle) == token:
                inside = middle
            else:
                outside = middle
        result[token] = outside - low
        low = outside
    return result


def settings_for(vocabulary: int) -> st.SearchStrategy[SamplingSettings]:
    """Settings that sample, each filter and penalty on and off."""
    ids = st.integers(0, vocabulary - 1)
    biases = st.dictionaries(ids, st.sampled_from([-100.0, -1.5, 0.0, 2.0, 30.0]), max_size=3)
    return st.builds(
        SamplingSettings,
        temperature=st.sampled_from([0.3, 1.0, 2.5]),
        top_k=st.sampled_from([0, 0, 1, 3, 20]),
        top_p=st.sampled_from([0.1, 0.5, 0.95, 1.0]),
        repetition_penalty=st.sampled_from([1.0, 0.8, 1.3, 5.0]),
        min_p=st.sampled_from([0.0, 0.0, 0.02, 0.3, 1.0]),
        presence_penalty=st.sampled_from([0.0, -0.7, 1.1]),
        frequency_penalty=st.sampled_from([0.0, -0.4, 0.9]),
        logit_bias=biases.map(lambda chosen: tuple(chosen.items())),
    )
