"""Whatever does not fit is refused in Python, before any address is read or written."""

from __future__ import annotations

from ctypes import byref
from dataclasses import replace
from typing import Any

import pytest
import torch

from engine.errors import EngineError, ProtocolError
from engine.kernels import native_kernels
from engine.kernels.native_library import INT4, INT8, MatrixStruct, NativeLibrary, check_status
from engine.kernels.native_matrices import NativeMatrix, repack
from engine.kernels.torch_kernels import AttentionShare
from engine.model.config import ModelConfig
from engine.model.kv_cache import KVCache
from tests.engine.kernels.half_layers import (
    CPU,
    NativeHalf,
    attention_case,
    config_of,
    head_case,
    mlp_case,
    native_head,
    random_stream,
)
from tests.engine.kernels.native_arithmetic import FORMATS, random_matrix

CONFIG: ModelConfig = config_of()


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(
    "x",
    [torch.zeros(2, 95), torch.zeros(2, 97), torch.zeros(2, 96, dtype=torch.float64)],
    ids=["narrow", "wide", "float64"],
)
def test_a_product_refuses_other_activations(
    library: NativeLibrary, format: str, x: torch.Tensor
) -> None:
    native = repack(random_matrix(format, 20, 96, 96, 0), library)
    for kind in ("generated", "prompt"):
        with pytest.raises(ProtocolError, match=r"native kernels take .* \[2, 96\] on the CPU"):
            native.multiply(x, kind)


def test_strided_activations_are_read_as_what_they_are(library: NativeLibrary) -> None:
    native = repack(random_matrix("int8", 20, 96, 96, 0), library)
    x = torch.randn(96, 3, generator=torch.Generator().manual_seed(0))
    whole = native.multiply(x.T.contiguous(), "generated")
    assert torch.equal(native.multiply(x.T, "generated"), whole)


@pytest.mark.parametrize(
    ("quants", "scales", "minimums"),
    [
        (torch.zeros(4, 3, 16), torch.zeros(4, 3), torch.zeros(4, 3)),
        (torch.zeros(4, 2, 16), torch.zeros(4, 3), torch.zeros(4, 3)),
        (torch.zeros(4, 3, 16), torch.zeros(4, 2), torch.zeros(4, 3)),
        (torch.zeros(4, 3, 16), torch.zeros(4, 3), None),
    ],
    ids=["rows", "groups", "scales", "minimums"],
)
def test_packing_refuses_tensors_that_do_not_belong_together(
    library: NativeLibrary,
    quants: torch.Tensor,
    scales: torch.Tensor,
    minimums: torch.Tensor | None,
) -> None:
    minimums = minimums if minimums is None else minimums.half()
    shape = (5 if quants.shape[1] == 3 and minimums is not None and scales.shape[1] == 3 else 4, 96)
    with pytest.raises(ProtocolError):
        NativeMatrix(library, INT4, shape, 96, quants.to(torch.uint8), scales.half(), minimums)


def test_packing_refuses_blocks_that_do_not_fill_the_columns(library: NativeLibrary) -> None:
    quants, scales = torch.zeros(4, 3, 32, dtype=torch.int8), torch.zeros(4, 3).half()
    with pytest.raises(ProtocolError, match="whole blocks are needed"):
        NativeMatrix(library, INT8, (4, 96), 40, quants, scales, None)


@pytest.mark.parametrize(("start", "end"), [(0, 21), (8, 20), (-16, 4), (16, 16), (32, 20)])
def test_dequantising_refuses_rows_that_are_not_there(
    library: NativeLibrary, start: int, end: int
) -> None:
    native = repack(random_matrix("int4", 20, 96, 96, 0), library)
    assert isinstance(native, NativeMatrix)
    with pytest.raises(ProtocolError, match=f"rows {start} to {end} of 20"):
        native.dequantize(start, end)
    with pytest.raises(ProtocolError):
        native.dequantize(0, 16, torch.zeros(96, 16).T)


