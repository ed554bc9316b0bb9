"""A token's bits are the same in any company, at any place of a batch, on any number of threads."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from engine.kernels import native_kernels
from engine.kernels.native_kernels import NativeRow, NativeRows
from engine.kernels.native_library import NativeLibrary
from engine.kernels.native_matrices import NativeMatrix, repack
from engine.model.batch import StepKind
from engine.model.config import Layer, ModelConfig, Rope
from engine.model.kv_cache import KVCache
from engine.model.norm import rms_norm
from tests.engine.kernels.half_layers import (
    CPU,
    Case,
    NativeHalf,
    attention_case,
    config_of,
    head_case,
    mlp_case,
    native_head,
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
    x[:, 7] *= 40.0  # What rounding leaves of its group is a group of its own.
    x[3::5, 100] *= 60.0
    alone = torch.cat([native.multiply(x[n : n + 1], "generated") for n in range(len(x))])
    # Some come late or never where there are more of them than cores.
    for threads in (1, 2, 3, 4, 16, 63, 64, 70):
        library.set_num_threads(threads)
        for start, end in [(0, 23), (1, 9), (3, 7), (5, 6), (20, 23)]:
            assert torch.equal(native.multiply(x[start:end], "generated"), alone[start:end])


@pytest.mark.usefixtures("instruction_set")
def test_a_product_of_very_many_groups_is_the_same_in_every_batch(library: NativeLibrary) -> None:
    """Nearly all of them rounded twice, more than are looked at together."""
    columns = 2 * 1030
    native = repack(random_matrix("int4", 35, columns, 2, 1), library)
    assert isinstance(native, NativeMatrix)
    x = torch.randn(5, columns, generator=torch.Generator().manual_seed(2))
    x[:, ::2] *= 9.0
    alone = torch.cat([native.multiply(x[n : n + 1], "generated") for n in range(len(x))])
    assert torch.equal(native.multiply(x, "generated"), alone)


def _attend(
    case: Case, library: NativeLibrary, steps: list[list[tuple[int, int, int]]]
) -> dict[tuple[int, int], torch.Tensor]:
    """Outputs by slot and position; a token's stream is a function of these two."""
    native = NativeHalf(case, library, WINDOW, "float16")
    outputs: dict[tuple[int, int], torch.Tensor] = {}
    for step in steps:
        places = [(slot, first + n) for slot, first, count in step for n in range(count)]
        streams = [random_stream(case.config, 1, 10_000 * s + p) for s, p in places]
        for slot, first, count in step:
            native.cache.extend(slot, first, count)
        found = native.part(torch.cat(streams), case.batch(*step))
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
@pytest.mark.parametrize("span", [0, 45])
def test_a_prompt_attends_the_same_however_it_is_cut(library: NativeLibrary, span: int) -> None:
    """Token by token, and in blocks that begin and end anywhere, beside another slot."""
    layer = Layer(mlp_width=43, reach="sliding" if span else "full", span=span)
    case = attention_case(config_of(layers=(layer,)), "bfloat16")
    length = 130
    width = (6 + 2 * 2) * case.config.head_width
    projected = torch.randn(length, width, generator=torch.Generator().manual_seed(3))

    def attend(pieces: list[tuple[int, int]], others: list[tuple[int, int]]) -> torch.Tensor:
        native = NativeHalf(case, library, WINDOW, "float16")
        found: list[torch.Tensor] = []
        for (first, count), (other, tokens) in zip(pieces, others, strict=True):
            segments = [(4, other, tokens), (0, first, count)] if tokens else [(0, first, count)]
            for slot, start, number in segments:
                native.cache.extend(slot, start, number)
            rows = [projected[other : other + tokens], projected[first : first + count]]
            batch = case.batch(*segments, kind="prompt")
            found.append(native.attend(torch.cat(rows), batch)[tokens:])
        return torch.cat(found)

    alone = attend([(n, 1) for n in range(length)], [(0, 0)] * length)
    pieces = [(0, 1), (1, 33), (34, 16), (50, 79), (129, 1)]
    others = [(0, 3), (3, 1), (4, 20), (24, 5), (29, 0)]
    for threads in (1, 2, 4):
        library.set_num_threads(threads)
        assert torch.equal(attend(pieces, others), alone)


