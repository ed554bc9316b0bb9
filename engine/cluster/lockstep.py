"""All devices of a plan in one process, in lockstep: for research, and the oracle of the exchange.

In: an open model and a plan. Out: what its runners would compute, row by row, without a socket:
partial sums rounded to the wire and added in device order, as the hand-over rule says.

T new tokens, M model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.cluster.wire_format import from_wire, to_wire
from engine.errors import ConfigError, PlanError, PromptError
from engine.kernels.torch_kernels import Batch
from engine.model.batch import ComputeDtype, Segment, StepKind
from engine.model.config import CacheDtype
from engine.model.shard import ModelShard
from engine.model.view import DEFAULT_WINDOW, LONGEST_STEP
from engine.model.weight_store import WeightStore, fetch_weights
from engine.plan.plan import Plan, PlanShape
from engine.weights.checkpoint import Checkpoint


class Lockstep:
    """The shards of a plan, run one after the other.

    Attributes:
        shards: by column of the plan, for the columns with a share.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        plan: Plan,
        dtype: ComputeDtype = "float32",
        window: int | None = None,
        kv_dtype: CacheDtype = "float32",
        devices: Sequence[torch.device] | None = None,
    ) -> None:
        """Load every device's share.

        Args:
            checkpoint: open, for as long as this is used.
            dtype: what the weights compute in: "float32", "bfloat16", "int8" or "int4".
            window: positions that attention can reach back; None takes the model's context, at
                most 8,192. Longer texts slide.
            kv_dtype: what keys and values are kept in: "float32", "bfloat16" or "float16".
            devices: one for each column of the plan; the CPU for all if None.
        Raises:
            PlanError: the plan is of another model.
            ConfigError: a wrong number of devices, an unknown dtype, or a window below 1.
        """
        if dtype not in get_args(ComputeDtype) or kv_dtype not in get_args(CacheDtype):
            raise ConfigError(
                f"dtype {dtype!r} with kv_dtype {kv_dtype!r}; choose from "
                f"{', '.join(get_args(ComputeDtype))} and {', '.join(get_args(CacheDtype))}"
            )
        if window is None:
            window = min(checkpoint.config.max_positions, DEFAULT_WINDOW)
        if window < 1:
            raise ConfigError(f"window {window} is below 1 position; give at least 1")
        if plan.shape != PlanShape.from_config(checkpoint.config):
            raise PlanError(
                f"the plan does not fit {checkpoint.path}: it was made for a model of other sizes. "
                "Make it from this model's configuration"
            )
        if devices is not None and len(devices) != len(plan.devices):
            raise ConfigError(
                f"{len(devices)} devices for a plan of {len(plan.devices)} columns; give one each"
            )
        self.checkpoint, self.plan = checkpoint, plan
        targets = devices or [torch.device("cpu")] * len(plan.devices)
        self._targets = list(targets)
        self.shards: dict[int, ModelShard] = {}
        for index in plan.used_devices():
            target = self._targets[index]
            shard = ModelShard(checkpoint.config, plan, index, dtype, window, kv_dtype, target)
            store = WeightStore(checkpoint.tensors, dtype, target, {})
            fetch_weights(
                store,
                shard.weight_keys(),
                lambda s: checkpoint.read_slice(s.name, s.axis, s.start, s.end),
            )
            shard.take(store.packed)
            self.shards[index] = shard
        self._layer_lengths: dict[int, int] = {}
        self._slots: set[int] = set()

    def logits(
        self, ids: list[int], first_position: int = 0, kind: StepKind = "prompt", slot: int = 0
    ) -> NDArray[np.float32]:
        """Logits [T, V] of the next tokens of a slot.

        Raises: as `step`.
        """
        if not ids:
            raise PromptError("no token ids were given; name at least one")
        starts = range(0, len(ids), LONGEST_STEP)
        pieces = [(slot, first_position + n, ids[n : n + LONGEST_STEP]) for n in starts]
        return np.concatenate([self.step([piece], kind)[0] for piece in pieces])

    def step(
        self, pieces: Sequence[tuple[int, int, list[int]]], kind: StepKind = "prompt"
    ) -> list[NDArray[np.float32]]:
        """Logits of several slots' next tokens in one ragged step.

        Args:
            pieces: slot (>= 0), first position, ids; position 0 begins a slot anew.
        Returns: float32 [T, V] for each piece.
        Raises:
            ProtocolError: tokens do not follow those already in their slot.
            PromptError: an id outside the vocabulary, or a slot below 0.
        """
        plan = self.plan
        for slot, first, _ in pieces:
            if slot < 0:
                raise PromptError(f"slot {slot} is below 0; those are the layers' own. Choose 0")
            if first == 0:
                for shard in self.shards.values():
                    shard.cache.free(slot)
        with torch.inference_mode():
            all_ids = [id for _, _, ids in pieces for id in ids]
            x = torch.as_tensor(self.checkpoint.embed(all_ids).copy())
            batches = self._batches(kind, *((s, first, len(ids)) for s, first, ids in pieces))
            for row in range(plan.shape.head_row):
                x = self._row(row, x, batches)
            heads = [
                self.shards[i].logits(x.to(self._targets[i])).cpu()
                for i in plan.group(plan.shape.head_row)
            ]
        rows = torch.cat(heads, dim=-1)
        lengths = [len(ids) for _, _, ids in pieces]
        return [part.numpy() for part in torch.split(rows, lengths)]

    def run_layer(
        self,
        layer: int,
        x_TM: Tensor,
        first_position: int | None = None,
        kind: StepKind = "prompt",
    ) -> Tensor:
        """One layer alone: attention and MLP with their residuals, over the plan's devices.

        Keys and values of the layer are kept, apart from those of `logits`; each layer counts its
        own positions.

        Args:
            layer: 0 to the number of layers - 1.
            x_TM: float32, the residual stream of new tokens.
            first_position: of the first token; 0 begins anew, None follows the tokens before.
        Returns: float32 [T, M] on the CPU.
        Raises:
            PlanError: there is no such layer.
            PromptError: another shape or dtype than the stream has.
            ProtocolError: the tokens do not follow.
        """
        shape, width = self.plan.shape, self.checkpoint.config.width
        if not 0 <= layer < shape.num_layers:
            raise PlanError(
                f"layer {layer} of a model with layers 0 to {shape.num_layers - 1}; choose another"
            )
        if x_TM.ndim != 2 or x_TM.shape[1] != width or x_TM.dtype != torch.float32:
            raise PromptError(
                f"the stream is {x_TM.dtype} {list(x_TM.shape)}, float32 [tokens, {width}] is "
                "needed. Convert or reshape it"
            )
        # A slot of its own for every layer, so that its length is its own too.
        slot = -1 - layer
        if first_position is None:
            first_position = self._layer_lengths.get(layer, 0)
        elif first_position == 0:
            for shard in self.shards.values():
                shard.cache.free(slot)
        outputs: list[Tensor] = []
        with torch.inference_mode():
            for start in range(0, x_TM.shape[0], LONGEST_STEP):
                piece = x_TM[start : start + LONGEST_STEP].cpu()
                batches = self._batches(kind, (slot, first_position, piece.shape[0]))
                first_position += piece.shape[0]
                self._layer_lengths[layer] = first_position
                x = self._row(shape.attention_row(layer), piece, batches)
                outputs.append(self._row(shape.mlp_row(layer), x, batches))
        return torch.cat(outputs).clone()  # Outside inference mode: an ordinary tensor.

    def clear(self) -> None:
        """Forget all tokens of all slots and layers."""
        for shard in self.shards.values():
            for slot in self._slots:
                shard.cache.free(slot)
        self._slots.clear()
        self._layer_lengths.clear()

    def _batches(self, kind: StepKind, *pieces: tuple[int, int, int]) -> dict[int, Batch]:
        """What the rows of a step share, per device; pieces are slot, first position, count."""
        segments = tuple(
            Segment(
                slot=slot,
                first_position=first,
                token_count=count,
                logit_offsets=tuple(range(count)),
            )
            for slot, first, count in pieces
        )
        self._slots.update(slot for slot, _, _ in pieces)
        return {i: shard.batch(kind, segments) for i, shard in self.shards.items()}

    def _row(self, row: int, x: Tensor, batches: Mapping[int, Batch]) -> Tensor:
        """The residual stream after a row."""
        group = self.plan.group(row)
        parts = [self._rounded(index, row, x, batches[index]) for index in group]
        # Those who compute the next row add; they hold the row's post-norm.
        adding = self.plan.group(row + 1)[0]
        target = self._targets[adding]
        total = sum(parts[1:], start=parts[0]).to(target)
        return self.shards[adding].add(row, x.to(target), total).cpu()

    def _rounded(self, index: int, row: int, x: Tensor, batch: Batch) -> Tensor:
        """A partial sum as it arrives: rounded to the wire, unless nothing is sent."""
        part = self.shards[index].part(row, x.to(self._targets[index]), batch).cpu()
        plan = self.plan
        wire = plan.wire_of(batch.kind)
        if wire == "float32" or plan.group(row) == plan.group(row + 1) == (index,):
            return part
        return torch.as_tensor(from_wire(to_wire(part.numpy(), wire)))
