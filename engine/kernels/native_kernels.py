"""The half-layer entry points in C++, on a CPU: one call for many rows, and for prompts whose products
are torch's what lies between those of an attention half.

In and out as in `engine.kernels.torch_kernels`, whose shares these are prepared from; other devices
and mixtures of experts stay there. Sizes are checked here: past this file there are only pointers.

T tokens of a step, H query heads and K kv heads of the share, D head width.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from ctypes import addressof, byref, c_int64, pointer, sizeof
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from engine.errors import ProtocolError
from engine.kernels.native_batch import NativeBatch, make_native_batch
from engine.kernels.native_library import (
    AttentionStruct,
    HeadStruct,
    MlpStruct,
    NativeLibrary,
    RowStruct,
    check_status,
)
from engine.kernels.native_matrices import (
    NativeMatrix,
    address_of,
    check_tensor,
    optional_address,
)
from engine.kernels.torch_kernels import AttentionShare, Batch, HeadShare, MlpShare
from engine.model.config import NO_ROPE, Activation, CacheDtype, ModelConfig, RopeLayout
from engine.model.kv_cache import CACHE_DTYPES, KVCache
from engine.model.norm import rms_norm
from engine.model.view import View

_CACHE_DTYPES: dict[CacheDtype, int] = {"float32": 0, "float16": 1, "bfloat16": 2}
_ACTIVATIONS: dict[Activation, int] = {"silu": 0, "gelu_tanh": 1}
_ROPE_LAYOUTS: dict[RopeLayout, int] = {"half": 1, "adjacent": 2}

# The arguments of a call that ends before the output head.
_NO_HEAD = (None, None, 0, None)
# What one call reads, at most: between calls a long step is reported, and can be given up.
MOST_RUN_BYTES = 1 << 28
# Tokens whose products take about as long as reading the weights once more.
TOKENS_A_READING = 8


@dataclass(frozen=True, slots=True)
class NativeRow:
    """A share's half of a layer, ready to be called.

    Attributes:
        attention, mlp: the struct of the half that it is.
        layer: whose cache it writes, for attention.
        cached_bytes: that it reads for each position of a conversation; 0 without attention.
        reach: positions back that it sees, at most.
        most_prompt_tokens: up to which its products are faster than torch's for prompts, too.
        held: what the structs point to.
    """

    library: NativeLibrary
    attention: AttentionStruct | None
    mlp: MlpStruct | None
    layer: int | None
    width: int
    weight_bytes: int
    cached_bytes: int
    reach: int
    most_prompt_tokens: int
    held: tuple[object, ...]

    def read_bytes(self, times: int, ends: Sequence[tuple[int, int]]) -> int:
        """What a step reads. Args: times: that the weights are read. ends: as of a batch."""
        num_positions = sum([min(end, self.reach) for _, end in ends]) if self.cached_bytes else 0
        return times * self.weight_bytes + num_positions * self.cached_bytes


@dataclass(frozen=True, slots=True)
class _Run:
    """Rows that follow each other.

    Attributes:
        layers: whose caches they write.
        cached_bytes: that they read for each position of a conversation, whatever their reach.
        most_prompt_tokens: of the row that has the fewest.
    """

    layers: tuple[int, ...]
    weight_bytes: int
    cached_bytes: int
    most_prompt_tokens: int

    def most_bytes(self, times: int, ends: Sequence[tuple[int, int]]) -> int:
        """What a step reads at most. Args: as of `NativeRow.read_bytes`."""
        return times * self.weight_bytes + sum([end for _, end in ends]) * self.cached_bytes


@dataclass(frozen=True, slots=True)
class NativeHead:
    """A share's rows of the output head, ready to be called."""

    library: NativeLibrary
    struct: Any
    width: int
    num_rows: int
    held: tuple[object, ...]


NativeShare = NativeRow | NativeHead