@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize("format", FORMATS)
def test_rows_of_a_prompt_give_the_same_however_it_is_cut(
    library: NativeLibrary, format: str
) -> None:
    """In pieces, some of which are more than go through a row together, beside another slot."""
    ropes = (Rope(theta=10000.0), Rope(theta=500.0))
    config = config_of(width=64, layers=(Layer(mlp_width=75, rope=1),), ropes=ropes)
    cases = [attention_case(config, format), mlp_case(config, format, 75)]
    length = 300
    x, other = random_stream(config, length, 1), random_stream(config, length, 2)

    def read(pieces: list[tuple[int, int]], others: list[tuple[int, int]]) -> torch.Tensor:
        cache = KVCache(config, {0: 2}, WINDOW, "float16", CPU)
        rows = _join([case.native(library) for case in cases], {}, config, cache)
        found: list[torch.Tensor] = []
        for (first, count), (start, tokens) in zip(pieces, others, strict=True):
            segments = [(4, start, tokens), (0, first, count)] if tokens else [(0, first, count)]
            for segment in segments:
                cache.extend(*segment)
            batch = rows.batch(cases[0].batch(*segments, kind="prompt"))
            stream = torch.cat([other[start : start + tokens], x[first : first + count]])
            # Row by row: how this machine multiplies prompts decides nothing here.
            for row in range(2):
                stream = stream + rows.part(row, stream, batch)
            found.append(stream[tokens:])
        return torch.cat(found)

    expected = read([(n, 1) for n in range(length)], [(0, 0)] * length)
    for threads in (1, 2, 4):
        library.set_num_threads(threads)
        assert torch.equal(read([(0, length)], [(0, 0)]), expected)
        pieces = [(0, 1), (1, 33), (34, 16), (50, 200), (250, 50)]
        assert torch.equal(read(pieces, [(0, 3), (3, 1), (4, 20), (24, 150), (174, 90)]), expected)


@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("columns", "tokens"), [(331, 13), (1056, 40)])
def test_the_mlp_is_the_same_in_every_batch_and_on_every_number_of_threads(
    library: NativeLibrary, format: str, columns: int, tokens: int
) -> None:
    """Whole groups, gated in two pieces, and others; values that dominate their groups."""
    case = mlp_case(config_of(), format, columns)
    native = NativeHalf(case, library)
    x = random_stream(case.config, tokens, 3)
    x[:, 7] *= 40.0
    alone = torch.cat([native.part(x[n : n + 1]) for n in range(len(x))])
    for threads in range(1, 5):
        library.set_num_threads(threads)
        assert torch.equal(native.part(x), alone)
        assert torch.equal(native.part(x[4:11]), alone[4:11])


