"""Shares of half-layers with random weights, for native kernels and for torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from engine.kernels import native_kernels
from engine.kernels.matrices import BFloat16Matrix, Float32Matrix, Matrix
from engine.kernels.native_kernels import NativeHead, NativeRow, NativeRows
from engine.kernels.native_library import NativeLibrary
from engine.kernels.native_matrices import repack
from engine.kernels.torch_kernels import AttentionShare, Batch, HeadShare, Mlp, MlpShare
from engine.model.attention import kv_groups
from engine.model.batch import Segment, StepKind
from engine.model.config import NO_ROPE, CacheDtype, Layer, ModelConfig, Rope
from engine.model.kv_cache import KVCache
from engine.model.rope import RopeTable
from engine.model.shard import make_batch
from tests.engine.kernels.native_arithmetic import Packable, exact_values, quantized, random_matrix

CPU = torch.device("cpu")
Share = AttentionShare | MlpShare | HeadShare


class _RoundingMatrix:
    """The weights of a packable matrix in float32, with the arithmetic of the native kernels."""

    def __init__(self, matrix: Packable) -> None:
        self._weights = torch.as_tensor(exact_values(matrix))
        self._block = None if isinstance(matrix, BFloat16Matrix) else matrix.block

    @property
    def num_bytes(self) -> int:
        return self._weights.nbytes

    def multiply(self, x_TK: Tensor, kind: StepKind) -> Tensor:
        block = self._block
        x = x_TK.double() if block is None else torch.as_tensor(quantized(x_TK, block))
        return (x @ self._weights.T).float()


@dataclass(frozen=True)
class Case:
    """A model of one layer, and a share of it with packable weights.

    Attributes:
        format: of the share's matrices.
    """

    config: ModelConfig
    share: Share
    format: str

    def exact(self) -> Any:
        """The share with the same weights, and activations rounded as native kernels do."""
        return self._with(_RoundingMatrix)

    def wide(self) -> Any:
        """The share with the same weights in float32."""
        return self._with(
            lambda matrix: Float32Matrix(torch.as_tensor(exact_values(matrix)).float())
        )

    def native(self, library: NativeLibrary) -> Any:
        """The share with packed weights."""
        return self._with(lambda matrix: repack(matrix, library))

    def _with(self, change: Any) -> Share:
        share: Any = self.share
        if isinstance(share, AttentionShare):
            return replace(share, qkv=change(share.qkv), output=change(share.output))
        if isinstance(share, HeadShare):
            return replace(share, matrix=change(share.matrix))
        dense = share.dense
        return replace(share, dense=Mlp(gate_up=change(dense.gate_up), down=change(dense.down)))

    def batch(self, *segments: tuple[int, int, int], kind: StepKind = "generated") -> Batch:
        """Tokens of a step. Args: segments: slot, first position, count."""
        made = tuple(
            Segment(slot=slot, first_position=first, token_count=count, logit_offsets=())
            for slot, first, count in segments
        )
        ropes = [RopeTable(rope, self.config.head_width, CPU) for rope in self.config.ropes]
        return make_batch(kind, made, ropes, self.config, CPU)


class NativeHalf:
    """A half-layer of native kernels, alone, with a cache of its own."""

    def __init__(
        self, case: Case, library: NativeLibrary, window: int = 50, kv: CacheDtype = "float32"
    ) -> None:
        heads = case.share.num_kv_heads if isinstance(case.share, AttentionShare) else 1
        self.cache = KVCache(case.config, {0: heads}, window, kv, CPU)
        row = native_kernels.prepare(case.native(library), case.config, self.cache)
        assert isinstance(row, NativeRow)
        self._rows = NativeRows({0: row}, {}, case.config, self.cache)
        self._case = case

    def part(self, x: Tensor, batch: Batch | None = None) -> Tensor:
        """This share's part of the sum; without a batch, of tokens that follow each other."""
        batch = batch or self._case.batch((0, 0, max(1, x.shape[0])))
        return self._rows.part(0, x, self._rows.batch(batch))

    def prompt(self, x: Tensor, batch: Batch) -> Tensor:
        """The same of a prompt, with products in float32."""
        epsilon = self._case.config.norm_epsilon
        share, prepared = self._case.wide(), self._rows.batch(batch)
        return self._rows.prompt_attention(0, x, share, prepared, epsilon)

    def attend(self, projected: Tensor, batch: Batch) -> Tensor:
        """What lies between the products."""
        return self._rows.attend(0, projected.clone(), self._rows.batch(batch))


def native_head(case: Case, library: NativeLibrary) -> NativeHead:
    """A head of native kernels."""
    cache = KVCache(case.config, {}, 50, "float32", CPU)
    head = native_kernels.prepare(case.native(library), case.config, cache)
    assert isinstance(head, NativeHead)
    return head


