"""Sizes and values of every format equal those of the gguf package."""

from __future__ import annotations

import math

import gguf
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import CheckpointError
from engine.weights.formats import FORMATS, dequantize, num_bytes

WEIGHT_FORMATS = sorted(name for name, entry in FORMATS.items() if entry.is_weight)
GGUF_FORMATS = sorted(name for name, entry in FORMATS.items() if entry.ggml_type is not None)


@pytest.mark.parametrize("name", GGUF_FORMATS)
def test_block_sizes_and_numbers_are_those_of_gguf(name: str) -> None:
    kind = gguf.GGMLQuantizationType[name]
    assert FORMATS[name].ggml_type == kind.value
    assert gguf.GGML_QUANT_SIZES[kind] == (FORMATS[name].block_size, FORMATS[name].block_bytes)


# Less than a group, whole groups, whole groups and a remainder; narrow and wide rows.
SHAPES = [(5, 3, 2), (1, 1), (16, 32), (3, 7, 61), (1, 1025), (4099, 1)]


@pytest.mark.parametrize("blocks", SHAPES)
@pytest.mark.parametrize("name", WEIGHT_FORMATS)
def test_values_of_any_bytes_equal_those_of_gguf_bit_for_bit(
    name: str, blocks: tuple[int, ...]
) -> None:
    shape = (*blocks[:-1], blocks[-1] * FORMATS[name].block_size)
    raw = np.random.default_rng(3).integers(0, 256, num_bytes(name, shape), np.uint8)
    ours = dequantize(name, raw, shape)
    with np.errstate(all="ignore"):
        theirs = gguf.quants.dequantize(
            raw.reshape(math.prod(shape[:-1]), -1), gguf.GGMLQuantizationType[name]
        )
    assert ours.shape == shape
    assert ours.dtype == np.float32
    assert ours.tobytes() == theirs.tobytes()


@pytest.mark.parametrize("name", WEIGHT_FORMATS)
def test_a_slice_of_rows_has_the_values_of_those_rows(name: str) -> None:
    shape = (7, FORMATS[name].block_size)
    raw = np.random.default_rng(4).integers(0, 128, num_bytes(name, shape), np.uint8)
    row = num_bytes(name, shape[1:])
    part = dequantize(name, raw[2 * row : 5 * row], (3, shape[1]))
    assert part.tobytes() == dequantize(name, raw, shape)[2:5].tobytes()


@given(st.lists(st.integers(0, (1 << 64) - 1), min_size=1, max_size=4))
def test_sizes_never_wrap(dimensions: list[int]) -> None:
    product = 1
    for dimension in dimensions:
        product *= dimension
    assert num_bytes("F32", dimensions) == 4 * product


def test_the_two_dimensions_that_wrap_to_a_small_product_give_the_true_size() -> None:
    """numpy's uint64 product of these is 4194304; gguf-py takes it for the size."""
    assert num_bytes("I64", (4398046511105, 4194304)) == 8 * 4398046511105 * 4194304


def test_nonsense_is_told_in_one_line() -> None:
    with pytest.raises(CheckpointError, match="255 elements is not whole Q4_K blocks"):
        num_bytes("Q4_K", (3, 255))
    with pytest.raises(CheckpointError, match="'Q4_2' is not supported"):
        num_bytes("Q4_2", (32,))
    with pytest.raises(CheckpointError, match="negative"):
        num_bytes("F32", (-1, 4))
    with pytest.raises(CheckpointError, match="I8 holds no weights"):
        dequantize("I8", np.zeros(4, np.uint8), (4,))
    with pytest.raises(CheckpointError, match=r"Q8_0\[2, 32\] is 68 bytes, the data has 67"):
        dequantize("Q8_0", np.zeros(67, np.uint8), (2, 32))


def test_a_tensor_without_elements_has_no_bytes_and_no_values() -> None:
    assert num_bytes("Q4_1", (0, 64)) == 0
    assert dequantize("Q4_1", np.zeros(0, np.uint8), (0, 64)).shape == (0, 64)