@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize("kind", ["generated", "prompt"])
@pytest.mark.parametrize("format", FORMATS)
def test_rows_in_one_call_give_what_they_give_one_by_one(
    library: NativeLibrary, format: str, kind: StepKind
) -> None:
    """Biases, norms of sums, columns that fill whole groups and others, contexts of many parts."""
    config = config_of(
        width=64, layers=(Layer(mlp_width=64), Layer(mlp_width=75)), has_output_bias=True
    )
    cases = [
        attention_case(config, format),
        mlp_case(config, format, 64),
        attention_case(config, format, seed=5),
        mlp_case(config, format, 75),
    ]
    shares = [case.native(library) for case in cases]
    shares[2] = replace(shares[2], layer=1)
    _take_prompts(shares, 650)
    # Torch's norm differs in its last bits, which may send a rounded activation to another step.
    is_exact = format != "bfloat16"
    norms = {} if is_exact else {0: torch.rand(64) + 0.5, 3: torch.rand(64) + 0.5}
    caches = [KVCache(config, {0: 2, 1: 2}, WINDOW, "float16", CPU) for _ in range(2)]
    rows = [_join(shares, norms, config, cache) for cache in caches]
    head = native_head(head_case(config, format, 99), library)
    x = random_stream(config, 700, 1)
    for step in [((0, 0, 650),), ((0, 650, 1), (3, 0, 2)), ((0, 651, 1),), ((0, 652, 3),)]:
        for slot, first, count in step:
            for cache in caches:
                cache.extend(slot, first, count)
        batches = [held.batch(cases[0].batch(*step, kind=kind)) for held in rows]
        stream = x[: sum(count for _, _, count in step)]
        library.set_num_threads(1)
        expected = stream
        for row in range(4):
            total = rows[0].part(row, expected, batches[0])
            if row in norms:
                total = rms_norm(total, norms[row], config.norm_epsilon)
            expected = expected + total
        library.set_num_threads(3)
        wanted = (0, len(stream) - 1)
        found, end, logits = rows[1].advance(0, 4, stream, batches[1], head, wanted)
        assert end == 4
        assert logits is not None
        assert torch.equal(logits, native_kernels.head_part(found[list(wanted)], head))
        tolerance = 0.0 if is_exact else 1e-5 * expected.abs().max()
        assert (found - expected).abs().max() <= tolerance
        without, end, logits = rows[1].advance(1, 2, stream, batches[1])
        assert (end, logits) == (2, None)
        assert torch.equal(without, stream + rows[0].part(1, stream, batches[0]))


@pytest.mark.parametrize("most", [20, 128])
def test_a_prompt_goes_on_natively_as_far_as_its_rows_take_it(
    library: NativeLibrary, most: int
) -> None:
    """The second attention's matrices take as many tokens, the MLP before it none."""
    config = config_of(width=64, layers=(Layer(mlp_width=64), Layer(mlp_width=75)))
    cases = [
        attention_case(config, "int4"),
        mlp_case(config, "bfloat16", 64),
        attention_case(config, "int4", seed=5),
    ]
    shares = [case.native(library) for case in cases]
    shares[2] = replace(shares[2], layer=1)
    _take_prompts([shares[0], shares[2]], most)
    cache = KVCache(config, {0: 2, 1: 2}, WINDOW, "float16", CPU)
    rows = _join(shares, {}, config, cache)
    for first, count, kind in (
        (0, most, "prompt"),
        (most, most + 1, "prompt"),
        (0, 30, "generated"),
    ):
        slot = int(kind == "generated")
        cache.extend(slot, first, count)
        batch = rows.batch(cases[0].batch((slot, first, count), kind=kind))
        takes = [rows.takes(row, batch) for row in range(3)]
        is_short = kind == "prompt" and count <= most
        assert takes == ([True, False, True] if is_short else [kind == "generated"] * 3)
        if not takes[0]:
            continue
        x = random_stream(config, count, first)
        found, end, logits = rows.advance(0, 3, x, batch)
        assert (end, logits) == (1 if is_short else 3, None)
        if is_short:
            assert torch.equal(found, x + rows.part(0, x, batch))


def _take_prompts(shares: list[Any], most: int) -> None:
    """Let shares multiply so many tokens of prompts, whatever is fastest on this machine."""
    for share in shares:
        dense = getattr(share, "dense", None)
        for matrix in (dense.gate_up, dense.down) if dense else (share.qkv, share.output):
            matrix.most_prompt_tokens = most


def _join(
    shares: list[Any], norms: dict[int, torch.Tensor], config: ModelConfig, cache: KVCache
) -> NativeRows:
    prepared = {n: native_kernels.prepare(share, config, cache) for n, share in enumerate(shares)}
    rows = {n: row for n, row in prepared.items() if isinstance(row, NativeRow)}
    assert len(rows) == len(shares)
    return NativeRows(rows, norms, config, cache)
