"""A native product is that of the packed weights with activations rounded to int8, and no other."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.kernels.matrices import has_bfloat16_units
from engine.kernels.native_library import NativeLibrary
from engine.kernels.native_matrices import (
    PASS_TOKENS,
    NativeMatrix,
    most_prompt_tokens,
    repack,
)
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
    x[:, :: data.draw(st.integers(5, 60))] *= data.draw(st.sampled_from([1.0, 20.0, 1e4]))
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


@pytest.mark.parametrize("format", ["int4", "symmetric int4", "int8"])
def test_one_large_value_does_not_cost_its_neighbours_their_precision(
    library: NativeLibrary, format: str
) -> None:
    """Alone and in company: some models have a channel a hundred times as large as the others."""
    matrix, native = packed(library, format, 40, 1, 96, 5)
    x = torch.randn(20, 96, generator=torch.Generator().manual_seed(6))
    x[:, 40] *= 100.0
    weights = exact_values(matrix)  # type: ignore[arg-type]
    exact = x.double().numpy() @ weights.T
    groups = x.view(20, 3, 32).abs().amax(2).double().numpy()
    steps = groups / 127 / np.array([1.0, 254.0, 1.0])
    room = steps @ np.abs(weights).reshape(-1, 3, 32).sum(2).T * 0.5001
    _, rounding = product(matrix, x)  # type: ignore[arg-type]
    for start, end in [(0, 20), *((n, n + 1) for n in range(20))]:
        found = native.multiply(x[start:end], "generated").double().numpy()
        assert (np.abs(found - exact[start:end]) <= (room + 2 * rounding)[start:end]).all()


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
def test_prompts_multiply_by_the_same_weights_through_torch(
    library: NativeLibrary, format: str
) -> None:
    """In pieces: the matrix is larger than the scratch buffer."""
    library.use("portable")
    matrix, native = packed(library, format, 700, 2, 480, 3)
    assert not native.most_prompt_tokens
    x = torch.randn(5, 960, generator=torch.Generator().manual_seed(4))
    found = native.multiply(x, "prompt").double().numpy()
    exact = x.double().numpy() @ exact_values(matrix).T  # type: ignore[arg-type]
    # bfloat16 units round both factors to 8 bits; float32 products stay far below that.
    allowed = np.abs(x.double().numpy()) @ np.abs(exact_values(matrix)).T * 2**-7  # type: ignore[arg-type]
    assert (np.abs(found - exact) <= allowed).all()


@pytest.mark.parametrize("format", FORMATS)
def test_prompts_multiply_like_generated_tokens_where_that_is_fast(
    library: NativeLibrary, format: str
) -> None:
    """More tokens than are multiplied at a time; each as if it were alone."""
    x = torch.randn(2 * PASS_TOKENS + 5, 192, generator=torch.Generator().manual_seed(4))
    for name in [name for name, runs in library.instruction_sets.items() if runs]:
        library.use(name)
        _, native = packed(library, format, 40, 2, 96, 3)
        alone = torch.cat([native.multiply(x[n : n + 1], "generated") for n in range(len(x))])
        assert torch.equal(native.multiply(x, "generated"), alone)
        assert native.most_prompt_tokens == (format != "bfloat16") * most_prompt_tokens(library)
        some = x[: native.most_prompt_tokens]
        assert torch.equal(native.multiply(some, "prompt"), alone[: len(some)])
        native.most_prompt_tokens = 16 * (format != "bfloat16")
        longer = native.multiply(x[:17], "prompt")
        rows = native.dequantize(0, 40)
        nearest = torch.bfloat16 if has_bfloat16_units("cpu") else torch.float32
        expected = x[:17].to(nearest).float() @ rows.to(nearest).float().T
        assert (longer - expected).abs().max() <= 0.01 * expected.abs().max()
        if format != "bfloat16":
            assert torch.equal(native.multiply(x[:16], "prompt"), alone[:16])


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
