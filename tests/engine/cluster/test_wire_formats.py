"""Partial sums are rounded to the wire format as torch rounds, and come back unchanged."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from engine.cluster.wire_format import from_wire, to_wire

arrays = hnp.arrays(
    np.float32, hnp.array_shapes(max_dims=2), elements=st.floats(width=32, allow_nan=True)
)


@given(arrays, st.sampled_from(["float32", "bfloat16", "float16"]))
def test_rounding_equals_torch(values: np.ndarray, wire: str) -> None:
    dtype = getattr(torch, wire)
    expected = torch.tensor(values).to(dtype).float().numpy()
    np.testing.assert_array_equal(from_wire(to_wire(values, wire)), expected)


@pytest.mark.parametrize("wire", ["float32", "bfloat16", "float16"])
def test_rounding_twice_is_rounding_once(wire: str) -> None:
    values = np.random.default_rng(0).standard_normal((9, 7)).astype(np.float32)
    once = from_wire(to_wire(values, wire))
    np.testing.assert_array_equal(from_wire(to_wire(once, wire)), once)
