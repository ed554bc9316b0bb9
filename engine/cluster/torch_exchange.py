"""The hand-over between two plan rows over torch.distributed, for networks that are trusted.

In and out: as `exchange.Exchange`, bit for bit: partial sums are rounded to the wire format and
added in device order, which an all-reduce of torch's does not promise. So it sends from point to
point. It neither encrypts nor authenticates, and a fault, also a step that was given up, makes a
new group: what was under way cannot be taken back.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from engine.cluster.collectives import RowHandOver, hand_over_table
from engine.cluster.exchange import WAIT_SECONDS
from engine.cluster.messages import NUMPY_TYPES, Array
from engine.cluster.peer_links import PeerLinks
from engine.cluster.pieces import MAX_PIECES
from engine.cluster.step_counters import Counters
from engine.cluster.torch_group import MAX_TAG, GroupError, Rendezvous, TorchGroup, Transfer
from engine.cluster.wire_format import Activations, from_wire, to_wire
from engine.errors import EngineError, ProtocolError, WorkerLost
from engine.model.batch import StepKind
from engine.plan.plan import Plan

# Between looks at what the engine host says.
_LISTEN_SECONDS = 0.02
_STREAM_BYTES = 4


@dataclass(frozen=True, slots=True)
class _UnderWay:
    """A hand-over that this device has begun and takes something from.

    Attributes:
        x, own: the residual stream and the rounded partial sum, where this device contributed.
        buffers: what other contributors' bytes come into, by device.
        transfer: None where nothing is awaited.
    """

    table: RowHandOver
    num_tokens: int
    x: Activations | None
    own: Array | None
    buffers: dict[int, torch.Tensor]
    transfer: Transfer | None


class TorchExchange:
    """One device's side of all hand-overs of an epoch; see `collective.Collective`."""

    def __init__(
        self,
        epoch: int,
        plan: Plan,
        device_index: int,
        width: int,
        links: PeerLinks,
        meeting_point: str,
        rendezvous: Rendezvous | None,
        memory: torch.device,
        wait: Callable[[float], None],
        add: Callable[[int, Activations, Activations], Activations],
    ) -> None:
        """Join nobody yet.

        Args:
            links: the encrypted sockets to the same peers: they measure, and notice a loss.
            meeting_point: "ADDRESS:PORT" of the first device's rendezvous.
            rendezvous: on the first device with a share, else None.
            memory: of this device; NCCL moves the tensors if all devices are GPUs.
            wait: called with 0 while nothing is there; raises when the step is aborted or a peer
                is lost.
            add: the residual stream after a row, from the stream before it and the sum of parts.
        """
        self.plan = plan
        self.device_index = device_index
        self.links = links
        self.counters = Counters()
        self._epoch, self._width = epoch, width
        self._meeting_point, self._rendezvous = meeting_point, rendezvous
        used = plan.used_devices()
        self._ranks = {device: rank for rank, device in enumerate(used)}
        has_cpu = any(plan.devices[device].endswith("/cpu") for device in used)
        self._memory = torch.device("cpu") if has_cpu else memory
        self._wait = wait
        self._add = add
        self._table = hand_over_table(plan, device_index)
        self._step_id = 0
        self._wire: str = plan.wire
        self._under_way: dict[tuple[int, int], _UnderWay] = {}
        self._group: TorchGroup | None = None
        # The group's generation: the last step that was given up before those it serves.
        self._generation = 0
        self._given_up: set[int] = set()

    def row(self, row: int) -> RowHandOver:
        """What this device does after `row`."""
        return self._table[row]

    def begin_step(self, step_id: int, kind: StepKind) -> None:
        """Start a step, in a new group if a step before it was given up.

        The engine host tells all devices that it gives a step up before it sends the next one, so
        they agree on the group.

        Raises: WorkerLost: a peer is gone, or did not come.
        """
        self.counters = Counters()
        self._step_id = step_id
        self._wire = self.plan.wire_of(kind)
        self._under_way.clear()
        self.links.check()
        generation = max((given_up for given_up in self._given_up if given_up < step_id), default=0)
        if self._group is None or generation != self._generation:
            self._leave()
            self._generation = generation
            self._given_up = {step for step in self._given_up if step >= generation}
            self._join()

    def hand_over(
        self, row: int, x: Activations | None, partial: Activations | None, num_tokens: int
    ) -> Activations | None:
        """`start` and `finish` in one."""
        self.start(row, 0, x, partial, num_tokens)
        return self.finish(row, 0)

    def start(
        self,
        row: int,
        piece: int,
        x: Activations | None,
        partial: Activations | None,
        num_tokens: int,
    ) -> None:
        """Send what this device owes after `row`, and get ready for what it needs.

        Args, Raises: as `Collective.start`.
        """
        table = self._table[row]
        started = time.perf_counter_ns()
        own: Array | None = None
        sends: list[tuple[int, torch.Tensor]] = []
        if table.contributes:
            assert x is not None
            assert partial is not None
            own = to_wire(partial, self._wire)
            if self._wire == "float16" and np.isinf(own).any():
                raise EngineError(
                    f"{self.plan.shape.row_name(row)} gives numbers past 65,504, the largest that "
                    "float16 holds; use wire float32 or bfloat16"
                )
            sends = self._sends(row, table, x, own)
        buffers = self._buffers(table, num_tokens)
        transfer: Transfer | None = None
        if sends or buffers:
            assert self._group is not None
            transfer = self._group.start(
                [(self._ranks[device], tensor) for device, tensor in sends],
                [(self._ranks[device], buffer) for device, buffer in buffers.items()],
                ((self._step_id * len(self._table) + row) * MAX_PIECES + piece) % MAX_TAG,
            )
        for device, tensor in sends:
            self.counters.sent_bytes += tensor.nbytes
            self.counters.link(device).sent_bytes += tensor.nbytes
        if table.receives:
            self._under_way[row, piece] = _UnderWay(
                table, num_tokens, x, own, buffers, transfer if buffers else None
            )
        self.counters.serialise_ns += time.perf_counter_ns() - started

    def finish(self, row: int, piece: int) -> Activations | None:
        """The residual stream at the next row, of a piece; None without a share there.

        Raises: WorkerLost: a peer is gone, or said nothing for too long.
        """
        item = self._under_way.pop((row, piece), None)
        if item is None:
            return None
        if item.transfer is not None:
            self._finish(item.transfer, self.plan.shape.row_name(row))
        for device, buffer in item.buffers.items():
            self.counters.received_bytes += buffer.nbytes
            self.counters.link(device).received_bytes += buffer.nbytes
        return self._result(row, item)

    def take_early(self) -> None:
        """While idle: answer pings.

        Raises: ProtocolError: a peer sent something that no plan asks for.
        """
        if self.links.receive() is not None:
            raise ProtocolError("a hand-over came by socket, but the plan's transport is torch")

    def give_up(self, step_id: int) -> None:
        """A step was given up, here or elsewhere: what is under way cannot be taken back."""
        self._given_up.add(step_id)

    def close(self) -> None:
        """Leave the group, and close the sockets to the peers.

        Raises: SystemExit: torch.distributed does not come back.
        """
        self.links.close()
        self._leave()

    # ---- the group ---------------------------------------------------------------------------

    def _join(self) -> None:
        if len(self._ranks) == 1:
            return
        self._group = TorchGroup(
            f"{self._epoch}/{self._generation}",
            self._ranks[self.device_index],
            len(self._ranks),
            self._meeting_point,
            self._rendezvous,
            self._memory,
        )
        self._finish(self._group.connecting, "the first step")

    def _leave(self) -> None:
        if self._group is not None:
            group, self._group = self._group, None
            group.close()

    def _finish(self, transfer: Transfer, what: str) -> None:
        """Wait, and hear the engine host and the peers' sockets meanwhile."""
        started = time.perf_counter_ns()
        deadline = time.monotonic() + WAIT_SECONDS
        while not transfer.done.wait(_LISTEN_SECONDS):
            self._wait(0.0)
            self.take_early()
            if time.monotonic() > deadline:
                reason = f"it sent nothing for {what} in {WAIT_SECONDS:.0f} s"
                raise self._lost(GroupError(reason, transfer.waiting_for))
        waited = time.perf_counter_ns() - started
        self.counters.wait_ns += waited
        if transfer.waiting_for is not None:
            self.counters.link(self._device(transfer.waiting_for)).wait_ns += waited
        if transfer.error is not None:
            raise self._lost(transfer.error)

    def _lost(self, error: GroupError) -> WorkerLost:
        if error.peer is None:
            return WorkerLost(f"transport torch failed: {error}. Apply the plan again")
        return self.links.lost(self._device(error.peer), str(error))

    def _device(self, rank: int) -> int:
        return self.plan.used_devices()[rank]

    # ---- tensors -----------------------------------------------------------------------------

    def _sends(
        self, row: int, table: RowHandOver, x: Activations, own: Array
    ) -> list[tuple[int, torch.Tensor]]:
        """What each receiver gets, in one tensor of bytes: the part, then the residual stream."""
        others = [r for r in table.receivers if r != self.device_index]
        if not others:
            return []
        if table.is_alone:
            # The sum is its own part, so one finished tensor is enough.
            finished = self._to_memory([self._add(row, x, from_wire(own))])
            return [(receiver, finished) for receiver in others]
        part = self._to_memory([own])
        is_first = table.contributors[0] == self.device_index
        both = self._to_memory([own, x]) if is_first and table.newcomers else part
        return [(r, both if r in table.newcomers else part) for r in others]

    def _buffers(self, table: RowHandOver, num_tokens: int) -> dict[int, torch.Tensor]:
        """Room for what each contributor sends here."""
        buffers: dict[int, torch.Tensor] = {}
        if not table.receives:
            return buffers
        values = num_tokens * self._width
        for contributor in table.contributors:
            if contributor == self.device_index:
                continue
            size = 0 if table.is_alone else values * np.dtype(NUMPY_TYPES[self._wire]).itemsize
            is_first = contributor == table.contributors[0]
            if self.device_index in table.newcomers and is_first:
                size += values * _STREAM_BYTES
            buffers[contributor] = torch.empty(size, dtype=torch.uint8, device=self._memory)
        return buffers

    def _result(self, row: int, item: _UnderWay) -> Activations:
        """The residual stream, from the parts in device order."""
        table, x = item.table, item.x
        shape = (item.num_tokens, self._width)
        wire = np.dtype(NUMPY_TYPES[self._wire])
        part_bytes = 0 if table.is_alone else item.num_tokens * self._width * wire.itemsize
        total: Activations | None = None
        for contributor in table.contributors:
            if contributor == self.device_index:
                assert item.own is not None
                part = from_wire(item.own)
            else:
                data = item.buffers[contributor].cpu().numpy()
                if data.nbytes > part_bytes:
                    x = data[part_bytes:].view(np.float32).reshape(shape)
                if table.is_alone:
                    assert x is not None
                    return x
                part = from_wire(data[:part_bytes].view(wire).reshape(shape))
            total = part if total is None else total + part
        assert total is not None
        assert x is not None
        return self._add(row, x, total)

    def _to_memory(self, arrays: Sequence[Array]) -> torch.Tensor:
        """A tensor of their bytes that nobody changes."""
        flat = [np.ascontiguousarray(a).reshape(-1).view(np.uint8) for a in arrays]
        return torch.as_tensor(np.concatenate(flat)).to(self._memory)
