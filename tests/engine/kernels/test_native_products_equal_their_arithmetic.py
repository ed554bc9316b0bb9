"""A native product is that of the packed weights with activations rounded to int8, and no other."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.kernels.native_library import NativeLibrary
from engine.kernels.native_matrices import NativeMatrix, repack
from tests.engine.kernels.native_arithmetic import FORMATS, exact_values, product, random_matrix

SHAPES = {
    "format": st.sampled_from(FORMATS),
    "rows": st.integers(1, 70),
    "blocks": st.integers(1, 4),
    "block": st.integers(1, 75),
    "seed": st.integers(0, 99),
}
shared = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


def packed(
    library: NativeLibrary, format: str, rows: int, blocks: int, block: int, seed: int
) -> tuple[object, NativeMatrix]:
    columns = blocks * block
    matrix = random_matrix(format, rows, columns, columns if format == "bfloat16" else block, seed)
    native = repack(matrix, library)
    assert isinstance(native, NativeMatrix)
    return matrix, native


@shared
@given(**SHAPES, tokens=st.integers(1, 19), threads=st.integers(1, 4), data=st.data())
def test_every_instruction_set_computes_the_promised_product(
    library: NativeLibrary,
    format: str,
    rows: int,
    blocks: int,
    block: int,
    seed: int,
    tokens: int,
    threads: int,
    data: st.DataObject,
) -> None:
    matrix, native = packed(library, format, rows, blocks, block, seed)
    usable = [name for name, runs in library.instruction_sets.items() if runs]
    library.use(data.draw(st.sampled_from(usable)))
    library.set_num_threads(threads)
    x = torch.randn(tokens, blocks * block, generator=torch.Generator().manual_seed(seed))
    x[0, : min(40, block)] = 0.0  # a group without any magnitude
    found = native.multiply(x, "generated").double().numpy()
    expected, allowed = product(matrix, x)  # type: ignore[arg-type]
    excess = np.abs(found - expected) - allowed
    assert excess.max() <= 0, f"{excess.max()} too far at {np.argmax(excess)}"


@shared
@given(**SHAPES, tokens=st.integers(1, 5))
def test_rounding_activations_costs_at_most_half_a_step_of_each(
    library: NativeLibrary,
    format: str,
    rows: int,
    blocks: int,
    block: int,
    seed: int,
    tokens: int,
) -> None:
    matrix, native = packed(library, format, rows, blocks, block, seed)
    x = torch.randn(tokens, blocks * block, generator=torch.Generator().manual_seed(seed))
    weights = exact_values(matrix)  # type: ignore[arg-type]
    exact = x.double().numpy() @ weights.T
    # A group's step is at most a 127th of the token's largest magnitude.
    step = 0.0 if format == "bfloat16" else x.abs().amax(1).double().numpy() / 127
    room = np.abs(weights).sum(1)[None] * np.reshape(step, (-1, 1)) * 0.5001
    _, rounding = product(matrix, x)  # type: ignore[arg-type]
    found = native.multiply(x, "generated").double().numpy()
    assert (np.abs(found - exact) <= room + 2 * rounding).all()


@shared
@given(**SHAPES, data=st.data())
def test_dequantised_rows_are_the_packed_ones_to_the_bit(
    library: NativeLibrary,
    format: str,
    rows: int,
    blocks: int,
    block: int,
    seed: int,
    data: st.DataObject,
) -> None:
    matrix, native = packed(library, format, rows, blocks, block, seed)
    usable = [name for name, runs in library.instruction_sets.items() if runs]
    library.use(data.draw(st.sampled_from(usable)))
    start = data.draw(st.integers(0, (rows - 1) // 16)) * 16
    end = data.draw(st.integers(start + 1, rows))
    expected = torch.as_tensor(exact_values(matrix)[start:end]).float()  # type: ignore[arg-type]
    assert torch.equal(native.dequantize(start, end), expected)
    narrow = torch.empty(end - start, blocks * block, dtype=torch.bfloat16)
    assert torch.equal(native.dequantize(start, end, narrow), expected.to(torch.bfloat16))


@pytest.mark.parametrize("format", FORMATS)
def test_prompts_multiply_by_the_same_weights(library: NativeLibrary, format: str) -> None:
    """In pieces: the matrix is larger than the scratch buffer."""
    matrix, native = packed(library, format, 700, 2, 480, 3)
    x = torch.randn(5, 960, generator=torch.Generator().manual_seed(4))
    found = native.multiply(x, "prompt").double().numpy()
    exact = x.double().numpy() @ exact_values(matrix).T  # type: ignore[arg-type]
    # bfloat16 units round both factors to 8 bits; float32 products stay far below that.
    allowed = np.abs(x.double().numpy()) @ np.abs(exact_values(matrix)).T * 2**-7  # type: ignore[arg-type]
    assert (np.abs(found - exact) <= allowed).all()


@shared
@given(**SHAPES, bad=st.sampled_from([float("nan"), float("inf"), -float("inf")]), data=st.data())
def test_what_is_no_number_stays_none(
    library: NativeLibrary,
    format: str,
    rows: int,
    blocks: int,
    block: int,
    seed: int,
    bad: float,
    data: st.DataObject,
) -> None:
    """Damaged weights must not end as an answer of plausible numbers."""
    _, native = packed(library, format, rows, blocks, block, seed)
    usable = [name for name, runs in library.instruction_sets.items() if runs]
    library.use(data.draw(st.sampled_from(usable)))
    x = torch.randn(2, blocks * block, generator=torch.Generator().manual_seed(seed))
    whole = native.multiply(x, "generated")
    x[1, data.draw(st.integers(0, blocks * block - 1))] = bad
    found = native.multiply(x, "generated")
    assert torch.equal(found[0], whole[0])
    assert not found[1].isfinite().any()
