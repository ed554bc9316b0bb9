"""All devices of a plan in one process: the oracle for the exchange between processes.

Sums partial sums in device order, as the hand-over rule says, without a socket.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from engine.cluster.exchange import from_wire, to_wire
from engine.kernels.torch_kernels import Batch
from engine.model.batch import ComputeDtype, Segment, StepKind
from engine.model.shard import ModelShard, WeightStore, fetch_weights
from engine.plan.plan import Plan
from engine.weights.checkpoint import Checkpoint

CPU = torch.device("cpu")


class OneProcess:
    """The shards of a plan, run in lockstep."""

    def __init__(
        self, checkpoint: Checkpoint, plan: Plan, dtype: ComputeDtype = "float32", window: int = 256
    ) -> None:
        """Load every device's share."""
        self.checkpoint, self.plan = checkpoint, plan
        self.shards: dict[int, ModelShard] = {}
        for index in plan.used_devices():
            shard = ModelShard(checkpoint.config, plan, index, dtype, window, CPU)
            store = WeightStore(checkpoint.tensors, dtype, CPU, {})
            fetch_weights(
                store,
                shard.weight_keys(),
                lambda s: checkpoint.read_slice(s.name, s.axis, s.start, s.end),
            )
            shard.take(store.packed)
            self.shards[index] = shard

    def logits(
        self, ids: list[int], first_position: int = 0, kind: StepKind = "prompt", slot: int = 0
    ) -> NDArray[np.float32]:
        """Logits [len(ids), vocab] of the next tokens of a slot."""
        segment = Segment(
            slot=slot,
            first_position=first_position,
            token_count=len(ids),
            logit_offsets=tuple(range(len(ids))),
        )
        plan = self.plan
        with torch.inference_mode():
            x = torch.as_tensor(self.checkpoint.read_rows("embedding", ids).copy())
            batches = {i: s.batch(kind, (segment,)) for i, s in self.shards.items()}
            for row in range(plan.shape.head_row):
                parts = [self._rounded(i, row, x, batches[i]) for i in plan.group(row)]
                x = x + sum(parts[1:], start=parts[0])
            heads = [self.shards[i].logits(x) for i in plan.group(plan.shape.head_row)]
        return torch.cat(heads, dim=-1).numpy()

    def _rounded(self, index: int, row: int, x: torch.Tensor, batch: Batch) -> torch.Tensor:
        """A partial sum as it arrives: rounded to the wire, unless nothing is sent."""
        part = self.shards[index].part(row, x, batch)
        plan = self.plan
        if plan.wire == "float32" or plan.group(row) == plan.group(row + 1) == (index,):
            return part
        return torch.as_tensor(from_wire(to_wire(part.numpy(), plan.wire)))
