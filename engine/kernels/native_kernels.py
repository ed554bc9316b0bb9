"""The half-layer entry points in C++, for generated tokens on a CPU: each one call.

In and out as in `engine.kernels.torch_kernels`, whose shares these are prepared from; prompts,
other devices and mixtures of experts stay there. Sizes are checked here: past this file there are
only pointers.

T tokens of a step, H query heads and K kv heads of the share, D head width.
"""

from __future__ import annotations

from array import array
from ctypes import byref, c_int64
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from engine.errors import ProtocolError
from engine.kernels.native_library import (
    AttentionStruct,
    HeadStruct,
    MlpStruct,
    NativeLibrary,
    check_status,
)
from engine.kernels.native_matrices import NativeMatrix, check_tensor
from engine.kernels.torch_kernels import AttentionShare, Batch, HeadShare, MlpShare
from engine.model.config import NO_ROPE, Activation, CacheDtype, ModelConfig, RopeLayout
from engine.model.kv_cache import KVCache
from engine.model.view import View

_CACHE_DTYPES: dict[CacheDtype, int] = {"float32": 0, "float16": 1, "bfloat16": 2}
_ACTIVATIONS: dict[Activation, int] = {"silu": 0, "gelu_tanh": 1}
_ROPE_LAYOUTS: dict[RopeLayout, int] = {"half": 1, "adjacent": 2}


@dataclass(frozen=True, slots=True)
class NativeAttention:
    """A share's attention, ready to be called.

    Attributes:
        rope: index of the RoPE table, or NO_ROPE.
        held: what the struct points to.
    """

    library: NativeLibrary
    struct: Any
    layer: int
    width: int
    head_width: int
    rope: int
    held: tuple[object, ...]


@dataclass(frozen=True, slots=True)
class NativeMlp:
    """A share's dense MLP, ready to be called."""

    library: NativeLibrary
    struct: Any
    width: int
    held: tuple[object, ...]


@dataclass(frozen=True, slots=True)
class NativeHead:
    """A share's rows of the output head, ready to be called."""

    library: NativeLibrary
    struct: Any
    width: int
    num_rows: int
    held: tuple[object, ...]


NativeShare = NativeAttention | NativeMlp | NativeHead


def prepare(
    share: AttentionShare | MlpShare | HeadShare,
    config: ModelConfig,
    kv_window: int,
    kv_dtype: CacheDtype,
) -> NativeShare | None:
    """What the native entry points take; None where a matrix is not packed for them.

    Raises: ProtocolError: the share's tensors do not fit together.
    """
    if isinstance(share, AttentionShare):
        return _prepare_attention(share, config, kv_window, kv_dtype)
    if isinstance(share, HeadShare):
        return _prepare_head(share, config)
    return _prepare_mlp(share, config)


