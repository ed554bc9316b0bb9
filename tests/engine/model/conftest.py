"""What the model tests share: comparing with a tolerance, and plans of any cut."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from numpy.typing import NDArray

from engine.plan.plan import Plan, PlanShape

# Float32 with logits of order one: only the order of additions differs.
TOLERANCE = 1e-5


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Products this small only make a second thread wait, on a busy machine for long."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def oracle_logits(model: Any, ids: list[int]) -> NDArray[np.float32]:
    """What transformers computes, float32 [T, V]."""
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].float().numpy()


def assert_close(
    found: NDArray[np.float32], expected: NDArray[np.float32], tolerance: float = TOLERANCE
) -> None:
    """Compare, and say where the largest difference is."""
    assert found.shape == expected.shape
    difference = np.abs(found - expected)
    where = tuple(int(n) for n in np.unravel_index(difference.argmax(), difference.shape))
    assert difference.max() <= tolerance, f"largest difference {difference.max():.3g} at {where}"


@st.composite
def any_plan(draw: st.DrawFn, shape: PlanShape) -> Plan:
    """A plan of three devices in which every row is cut anywhere."""
    rows: list[tuple[int, ...]] = []
    for row in range(shape.num_rows):
        total = shape.num_quanta(row)
        first = draw(st.integers(0, total))
        second = draw(st.integers(0, total - first))
        rows.append((first, second, total - first - second))
    return Plan(shape, ("a/cpu", "b/cpu", "c/cpu"), tuple(rows)).validate()
