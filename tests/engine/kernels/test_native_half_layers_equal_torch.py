"""The native half-layers compute what the torch ones do, over every kind of layer and cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.kernels import native_kernels, torch_kernels
from engine.kernels.native_library import NativeLibrary
from engine.model.batch import StepKind
from engine.model.config import CacheDtype, Layer, ModelConfig, Reach
from engine.model.kv_cache import CACHE_DTYPES, KVCache
from tests.engine.kernels.half_layers import (
    CPU,
    Case,
    NativeHalf,
    attention_case,
    config_of,
    configs,
    head_case,
    mlp_case,
    native_head,
    random_stream,
)
from tests.engine.kernels.native_arithmetic import FORMATS

# With bfloat16 weights both compute in float32: only the order of additions differs, and exp.
EXACT_TOLERANCE = 2e-5
# Both round activations to int8, but a difference of 1e-7 may send one of them to another step, and
# then it is off by a 127th of its group's largest.
ROUNDED_TOLERANCE = 0.02
# A key may round to the neighbour of what the other's rounds to.
CACHE_TOLERANCES: dict[CacheDtype, float] = {
    "float32": EXACT_TOLERANCE,
    "float16": 2e-3,
    "bfloat16": 1.6e-2,
}
WINDOW = 50
Step = tuple[tuple[int, int, int], ...]
# Slots, first positions and counts: ragged, some tokens of a slot at once, slots that come and go.
STEPS: tuple[Step, ...] = (
    ((0, 0, 3), (5, 0, 1)),
    ((5, 1, 4), (0, 3, 2), (2, 0, 7)),
    ((0, 5, 1), (2, 7, 1), (5, 5, 1)),
    ((2, 8, 70),),
    ((0, 6, 1), (2, 78, 2)),
)
# The same with blocks of tokens and tiles of positions, whole ones and rests.
PROMPTS: tuple[Step, ...] = (
    ((0, 0, 40), (5, 0, 16)),
    ((5, 16, 1), (0, 40, 33), (2, 0, 3)),
    ((5, 17, 100),),
    ((2, 3, 15), (0, 73, 48)),
    # More than go through a row together.
    ((0, 121, 20), (2, 18, 300)),
)
shared = settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])


def assert_near(found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    scale = max(1.0, expected.abs().max().item())
    difference = (found - expected).abs()
    at = int(difference.argmax())
    assert difference.max() <= tolerance * scale, f"{difference.max()} of {scale} at {at}"


def use(library: NativeLibrary, data: st.DataObject) -> None:
    usable = [name for name, runs in library.instruction_sets.items() if runs]
    library.use(data.draw(st.sampled_from(usable)))
    library.set_num_threads(data.draw(st.integers(1, 3)))


def assert_attention_agrees(
    library: NativeLibrary,
    case: Case,
    steps: tuple[Step, ...],
    kv: CacheDtype,
    window: int,
    kind: StepKind = "generated",
) -> None:
    config, exact = case.config, case.exact()
    native = NativeHalf(case, library, window, kv)
    cache = KVCache(config, {0: exact.num_kv_heads}, window, kv, CPU)
    rounded = 0.0 if case.format == "bfloat16" else ROUNDED_TOLERANCE
    for number, step in enumerate(steps):
        batch = case.batch(*step, kind=kind)
        for slot, first, count in step:
            cache.extend(slot, first, count)
            native.cache.extend(slot, first, count)
        x = random_stream(config, sum(count for _, _, count in step), number)
        expected = torch_kernels.attention_part(x, exact, batch, cache, config)
        found = native.part(x, batch)
        # A token may meet both: its key rounds to the neighbour, and then what it attends to.
        assert_near(found, expected, CACHE_TOLERANCES[kv] + rounded)


@shared
@given(
    config=configs(),
    format=st.sampled_from(FORMATS),
    heads=st.sampled_from([(0, 6), (2, 5), (1, 2), (0, 4)]),
    kv=st.sampled_from(["float32", "float16", "bfloat16"]),
    kind=st.sampled_from(["generated", "prompt"]),
    data=st.data(),
)
def test_attention_agrees_over_every_kind_of_layer(
    library: NativeLibrary,
    config: ModelConfig,
    format: str,
    heads: tuple[int, int],
    kv: CacheDtype,
    kind: StepKind,
    data: st.DataObject,
) -> None:
    use(library, data)
    case, steps = attention_case(config, format, heads), STEPS if kind == "generated" else PROMPTS
    assert_attention_agrees(library, case, steps, kv, WINDOW, kind)


def assert_prompts_agree(
    library: NativeLibrary, case: Case, steps: tuple[Step, ...], kv: CacheDtype, window: int
) -> None:
    config, wide = case.config, case.wide()
    native = NativeHalf(case, library, window, kv)
    cache = KVCache(config, {0: wide.num_kv_heads}, window, kv, CPU)
    for number, step in enumerate(steps):
        batch = case.batch(*step, kind="prompt")
        for slot, first, count in step:
            cache.extend(slot, first, count)
            native.cache.extend(slot, first, count)
        x = random_stream(config, sum(count for _, _, count in step), number)
        expected = torch_kernels.attention_part(x, wide, batch, cache, config)
        assert_near(native.prompt(x, batch), expected, CACHE_TOLERANCES[kv])


@shared
@given(
    config=configs(),
    heads=st.sampled_from([(0, 6), (2, 5), (1, 2), (0, 4)]),
    kv=st.sampled_from(["float32", "float16", "bfloat16"]),
    data=st.data(),
)
def test_prompts_attend_as_in_torch_over_every_kind_of_layer(
    library: NativeLibrary,
    config: ModelConfig,
    heads: tuple[int, int],
    kv: CacheDtype,
    data: st.DataObject,
) -> None:
    use(library, data)
    assert_prompts_agree(library, attention_case(config, "bfloat16", heads), PROMPTS, kv, WINDOW)


@shared
@given(kv=st.sampled_from(["float32", "float16", "bfloat16"]), data=st.data())
def test_values_are_kept_as_torch_rounds_them(
    library: NativeLibrary, kv: CacheDtype, data: st.DataObject
) -> None:
    """To the bit: denormals, ties, what is too large for float16, and what is no number."""
    use(library, data)
    case = attention_case(config_of(head_width=20), "bfloat16")
    native = NativeHalf(case, library, WINDOW, kv)
    num_tokens, width = 5, 20
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    words = torch.randint(-(2**31), 2**31, (num_tokens, 10 * width), generator=generator)
    ties = torch.tensor([1 + 2**-11, 1 + 2**-8, 65519.0, 65520.0, 2**-25, 3 * 2**-25, 1e-41])
    projected = words.to(torch.int32).view(torch.float32)
    projected[0, -len(ties) :] = ties
    projected[:, : 6 * width] = 0.0  # queries
    native.cache.extend(0, 0, num_tokens)
    native.attend(projected, case.batch((0, 0, num_tokens), kind="prompt"))
    kept = native.cache.layer(0, 0).append(num_tokens, torch.empty(0, 2, 20), torch.empty(0, 2, 20))
    expected = projected.view(num_tokens, 10, width)[:, 8:].transpose(0, 1).to(CACHE_DTYPES[kv])
    assert torch.equal(kept.values.isnan(), expected.isnan())
    assert torch.equal(kept.values.nan_to_num(1.0), expected.nan_to_num(1.0))


@pytest.mark.parametrize(
    ("reach", "span"), [("full", 0), ("sliding", 30), ("sliding", 400), ("chunked", 100)]
)
def test_prompts_attend_as_in_torch_in_a_ring_that_has_wrapped(
    library: NativeLibrary, reach: Reach, span: int
) -> None:
    layer = Layer(mlp_width=43, reach=reach, span=span)
    case = attention_case(config_of(layers=(layer,)), "bfloat16")
    steps = tuple([((0, first, 700),) for first in range(0, 3500, 700)])
    assert_prompts_agree(library, case, steps, "float32", 600)


@pytest.mark.parametrize("span", [0, 30, 400])
def test_attention_agrees_in_a_ring_that_has_wrapped(library: NativeLibrary, span: int) -> None:
    """Many chunks of positions, some of them across the ring's end."""
    layer = Layer(mlp_width=43, reach="sliding" if span else "full", span=span)
    case = attention_case(config_of(layers=(layer,)), "bfloat16")
    steps: list[Step] = [((0, first, 700),) for first in range(0, 3500, 700)]
    steps += [((0, 3500 + n, 1), (1, n, 1)) for n in range(3)]
    assert_attention_agrees(library, case, tuple(steps), "float32", 600)