def attention_part(x_TW: Tensor, share: NativeAttention, batch: Batch, cache: KVCache) -> Tensor:
    """Norm, projections, RoPE, attention over the cache, output projection.

    Args: x_TW: contiguous float32 [T, width] residual stream on the CPU.
    Returns: float32 [T, width], this share's part of the sum.
    Raises: ProtocolError: a tensor has another shape, dtype or layout.
    """
    num_tokens = _check_stream(x_TW, share.width)
    cos = sin = scales = None
    if share.rope != NO_ROPE:
        shape = (num_tokens, share.head_width // 2)
        cos, sin = (_address("angles", table, shape) for table in batch.ropes[share.rope])
    elif batch.query_scale is not None:
        scales = _address("query scales", batch.query_scale, (num_tokens,))
    places: list[int] = []
    counted = 0
    for segment in batch.segments:
        first, count = segment.first_position, segment.token_count
        places += cache.layer(segment.slot, share.layer).reserve(first + count)
        places += (first, count)
        counted += count
    if counted != num_tokens:
        raise ProtocolError(
            f"segments of {counted:,} tokens came with a stream of {num_tokens:,}, as many are "
            "needed. Send the step again"
        )
    segments = array("q", places)
    output = torch.empty_like(x_TW)
    status = share.library.attention_part(
        share.struct,
        segments.buffer_info()[0],
        len(batch.segments),
        x_TW.data_ptr(),
        num_tokens,
        cos,
        sin,
        scales,
        output.data_ptr(),
    )
    check_status(status)
    return output


def mlp_part(x_TW: Tensor, share: NativeMlp) -> Tensor:
    """Norm, then the gated MLP.

    Args: x_TW: contiguous float32 [T, width] residual stream on the CPU.
    Returns: float32 [T, width], this share's part of the sum.
    Raises: ProtocolError: the stream has another shape, dtype or layout.
    """
    num_tokens = _check_stream(x_TW, share.width)
    output = torch.empty_like(x_TW)
    status = share.library.mlp_part(share.struct, x_TW.data_ptr(), num_tokens, output.data_ptr())
    check_status(status)
    return output


def head_part(x_NW: Tensor, share: NativeHead) -> Tensor:
    """Final norm and this share's rows of the output head.

    Args: x_NW: float32 [N, width] residual stream at the positions that need logits.
    Returns: float32 [N, rows of the share], raw logits.
    Raises: ProtocolError: the stream has another shape or dtype.
    """
    x_NW = x_NW.contiguous()
    num_tokens = _check_stream(x_NW, share.width)
    output = x_NW.new_empty(num_tokens, share.num_rows)
    status = share.library.head_part(share.struct, x_NW.data_ptr(), num_tokens, output.data_ptr())
    check_status(status)
    return output


def _check_stream(x_TW: Tensor, width: int) -> int:
    """Tokens of a residual stream that may be read by its address."""
    num_tokens = x_TW.shape[0]
    check_tensor("a residual stream", x_TW, torch.float32, (num_tokens, width))
    if not x_TW.is_contiguous() or not num_tokens:
        raise ProtocolError(
            f"a residual stream of {num_tokens} tokens with strides {x_TW.stride()} was handed to "
            "a native kernel, at least one token in contiguous memory is needed. Copy it"
        )
    return num_tokens


def _address(name: str, tensor: Tensor, shape: tuple[int, ...]) -> int:
    """Of a contiguous float32 tensor on the CPU.

    Raises: ProtocolError: it is none, or has another shape.
    """
    if not check_tensor(name, tensor, torch.float32, shape).is_contiguous():
        raise ProtocolError(f"{name} are not contiguous, native kernels read no others. Copy them")
    return tensor.data_ptr()


def _optional(name: str, tensor: Tensor | None, shape: tuple[int, ...]) -> int | None:
    return None if tensor is None else _address(name, tensor, shape)


def _prepare_attention(
    share: AttentionShare, config: ModelConfig, kv_window: int, kv_dtype: CacheDtype
) -> NativeAttention | None:
    qkv, output = share.qkv, share.output
    if not (isinstance(qkv, NativeMatrix) and isinstance(output, NativeMatrix)):
        return None
    layer, width = config.layers[share.layer], config.head_width
    rows = (share.num_heads + 2 * share.num_kv_heads) * width
    _check_matrix("qkv", qkv, (rows, config.width))
    _check_matrix("output", output, (config.width, share.num_heads * width))
    per_kv = [per_kv for _, num_kv, per_kv in share.groups for _ in range(num_kv)]
    first_heads = list(accumulate(per_kv, initial=0))
    if len(per_kv) != share.num_kv_heads or first_heads[-1] != share.num_heads:
        raise ProtocolError(
            f"groups {share.groups} do not cover {share.num_heads} heads over "
            f"{share.num_kv_heads} KV heads, every head needs one. Load the model again"
        )
    has_rope = layer.rope != NO_ROPE
    view = View.of_layer(layer, kv_window)
    heads_array = (c_int64 * len(first_heads))(*first_heads)
    struct = AttentionStruct(
        qkv=qkv.struct,
        output=output.struct,
        norm=_address("a norm", share.norm, (config.width,)),
        qkv_bias=_optional("a bias", share.qkv_bias, (rows,)),
        output_bias=_optional("a bias", share.output_bias, (config.width,)),
        q_norm=_optional("a norm", share.q_norm, (width,)),
        k_norm=_optional("a norm", share.k_norm, (width,)),
        first_heads=heads_array,
        num_heads=share.num_heads,
        num_kv_heads=share.num_kv_heads,
        head_width=width,
        rope_layout=_ROPE_LAYOUTS[config.rope_layout] if has_rope else 0,
        has_l2_norm=has_rope and config.qk_norm == "l2",
        reach=view.reach,
        chunk=view.chunk,
        cache_dtype=_CACHE_DTYPES[kv_dtype],
        norm_epsilon=config.norm_epsilon,
        scale=config.attention_scale or width**-0.5,
    )
    held = (struct, share, heads_array)
    return NativeAttention(
        qkv.library, byref(struct), share.layer, config.width, width, layer.rope, held
    )


def _prepare_mlp(share: MlpShare, config: ModelConfig) -> NativeMlp | None:
    if share.dense is None or share.router is not None:
        return None
    gate_up, down = share.dense.gate_up, share.dense.down
    if not (isinstance(gate_up, NativeMatrix) and isinstance(down, NativeMatrix)):
        return None
    columns = down.shape[1]
    _check_matrix("gate_up", gate_up, (2 * columns, config.width))
    _check_matrix("down", down, (config.width, columns))
    struct = MlpStruct(
        gate_up=gate_up.struct,
        down=down.struct,
        norm=_address("a norm", share.norm, (config.width,)),
        activation=_ACTIVATIONS[config.activation],
        norm_epsilon=config.norm_epsilon,
    )
    return NativeMlp(gate_up.library, byref(struct), config.width, (struct, share))


def _prepare_head(share: HeadShare, config: ModelConfig) -> NativeHead | None:
    matrix = share.matrix
    if not isinstance(matrix, NativeMatrix):
        return None
    _check_matrix("head", matrix, (matrix.shape[0], config.width))
    struct = HeadStruct(
        matrix=matrix.struct,
        norm=_address("a norm", share.norm, (config.width,)),
        norm_epsilon=config.norm_epsilon,
        softcap=config.logit_softcap,
    )
    held = (struct, share)
    return NativeHead(matrix.library, byref(struct), config.width, matrix.shape[0], held)


def _check_matrix(name: str, matrix: NativeMatrix, shape: tuple[int, int]) -> None:
    if matrix.shape != shape:
        raise ProtocolError(
            f"the {name} matrix is {list(matrix.shape)}, this share needs {list(shape)}. Load the "
            "model again"
        )
