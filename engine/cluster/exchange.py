"""The hand-over between two plan rows.

In: a device's partial sum of a row and its residual stream. Out: the residual stream at the entry
of the next row, on the devices that have a share there, bit-identical on all of them: everyone
rounds partial sums to the wire format, the sender too, and adds them in device order. It computes
no layer; arrays are numpy float32 [N, width].
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.cluster.messages import Array, HandOver, expect_tensor
from engine.cluster.transport import Channel
from engine.errors import EngineError, ProtocolError, WorkerLost
from engine.plan.plan import Plan

Activations = NDArray[np.float32]

# The engine host notices a lost peer long before; this bounds the wait when the host is gone too.
WAIT_SECONDS = 60.0


def to_wire(values: Activations, wire: str) -> Array:
    """Round to the wire format: float32, float16, or bfloat16 bits as uint16, to nearest even."""
    if wire == "float32":
        return np.ascontiguousarray(values)
    if wire == "float16":
        with np.errstate(over="ignore"):
            return values.astype(np.float16)
    bits = np.ascontiguousarray(values).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    # A NaN must not be carried into infinity by the addition.
    return np.where(np.isnan(values), np.uint32(0x7FC0), rounded).astype(np.uint16)


def from_wire(array: Array) -> Activations:
    """The float32 values of an array in wire format."""
    if array.dtype == np.uint16:
        return (array.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return array.astype(np.float32, copy=False)


@dataclass(frozen=True, slots=True)
class RowHandOver:
    """What one device does after a row.

    Attributes:
        contributors: device indexes with a share in this row, in order.
        receivers: those with a share in the next row.
        newcomers: receivers that did not contribute, and so lack the residual stream.
    """

    contributors: tuple[int, ...]
    receivers: tuple[int, ...]
    newcomers: frozenset[int]
    contributes: bool
    receives: bool

    @property
    def is_local(self) -> bool:
        """Whether nothing crosses a process border."""
        return self.contributors == self.receivers and len(self.receivers) == 1


@dataclass(slots=True)
class Counters:
    """What a device did in a step; the names are those of StepAnswer."""

    compute_ns: int = 0
    wait_ns: int = 0
    serialise_ns: int = 0
    sent_bytes: int = 0
    received_bytes: int = 0


@dataclass(slots=True)
class Exchange:
    """One device's side of all hand-overs of an epoch.

    Attributes:
        outboxes: a channel to each peer that must hear from this device.
        wait: called while nothing is there; returns when the inbox may hold a message, and raises
            when the step is aborted. Takes seconds.
        add: the residual stream after a row, from the stream before it and the sum of all parts.
    """

    epoch: int
    plan: Plan
    device_index: int
    width: int
    inbox: Channel[HandOver] | None
    outboxes: dict[int, Channel[Any]]
    wait: Callable[[float], None]
    add: Callable[[int, Activations, Activations], Activations]
    counters: Counters = field(default_factory=Counters)
    _early: dict[tuple[int, int, int], tuple[HandOver, list[Array]]] = field(
        default_factory=dict[tuple[int, int, int], tuple[HandOver, list[Array]]]
    )
    _rows: list[RowHandOver] = field(default_factory=list[RowHandOver])

    def __post_init__(self) -> None:
        """Work the table out once."""
        for row in range(self.plan.shape.num_rows - 1):
            contributors, receivers = self.plan.group(row), self.plan.group(row + 1)
            self._rows.append(
                RowHandOver(
                    contributors,
                    receivers,
                    frozenset(receivers) - frozenset(contributors),
                    self.device_index in contributors,
                    self.device_index in receivers,
                )
            )

    def row(self, row: int) -> RowHandOver:
        """What this device does after `row`."""
        return self._rows[row]

    def begin_step(self, step_id: int) -> None:
        """Forget hand-overs of earlier steps, which were aborted."""
        self.counters = Counters()
        for key in [key for key in self._early if key[0] < step_id]:
            del self._early[key]

    def hand_over(
        self, step_id: int, row: int, x: Activations | None, partial: Activations | None, rows: int
    ) -> Activations | None:
        """Send what this device owes after `row`, and receive what it needs for the next one.

        Args:
            x: the residual stream [rows, width], where this device contributed.
            partial: its partial sum [rows, width], likewise.
            rows: tokens that cross.
        Returns: the residual stream at the next row, or None without a share there.
        Raises:
            EngineError: the partial sum does not fit the wire format.
            ProtocolError: a peer sent something else than the plan says.
            WorkerLost: a peer said nothing for too long.
        """
        table = self._rows[row]
        own: Array | None = None
        if table.contributes:
            assert x is not None
            assert partial is not None
            started = time.perf_counter_ns()
            own = to_wire(partial, self.plan.wire)
            if self.plan.wire == "float16" and np.isinf(own).any():
                raise EngineError(
                    f"{self.plan.shape.row_name(row)} gives numbers past 65,504, the largest that "
                    "float16 holds; use wire float32 or bfloat16"
                )
            self._send(step_id, row, table, x, own)
            self.counters.serialise_ns += time.perf_counter_ns() - started
        if not table.receives:
            return None
        return self._receive(step_id, row, table, x, own, rows)

    def _send(self, step_id: int, row: int, table: RowHandOver, x: Activations, own: Array) -> None:
        first = table.contributors[0]
        is_alone = len(table.contributors) == 1
        # One contributor: the sum is its own part, so one finished tensor is enough.
        finished = self.add(row, x, from_wire(own)) if is_alone and table.newcomers else None
        for receiver in table.receivers:
            if receiver == self.device_index:
                continue
            tensors: list[Array] = []
            if not is_alone:
                tensors.append(own)
            if finished is not None:
                tensors.append(finished)
            elif receiver in table.newcomers and first == self.device_index:
                tensors.append(np.ascontiguousarray(x))
            message = HandOver(
                epoch=self.epoch,
                step_id=step_id,
                row=row,
                device_index=self.device_index,
                has_partial=not is_alone,
                has_residual=len(tensors) > (0 if is_alone else 1),
            )
            self.counters.sent_bytes += self.outboxes[receiver].send(message, tensors)

    def _receive(
        self,
        step_id: int,
        row: int,
        table: RowHandOver,
        x: Activations | None,
        own: Array | None,
        rows: int,
    ) -> Activations:
        is_alone = len(table.contributors) == 1
        first = table.contributors[0]
        if is_alone:
            if own is not None:
                assert x is not None
                return self.add(row, x, from_wire(own))
            (residual,) = self._expect(step_id, row, first, False, True, rows)
            return residual
        total: Activations | None = None
        for contributor in table.contributors:
            if contributor == self.device_index:
                assert own is not None
                part = from_wire(own)
            else:
                with_residual = x is None and contributor == first
                tensors = self._expect(step_id, row, contributor, True, with_residual, rows)
                part = from_wire(tensors[0])
                if with_residual:
                    x = tensors[1]
            total = part if total is None else total + part
        assert total is not None
        assert x is not None
        return self.add(row, x, total)

    def _expect(
        self, step_id: int, row: int, sender: int, partial: bool, residual: bool, rows: int
    ) -> list[Array]:
        key = (step_id, row, sender)
        started = time.perf_counter_ns()
        deadline = time.monotonic() + WAIT_SECONDS
        while key not in self._early:
            if not self._drain(step_id):
                if time.monotonic() > deadline:
                    raise WorkerLost(
                        f"{self.plan.devices[sender]} sent nothing for "
                        f"{self.plan.shape.row_name(row)} in {WAIT_SECONDS:.0f} s"
                    )
                self.wait(1.0)
        self.counters.wait_ns += time.perf_counter_ns() - started
        message, tensors = self._early.pop(key)
        if (message.has_partial, message.has_residual) != (partial, residual):
            raise ProtocolError(
                f"{self.plan.devices[sender]} handed over other tensors for "
                f"{self.plan.shape.row_name(row)} than the plan says"
            )
        if len(tensors) != int(partial) + int(residual):
            raise ProtocolError(
                f"{self.plan.devices[sender]} handed over {len(tensors)} tensors, "
                f"announced {int(partial) + int(residual)}"
            )
        shape = (rows, self.width)
        what = f"hand-over of {self.plan.devices[sender]}"
        if partial:
            expect_tensor(tensors[0], self.plan.wire, shape, what)
        if residual:
            expect_tensor(tensors[-1], "float32", shape, what)
        return tensors

    def _drain(self, step_id: int) -> bool:
        """Take one hand-over from the inbox; False when it is empty."""
        if self.inbox is None:
            raise ProtocolError("this runner has no exchange socket, but its plan needs one")
        received = self.inbox.receive(0)
        if received is None:
            return False
        message = received.message
        if message.epoch != self.epoch or message.step_id < step_id:
            return True  # Late, from a step that was aborted.
        is_known = 0 <= message.row < len(self._rows)
        if not is_known or message.device_index not in self._rows[message.row].contributors:
            raise ProtocolError(
                f"hand-over of row {message.row} from device {message.device_index}, which has "
                "no share there"
            )
        self.counters.received_bytes += sum(t.nbytes for t in received.tensors)
        self._early[message.step_id, message.row, message.device_index] = (
            message,
            received.tensors,
        )
        return True

    def close(self) -> None:
        """Close the channels to the peers."""
        for channel in self.outboxes.values():
            channel.close()
