"""A slot that begins as another one does goes on as if it had computed that beginning itself."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import CacheFull, ProtocolError
from engine.model import kv_cache
from engine.model.batch import Segment
from engine.model.config import Layer
from engine.model.kv_cache import LayerCache, new_place
from engine.model.masks import visible_mask
from engine.model.share_keys import kv_heads_of
from engine.model.view import LONGEST_STEP, View, cache_bytes
from engine.plan.plan import PlanShape
from engine.plan.presets import single
from engine.weights.checkpoint import Checkpoint, open_checkpoint
from tests.engine.model.conftest import assert_close
from tests.one_process import OneProcess
from tests.tiny_families import save_tiny

CPU = torch.device("cpu")
WINDOW = 600
IDS = np.random.default_rng(3).integers(3, 99, 4000).tolist()


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Checkpoint]:
    """Layers that see 12 positions between layers that see the whole window."""
    folder = tmp_path_factory.mktemp("gemma")
    save_tiny("gemma3", folder, max_position_embeddings=8192)
    checkpoint = open_checkpoint(folder)
    yield checkpoint
    checkpoint.close()


@pytest.fixture
def model(gemma: Checkpoint) -> OneProcess:
    plan = single(PlanShape.from_config(gemma.config), "this/cpu")
    return OneProcess(gemma, plan, window=WINDOW)


def read(model: OneProcess, count: int, slot: int = 0) -> None:
    """Put the first ids into a slot, in the longest steps."""
    for position in range(0, count, LONGEST_STEP):
        model.logits(IDS[position : min(position + LONGEST_STEP, count)], position, slot=slot)


@pytest.mark.parametrize(("written", "length"), [(40, 40), (300, 9), (1030, 500), (3000, 2500)])
def test_both_slots_go_on_as_if_alone(model: OneProcess, written: int, length: int) -> None:
    """Short of every window, past the narrow ones, and where all rings have wrapped."""
    read(model, length, slot=5)
    expected = model.logits(IDS[length : length + 30], length, slot=5)
    model.shards[0].cache.free(5)
    read(model, written)
    cache = model.shards[0].cache
    cache.copy(0, 1, length)
    assert_close(model.logits(IDS[length : length + 30], length, slot=1), expected)
    # Nor does the source feel it: neither memory nor positions are shared.
    model.logits(IDS[:200], length + 30, slot=1)
    cache.truncate(0, length)
    assert_close(model.logits(IDS[length : length + 30], length), expected)


def test_what_has_left_a_ring_cannot_be_copied(model: OneProcess) -> None:
    read(model, 1500)
    cache = model.shards[0].cache
    for source, length, words in [
        (0, 300, "the first 300 of 1,500 positions of slot 0 cannot be copied"),
        (0, 1501, "cannot begin with 1,501 positions of slot 0, which holds 1,500"),
        (0, 0, "cannot begin with 0 positions"),
        (7, 10, "cannot begin with 10 positions of slot 7, which holds 0"),
        (1, 10, "cannot begin with 10 positions of slot 1"),
    ]:
        with pytest.raises(ProtocolError, match=words):
            cache.copy(source, 1, length)
    before = cache.num_bytes
    cache.copy(0, 1, 1500)
    # A copy of a copy is cut as the first source would be.
    with pytest.raises(ProtocolError, match="the first 300 of 1,500 positions of slot 1"):
        cache.copy(1, 2, 300)
    cache.free(1)
    assert cache.num_bytes == before


def test_a_copy_takes_the_memory_of_what_it_holds(model: OneProcess) -> None:
    config, heads = model.shards[0].config, kv_heads_of(model.shards[0].plan, 0)
    read(model, 900)
    cache = model.shards[0].cache
    before = cache.num_bytes
    cache.copy(0, 1, 200)
    stated = cache_bytes(config, heads, WINDOW, "float32", 200)
    assert cache.num_bytes - before == stated
    # Again, with the same result: a step whose answer was lost may be sent twice.
    cache.copy(0, 1, 200)
    assert cache.num_bytes - before == stated


def test_a_copy_that_does_not_fit_is_refused_and_leaves_the_slot_empty(
    model: OneProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    read(model, 300)
    cache = model.shards[0].cache
    before = cache.num_bytes
    # The machine's memory cannot be filled by a test: what it says of itself is replaced.
    monkeypatch.setattr(kv_cache, "free_bytes", lambda _device: 100)
    with pytest.raises(CacheFull, match=r"100 positions need .* more for keys and values") as error:
        cache.copy(0, 1, 100)
    assert "\n" not in str(error.value)
    assert cache.num_bytes == before
    cache.check([Segment(slot=1, first_position=0, token_count=0, logit_offsets=())])
    with pytest.raises(ProtocolError, match="slot 1: expected position 0"):
        cache.check([Segment(slot=1, first_position=100, token_count=0, logit_offsets=())])


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
def test_any_steps_cuts_and_copies_show_every_key_that_the_mask_allows(
    layer: Layer, window: int, data: st.DataObject
) -> None:
    """Each conversation stores values of its own; a copy has its source's and goes on with others."""
    view = View.of_layer(layer, window)
    caches = [LayerCache(1, 2, view, torch.float32, CPU, new_place())]
    contents: list[list[int]] = [[]]
    written = [0]
    number = 0
    for _ in range(data.draw(st.integers(1, 10))):
        n = data.draw(st.integers(0, len(caches) - 1))
        held = contents[n]
        is_whole = written[n] <= view.reach + LONGEST_STEP
        lowest = 0 if is_whole else min(len(held), written[n] - LONGEST_STEP)
        length = data.draw(st.integers(max(0, lowest), len(held)))
        if length and data.draw(st.booleans()):
            caches.append(caches[n].copy(length, written[n], new_place()))
            assert caches[-1].num_bytes == caches[n].copied_bytes(length, written[n])
            contents.append(held[:length])
            written.append(written[n])
            n = len(caches) - 1
        count = data.draw(st.sampled_from([1, 7, 300, LONGEST_STEP]))
        new = list(range(number, number + count))
        number += count
        contents[n] = contents[n][:length] + new
        values = torch.tensor(new).float()[:, None, None].expand(count, 1, 2)
        cached = caches[n].append(length, values, values)
        written[n] = max(written[n], length + count)
        positions = torch.arange(length, length + count)
        claimed = cached.positions
        if claimed is None:
            assert cached.first_position is not None
            claimed = torch.arange(cached.keys.shape[1]) + cached.first_position
        mask = visible_mask(view, positions, claimed)
        stored = cached.keys[0, :, 0].long()
        for offset in {0, count // 2, count - 1}:
            query = length + offset
            seen = sorted(stored[mask[offset]].tolist())
            assert seen == sorted(contents[n][view.first_visible(query) : query + 1])
