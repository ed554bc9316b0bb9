"""A matrix over devices gives what one tensor gives, for any shape, cut and dimension."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from engine.cluster.cluster_matrix import ClusterMatrix, share_fractions
from engine.errors import ConfigError

# Sums of at most 40 products of order one in float64: 40 roundings of 1e-16 and some.
TOLERANCE = 1e-13

sizes = st.integers(1, 40)


@st.composite
def percentages(draw: st.DrawFn) -> list[float]:
    """One to five shares, some of them 0, as percents or as fractions."""
    weights = draw(st.lists(st.integers(0, 9), min_size=1, max_size=5).filter(any))
    whole = draw(st.sampled_from([1.0, 100.0]))
    return [whole * weight / sum(weights) for weight in weights]


@st.composite
def tensors(draw: st.DrawFn, *shape: int) -> Tensor:
    """Random float64, or int64, where every sum is exact."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    if draw(st.booleans()):
        return torch.randint(-9, 10, shape, generator=generator)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def assert_equal(found: Tensor, expected: Tensor) -> None:
    """Integers exactly, reals within the tolerance."""
    assert found.shape == expected.shape and found.dtype == expected.dtype
    if expected.dtype == torch.int64:
        assert torch.equal(found, expected)
    elif expected.numel():
        difference = (found - expected).abs().max()
        assert difference <= TOLERANCE * max(1.0, float(expected.abs().max())), difference


@given(data=st.data(), rows=sizes, columns=sizes, split_dim=st.integers(0, 1))
def test_products_equal_torch(data: st.DataObject, rows: int, columns: int, split_dim: int) -> None:
    whole = data.draw(tensors(rows, columns))
    matrix = ClusterMatrix(whole, data.draw(percentages()), split_dim=split_dim)
    x = torch.randn(3, 2, rows, dtype=torch.float64).to(whole.dtype)
    assert_equal(x @ matrix, x @ whole)
    assert_equal(x[0, 0] @ matrix, x[0, 0] @ whole)
    y = torch.randn(2, 3, columns, dtype=torch.float64).to(whole.dtype)
    assert_equal(y @ matrix.T, y @ whole.T)
    z = torch.randn(columns, 4, dtype=torch.float64).to(whole.dtype)
    assert_equal(matrix @ z, whole @ z)


@given(data=st.data(), rows=sizes, columns=sizes, split_dim=st.integers(0, 1))
def test_nothing_is_lost_and_no_share_is_off_by_one(
    data: st.DataObject, rows: int, columns: int, split_dim: int
) -> None:
    whole = data.draw(tensors(rows, columns))
    shares = data.draw(percentages())
    matrix = ClusterMatrix(whole, shares, split_dim=split_dim)
    assert torch.equal(matrix.gather(), whole)
    assert torch.equal(matrix.T.gather(), whole.T)
    assert (matrix.shape, matrix.dtype) == (whole.shape, whole.dtype)
    for size, share in zip(matrix.sizes, shares, strict=True):
        exact = share / sum(shares) * whole.shape[split_dim]
        assert abs(size - exact) < 1 + 1e-9
        assert size == 0 or share > 0


@given(
    data=st.data(),
    rows=sizes,
    columns=sizes,
    dims=st.tuples(st.integers(0, 1), st.integers(0, 1)),
)
def test_sums_equal_torch_whatever_the_cuts(
    data: st.DataObject, rows: int, columns: int, dims: tuple[int, int]
) -> None:
    first = data.draw(tensors(rows, columns))
    second = data.draw(tensors(rows, columns)).to(first.dtype)
    left = ClusterMatrix(first, data.draw(percentages()), split_dim=dims[0])
    right = ClusterMatrix(second, data.draw(percentages()), split_dim=dims[1])
    assert torch.equal((left + right).gather(), first + second)
    assert (left + right).sizes == left.sizes
    assert torch.equal((left + second).gather(), first + second)
    assert torch.equal((second + left).gather(), first + second)
    assert torch.equal((left + second[:1]).gather(), first + second[:1])
    assert torch.equal((left + second[0]).gather(), first + second[0])