class NativeRows:
    """The rows of a device that native kernels compute, by their index in the plan."""

    def __init__(
        self,
        rows: Mapping[int, NativeRow],
        post_norms: Mapping[int, Tensor],
        config: ModelConfig,
        cache: KVCache,
    ) -> None:
        """Join prepared rows.

        Args:
            rows: at least one, all of one library.
            post_norms: float32 [width] weights by row, where a row's sum is normalised.
            cache: the one that they were prepared for.
        Raises: ProtocolError: a norm has another shape.
        """
        self._rows = dict(rows)
        self._cache = cache
        self._head_width, self._width = config.head_width, config.width
        self._library = next(iter(rows.values())).library
        self._structs = (RowStruct * (max(rows) + 1))()
        for index, row in rows.items():
            norm = post_norms.get(index)
            self._structs[index] = RowStruct(
                attention=None if row.attention is None else pointer(row.attention),
                mlp=None if row.mlp is None else pointer(row.mlp),
                post_norm=optional_address("a norm", norm, (config.width,)),
                norm_epsilon=config.norm_epsilon,
            )
        self._post_norms = dict(post_norms)
        # Steps have the same rows again and again; to look at each takes longer than a small one.
        self._runs: dict[tuple[int, int], _Run] = {}

    def __contains__(self, row: int) -> bool:
        """Whether native kernels compute a row of generated tokens."""
        return row in self._rows

    def takes(self, row: int, batch: NativeBatch) -> bool:
        """Whether native kernels compute a row of a step from end to end."""
        found = self._rows.get(row)
        return found is not None and batch.takes(found.most_prompt_tokens)

    def batch(self, batch: Batch) -> NativeBatch:
        """A step's batch for these rows.

        Raises: ProtocolError: angles or scales have another shape, dtype or layout.
        """
        return make_native_batch(batch, self._cache, self._head_width)

    def is_current(self, batch: NativeBatch) -> bool:
        """Whether the slots of a batch still have the memory that it points to."""
        held = zip(batch.segments, batch.places, strict=True)
        return all(self._cache.places(segment.slot) is places for segment, places in held)

    def part(self, row: int, x_TW: Tensor, batch: NativeBatch) -> Tensor:
        """Norm, and one half of a layer.

        Args: x_TW: contiguous float32 [T, width] residual stream on the CPU.
        Returns: float32 [T, width], this share's part of the sum.
        Raises: ProtocolError: the stream has another shape, dtype or layout.
        """
        return self._call(row, row + 1, x_TW, batch, is_partial=True)

    def prompt_attention(
        self, row: int, x_TW: Tensor, share: AttentionShare, batch: NativeBatch, epsilon: float
    ) -> Tensor:
        """The attention half of a layer for a prompt, whose products are torch's.

        Args:
            row: one of these rows, prepared from this share.
            x_TW: contiguous float32 [T, width] residual stream on the CPU.
        Returns: float32 [T, width], this share's part of the sum.
        Raises: ProtocolError: the stream has another shape, dtype or layout.
        """
        _check_count(batch, _check_stream(x_TW, self._width))
        projected = share.qkv.multiply(rms_norm(x_TW, share.norm, epsilon), batch.kind)
        result = share.output.multiply(self.attend(row, projected, batch), batch.kind)
        return result if share.output_bias is None else result + share.output_bias

    def attend(self, row: int, projected_TN: Tensor, batch: NativeBatch) -> Tensor:
        """What lies between the two products of an attention half, best for many tokens of a slot.

        Args:
            row: one of these rows, of attention.
            projected_TN: contiguous float32 [T, (H + 2 K) D] on the CPU; placed in itself.
        Returns: float32 [T, H D].
        Raises: ProtocolError: the projections have another shape, dtype or layout.
        """
        prepared = self._rows[row]
        struct = prepared.attention
        assert struct is not None and prepared.layer is not None
        width = self._head_width
        num_rows = (struct.num_heads + 2 * struct.num_kv_heads) * width
        address = address_of("projections", projected_TN, (batch.num_tokens, num_rows))
        for slot, end_position in batch.ends:
            self._cache.reserve(slot, (prepared.layer,), end_position)
        attended = projected_TN.new_empty(batch.num_tokens, struct.num_heads * width)
        step, target = batch.whole.address, attended.data_ptr()
        check_status(self._library.attend(byref(struct), step, address, target))
        return attended

    def advance(
        self,
        first_row: int,
        end_row: int,
        x_TW: Tensor,
        batch: NativeBatch,
        head: NativeHead | None = None,
        logit_rows: Sequence[int] = (),
    ) -> tuple[Tensor, int, Tensor | None]:
        """As many rows one after another as go into one call, at least the first.

        Args:
            first_row: one that these rows take of such a batch; nobody else has a share of it, nor of
                those up to the end.
            x_TW: contiguous float32 [T, width] residual stream on the CPU.
            head: what follows the last row; goes into the call that computes that row, if it is one.
            logit_rows: N tokens of the stream whose logits are wanted.
        Returns: the stream after the rows, float32 [T, width], the row that it is the entry of, and
            the head's logits, float32 [N, rows of its share], where they were computed.
        Raises: ProtocolError: the stream has another shape, dtype or layout.
        """
        # With many tokens, as after a fault, arithmetic takes the time and not reading.
        times_read = max(1, x_TW.shape[0] // TOKENS_A_READING)
        end, num_bytes = first_row, 0
        whole = self._run(first_row, end_row)
        if (
            whole is not None
            and batch.takes(whole.most_prompt_tokens)
            and whole.most_bytes(times_read, batch.ends) <= MOST_RUN_BYTES
        ):
            end = end_row
        while end < end_row and self.takes(end, batch):
            num_bytes += self._rows[end].read_bytes(times_read, batch.ends)
            if end > first_row and num_bytes > MOST_RUN_BYTES:
                break
            end += 1
        if head is None or end < end_row or not logit_rows:
            return self._call(first_row, end, x_TW, batch, is_partial=False), end, None
        if len(batch.passes) > 1:
            stream = self._call(first_row, end, x_TW, batch, is_partial=False)
            return stream, end, head_part(stream[list(logit_rows)], head)
        logits = x_TW.new_empty(len(logit_rows), head.num_rows)
        tokens = array("q", logit_rows)
        arguments = (head.struct, tokens.buffer_info()[0], len(tokens), logits.data_ptr())
        stream = self._call(first_row, end, x_TW, batch, *arguments, is_partial=False)
        return stream, end, logits

    def _run(self, first: int, end: int) -> _Run | None:
        """The rows [first, end); None where native kernels do not compute all of them."""
        if (first, end) not in self._runs:
            if any(n not in self._rows for n in range(first, end)):
                return None
            rows = [self._rows[n] for n in range(first, end)]
            self._runs[first, end] = _Run(
                layers=tuple([row.layer for row in rows if row.layer is not None]),
                weight_bytes=sum(row.weight_bytes for row in rows),
                cached_bytes=sum(row.cached_bytes for row in rows),
                most_prompt_tokens=min((row.most_prompt_tokens for row in rows), default=0),
            )
        return self._runs[first, end]

    def _call(
        self,
        first: int,
        end: int,
        x_TW: Tensor,
        batch: NativeBatch,
        *head: Any,
        is_partial: bool,
    ) -> Tensor:
        _check_count(batch, _check_stream(x_TW, self._width))
        run = self._run(first, end)
        assert run is not None
        for slot, end_position in batch.ends if run.layers else ():
            self._cache.reserve(slot, run.layers, end_position)
        output = torch.empty_like(x_TW)
        structs = addressof(self._structs) + first * sizeof(RowStruct)
        source, target = x_TW.data_ptr(), output.data_ptr()
        for step, first_token in batch.passes:
            offset = 4 * self._width * first_token
            status = self._library.rows(
                structs,
                end - first,
                step,
                self._width,
                source + offset,
                is_partial,
                target + offset,
                *(head or _NO_HEAD),
            )
            check_status(status)
        return output


def prepare(
    share: AttentionShare | MlpShare | HeadShare, config: ModelConfig, cache: KVCache
) -> NativeShare | None:
    """What the native entry points take; None where a matrix is not packed for them.

    Raises: ProtocolError: the share's tensors do not fit together.
    """
    if isinstance(share, AttentionShare):
        return _prepare_attention(share, config, cache)
    if isinstance(share, HeadShare):
        return _prepare_head(share, config)
    return _prepare_mlp(share, config)


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


def _check_count(batch: NativeBatch, num_tokens: int) -> None:
    if num_tokens != batch.num_tokens:
        raise ProtocolError(
            f"segments of {batch.num_tokens:,} tokens came with a stream of {num_tokens:,}, as "
            "many are needed. Send the step again"
        )


def _prepare_attention(
    share: AttentionShare, config: ModelConfig, cache: KVCache
) -> NativeRow | None:
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
    view = View.of_layer(layer, cache.window)
    heads_array = (c_int64 * len(first_heads))(*first_heads)
    struct = AttentionStruct(
        qkv=qkv.struct,
        output=output.struct,
        norm=address_of("a norm", share.norm, (config.width,)),
        qkv_bias=optional_address("a bias", share.qkv_bias, (rows,)),
        output_bias=optional_address("a bias", share.output_bias, (config.width,)),
        q_norm=optional_address("a norm", share.q_norm, (width,)),
        k_norm=optional_address("a norm", share.k_norm, (width,)),
        first_heads=heads_array,
        num_heads=share.num_heads,
        num_kv_heads=share.num_kv_heads,
        head_width=width,
        place=cache.layers.index(share.layer),
        rope=layer.rope if has_rope else 0,
        rope_layout=_ROPE_LAYOUTS[config.rope_layout] if has_rope else 0,
        has_l2_norm=has_rope and config.qk_norm == "l2",
        reach=view.reach,
        chunk=view.chunk,
        cache_dtype=_CACHE_DTYPES[cache.dtype],
        norm_epsilon=config.norm_epsilon,
        scale=config.attention_scale or width**-0.5,
    )
    weight_bytes = qkv.num_bytes + output.num_bytes
    held = (share, heads_array)
    cached_bytes = 2 * share.num_kv_heads * width * CACHE_DTYPES[cache.dtype].itemsize
    return NativeRow(
        library=qkv.library,
        attention=struct,
        mlp=None,
        layer=share.layer,
        width=config.width,
        weight_bytes=weight_bytes,
        cached_bytes=cached_bytes,
        reach=view.reach,
        most_prompt_tokens=min(qkv.most_prompt_tokens, output.most_prompt_tokens),
        held=held,
    )


def _prepare_mlp(share: MlpShare, config: ModelConfig) -> NativeRow | None:
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
        norm=address_of("a norm", share.norm, (config.width,)),
        activation=_ACTIVATIONS[config.activation],
        norm_epsilon=config.norm_epsilon,
    )
    weight_bytes = gate_up.num_bytes + down.num_bytes
    return NativeRow(
        library=gate_up.library,
        attention=None,
        mlp=struct,
        layer=None,
        width=config.width,
        weight_bytes=weight_bytes,
        cached_bytes=0,
        reach=0,
        most_prompt_tokens=min(gate_up.most_prompt_tokens, down.most_prompt_tokens),
        held=(share,),
    )


def _prepare_head(share: HeadShare, config: ModelConfig) -> NativeHead | None:
    matrix = share.matrix
    if not isinstance(matrix, NativeMatrix):
        return None
    _check_matrix("head", matrix, (matrix.shape[0], config.width))
    struct = HeadStruct(
        matrix=matrix.struct,
        norm=address_of("a norm", share.norm, (config.width,)),
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