@pytest.mark.parametrize(
    "x",
    [
        torch.zeros(2, CONFIG.width + 1),
        torch.zeros(2, CONFIG.width, dtype=torch.bfloat16),
        torch.zeros(CONFIG.width, 2).T,
        torch.zeros(0, CONFIG.width),
    ],
    ids=["wide", "bfloat16", "strided", "empty"],
)
def test_half_layers_refuse_another_stream(library: NativeLibrary, x: torch.Tensor) -> None:
    head = native_head(head_case(CONFIG, "int8", 99), library)
    for case in (attention_case(CONFIG, "int8"), mlp_case(CONFIG, "int8", 43)):
        half = NativeHalf(case, library)
        half.cache.extend(0, 0, 2)
        with pytest.raises(ProtocolError):
            half.part(x, case.batch((0, 0, 2)))
        if isinstance(case.share, AttentionShare):
            with pytest.raises(ProtocolError):
                half.prompt(x, case.batch((0, 0, 2), kind="prompt"))
    if x.is_contiguous():  # the head makes its own copy of what is not
        with pytest.raises(ProtocolError):
            native_kernels.head_part(x, head)


@pytest.mark.parametrize(
    "projected",
    [
        torch.zeros(2, 199),
        torch.zeros(3, 200),
        torch.zeros(2, 200, dtype=torch.float64),
        torch.zeros(200, 2).T,
    ],
    ids=["narrow", "long", "float64", "strided"],
)
def test_attention_refuses_other_projections(
    library: NativeLibrary, projected: torch.Tensor
) -> None:
    case = attention_case(CONFIG, "int8")
    half = NativeHalf(case, library)
    half.cache.extend(0, 0, 2)
    with pytest.raises(ProtocolError):
        half.attend(projected, case.batch((0, 0, 2), kind="prompt"))


def test_attention_refuses_segments_and_angles_of_other_tokens(library: NativeLibrary) -> None:
    case = attention_case(CONFIG, "int8")
    half = NativeHalf(case, library)
    x = random_stream(CONFIG, 2, 0)
    batch = case.batch((0, 0, 2))
    with pytest.raises(ProtocolError, match="segments of 3 tokens came with a stream of 2"):
        half.part(x, case.batch((0, 0, 3)))
    with pytest.raises(ProtocolError, match="segments of 3 tokens came with a stream of 2"):
        half.prompt(x, case.batch((0, 0, 3), kind="prompt"))
    with pytest.raises(ProtocolError, match="angles"):
        half.part(x, replace(batch, ropes=case.batch((0, 0, 3)).ropes))


@pytest.mark.parametrize(
    "change",
    [
        {"norm": torch.ones(CONFIG.width - 1)},
        {"qkv_bias": torch.ones(7)},
        {"num_kv_heads": 3},
        {"groups": [(4, 2, 2)]},
        {"q_norm": torch.ones(CONFIG.head_width, dtype=torch.float64)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_shares_that_do_not_fit_the_model_are_refused(
    library: NativeLibrary, change: dict[str, Any]
) -> None:
    share = replace(attention_case(CONFIG, "int8").native(library), **change)
    with pytest.raises(ProtocolError):
        _prepare(share)


def test_the_library_itself_refuses_structs_that_contradict_themselves(
    library: NativeLibrary,
) -> None:
    """The last line of defence: nothing is read through a null pointer."""
    x, out = torch.zeros(1, 96), torch.zeros(1, 20)
    empty = MatrixStruct(INT8, 20, 96, 96, 3, None)
    assert library.multiply(byref(empty), x.data_ptr(), 1, out.data_ptr()) != 0
    off = MatrixStruct(INT8, 20, 96, 96, 4, x.data_ptr())
    status = library.multiply(byref(off), x.data_ptr(), 1, out.data_ptr())
    with pytest.raises(EngineError, match="sizes that contradict each other"):
        check_status(status)


def _prepare(share: Any) -> object:
    cache = KVCache(CONFIG, {0: 2}, 50, "float32", CPU)
    return native_kernels.prepare(share, CONFIG, cache)