def config_of(**changes: Any) -> ModelConfig:
    """A model of one layer with odd sizes."""
    settings: dict[str, Any] = {
        "family": "test",
        "width": 75,
        "layers": (Layer(mlp_width=43),),
        "num_heads": 6,
        "num_kv_heads": 2,
        "head_width": 20,
        "vocab_size": 99,
        "norm_epsilon": 1e-5,
        "ropes": (Rope(theta=10000.0),),
        "rope_layout": "half",
        "max_positions": 4096,
        "is_head_tied": False,
    }
    return ModelConfig(**(settings | changes))


def attention_case(
    config: ModelConfig, format: str, heads: tuple[int, int] = (0, 6), seed: int = 0
) -> Case:
    """Query heads [first, end) of the layer."""
    torch.manual_seed(seed)
    first, end = heads
    width, head_width = config.width, config.head_width
    groups = list(kv_groups(first, end, config.heads_per_kv))
    num_kv = sum(count for _, count, _ in groups)
    rows, columns = (end - first + 2 * num_kv) * head_width, (end - first) * head_width
    has_norms = config.qk_norm == "weight"
    return Case(
        config,
        AttentionShare(
            layer=0,
            norm=torch.rand(width) + 0.5,
            qkv=_matrix(format, rows, width, width, seed),
            output=_matrix(format, width, columns, head_width, seed + 1),
            num_heads=end - first,
            num_kv_heads=num_kv,
            groups=groups,
            qkv_bias=torch.randn(rows) if config.has_qkv_bias else None,
            output_bias=torch.randn(width) if config.has_output_bias else None,
            q_norm=torch.rand(head_width) + 0.5 if has_norms else None,
            k_norm=torch.rand(head_width) + 0.5 if has_norms else None,
        ),
        format,
    )


def mlp_case(config: ModelConfig, format: str, columns: int, seed: int = 0) -> Case:
    """So many columns of the layer's MLP."""
    torch.manual_seed(seed)
    mlp = Mlp(
        gate_up=_matrix(format, 2 * columns, config.width, config.width, seed),
        down=_matrix(format, config.width, columns, columns, seed + 1),
    )
    return Case(config, MlpShare(norm=torch.rand(config.width) + 0.5, dense=mlp), format)


def head_case(config: ModelConfig, format: str, rows: int, seed: int = 0) -> Case:
    """So many rows of the output head."""
    torch.manual_seed(seed)
    matrix = _matrix(format, rows, config.width, config.width, seed)
    return Case(config, HeadShare(norm=torch.rand(config.width) + 0.5, matrix=matrix), format)


def _matrix(format: str, rows: int, columns: int, block: int, seed: int) -> Matrix:
    """With outputs of order one, so that softmax and activations are in their interesting range."""
    matrix: Packable = random_matrix(
        format, rows, columns, columns if format == "bfloat16" else block, seed
    )
    size = columns**-0.5
    if format == "bfloat16":
        matrix.values *= size  # type: ignore[union-attr]
        return matrix
    matrix.scales *= size / (3.0 if format == "int8" else 0.5)  # type: ignore[union-attr]
    if format == "int4":
        matrix.minimums *= size  # type: ignore[union-attr]
    return matrix


@st.composite
def configs(draw: st.DrawFn) -> ModelConfig:
    """Everything that attention and MLP know to do differently."""
    has_rope = draw(st.booleans())
    layer = Layer(
        mlp_width=43,
        rope=0 if has_rope else NO_ROPE,
        reach=draw(st.sampled_from(["full", "sliding", "chunked"])),
        span=draw(st.integers(1, 9)),
    )
    return config_of(
        width=draw(st.sampled_from([48, 75])),
        layers=(layer,),
        head_width=draw(st.sampled_from([4, 20, 32, 48])),
        rope_layout=draw(st.sampled_from(["half", "adjacent"])),
        qk_norm=draw(st.sampled_from(["none", "weight", "l2"])),
        has_qkv_bias=draw(st.booleans()),
        has_output_bias=draw(st.booleans()),
        activation=draw(st.sampled_from(["silu", "gelu_tanh"])),
        attention_scale=draw(st.sampled_from([0.0, 0.3])),
        logit_softcap=draw(st.sampled_from([0.0, 5.0])),
        tuning_floor=draw(st.sampled_from([0, 4])),
        tuning_scale=0.4,
    )


def random_stream(config: ModelConfig, num_tokens: int, seed: int) -> Tensor:
    """Residual stream of so many tokens."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_tokens, config.width, generator=generator)
