"""The largest logits and log-sum-exps of the native kernels are those of their definition."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.kernels import native_logits
from engine.kernels.native_library import NativeLibrary

shared = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(autouse=True)
def use_library(library: NativeLibrary, monkeypatch: pytest.MonkeyPatch) -> None:
    """Computes with the library under test, whatever the environment asks for."""
    monkeypatch.setattr(native_logits, "native_library", lambda: library)


def _use(library: NativeLibrary, data: st.DataObject) -> None:
    usable = [name for name, runs in library.instruction_sets.items() if runs]
    library.use(data.draw(st.sampled_from(usable)))


@shared
@given(
    length=st.integers(1, 400),
    seed=st.integers(0, 1000),
    decimals=st.integers(0, 5),
    broken=st.lists(st.sampled_from([math.nan, math.inf, -math.inf]), max_size=3),
    data=st.data(),
)
def test_the_largest_come_first_and_equals_in_their_order(
    library: NativeLibrary,
    length: int,
    seed: int,
    decimals: int,
    broken: list[float],
    data: st.DataObject,
) -> None:
    _use(library, data)
    random = np.random.default_rng(seed)
    logits = np.round(random.normal(size=(2, length)) * 3, decimals).astype(np.float32)
    for value in broken:
        logits[0, random.integers(length)] = value
    count = data.draw(st.integers(1, length))
    values, indices = native_logits.largest(torch.tensor(logits), count)
    for row, found, at in zip(logits, values.numpy(), indices.numpy(), strict=True):
        # Stable, and numbers after what is none.
        keys = np.where(np.isnan(row), -np.inf, -row.astype(np.float64))
        order = np.lexsort((np.arange(length), keys, ~np.isnan(row)))[:count]
        assert at.tolist() == order.tolist()
        assert np.array_equal(found, row[order], equal_nan=True)


@shared
@given(
    length=st.integers(1, 400),
    seed=st.integers(0, 1000),
    spread=st.sampled_from([0.0, 1.0, 30.0, 1e4]),
    temperature=st.sampled_from([1e-300, 1e-3, 0.3, 1.0, 5.0, 1e8]),
    data=st.data(),
)
def test_log_sum_exp_is_as_exact_as_doubles_are(
    library: NativeLibrary,
    length: int,
    seed: int,
    spread: float,
    temperature: float,
    data: st.DataObject,
) -> None:
    _use(library, data)
    logits = (np.random.default_rng(seed).normal(size=length) * spread).astype(np.float32)
    logits[::7] = -np.inf
    logits[-1] = 1.0
    found = native_logits.log_sum_exp(torch.tensor(logits), temperature)
    scaled = logits.astype(np.float64) / temperature
    exact = scaled.max() + math.log(math.fsum(np.exp(scaled - scaled.max())))
    assert found == pytest.approx(exact, rel=1e-14, abs=1e-14)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_no_number_is_what_the_sum_is(library: NativeLibrary, value: float) -> None:
    for at in (0, 5, 99):
        logits: Any = torch.zeros(100)
        logits[at] = value
        found = native_logits.log_sum_exp(logits, 0.5)
        assert found == value or (math.isnan(found) and math.isnan(value))
    assert native_logits.log_sum_exp(torch.full((5,), -math.inf), 1.0) == -math.inf
