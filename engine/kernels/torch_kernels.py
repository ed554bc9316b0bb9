"""The two half-layer entry points in torch: what lies between two exchanges, on any device.

In: the residual stream and a device's share of a row. Out: its partial sum, before the residual.
It does not exchange anything and keeps no state but the cache it is handed. Gradients flow through
everything, so that training computes what inference does.

T tokens of a step, H query heads and K kv heads of the share, D head width, F its MLP columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import gelu, silu

from engine.kernels.matrices import Matrix, has_bfloat16_units
from engine.model.attention import attend
from engine.model.batch import Segment, StepKind
from engine.model.config import NO_ROPE, Activation, ModelConfig
from engine.model.kv_cache import CachedKeys
from engine.model.moe import route
from engine.model.norm import l2_norm, rms_norm
from engine.model.rope import apply_rope
from engine.model.view import View


class SlotLayer(Protocol):
    """Keys and values of one layer of one slot."""

    @property
    def view(self) -> View:
        """How far back the layer sees."""
        ...

    def append(self, first_position: int, keys_THD: Tensor, values_THD: Tensor) -> CachedKeys:
        """Add new tokens; returns what they attend over."""
        ...


class Cache(Protocol):
    """Whoever keeps keys and values, or only pretends to."""

    def layer(self, slot: int, layer: int) -> SlotLayer:
        """One layer of one slot."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionShare:
    """A device's heads of one layer.

    Attributes:
        norm: weight that the norm multiplies by.
        qkv: rows of the query heads, then the key heads, then the value heads.
        qkv_bias: in the same order, or None.
        output_bias: None also on every device but the first of the row.
        q_norm, k_norm: float32 [D] where heads are normalised with a weight.
        groups: from `engine.model.attention.kv_groups`.
    """

    layer: int
    norm: Tensor
    qkv: Matrix
    output: Matrix
    num_heads: int
    num_kv_heads: int
    groups: list[tuple[int, int, int]]
    qkv_bias: Tensor | None = None
    output_bias: Tensor | None = None
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Mlp:
    """Columns of one gated MLP; `gate_up` has the gate rows, then the up rows."""

    gate_up: Matrix
    down: Matrix


