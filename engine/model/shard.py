"""A device's share of a model under a plan: which weights it needs, and the rows it computes.

In: a plan, a device's column, and packed weights. Out: partial sums per plan row, and the residual
stream after it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from engine.kernels import native_kernels
from engine.kernels.matrices import Matrix
from engine.kernels.native_batch import NativeBatch
from engine.kernels.native_kernels import NativeHead, NativeRow, NativeRows
from engine.kernels.native_matrices import NativeMatrix
from engine.kernels.torch_kernels import (
    AttentionShare,
    Batch,
    HeadShare,
    Mlp,
    MlpShare,
    attention_part,
    head_part,
    mlp_part,
)
from engine.model.attention import kv_groups
from engine.model.batch import ComputeDtype, Segment, StepKind
from engine.model.config import CacheDtype, ModelConfig
from engine.model.kv_cache import KVCache
from engine.model.norm import rms_norm
from engine.model.rope import RopeTable, temperature_scale
from engine.model.share_keys import RowKeys, WeightKey, kv_heads_of, post_norm_key, row_keys
from engine.plan.plan import Plan

Packed = Mapping[WeightKey, Matrix | Tensor]


class ModelShard:
    """The rows of a plan that one device computes."""

    def __init__(
        self,
        config: ModelConfig,
        plan: Plan,
        device_index: int,
        dtype: ComputeDtype,
        kv_window: int,
        kv_dtype: CacheDtype,
        device: torch.device,
    ) -> None:
        """Args: device_index: this device's column of the plan."""
        self.config = config
        self.plan = plan
        self.dtype: ComputeDtype = dtype
        self._index = device_index
        self._device = device
        self._ropes = [RopeTable(rope, config.head_width, device) for rope in config.ropes]
        self._shares: dict[int, AttentionShare | MlpShare | HeadShare] = {}
        # The same shares for native kernels, where these have all of a row.
        self._native: NativeRows | None = None
        self._native_head: NativeHead | None = None
        self._post_norms: dict[int, Tensor] = {}
        # Of a step that has not been asked for yet.
        self._prepared: NativeBatch | None = None
        heads = kv_heads_of(plan, device_index)
        self.cache = KVCache(config, heads, kv_window, kv_dtype, device)

    def weight_keys(self) -> list[WeightKey]:
        """Every weight this share needs, in the order of the rows."""
        keys: list[WeightKey] = []
        for row in range(self.plan.shape.num_rows):
            keys += self._row_keys(row).values()
            post_norm = self._post_norm_key(row)
            if post_norm is not None:
                keys.append(post_norm)
        return keys

    def take(self, packed: Packed) -> None:
        """Build the shares from packed weights; all of `weight_keys` must be there."""
        native_rows: dict[int, NativeRow] = {}
        for row in range(self.plan.shape.num_rows):
            keys = self._row_keys(row)
            if keys:
                share = self._share(row, _Roles(keys, packed, self.config))
                self._shares[row] = share
                native = native_kernels.prepare(share, self.config, self.cache)
                if isinstance(native, NativeRow):
                    native_rows[row] = native
                else:
                    self._native_head = native
            post_norm = self._post_norm_key(row)
            if post_norm is not None:
                roles = _Roles({"norm": post_norm}, packed, self.config)
                self._post_norms[row] = roles.norm("norm")
        if native_rows:
            self._native = NativeRows(native_rows, self._post_norms, self.config, self.cache)

    @property
    def is_native(self) -> bool:
        """Whether native kernels have all of what generated tokens need."""
        head = self.plan.shape.head_row
        return all(
            self._native_head is not None
            if row == head
            else self._native is not None and row in self._native
            for row in self._shares
        )

    def batch(self, kind: StepKind, segments: tuple[Segment, ...]) -> Batch:
        """Extend the slots by a step's segments and prepare what its rows share.

        Raises: ProtocolError: a segment does not follow its slot's tokens.
        """
        for segment in segments:
            self.cache.extend(segment.slot, segment.first_position, segment.token_count)
        prepared, self._prepared = self._prepared, None
        if prepared is not None and kind == "generated" and prepared.segments == segments:
            assert self._native is not None
            if self._native.is_current(prepared):
                return prepared
        return self._make_batch(kind, segments)

    def prepare_next(self, batch: Batch) -> Batch | None:
        """After a step of one token for each slot: get ready for that of the tokens that follow.

        Returns: its batch, where there is anything to get ready.
        """
        if not isinstance(batch, NativeBatch) or batch.kind == "prompt":
            return None
        if batch.num_tokens > len(batch.segments):
            return None
        # Nothing of size is allocated for a step that may never come.
        end = max(segment.first_position for segment in batch.segments) + 2
        if any(table.num_positions < end for table in self._ropes):
            return None
        following = [
            Segment(
                slot=s.slot,
                first_position=s.first_position + 1,
                token_count=1,
                logit_offsets=s.logit_offsets,
            )
            for s in batch.segments
        ]
        prepared = self._make_batch(batch.kind, tuple(following))
        self._prepared = prepared if isinstance(prepared, NativeBatch) else None
        return self._prepared

    def cut_back(self, batch: Batch) -> None:
        """Let the tokens of a batch not have been; nothing that they wrote over is missed.

        Args: batch: computed last, and `cache.can_take_back` it.
        """
        for segment in batch.segments:
            self.cache.truncate(segment.slot, segment.first_position)

    def tied_rows(self, ids: Sequence[int]) -> Tensor | None:
        """The output head's rows of some tokens, scaled as input embeddings are.

        Returns: float32 [n, width]; None where the head is no embedding, or not all of it is here
            in a format of the native kernels. A head that was quantised has rows of its own.
        """
        share = self._shares.get(self.plan.shape.head_row)
        if not self.config.is_head_tied or not isinstance(share, HeadShare):
            return None
        head = share.matrix
        if not isinstance(head, NativeMatrix) or head.shape[0] != self.config.vocab_size:
            return None
        rows = head.rows(ids)
        scale = self.config.embedding_scale
        return rows if scale == 1 else rows * scale

    def _make_batch(self, kind: StepKind, segments: tuple[Segment, ...]) -> Batch:
        batch = make_batch(kind, segments, self._ropes, self.config, self._device)
        return batch if self._native is None else self._native.batch(batch)

    def part(self, row: int, x: Tensor, batch: Batch) -> Tensor:
        """This device's partial sum of an attention or mlp row."""
        native, share = self._native, self._shares[row]
        if isinstance(batch, NativeBatch) and native is not None and row in native:
            if native.takes(row, batch):
                return native.part(row, x.contiguous(), batch)
            if isinstance(share, AttentionShare):
                epsilon = self.config.norm_epsilon
                return native.prompt_attention(row, x.contiguous(), share, batch, epsilon)
        if isinstance(share, AttentionShare):
            return attention_part(x, share, batch, self.cache, self.config)
        assert isinstance(share, MlpShare)
        return mlp_part(x, share, batch.kind, self.config)

    def advance(
        self,
        first_row: int,
        end_row: int,
        x: Tensor,
        batch: Batch,
        logit_rows: Sequence[int] = (),
    ) -> tuple[Tensor, int, Tensor | None]:
        """At least the first of rows that this device computes alone, one after another.

        Args: logit_rows: tokens that this device also computes its logits of, after the last row.
        Returns: the residual stream after the rows, the row that it is the entry of, and these
            logits, where they came with them.
        """
        native = self._native
        if isinstance(batch, NativeBatch) and native and native.takes(first_row, batch):
            head = self._native_head if end_row == self.plan.shape.head_row else None
            return native.advance(first_row, end_row, x.contiguous(), batch, head, logit_rows)
        x = self.add(first_row, x, self.part(first_row, x, batch))
        return x, first_row + 1, None

    def add(self, row: int, x: Tensor, total: Tensor) -> Tensor:
        """The residual stream after a row, from the sum of all its parts."""
        norm = self._post_norms.get(row)
        if norm is not None:
            total = rms_norm(total, norm, self.config.norm_epsilon)
        return x + total

    def has_post_norm(self, row: int) -> bool:
        """Whether `add` norms the sum of a row first."""
        return row in self._post_norms

    def logits(self, x_NW: Tensor) -> Tensor:
        """Raw logits [N, rows] of this device's vocabulary rows."""
        if self._native_head is not None:
            return native_kernels.head_part(x_NW, self._native_head)
        share = self._shares[self.plan.shape.head_row]
        assert isinstance(share, HeadShare)
        return head_part(x_NW, share, self.config)

    def _row_keys(self, row: int) -> RowKeys:
        return row_keys(self.config, self.plan, row, self._index)

    def _post_norm_key(self, row: int) -> WeightKey | None:
        return post_norm_key(self.config, self.plan, row, self._index)

    def _share(self, row: int, roles: _Roles) -> AttentionShare | MlpShare | HeadShare:
        config, plan = self.config, self.plan
        kind = plan.shape.row_kind(row)
        if kind == "head":
            return HeadShare(norm=roles.norm("norm"), matrix=roles.matrix("head"))
        if kind == "mlp":
            num_experts = sum(1 for role in roles.keys if role.startswith("expert ")) // 2
            return MlpShare(
                norm=roles.norm("norm"),
                dense=roles.mlp("dense") if "dense down" in roles.keys else None,
                router=roles.tensor("router"),
                experts=tuple(roles.mlp(f"expert {n}") for n in range(num_experts)),
            )
        start, end = plan.unit_range(row, self._index)
        kv_start, kv_end = plan.kv_head_range(row, self._index)
        return AttentionShare(
            layer=row // 2,
            norm=roles.norm("norm"),
            qkv=roles.matrix("qkv"),
            output=roles.matrix("output"),
            num_heads=end - start,
            num_kv_heads=kv_end - kv_start,
            groups=list(kv_groups(start, end, config.heads_per_kv)),
            qkv_bias=roles.tensor("qkv_bias"),
            output_bias=roles.tensor("output_bias"),
            q_norm=roles.norm("q_norm") if "q_norm" in roles.keys else None,
            k_norm=roles.norm("k_norm") if "k_norm" in roles.keys else None,
        )