@shared
@given(
    part=st.sampled_from(["queries", "keys", "values"]),
    kind=st.sampled_from(["generated", "prompt"]),
    data=st.data(),
)
def test_what_is_no_number_stays_none_through_attention(
    library: NativeLibrary, part: str, kind: StepKind, data: st.DataObject
) -> None:
    """A damaged row of weights: every token that sees its outcome has none either."""
    use(library, data)
    case = attention_case(config_of(), "bfloat16")
    width = case.config.head_width
    first = {"queries": 0, "keys": 6 * width, "values": 8 * width}[part]
    # The first of its KV head's three query heads, or what all of them see.
    heads = 1 if part == "queries" else 3
    share: Any = case.share
    column = data.draw(st.integers(0, width - 1))
    share.qkv.values[first + column, 3] = float("nan")
    native = NativeHalf(case, library, WINDOW)
    native.cache.extend(0, 0, 20)
    x = random_stream(case.config, 20, 1)
    batch = case.batch((0, 0, 20), kind=kind)
    if kind == "prompt":
        projected = x @ share.qkv.values.float().T
        found = native.attend(projected, batch).view(20, 6, width)
        damaged = found[:, :heads, column] if part == "values" else found[:, :heads]
        assert not damaged.isfinite().any()
        assert found[:, 3:].isfinite().all()
    else:
        assert not native.part(x, batch).isfinite().any()


