"""Grouped-query attention of one sequence's new tokens over what its cache shows them.

T new tokens, S cached tokens (the new ones included), H query heads, K kv heads, D head width.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from engine.model.kv_cache import CachedKeys
from engine.model.masks import visible_mask
from engine.model.view import View

# Queries times keys that one mask covers; torch widens it to a float per element.
MASK_ELEMENTS = 1 << 22


def kv_groups(first_head: int, end_head: int, heads_per_kv: int) -> Iterator[tuple[int, int, int]]:
    """Cut a range of query heads into runs that share KV heads evenly.

    A range that begins or ends inside a KV head's group has a short run there.

    Yields: (heads of the run, KV heads of the run, query heads per KV head of the run).
    """
    head = first_head
    while head < end_head:
        border = (head // heads_per_kv + 1) * heads_per_kv
        if head % heads_per_kv or border > end_head:
            run = min(border, end_head) - head
            yield run, 1, run
        else:
            num_kv = (end_head - head) // heads_per_kv
            run = num_kv * heads_per_kv
            yield run, num_kv, heads_per_kv
        head += run


def attend(
    query_THD: Tensor,
    cached: CachedKeys,
    query_positions_T: Tensor,
    view: View,
    groups: list[tuple[int, int, int]],
    scale: float,
) -> Tensor:
    """Attention over what the view shows of the cache.

    Args:
        query_THD: queries, rotated where the layer has RoPE.
        cached: keys and values in the dtype to compute in, those of the queries' tokens included.
        query_positions_T: int64 [T], consecutive.
        groups: from `kv_groups`, in the order of the heads.
        scale: factor of q · k.
    Returns: [T, H, D] in that dtype.
    """
    num_tokens = query_THD.shape[0]
    keys_KSD, values_KSD = cached.keys, cached.values
    num_keys = keys_KSD.shape[1]
    query_HTD = query_THD.to(keys_KSD.dtype).transpose(0, 1)
    # is_causal aligns top-left: with earlier tokens in the cache it would hide the wrong keys.
    is_causal = 1 < num_tokens == num_keys <= min(view.reach, view.chunk or view.reach) and (
        cached.first_position == 0
    )
    # One token sees every key it was handed, unless they come as a ring.
    if is_causal or (num_tokens == 1 and cached.first_position is not None):
        joined = _attend_groups(query_HTD, keys_KSD, values_KSD, None, is_causal, groups, scale)
        return joined.transpose(0, 1)
    # Scores are never held for more than a block of keys and queries, but a mask is held whole.
    step = max(1, MASK_ELEMENTS // num_keys)
    key_positions = _key_positions(cached)
    pieces: list[Tensor] = []
    for start in range(0, num_tokens, step):
        mask = visible_mask(view, query_positions_T[start : start + step], key_positions)
        query = query_HTD[:, start : start + step]
        pieces.append(_attend_groups(query, keys_KSD, values_KSD, mask, False, groups, scale))
    joined = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)
    return joined.transpose(0, 1)


def _attend_groups(
    query_HTD: Tensor,
    keys_KSD: Tensor,
    values_KSD: Tensor,
    mask_TS: Tensor | None,
    is_causal: bool,
    groups: list[tuple[int, int, int]],
    scale: float,
) -> Tensor:
    """Each run of heads over its keys: [H, T, D]."""
    _, num_tokens, head_width = query_HTD.shape
    num_keys = keys_KSD.shape[1]
    outputs: list[Tensor] = []
    head = kv_head = 0
    for num_heads, num_kv, heads_per_kv in groups:
        shape = (num_kv, heads_per_kv, num_keys, head_width)
        query = query_HTD[head : head + num_heads]
        query = query.reshape(num_kv, heads_per_kv, num_tokens, head_width)
        keys = keys_KSD[kv_head : kv_head + num_kv, None].expand(shape)
        values = values_KSD[kv_head : kv_head + num_kv, None].expand(shape)
        output = scaled_dot_product_attention(
            query, keys, values, attn_mask=mask_TS, is_causal=is_causal, scale=scale
        )
        outputs.append(output.reshape(num_heads, num_tokens, head_width))
        head += num_heads
        kv_head += num_kv
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _key_positions(cached: CachedKeys) -> Tensor:
    if cached.positions is not None:
        return cached.positions
    assert cached.first_position is not None
    first, count = cached.first_position, cached.keys.shape[1]
    return torch.arange(first, first + count, device=cached.keys.device)
