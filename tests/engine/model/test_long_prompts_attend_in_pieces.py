"""Attention over long texts holds no scores of all queries with all keys."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from engine.model.attention import MASK_ELEMENTS, attend, kv_groups
from engine.model.kv_cache import CachedKeys
from engine.model.view import LONGEST_STEP, View

# Sums of thousands of float32 products, in another order.
TOLERANCE = 2e-6

# Prints by how many bytes the process has grown at most, in a last piece of a prompt.
MEASURE = """
import resource, torch
from engine.model.attention import attend, kv_groups
from engine.model.kv_cache import CachedKeys
from engine.model.view import LONGEST_STEP, View
torch.set_num_threads(1)
num_keys, heads, width = 24 * 1024, 9, 16
def run(num_tokens, num_keys):
    query = torch.zeros(num_tokens, heads, width)
    keys = torch.zeros(3, num_keys, width)
    positions = torch.arange(num_keys - num_tokens, num_keys)
    attend(query, CachedKeys(keys, keys, 0, None), positions, View(num_keys, 0),
           list(kv_groups(0, heads, 3)), 0.25)
run(4, 64)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
run(LONGEST_STEP, num_keys)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


@pytest.mark.parametrize("view", [View(9000, 0), View(700, 0), View(9000, 1024)])
@pytest.mark.parametrize("is_ring", [False, True])
def test_pieces_of_queries_see_what_the_whole_sees(view: View, is_ring: bool) -> None:
    num_tokens, num_keys, num_heads, width = LONGEST_STEP, 7000, 5, 8
    assert num_tokens * num_keys > MASK_ELEMENTS, "one piece would do, so this proves nothing"
    generator = torch.Generator().manual_seed(3)
    query = torch.randn(num_tokens, num_heads, width, generator=generator)
    keys = torch.randn(2, num_keys, width, generator=generator)
    values = torch.randn(2, num_keys, width, generator=generator)
    positions = torch.arange(1000, 1000 + num_keys)
    groups = list(kv_groups(1, 1 + num_heads, 3))
    if is_ring:
        order = torch.randperm(num_keys, generator=generator)
        cached = CachedKeys(keys[:, order], values[:, order], None, positions[order])
    else:
        cached = CachedKeys(keys, values, 1000, None)
    found = attend(query, cached, positions[-num_tokens:], view, groups, 0.3)

    at = positions[-num_tokens:, None]
    visible = (positions <= at) & (positions > at - view.reach)
    if view.chunk:
        visible &= positions // view.chunk == at // view.chunk
    kv_head = torch.tensor([0, 0, 1, 1, 1])
    scores = torch.einsum("thd,hsd->hts", query.double(), keys[kv_head].double()) * 0.3
    weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
    expected = torch.einsum("hts,hsd->thd", weights, values[kv_head].double())
    worst = (found - expected).abs().max().item()
    assert worst <= TOLERANCE, f"largest difference {worst:.3g}"


@pytest.mark.skipif(sys.platform != "linux", reason="others count in other units")
def test_memory_grows_by_less_than_the_scores_of_one_head() -> None:
    root = Path(__file__).parents[3]
    found = subprocess.run(
        [sys.executable, "-c", MEASURE],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
        cwd=root,
    )
    one_head = LONGEST_STEP * 24 * 1024 * 4
    grown = int(found.stdout)
    assert grown < one_head, f"{grown:,} bytes, the scores of one of 9 heads are {one_head:,}"