def test_attention_agrees_after_a_slot_was_cut_back(library: NativeLibrary) -> None:
    """What was written past the cut must not be seen."""
    config = config_of()
    case = attention_case(config, "bfloat16")
    native, whole = (NativeHalf(case, library, WINDOW) for _ in range(2))
    x = random_stream(config, 9, 1)
    for first, count, tokens in ((0, 9, x), (4, 5, x[4:].contiguous())):
        native.cache.truncate(0, first)
        native.cache.extend(0, first, count)
        found = native.part(tokens, case.batch((0, first, count)))
    whole.cache.extend(0, 0, 9)
    again = whole.part(x, case.batch((0, 0, 9)))
    assert torch.equal(found, again[4:])


@shared
@given(
    config=configs(),
    format=st.sampled_from(FORMATS),
    # The last one takes two pieces with 40 tokens.
    columns=st.sampled_from([1, 32, 43, 75, 300, 320, 1056]),
    tokens=st.integers(1, 9) | st.just(40),
    data=st.data(),
)
def test_mlp_agrees_over_every_width(
    library: NativeLibrary,
    config: ModelConfig,
    format: str,
    columns: int,
    tokens: int,
    data: st.DataObject,
) -> None:
    use(library, data)
    case = mlp_case(config, format, columns)
    native = NativeHalf(case, library)
    x = random_stream(config, tokens, columns)
    expected = torch_kernels.mlp_part(x, case.exact(), "generated", config)
    tolerance = EXACT_TOLERANCE if format == "bfloat16" else ROUNDED_TOLERANCE
    assert_near(native.part(x), expected, tolerance)


@shared
@given(
    config=configs(),
    format=st.sampled_from(FORMATS),
    rows=st.sampled_from([1, 16, 99]),
    tokens=st.integers(1, 9),
    data=st.data(),
)
def test_the_head_agrees(
    library: NativeLibrary,
    config: ModelConfig,
    format: str,
    rows: int,
    tokens: int,
    data: st.DataObject,
) -> None:
    use(library, data)
    case = head_case(config, format, rows)
    native = native_head(case, library)
    x = random_stream(config, tokens, rows)
    expected = torch_kernels.head_part(x, case.exact(), config)
    tolerance = EXACT_TOLERANCE if format == "bfloat16" else ROUNDED_TOLERANCE
    assert_near(native_kernels.head_part(x, native), expected, tolerance)


def test_activations_of_any_size_stay_finite(library: NativeLibrary) -> None:
    """exp of a large gate, and of a large score, must not overflow."""
    config: Any = config_of()
    mlp, attention = mlp_case(config, "bfloat16", 43), attention_case(config, "bfloat16")
    for case in (mlp, attention):
        case.share.norm.mul_(3000.0)
    x = random_stream(config, 4, 0)
    native = NativeHalf(mlp, library)
    expected = torch_kernels.mlp_part(x, mlp.exact(), "generated", config)
    assert_near(native.part(x), expected, EXACT_TOLERANCE)
    assert_attention_agrees(library, attention, STEPS[:2], "float32", WINDOW)