@dataclass(frozen=True, slots=True, kw_only=True)
class MlpShare:
    """A device's MLP columns of one layer.

    Attributes:
        dense: the layer's MLP, or the expert that sees every token.
        router: float32 [experts, width], or None in a dense layer.
        experts: the columns of every routed expert.
    """

    norm: Tensor
    dense: Mlp | None
    router: Tensor | None = None
    experts: tuple[Mlp, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadShare:
    """A device's vocabulary rows of the output head."""

    norm: Tensor
    matrix: Matrix


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """What the tokens of a step share on every row.

    Attributes:
        positions: int64 [T].
        ropes: per RoPE table of the model, cosine and sine float32 [T, D / 2] of each token.
        query_scale: float32 [T], temperature of the queries of layers without RoPE, or None.
    """

    kind: StepKind
    segments: tuple[Segment, ...]
    positions: Tensor
    ropes: tuple[tuple[Tensor, Tensor], ...]
    query_scale: Tensor | None


def attention_part(
    x_TW: Tensor, share: AttentionShare, batch: Batch, cache: Cache, config: ModelConfig
) -> Tensor:
    """Norm, projections, RoPE, attention over the cache, output projection.

    Args:
        x_TW: float32 [T, width] residual stream.
    Returns: float32 [T, width], this share's part of the sum.
    """
    num_tokens, width = x_TW.shape[0], config.head_width
    projected = share.qkv.multiply(rms_norm(x_TW, share.norm, config.norm_epsilon), batch.kind)
    if share.qkv_bias is not None:
        projected = projected + share.qkv_bias
    heads = projected.view(num_tokens, -1, width)
    num_rotated = share.num_heads + share.num_kv_heads
    values = heads[:, num_rotated:]
    query, keys = _place(
        heads[:, : share.num_heads], heads[:, share.num_heads : num_rotated], share, batch, config
    )
    scale = config.attention_scale or width**-0.5
    outputs: list[Tensor] = []
    start = 0
    for segment in batch.segments:
        end = start + segment.token_count
        layer_cache = cache.layer(segment.slot, share.layer)
        cached = layer_cache.append(segment.first_position, keys[start:end], values[start:end])
        outputs.append(
            attend(
                query[start:end],
                _in_compute_dtype(cached),
                batch.positions[start:end],
                layer_cache.view,
                share.groups,
                scale,
            )
        )
        start = end
    attended = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    flat = attended.reshape(num_tokens, share.num_heads * width).float()
    result = share.output.multiply(flat, batch.kind)
    return result if share.output_bias is None else result + share.output_bias


def _place(
    query: Tensor, keys: Tensor, share: AttentionShare, batch: Batch, config: ModelConfig
) -> tuple[Tensor, Tensor]:
    """Norms of the heads, and their positions, in the order that the model has them."""
    layer = config.layers[share.layer]
    if share.q_norm is not None and share.k_norm is not None:
        query = rms_norm(query, share.q_norm, config.norm_epsilon)
        keys = rms_norm(keys, share.k_norm, config.norm_epsilon)
    if layer.rope == NO_ROPE:
        if batch.query_scale is not None:
            query = query * batch.query_scale[:, None, None]
        return query, keys
    cos, sin = batch.ropes[layer.rope]
    query = apply_rope(query, cos, sin, config.rope_layout)
    keys = apply_rope(keys, cos, sin, config.rope_layout)
    if config.qk_norm == "l2":
        query, keys = l2_norm(query, config.norm_epsilon), l2_norm(keys, config.norm_epsilon)
    return query, keys


def _in_compute_dtype(cached: CachedKeys) -> CachedKeys:
    """Widen what this device would be slow to compute with."""
    if cached.keys.dtype == torch.float32:
        return cached
    if cached.keys.dtype == torch.bfloat16 and has_bfloat16_units(cached.keys.device.type):
        return cached
    return CachedKeys(
        cached.keys.float(), cached.values.float(), cached.first_position, cached.positions
    )


def mlp_part(x_TW: Tensor, share: MlpShare, kind: StepKind, config: ModelConfig) -> Tensor:
    """Norm, then the gated MLP, or the experts that each token is sent to.

    Args:
        x_TW: float32 [T, width] residual stream.
    Returns: float32 [T, width], this share's part of the sum.
    Source: arXiv 2002.05202.
    """
    normed = rms_norm(x_TW, share.norm, config.norm_epsilon)
    total = None
    if share.dense is not None:
        total = _gated(normed, share.dense, kind, config.activation)
    if share.router is None:
        assert total is not None
        return total
    experts = config.experts
    assert experts is not None
    routing = route(x_TW, share.norm, config.norm_epsilon, share.router, experts)
    routed = torch.zeros_like(x_TW)
    for expert, tokens, weights in routing.visits():
        visiting = normed[tokens]
        if experts.weighs == "input":
            visiting = visiting * weights
        output = _gated(visiting, share.experts[expert], kind, config.activation)
        if experts.weighs == "output":
            output = output * weights
        routed = routed.index_add(0, tokens, output)
    return routed if total is None else total + routed


def _gated(x_TW: Tensor, mlp: Mlp, kind: StepKind, activation: Activation) -> Tensor:
    gate, up = mlp.gate_up.multiply(x_TW, kind).chunk(2, dim=-1)
    activated = silu(gate) if activation == "silu" else gelu(gate, approximate="tanh")
    return mlp.down.multiply(activated * up, kind)


def head_part(x_NW: Tensor, share: HeadShare, config: ModelConfig) -> Tensor:
    """Final norm and this share's rows of the output head.

    Args:
        x_NW: float32 [N, width] residual stream at the positions that need logits.
    Returns: float32 [N, rows of the share], raw logits.
    """
    # The same arithmetic for every position, whoever asked: logits of a prompt token feed the
    # first generated one.
    normed = rms_norm(x_NW, share.norm, config.norm_epsilon)
    logits = share.matrix.multiply(normed, "generated")
    if config.logit_softcap:
        logits = torch.tanh(logits / config.logit_softcap) * config.logit_softcap
    return logits