class _Roles:
    """Packed weights of a row by their role."""

    def __init__(self, keys: RowKeys, packed: Packed, config: ModelConfig) -> None:
        self.keys = keys
        self._packed = packed
        self._adds_one = config.norm_adds_one

    def tensor(self, role: str) -> Tensor | None:
        """A plain tensor, or None where the model has none."""
        if role not in self.keys:
            return None
        found = self._packed[self.keys[role]]
        assert isinstance(found, Tensor)
        return found

    def norm(self, role: str) -> Tensor:
        """What a norm multiplies by."""
        found = self.tensor(role)
        assert found is not None
        return found + 1 if self._adds_one else found

    def matrix(self, role: str) -> Matrix:
        """A packed matrix."""
        found = self._packed[self.keys[role]]
        assert not isinstance(found, Tensor)
        return found

    def mlp(self, role: str) -> Mlp:
        """A gated MLP."""
        return Mlp(gate_up=self.matrix(f"{role} gate_up"), down=self.matrix(f"{role} down"))


def make_batch(
    kind: StepKind,
    segments: tuple[Segment, ...],
    ropes: list[RopeTable],
    config: ModelConfig,
    device: torch.device,
) -> Batch:
    """What the rows of a step share: positions, rotations, temperatures."""
    ends = [s.first_position + s.token_count for s in segments]
    runs = [torch.arange(s.first_position, end) for s, end in zip(segments, ends, strict=True)]
    positions = runs[0] if len(runs) == 1 else torch.cat(runs)
    scale: Tensor | None = None
    if config.tuning_floor:
        scale = temperature_scale(positions, config.tuning_floor, config.tuning_scale).to(device)
    positions = positions.to(device)
    if len(runs) == 1:
        tables = [table.run(segments[0].first_position, ends[0]) for table in ropes]
    else:
        tables = [table.rows(positions, max(ends)) for table in ropes]
    return Batch(
        kind=kind,
        segments=segments,
        positions=positions,
        ropes=tuple(tables),
        query_scale=scale,
    )
