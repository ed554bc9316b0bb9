"""The hand-over between two plan rows.

In: a device's partial sum of a row and its residual stream. Out: the residual stream at the entry
of the next row, on the devices that have a share there, bit-identical on all of them: everyone
rounds partial sums to the wire format, the sender too, and adds them in device order. Which way
they take is `collectives`' choice and changes no bit. It computes no layer; arrays are numpy
float32 [N, width].

A hand-over is begun by `start` and ended by `finish`; others may be under way in between, and go
on whenever this thread looks at its inbox.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from engine.cluster.collectives import RowHandOver, Way, hand_over_table, way_of
from engine.cluster.messages import Array, HandOver, expect_tensor
from engine.cluster.peer_links import DIRECT_BYTES, PeerLinks
from engine.cluster.pieces import MAX_PIECES
from engine.cluster.step_counters import Counters
from engine.cluster.swap import LOOK_NS, Lane, Swap
from engine.cluster.transport import Received
from engine.cluster.wire_format import Activations, from_wire, to_wire
from engine.errors import EngineError, ProtocolError
from engine.model.batch import StepKind
from engine.plan.plan import Plan

# The engine host notices a lost peer long before; this bounds the wait when the host is gone too.
WAIT_SECONDS = 300.0
# While messages come, the engine host is heard at least so often.
HEAR_SECONDS = 0.05
# Hand-overs that came before this device got there; more is no plan's.
MAX_EARLY_BYTES = 1 << 30
# Memory of a hand-over without its tensors, so that many without any count, too.
HELD_BYTES = 1024
MAX_WAYS = 4096
MAX_TAKEN_EARLY = 100


@dataclass(slots=True)
class _UnderWay:
    """A hand-over that this device has begun.

    Attributes:
        num_bytes: about what each peer sends for it.
        x, own: the residual stream and the rounded partial sum, where this device contributed.
        finished: what is known of the result, by who finished it.
    """

    way: Way
    row: int
    piece: int
    num_bytes: int
    x: Activations | None = None
    own: Array | None = None
    finished: dict[int, Activations] = field(default_factory=dict[int, Activations])

    @property
    def is_done(self) -> bool:
        return len(self.finished) == len(self.way.needed)

    @property
    def result(self) -> Activations:
        parts = [self.finished[index] for index in self.way.needed]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)


_Phase = Literal["part", "finished"]


class Exchange:
    """One device's side of all hand-overs of an epoch."""

    def __init__(
        self,
        epoch: int,
        plan: Plan,
        device_index: int,
        width: int,
        links: PeerLinks,
        wait: Callable[[float], None],
        add: Callable[[int, Activations, Activations], Activations],
        *,
        checks_numbers: bool = False,
    ) -> None:
        """Work the table out once.

        Args:
            wait: called while nothing is there; returns when the inbox may hold a message, and
                raises when the step is aborted or a peer is lost. Takes seconds.
            add: the residual stream after a row, from the stream before it and the sum of all
                parts.
            checks_numbers: whether what peers send must be finite. It costs a pass over every
                hand-over, and blames a machine for what damaged weights or a narrow dtype do, too.
        """
        self.plan = plan
        self.device_index = device_index
        self.links = links
        self.counters = Counters()
        self._epoch = epoch
        self._width = width
        self._wait = wait
        self._add = add
        self._checks_numbers = checks_numbers
        self._table = hand_over_table(plan, device_index)
        self._ways: dict[tuple[int, int, str], Way] = {}
        self._step_id = 0
        self._wire: str = plan.wire
        self._early: dict[tuple[int, int, int, _Phase, int], tuple[HandOver, list[Array], int]] = {}
        self._early_bytes = 0
        self._under_way: dict[tuple[int, int], _UnderWay] = {}
        self._swap = Swap(links)
        self._lanes: dict[tuple[int, int, str], Lane] = {}
        # A hand-over that waits for nothing but the next record of each other device's stream: with
        # this device's stream and rounded partial sum.
        self._quick: tuple[Lane, Activations, Array] | None = None

    def row(self, row: int) -> RowHandOver:
        """What this device does after `row`."""
        return self._table[row]

    def begin_step(self, step_id: int, kind: StepKind) -> None:
        """Forget hand-overs of earlier steps, which were aborted.

        Raises: WorkerLost: the connection to a peer broke since the last step.
        """
        self.counters = Counters()
        self._step_id = step_id
        self._wire = self.plan.wire_of(kind)
        self._under_way.clear()
        self._quick = None
        for key in [key for key in self._early if key[0] < step_id]:
            self._forget(key)
        self.links.check()

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

        Args:
            piece: which of the step's pieces crosses.
            x: the residual stream [num_tokens, width], where this device contributed.
            partial: its partial sum [num_tokens, width], likewise.
            num_tokens: tokens of the piece that cross.
        Raises:
            EngineError: the partial sum does not fit the wire format.
            ProtocolError: a peer sent something else than the plan says.
            WorkerLost: a peer takes nothing.
        """
        key = (row, num_tokens, self._wire)
        way = self._ways.get(key)
        if way is None:
            way = self._prepare(key)
        own = None
        started = time.perf_counter_ns()
        if way.table.contributes:
            assert x is not None
            assert partial is not None
            own = to_wire(partial, self._wire)
            if self._wire == "float16" and np.isinf(own).any():
                raise EngineError(
                    f"{self.plan.shape.row_name(row)} gives numbers past 65,504, the largest that "
                    "float16 holds; use wire float32 or bfloat16"
                )
            # With others under way, what comes next on a stream may be theirs.
            if not (piece or self._under_way or self._early or self._quick is not None):
                lane = self._lanes.get(key)
                if lane is not None:
                    for target in self._swap.send(lane, self._step_id, own, self.counters):
                        self._send(target, row, piece, "part", True, False, [own])
                    self._quick = (lane, x, own)
                    self.counters.serialise_ns += time.perf_counter_ns() - started
                    return
        self._settle()
        item = _UnderWay(way, row, piece, num_tokens * self._width * 4, x, own)
        if own is not None:
            self._send_parts(item)
            self.counters.serialise_ns += time.perf_counter_ns() - started
        if way.table.receives:
            is_first = not self._under_way
            self._under_way[row, piece] = item
            self._go_on(item)
            if not is_first:  # Others may wait for this device to add what came meanwhile.
                for _ in range(MAX_TAKEN_EARLY):
                    if not self._take_one():
                        break

    def finish(self, row: int, piece: int) -> Activations | None:
        """The residual stream at the next row, of a piece; None without a share there.

        Raises:
            ProtocolError: a peer sent something else than the plan says.
            WorkerLost: a peer is gone, or said nothing for too long.
        """
        quick = self._quick
        if quick is not None and not piece and quick[0].row == row:
            lane, x, own = quick
            total, records = self._swap.receive(lane, self._step_id, own, self.counters)
            if total is not None:
                self._quick = None
                return self._add(row, x, total)
            self._settle()
            for index, record in records.items():
                self._keep(self.links.read_record(index, record))
        item = self._under_way.get((row, piece))
        if item is None:
            return None
        heard_at = time.monotonic()
        deadline = heard_at + WAIT_SECONDS
        while not item.is_done:
            # Not tried first: what is there already makes the wait a short one.
            missing = self._missing(item)
            started = time.perf_counter_ns()
            is_direct = self.links.comes_directly(missing, item.num_bytes)
            if not self.links.look_for(LOOK_NS if is_direct else 0):
                self._wait(1.0)
                heard_at = time.monotonic()
            waited = time.perf_counter_ns() - started
            self.counters.wait_ns += waited
            self.counters.link(missing).wait_ns += waited
            # A peer that sends without end must not keep this thread from the engine host.
            if self._take_one(waited) and time.monotonic() - heard_at < HEAR_SECONDS:
                continue
            self._wait(0.0)
            heard_at = time.monotonic()
            self.links.check()
            if heard_at > deadline:
                what = self.plan.shape.row_name(row)
                raise self.links.lost(
                    missing, f"it sent nothing for {what} in {WAIT_SECONDS:.0f} s"
                )
        del self._under_way[row, piece]
        return item.result

    def _prepare(self, key: tuple[int, int, str]) -> Way:
        """Work out once how so many tokens are handed over after a row."""
        # Lengths of prompts are many; those of generated steps come again and again.
        if len(self._ways) >= MAX_WAYS:
            self._ways.clear()
            self._lanes.clear()
        row, num_tokens, wire = key
        me, shape = self.device_index, (num_tokens, self._width)
        way = self._ways[key] = way_of(self._table[row], me, num_tokens, self._width, wire)
        is_small = num_tokens * self._width * 4 <= DIRECT_BYTES
        if way.is_swap and is_small and not self._checks_numbers:
            self._lanes[key] = Lane(row, way, wire, self._epoch, me, shape)
        return way

    def _settle(self) -> None:
        """Let a quick hand-over go on as the others do."""
        if self._quick is None:
            return
        lane, x, own = self._quick
        self._quick = None
        num_bytes = lane.shape[0] * self._width * 4
        item = _UnderWay(lane.way, lane.row, 0, num_bytes, x, own)
        self._under_way[lane.row, 0] = item
        self._go_on(item)

    def take_early(self) -> None:
        """While idle: answer pings, and keep what quicker peers sent for the next step.

        Raises: ProtocolError: a peer sent something that no plan asks for.
        """
        for _ in range(MAX_TAKEN_EARLY):  # The engine host is heard in between.
            if not self._take_one():
                return

    def give_up(self, step_id: int) -> None:
        """A step was given up: `begin_step` forgets what it left."""

    def close(self) -> None:
        """Close the sockets to the peers."""
        self.links.close()

    # ---- sending -----------------------------------------------------------------------------

    def _send_parts(self, item: _UnderWay) -> None:
        way, me = item.way, self.device_index
        table = way.table
        assert item.x is not None
        assert item.own is not None
        stream = item.x
        if way.is_alone:
            # The sum is its own part, so one finished tensor is enough.
            stream = self._add(item.row, item.x, from_wire(item.own))
            if table.receives:
                item.finished[me] = stream
        for target, (start, end) in way.targets.items():
            if target == me:
                continue
            lacks_stream = target in table.newcomers and table.contributors[0] == me
            tensors = [] if way.is_alone else [item.own[start:end]]
            if lacks_stream:
                tensors.append(np.ascontiguousarray(stream[start:end]))
            self._send(
                target, item.row, item.piece, "part", not way.is_alone, lacks_stream, tensors
            )

    def _send(
        self,
        target: int,
        row: int,
        piece: int,
        phase: _Phase,
        has_partial: bool,
        has_residual: bool,
        tensors: list[Array],
    ) -> None:
        sent_ns, heard_ns = self.links.stamp(target)
        message = HandOver(
            epoch=self._epoch,
            step_id=self._step_id,
            row=row,
            piece=piece,
            device_index=self.device_index,
            phase=phase,
            has_partial=has_partial,
            has_residual=has_residual,
            sent_ns=sent_ns,
            heard_ns=heard_ns,
        )
        num_bytes = self.links.send(target, message, tensors)
        counters = self.counters
        counters.sent_bytes += num_bytes
        counters.link(target).sent_bytes += num_bytes

    # ---- receiving ---------------------------------------------------------------------------

    def _go_on(self, item: _UnderWay) -> None:
        """Do what can be done for a hand-over with what has come so far."""
        way, me = item.way, self.device_index
        if way.adds and me not in item.finished:
            for other in way.others:
                if not self._has(item, "part", other):
                    return
            mine = item.finished[me] = self._add_parts(item)
            if way.is_scattered:
                for other in way.table.owners:
                    if other != me:
                        self._send(other, item.row, item.piece, "finished", False, True, [mine])
        if not way.is_scattered:
            return
        for owner in way.needed:
            if owner not in item.finished and self._has(item, "finished", owner):
                start, end = way.targets[owner]
                tensors = self._take(item, "finished", owner, False, True, end - start)
                item.finished[owner] = tensors[0]

    def _add_parts(self, item: _UnderWay) -> Activations:
        """The residual stream of the tokens that this device finishes."""
        way, me = item.way, self.device_index
        start, end = way.targets[me]
        x = None if item.x is None else item.x[start:end]
        total: Activations | None = None
        for contributor in way.table.contributors:
            if contributor == me:
                assert item.own is not None
                part = from_wire(item.own[start:end])
            else:
                lacks_stream = x is None and contributor == way.table.contributors[0]
                tensors = self._take(
                    item, "part", contributor, not way.is_alone, lacks_stream, end - start
                )
                if lacks_stream:
                    x = tensors[-1]
                if way.is_alone:
                    return tensors[0]
                part = from_wire(tensors[0])
            total = part if total is None else total + part
        assert total is not None
        assert x is not None
        return self._add(item.row, x, total)

    def _has(self, item: _UnderWay, phase: _Phase, sender: int) -> bool:
        return (self._step_id, item.row, item.piece, phase, sender) in self._early

    def _missing(self, item: _UnderWay) -> int:
        """Whom a hand-over that is not done waits for."""
        if item.way.adds and self.device_index not in item.finished:
            for other in item.way.others:
                if not self._has(item, "part", other):
                    return other
        return next(owner for owner in item.way.needed if owner not in item.finished)

    def _take(
        self,
        item: _UnderWay,
        phase: _Phase,
        sender: int,
        partial: bool,
        residual: bool,
        num_tokens: int,
    ) -> list[Array]:
        """What a peer sent, after checking that it is what the plan says."""
        row = item.row
        message, tensors, num_bytes = self._forget((self._step_id, row, item.piece, phase, sender))
        device = self.plan.devices[sender]
        if (message.has_partial, message.has_residual) != (partial, residual):
            raise ProtocolError(
                f"{device} handed over other tensors for {self.plan.shape.row_name(row)} "
                "than the plan says"
            )
        if len(tensors) != int(partial) + int(residual):
            raise ProtocolError(
                f"{device} handed over {len(tensors)} tensors, announced "
                f"{int(partial) + int(residual)}"
            )
        counters = self.counters
        counters.received_bytes += num_bytes
        counters.link(sender).received_bytes += num_bytes
        shape = (num_tokens, self._width)
        what = f"hand-over of {device}"
        if partial:
            expect_tensor(tensors[0], self._wire, shape, what)
        if residual:
            expect_tensor(tensors[-1], "float32", shape, what)
        if self._checks_numbers:
            for tensor in tensors:
                count = int(np.count_nonzero(~np.isfinite(from_wire(tensor))))
                if count:
                    raise ProtocolError(
                        f"{count:,} non-finite values from {device} for "
                        f"{self.plan.shape.row_name(row)}"
                    )
        return tensors

    def _take_one(self, waited_ns: int = 0) -> bool:
        """Take one hand-over from the inbox; False when it is empty."""
        received = self.links.receive(waited_ns)
        if received is None:
            return False
        self._keep(received)
        return True

    def _keep(self, received: Received[HandOver]) -> None:
        """Keep what came until its hand-over takes it, which may be now.

        Raises: ProtocolError: the plan asks for no such thing, or too much has come.
        """
        message = received.message
        if message.step_id < self._step_id:
            return  # Late, from a step that was aborted.
        is_known = 0 <= message.row < len(self._table) and 0 <= message.piece < MAX_PIECES
        if is_known:
            table = self._table[message.row]
            senders = table.contributors if message.phase == "part" else table.owners
            is_known = table.receives and message.device_index in senders
        if not is_known:
            raise ProtocolError(
                f"hand-over of row {message.row}, piece {message.piece} from device "
                f"{message.device_index}, which owes this device nothing there"
            )
        key = (
            message.step_id,
            message.row,
            message.piece,
            message.phase,
            message.device_index,
        )
        if key in self._early:
            raise ProtocolError(
                f"{self.plan.devices[message.device_index]} handed over "
                f"{self.plan.shape.row_name(message.row)} twice"
            )
        num_bytes = sum([tensor.nbytes for tensor in received.tensors])
        self._early_bytes += num_bytes + HELD_BYTES
        if self._early_bytes > MAX_EARLY_BYTES:
            held, self._early_bytes = self._early_bytes, 0
            self._early.clear()
            raise ProtocolError(
                f"peers handed over {held:,} bytes that nothing has asked for yet, at "
                f"most {MAX_EARLY_BYTES:,} are kept"
            )
        self._early[key] = (message, received.tensors, num_bytes)
        item = self._under_way.get((message.row, message.piece))
        if item is not None and message.step_id == self._step_id:
            self._go_on(item)

    def _forget(self, key: tuple[int, int, int, _Phase, int]) -> tuple[HandOver, list[Array], int]:
        held = self._early.pop(key)
        self._early_bytes -= held[2] + HELD_BYTES
        return held
