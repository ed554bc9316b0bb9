"""Shapes and strategies of the plan's tests."""

from __future__ import annotations

import pytest

from engine.plan.plan import PlanShape


@pytest.fixture
def small_model() -> PlanShape:
    """The sizes of SmolLM2-135M: 30 layers, 9 query heads on 3 KV heads."""
    return PlanShape(num_layers=30, num_heads=9, num_kv_heads=3, mlp_width=1536, vocab_size=49152)


@pytest.fixture
def odd_shape() -> PlanShape:
    """No size is a multiple of its quantum, and no two are equal."""
    return PlanShape(num_layers=4, num_heads=15, num_kv_heads=5, mlp_width=170, vocab_size=599)