def test_shards_are_taken_over_where_they_lie() -> None:
    shards = [torch.randn(n, 7) for n in (3, 0, 4)]
    matrix = ClusterMatrix.from_shards(shards, split_dim=0)
    assert all(a is b for a, b in zip(matrix.shards, shards, strict=True))
    assert torch.equal(matrix.gather(), torch.cat(shards))
    assert matrix.sizes == (3, 0, 4) and matrix.shape == (7, 7)
    assert matrix.devices == (torch.device("cpu"),) * 3


def test_every_dtype_is_kept() -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.int32):
        whole = torch.arange(35).reshape(5, 7).to(dtype)
        matrix = ClusterMatrix(whole, [20, 30, 50], split_dim=1)
        assert {s.dtype for s in matrix.shards} == {dtype}
        assert (torch.ones(2, 5, dtype=dtype) @ matrix).dtype == dtype


@pytest.mark.gpu
def test_shares_on_a_gpu_give_the_same() -> None:
    whole = torch.randn(37, 29, dtype=torch.float64)
    x = torch.randn(3, 37, dtype=torch.float64)
    for dim in (0, 1):
        matrix = ClusterMatrix(whole, [40, 60], devices=["cpu", "cuda:0"], split_dim=dim)
        assert [d.type for d in matrix.devices] == ["cpu", "cuda"]
        assert_equal(x @ matrix, x @ whole)
        assert torch.equal((matrix + whole).gather(), whole + whole)


MATRIX = torch.ones(5, 7)
REFUSED: dict[str, tuple[Any, str]] = {
    "sum": (lambda: ClusterMatrix(MATRIX, [50, 40]), "sum to 90, they must sum to 100"),
    "negative": (lambda: ClusterMatrix(MATRIX, [-10, 110]), "not numbers >= 0"),
    "nan": (lambda: ClusterMatrix(MATRIX, [float("nan"), 1]), "not numbers >= 0"),
    "none": (lambda: ClusterMatrix(MATRIX, []), "Give one for each device"),
    "dim": (lambda: ClusterMatrix(MATRIX, [100], split_dim=2), "split_dim 2 is not 0"),
    "vector": (lambda: ClusterMatrix(MATRIX[0], [100]), r"shape \[7\] is no matrix"),
    "count": (lambda: ClusterMatrix(MATRIX, [100], devices=["cpu", "cpu"]), "1 percentages for 2"),
    "kind": (lambda: ClusterMatrix(MATRIX, [100], devices=["tpu 3"]), "device 'tpu 3' is unknown"),
    "gpu": (lambda: ClusterMatrix(MATRIX, [100], devices=["cuda:77"]), "cuda:77 was asked for"),
    "width": (lambda: torch.ones(2, 6) @ ClusterMatrix(MATRIX, [100]), "last dimension must be 5"),
    "dtype": (lambda: torch.ones(5).double() @ ClusterMatrix(MATRIX, [100]), "the dtype equal"),
    "addend": (lambda: ClusterMatrix(MATRIX, [100]) + torch.ones(7, 5), "cannot be added"),
    "shards": (lambda: ClusterMatrix.from_shards([MATRIX, MATRIX.T]), "do not make one matrix"),
    "no shards": (lambda: ClusterMatrix.from_shards([]), "do not make one matrix"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_done_is_refused_in_one_line(name: str) -> None:
    call, text = REFUSED[name]
    with pytest.raises(ConfigError, match=text) as found:
        call()
    assert "\n" not in str(found.value)


def test_rounded_percentages_are_scaled_to_the_whole() -> None:
    assert sum(share_fractions([33.3, 33.3, 33.3])) == 1
    assert share_fractions([0.25, 0.75]) == share_fractions([25, 75])
