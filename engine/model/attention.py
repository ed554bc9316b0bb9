"""Grouped-query attention of one sequence's new tokens over its cache.

T new tokens, S cached tokens (the new ones included), H query heads, K kv heads, D head width.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from engine.model.masks import causal_mask


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
    keys_KSD: Tensor,
    values_KSD: Tensor,
    first_position: int,
    groups: list[tuple[int, int, int]],
) -> Tensor:
    """Causal attention.

    Args:
        query_THD: rotated queries at positions first_position, first_position + 1, …
        keys_KSD, values_KSD: positions 0 … S - 1, in the dtype to compute in.
        groups: from `kv_groups`, in the order of the heads.
    Returns: [T, H, D] in that dtype.
    """
    num_tokens, _, head_width = query_THD.shape
    num_keys = keys_KSD.shape[1]
    query_HTD = query_THD.to(keys_KSD.dtype).transpose(0, 1)
    mask: Tensor | None = None
    # is_causal aligns top-left: with earlier tokens in the cache it would hide the wrong keys.
    is_causal = num_tokens > 1 and first_position == 0
    if num_tokens > 1 and not is_causal:
        key_positions = torch.arange(num_keys, device=query_THD.device)
        mask = causal_mask(key_positions[first_position:], key_positions)
    outputs: list[Tensor] = []
    head = kv_head = 0
    for num_heads, num_kv, heads_per_kv in groups:
        shape = (num_kv, heads_per_kv, num_keys, head_width)
        output = scaled_dot_product_attention(
            query_HTD[head : head + num_heads].reshape(
                num_kv, heads_per_kv, num_tokens, head_width
            ),
            keys_KSD[kv_head : kv_head + num_kv, None].expand(shape),
            values_KSD[kv_head : kv_head + num_kv, None].expand(shape),
            attn_mask=mask,
            is_causal=is_causal,
        )
        outputs.append(output.reshape(num_heads, num_tokens, head_width))
        head += num_heads
        kv_head += num_kv
    joined = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return joined.transpose(0, 1)
