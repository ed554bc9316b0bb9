"""Weight matrices multiply as their format promises."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine.kernels.matrices import (
    WIDEN_FROM_TOKENS,
    BFloat16Matrix,
    Int4Matrix,
    Int8Matrix,
    Matrix,
    has_bfloat16_units,
)
from engine.model.batch import StepKind
from engine.plan.plan import PlanShape
from engine.plan.presets import even, single
from engine.weights.checkpoint import open_checkpoint
from tests.one_process import OneProcess
from tests.tiny_models import save_tiny_llama


@settings(deadline=None, max_examples=40)
@given(
    rows=st.integers(1, 40),
    blocks=st.integers(1, 5),
    block=st.integers(1, 70),
    tokens=st.integers(1, 6),
    kind=st.sampled_from(["prompt", "generated"]),
)
def test_int8_differs_from_exact_by_at_most_half_a_step_of_each_weight(
    rows: int, blocks: int, block: int, tokens: int, kind: StepKind
) -> None:
    generator = torch.Generator().manual_seed(rows * 131 + blocks)
    values = torch.randn(rows, blocks * block, generator=generator)
    matrix = Int8Matrix.from_values(values, block)
    step = values.reshape(rows, blocks, block).abs().amax(-1, keepdim=True) / 127
    bound = step.expand(rows, blocks, block).reshape(rows, -1) * 0.51
    assert ((matrix.dequantize(0, rows) - values).abs() <= bound + 1e-6).all()
    assert_multiplies(matrix, values, bound, tokens, kind)


@settings(deadline=None, max_examples=40)
@given(
    rows=st.integers(1, 40),
    blocks=st.integers(1, 5),
    block=st.integers(1, 70),
    tokens=st.integers(1, 6),
    kind=st.sampled_from(["prompt", "generated"]),
)
def test_int4_differs_from_exact_by_at_most_half_a_step_of_each_weight(
    rows: int, blocks: int, block: int, tokens: int, kind: StepKind
) -> None:
    generator = torch.Generator().manual_seed(rows * 137 + blocks)
    values = torch.randn(rows, blocks * block, generator=generator)
    matrix = Int4Matrix.from_values(values, block)
    cut = values.reshape(rows, blocks, block)
    step = (cut.amax(-1, keepdim=True) - cut.amin(-1, keepdim=True)) / 15
    # float16 rounds scale and minimum to 11 bits, and 15 scales add up.
    rounding = cut.abs().amax(-1, keepdim=True) * 2**-9
    bound = (step * 0.5 + rounding).expand(rows, blocks, block).reshape(rows, -1)
    assert ((matrix.dequantize(0, rows) - values).abs() <= bound + 1e-6).all()
    assert_multiplies(matrix, values, bound, tokens, kind)


def assert_multiplies(
    matrix: Matrix, values: Tensor, bound: Tensor, tokens: int, kind: StepKind
) -> None:
    """Compare with a product of the values; `bound` is how far each may be from the matrix's."""
    x = torch.randn(tokens, values.shape[1], generator=torch.Generator().manual_seed(tokens))
    exact = x @ values.T
    # bfloat16 rounds activations and weights to 8 bits each.
    allowed = x.abs() @ (bound + values.abs() * 2**-7).T + exact.abs() * 2**-7 + 1e-5
    assert ((matrix.multiply(x, kind) - exact).abs() <= allowed).all()


def test_many_generated_tokens_have_the_bits_of_each_alone() -> None:
    """bfloat16 weights are widened for many tokens at a time, where there are no units for them.

    Small whole numbers, so that no order of additions rounds.
    """
    generator = torch.Generator().manual_seed(5)
    values = torch.randint(-8, 9, (70, 48), generator=generator) / 8
    x = torch.randint(-8, 9, (2 * WIDEN_FROM_TOKENS, 48), generator=generator) / 4
    matrix = BFloat16Matrix(values)
    together = matrix.multiply(x, "generated")
    alone = torch.cat([matrix.multiply(row[None], "generated") for row in x])
    torch.testing.assert_close(together, alone, rtol=0, atol=0)
    rounded = (x @ values.T).to(torch.bfloat16).float()
    torch.testing.assert_close(together, rounded, rtol=0, atol=0)


def test_a_group_of_equal_weights_is_kept() -> None:
    values = torch.tensor([[0.0] * 32 + [0.25] * 32 + [-3.5] * 32])
    matrix = Int4Matrix.from_values(values, 96)
    torch.testing.assert_close(matrix.dequantize(0, 1), values, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("kind", "take_over"),
    [
        (gguf.GGMLQuantizationType.Q4_0, Int4Matrix.from_q4_0),
        (gguf.GGMLQuantizationType.Q4_1, Int4Matrix.from_q4_1),
    ],
)
def test_4_bit_blocks_are_taken_over_without_a_second_rounding(
    kind: gguf.GGMLQuantizationType, take_over: Callable[..., Int4Matrix]
) -> None:
    # Scales from the least float16 to thousands.
    sizes = np.float32(10) ** np.linspace(-8, 3, 7, dtype=np.float32)[:, None]
    values = np.random.default_rng(1).standard_normal((7, 96)).astype(np.float32) * sizes
    raw = gguf.quants.quantize(values, kind)
    expected = gguf.quants.dequantize(raw, kind)
    found = take_over(raw.reshape(-1), 7, 96).dequantize(0, 7).numpy()
    np.testing.assert_array_equal(found, expected)


def test_q8_0_blocks_are_taken_over_without_a_second_rounding() -> None:
    values = np.random.default_rng(1).standard_normal((5, 96)).astype(np.float32)
    raw = gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q8_0)
    expected = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType.Q8_0)
    found = Int8Matrix.from_q8_0(raw.reshape(-1), 5, 96).dequantize(0, 5).numpy()
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("dtype", ["bfloat16", "int8", "int4"])
def test_a_split_changes_no_rounding_of_the_weights(dtype: str, tmp_path: Path) -> None:
    """Only the order of additions may differ between one device and three."""
    save_tiny_llama(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    shape = PlanShape.from_config(checkpoint.config)
    ids = list(range(30))
    one = OneProcess(checkpoint, single(shape, "a/cpu"), dtype).logits(ids)  # type: ignore[arg-type]
    three = OneProcess(checkpoint, even(shape, ["a/cpu", "b/cpu", "c/cpu"]), dtype).logits(ids)  # type: ignore[arg-type]
    exact = OneProcess(checkpoint, single(shape, "a/cpu")).logits(ids)
    spread = np.abs(one - exact).max()
    assert spread > 0, "the format rounds nothing, so this test proves nothing"
    # Where prompts are computed in bfloat16, both have rounded activations besides.
    rounded = 2 if has_bfloat16_units("cpu") else 1
    assert np.abs(one - three).max() <= max(rounded * spread, 2e-5)
