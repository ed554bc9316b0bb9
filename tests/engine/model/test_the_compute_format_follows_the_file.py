"""`--dtype int4` never narrows what its file holds wider, and `auto` stands for what is fast."""

from __future__ import annotations

import pytest

from engine.model.batch import ComputeDtype
from engine.model.share_keys import SliceKey, WeightKey
from engine.model.weight_formats import auto_dtype, is_head_exact, weight_format
from engine.weights.formats import TensorInfo


def model(layers: dict[str, str], head: str = "Q8_0") -> dict[str, TensorInfo]:
    """Tensors of one layer and a head, in the formats given; the others are Q4_0."""
    roles = dict.fromkeys(("q", "k", "v", "o", "gate", "up", "down"), "Q4_0") | layers
    formats = {f"layers.0.{role}": format for role, format in roles.items()}
    formats |= {"embedding": head, "head": head}
    found = {name: TensorInfo(name, format, (256, 256)) for name, format in formats.items()}
    found["layers.0.attention_norm"] = TensorInfo("layers.0.attention_norm", "F32", (256,))
    return found


ALL_ROLES = ("q", "k", "v", "o", "gate", "up", "down")


@pytest.mark.parametrize(
    ("names", "format", "expected"),
    [
        (("layers.0.o",), "Q4_0", "int4"),
        (("layers.0.o",), "Q4_1", "int4"),
        (("layers.0.o",), "Q8_0", "int8"),
        (("layers.0.o",), "Q6_K", "int8"),
        (("layers.0.o",), "Q5_1", "int8"),
        (("layers.0.o",), "Q4_K", "int4"),
        (("layers.0.o",), "BF16", "int4"),
        (("head",), "Q4_0", "int4"),
        (("head",), "Q8_0", "int8"),
        (("head",), "Q4_K", "int8"),
        (("head",), "F16", "int8"),
    ],
)
def test_int4_leaves_wide_what_is_wide(
    names: tuple[str, ...], format: str, expected: ComputeDtype
) -> None:
    key = WeightKey(tuple(SliceKey(name, 0, 0, 256) for name in names))
    tensors = {name: TensorInfo(name, format, (256, 256)) for name in names}
    assert weight_format(key, tensors, "int4") == expected


@pytest.mark.parametrize(
    ("format", "exact"),
    [
        ("Q4_0", {"float32", "int4"}),
        ("Q4_1", {"float32", "int4"}),
        ("Q8_0", {"float32", "int8", "int4"}),
        ("BF16", {"float32", "bfloat16"}),
        ("Q6_K", {"float32"}),
        ("F16", {"float32"}),
        ("F32", {"float32"}),
    ],
)
def test_a_head_is_exact_where_nothing_is_rounded_again(format: str, exact: set[str]) -> None:
    tensors = model({}, head=format)
    dtypes: tuple[ComputeDtype, ...] = ("float32", "bfloat16", "int8", "int4")
    assert {dtype for dtype in dtypes if is_head_exact(tensors, dtype)} == exact


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_other_formats_are_what_was_asked_for(dtype: ComputeDtype) -> None:
    tensors = model({"q": "Q8_0"})
    for name in ("layers.0.q", "layers.0.o", "head"):
        assert weight_format(WeightKey((SliceKey(name, 0, 0, 256),)), tensors, dtype) == dtype


@pytest.mark.parametrize(
    ("layers", "head", "native", "plain"),
    [
        ({}, "Q8_0", "int4", "bfloat16"),
        ({}, "Q6_K", "int4", "bfloat16"),
        ({"v": "Q8_0", "down": "Q4_1"}, "Q8_0", "int4", "bfloat16"),
        ({"v": "Q6_K", "down": "Q5_1"}, "Q6_K", "int4", "bfloat16"),
        ({"router": "F32"}, "Q8_0", "int4", "bfloat16"),
        (dict.fromkeys(ALL_ROLES, "Q8_0"), "Q8_0", "int8", "bfloat16"),
        (dict.fromkeys(ALL_ROLES, "Q4_K") | {"v": "Q6_K"}, "Q6_K", "int8", "bfloat16"),
        ({"v": "Q4_K"}, "Q6_K", "int8", "bfloat16"),
        (dict.fromkeys(ALL_ROLES, "BF16"), "BF16", "bfloat16", "bfloat16"),
        ({"o": "F16"}, "Q8_0", "bfloat16", "bfloat16"),
        (dict.fromkeys(ALL_ROLES, "F32"), "F32", "float32", "float32"),
    ],
)
def test_auto_never_rounds_to_four_bits_what_the_file_does_not(
    layers: dict[str, str], head: str, native: ComputeDtype, plain: ComputeDtype
) -> None:
    tensors = model(layers, head).values()
    assert auto_dtype(tensors, has_native_kernels=True) == native
    assert auto_dtype(tensors, has_native_kernels=False) == plain
