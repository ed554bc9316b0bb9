"""A conversation may grow past its KV window: memory stays, and the oldest positions leave."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import MistralConfig, MistralForCausalLM

from engine.errors import ProtocolError
from engine.model.attention import attend
from engine.model.config import Layer
from engine.model.kv_cache import CACHE_DTYPES, LayerCache, new_place
from engine.model.masks import visible_mask
from engine.model.share_keys import kv_heads_of
from engine.model.view import LONGEST_STEP, View, cache_bytes, can_truncate
from engine.plan.plan import PlanShape
from engine.plan.presets import single
from engine.weights.checkpoint import Checkpoint, open_checkpoint
from tests.engine.model.conftest import assert_close, oracle_logits
from tests.one_process import OneProcess
from tests.tiny_families import save_tiny

CPU = torch.device("cpu")
NUM_TOKENS = 5000
WINDOW = 512
IDS = np.random.default_rng(8).integers(3, 99, NUM_TOKENS).tolist()


def test_5000_tokens_through_a_window_of_512_equal_an_oracle_with_that_mask(
    tmp_path: Path,
) -> None:
    """The oracle is the same weights in an architecture whose every layer masks the window."""
    changes = {"max_position_embeddings": 8192}
    llama = save_tiny("llama", tmp_path, **changes)
    fields = {k: v for k, v in llama.config.to_dict().items() if k not in ("model_type",)}
    config = MistralConfig(**{**fields, "sliding_window": WINDOW})
    config._attn_implementation = "sdpa"
    oracle = MistralForCausalLM(config).eval()
    oracle.load_state_dict(llama.state_dict())
    expected = oracle_logits(oracle, IDS)
    with open_checkpoint(tmp_path) as checkpoint:
        plan = single(PlanShape.from_config(checkpoint.config), "this/cpu")
        model = OneProcess(checkpoint, plan, window=WINDOW)
        limit = cache_bytes(checkpoint.config, kv_heads_of(plan, 0), WINDOW, "float32", NUM_TOKENS)
        rows = [model.logits(IDS[:WINDOW])]
        position = WINDOW
        sizes = np.random.default_rng(1).choice([1, 1, 7, 100, LONGEST_STEP], 5000)
        for size in sizes:
            if position == NUM_TOKENS:
                break
            end = min(position + int(size), NUM_TOKENS)
            kind = "generated" if size == 1 else "prompt"
            rows.append(model.logits(IDS[position:end], position, kind))
            assert model.shards[0].cache.num_bytes <= limit
            position = end
    assert_close(np.concatenate(rows), expected)
    # A ring of window + longest step, keys and values, 2 KV heads of 20 in 3 layers, float32.
    assert limit == (WINDOW + LONGEST_STEP) * 2 * 2 * 20 * 3 * 4


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Checkpoint]:
    folder = tmp_path_factory.mktemp("gemma")
    save_tiny("gemma3", folder, max_position_embeddings=8192)
    checkpoint = open_checkpoint(folder)
    yield checkpoint
    checkpoint.close()


@pytest.mark.parametrize("dtype", CACHE_DTYPES)
def test_every_layer_has_the_memory_it_needs_and_that_is_stated_in_advance(
    gemma: Checkpoint, dtype: str
) -> None:
    plan = single(PlanShape.from_config(gemma.config), "this/cpu")
    model = OneProcess(gemma, plan, window=4096, kv_dtype=dtype)
    cache = model.shards[0].cache
    held: list[int] = []
    for position in range(0, 6000, 600):
        model.logits(IDS[:600], position)
        held.append(cache.num_bytes)
        heads = kv_heads_of(plan, 0)
        stated = cache_bytes(gemma.config, heads, 4096, dtype, position + 600)
        assert cache.num_bytes == stated
    sliding = cache.layer(0, 0).num_bytes
    full = cache.layer(0, 1).num_bytes
    size = CACHE_DTYPES[dtype].itemsize * 2 * 2 * 20
    assert sliding == (12 + LONGEST_STEP) * size
    assert full == (4096 + LONGEST_STEP) * size
    assert held[-1] == held[-2] == held[-3] == 2 * (sliding + full)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_narrow_cache_rounds_keys_and_values_and_nothing_else(
    gemma: Checkpoint, dtype: str
) -> None:
    """Half of the bits of a key move logits of order one by their rounding, not by more."""
    plan = single(PlanShape.from_config(gemma.config), "this/cpu")
    exact = OneProcess(gemma, plan).logits(IDS[:60])
    rounded = OneProcess(gemma, plan, kv_dtype=dtype).logits(IDS[:60])
    epsilon = torch.finfo(CACHE_DTYPES[dtype]).eps
    assert 0 < np.abs(exact - rounded).max() < 20 * epsilon


LAYERS = st.one_of(
    st.just(Layer(mlp_width=1)),
    st.builds(
        lambda reach, span: Layer(mlp_width=1, reach=reach, span=span),
        st.sampled_from(["sliding", "chunked"]),
        st.integers(1, 40),
    ),
)


@settings(deadline=None, max_examples=100)
@given(layer=LAYERS, window=st.integers(1, 60), data=st.data())
def test_a_ring_shows_every_key_that_the_mask_allows(
    layer: Layer, window: int, data: st.DataObject
) -> None:
    """Any steps and cuts: the visible keys, by their stored values, are exactly the allowed ones."""
    view = View.of_layer(layer, window)
    cache = LayerCache(1, 2, view, torch.float32, CPU, new_place())
    length = written = 0
    for _ in range(data.draw(st.integers(1, 8))):
        if data.draw(st.booleans()) and length:
            is_whole = written <= view.reach + LONGEST_STEP
            lowest = 0 if is_whole else min(length, written - LONGEST_STEP)
            length = data.draw(st.integers(max(0, lowest), length))
        count = data.draw(st.integers(1, LONGEST_STEP))
        positions = torch.arange(length, length + count)
        values = positions.float()[:, None, None].expand(count, 1, 2)
        cached = cache.append(length, values, values)
        assert cached.keys.shape[1] <= view.ring_capacity
        if cached.positions is None:
            assert cached.first_position is not None
            claimed = torch.arange(cached.keys.shape[1]) + cached.first_position
        else:
            claimed = cached.positions
        mask = visible_mask(view, positions, claimed)
        stored = cached.keys[0, :, 0].long()
        for offset in {0, count // 2, count - 1}:
            query = length + offset
            seen = sorted(stored[mask[offset]].tolist())
            assert seen == list(range(view.first_visible(query), query + 1))
        length += count
        written = max(written, length)


def test_a_slot_is_not_cut_back_to_where_its_keys_are_gone(gemma: Checkpoint) -> None:
    plan = single(PlanShape.from_config(gemma.config), "this/cpu")
    model = OneProcess(gemma, plan, window=600)
    for position in range(0, 3000, 1000):
        model.logits(IDS[position : position + 1000], position)
    assert not can_truncate(gemma.config, 600, 3000, 100)
    with pytest.raises(ProtocolError, match="3,000 positions cannot be cut back to 100"):
        model.shards[0].cache.truncate(0, 100)
    expected = model.logits(IDS[3000:3010], 3000)
    model.logits(IDS[:500], 3010)
    assert can_truncate(gemma.config, 600, 3510, 3000)
    model.shards[0].cache.truncate(0, 3000)
    assert_close(model.logits(IDS[3000:3010], 3000), expected)


@settings(deadline=None, max_examples=60)
@given(layer=LAYERS, window=st.integers(1, 60), counts=st.lists(st.integers(1, 40), max_size=4))
def test_attention_is_what_its_definition_says(
    layer: Layer, window: int, counts: list[int]
) -> None:
    """Chunks longer than the window, too: a first piece once saw all of its chunk."""
    view = View.of_layer(layer, window)
    cache = LayerCache(2, 4, view, torch.float32, CPU, new_place())
    generator = torch.Generator().manual_seed(7)
    total = sum(counts)
    query, keys, values = torch.randn(3, max(total, 1), 2, 4, generator=generator)
    start = 0
    for count in counts:
        end = start + count
        cached = cache.append(start, keys[start:end], values[start:end])
        found = attend(
            query[start:end], cached, torch.arange(start, end), view, [(2, 2, 1)], scale=0.4
        )
        for position in range(start, end):
            visible = slice(view.first_visible(position), position + 1)
            scores = torch.einsum("hd,shd->hs", query[position], keys[visible]).double() * 0.4
            weights = torch.softmax(scores, dim=-1)
            expected = torch.einsum("hs,shd->hd", weights, values[visible].double())
            torch.testing.assert_close(
                found[position - start].double(), expected, rtol=1e-5, atol=1e-5
            )
        start = end
