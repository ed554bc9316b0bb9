"""A token's bits are the same in any company, at any place of a batch, on any number of threads."""

from __future__ import annotations

import pytest
import torch

from engine.kernels import native_kernels
from engine.kernels.native_kernels import NativeAttention, NativeMlp
from engine.kernels.native_library import NativeLibrary
from engine.kernels.native_matrices import NativeMatrix, repack
from engine.model.kv_cache import KVCache
from tests.engine.kernels.half_layers import (
    CPU,
    Case,
    attention_case,
    config_of,
    mlp_case,
    random_stream,
)
from tests.engine.kernels.native_arithmetic import FORMATS, random_matrix

WINDOW = 700


@pytest.fixture(params=["avx512vnni", "avx2", "neon", "portable"])
def instruction_set(request: pytest.FixtureRequest, library: NativeLibrary) -> str:
    """Each that this machine has."""
    if not library.instruction_sets[request.param]:
        pytest.skip(f"this machine does not have {request.param}")
    library.use(request.param)
    return request.param


@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize("format", FORMATS)
def test_a_product_is_the_same_in_every_batch_and_on_every_number_of_threads(
    library: NativeLibrary, format: str
) -> None:
    native = repack(random_matrix(format, 83, 150, 150 if format == "bfloat16" else 75, 1), library)
    assert isinstance(native, NativeMatrix)
    x = torch.randn(23, 150, generator=torch.Generator().manual_seed(2))
    alone = torch.cat([native.multiply(x[n : n + 1], "generated") for n in range(len(x))])
    for threads in range(1, 5):
        library.set_num_threads(threads)
        for start, end in [(0, 23), (1, 9), (3, 7), (5, 6), (20, 23)]:
            assert torch.equal(native.multiply(x[start:end], "generated"), alone[start:end])


def _attend(
    case: Case, library: NativeLibrary, steps: list[list[tuple[int, int, int]]]
) -> dict[tuple[int, int], torch.Tensor]:
    """Outputs by slot and position; a token's stream is a function of these two."""
    native = native_kernels.prepare(case.native(library), case.config, WINDOW, "float16")
    assert isinstance(native, NativeAttention)
    cache = KVCache(case.config, {0: 2}, WINDOW, "float16", CPU)
    outputs: dict[tuple[int, int], torch.Tensor] = {}
    for step in steps:
        places = [(slot, first + n) for slot, first, count in step for n in range(count)]
        streams = [random_stream(case.config, 1, 10_000 * s + p) for s, p in places]
        for slot, first, count in step:
            cache.extend(slot, first, count)
        found = native_kernels.attention_part(torch.cat(streams), native, case.batch(*step), cache)
        outputs.update(zip(places, found, strict=True))
    return outputs


@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize("format", FORMATS)
def test_attention_is_the_same_in_every_company_and_on_every_number_of_threads(
    library: NativeLibrary, format: str
) -> None:
    """One slot token by token, and the same among others, several at once, over many chunks."""
    case = attention_case(config_of(), format)
    length = 300
    alone = _attend(case, library, [[(0, n, 1)] for n in range(length)])
    pieces = [(0, 1), (1, 97), (98, 2), (100, 199), (299, 1)]
    others = [(0, 3), (3, 1), (4, 40), (44, 5), (49, 1)]
    ragged = [
        [(4, other, tokens), (0, first, count)]
        for (first, count), (other, tokens) in zip(pieces, others, strict=True)
    ]
    for threads in (1, 2, 4):
        library.set_num_threads(threads)
        found = _attend(case, library, ragged)
        for n in range(length):
            assert torch.equal(found[0, n], alone[0, n]), f"position {n} on {threads} threads"


@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize("format", FORMATS)
def test_the_mlp_is_the_same_in_every_batch_and_on_every_number_of_threads(
    library: NativeLibrary, format: str
) -> None:
    case = mlp_case(config_of(), format, 331)
    native = native_kernels.prepare(case.native(library), case.config, WINDOW, "float32")
    assert isinstance(native, NativeMlp)
    x = random_stream(case.config, 13, 3)
    alone = torch.cat([native_kernels.mlp_part(x[n : n + 1], native) for n in range(len(x))])
    for threads in range(1, 5):
        library.set_num_threads(threads)
        assert torch.equal(native_kernels.mlp_part(x, native), alone)
        assert torch.equal(native_kernels.mlp_part(x[4:11], native), alone[4:11])
