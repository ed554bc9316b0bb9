"""The two half-layer entry points in torch: what lies between two exchanges, on any device.

In: the residual stream and a device's share of a row. Out: its partial sum, before the residual.
It does not exchange anything and keeps no state but the cache it is handed.

T tokens of a step, H query heads and K kv heads of the share, D head width, F its MLP columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import silu

from engine.kernels.matrices import Matrix, has_bfloat16_units
from engine.model.attention import attend
from engine.model.batch import Segment, StepKind
from engine.model.config import ModelConfig
from engine.model.kv_cache import KVCache
from engine.model.norm import rms_norm
from engine.model.rope import apply_rope


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionShare:
    """A device's heads of one layer.

    Attributes:
        qkv: rows of the query heads, then the key heads, then the value heads.
        groups: from `engine.model.attention.kv_groups`.
    """

    layer: int
    norm: Tensor
    qkv: Matrix
    output: Matrix
    num_heads: int
    num_kv_heads: int
    groups: list[tuple[int, int, int]]


@dataclass(frozen=True, slots=True, kw_only=True)
class MlpShare:
    """A device's MLP columns of one layer; `gate_up` has the gate rows, then the up rows."""

    norm: Tensor
    gate_up: Matrix
    down: Matrix


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadShare:
    """A device's vocabulary rows of the output head."""

    norm: Tensor
    matrix: Matrix


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """What the tokens of a step share on every row.

    Attributes:
        cos, sin: float32 [T, D / 2] for each token's position.
    """

    kind: StepKind
    segments: tuple[Segment, ...]
    cos: Tensor
    sin: Tensor


def attention_part(
    x_TW: Tensor, share: AttentionShare, batch: Batch, cache: KVCache, config: ModelConfig
) -> Tensor:
    """Norm, projections, RoPE, attention over the cache, output projection.

    Args:
        x_TW: float32 [T, width] residual stream.
    Returns: float32 [T, width], this share's part of the sum.
    """
    num_tokens = x_TW.shape[0]
    width = config.head_width
    num_rotated = share.num_heads + share.num_kv_heads
    projected = share.qkv.multiply(rms_norm(x_TW, share.norm, config.norm_epsilon), batch.kind)
    heads = projected.view(num_tokens, num_rotated + share.num_kv_heads, width)
    rotated = apply_rope(heads[:, :num_rotated], batch.cos, batch.sin, config.rope_layout)
    query, keys = rotated[:, : share.num_heads], rotated[:, share.num_heads :]
    values = heads[:, num_rotated:]
    outputs: list[Tensor] = []
    start = 0
    for segment in batch.segments:
        end = start + segment.token_count
        layer_cache = cache.layer(segment.slot, share.layer)
        all_keys, all_values = layer_cache.append(
            segment.first_position, keys[start:end], values[start:end], cache.window
        )
        if not has_bfloat16_units(x_TW.device.type):
            all_keys, all_values = all_keys.float(), all_values.float()
        outputs.append(
            attend(query[start:end], all_keys, all_values, segment.first_position, share.groups)
        )
        start = end
    attended = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    flat = attended.reshape(num_tokens, share.num_heads * width).float()
    return share.output.multiply(flat, batch.kind)


def mlp_part(x_TW: Tensor, share: MlpShare, kind: StepKind, config: ModelConfig) -> Tensor:
    """Norm, gate and up projections, SwiGLU, down projection.

    Args:
        x_TW: float32 [T, width] residual stream.
    Returns: float32 [T, width], this share's part of the sum.
    Source: arXiv 2002.05202.
    """
    projected = share.gate_up.multiply(rms_norm(x_TW, share.norm, config.norm_epsilon), kind)
    gate, up = projected.chunk(2, dim=-1)
    return share.down.multiply(silu(gate) * up, kind)


def head_part(x_NW: Tensor, share: HeadShare, config: ModelConfig) -> Tensor:
    """Final norm and this share's rows of the output head.

    Args:
        x_NW: float32 [N, width] residual stream at the positions that need logits.
    Returns: float32 [N, rows of the share], raw logits.
    """
    # The same arithmetic for every position, whoever asked: logits of a prompt token feed the
    # first generated one.
    return share.matrix.multiply(rms_norm(x_NW, share.norm, config.norm_epsilon), "generated")
