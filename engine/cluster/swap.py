"""The most frequent hand-over, in one go: everyone gives everyone a small partial sum.

In: this device's rounded partial sum. Out: the sum of everybody's, in device order, where they are
what comes next on the peers' streams; else what did come, for `exchange` to sort out. A step of one
token has two hand-overs a layer, and each costs both processes this thread's time. So whatever is
the same each time is prepared once, and records are compared with what they must be instead of
being read. It adds nothing to the residual stream.
"""

from __future__ import annotations

import time

import numpy as np

from engine.cluster import direct_form
from engine.cluster.collectives import Way
from engine.cluster.messages import Array
from engine.cluster.peer_links import SHORTEST_WAIT_NS, PeerLinks
from engine.cluster.sealed_stream import SealedStream
from engine.cluster.step_counters import Counters, LinkCounters
from engine.cluster.wire_format import Activations, from_wire

# A core waits awake for a small hand-over for so long, and then asleep: to wake from one socket costs
# less than to wake from all that a runner listens to. The engine host is not heard meanwhile.
LOOK_NS = 50_000
SLEEP_MILLISECONDS = 2


class _Theirs:
    """What comes from one other device.

    Attributes:
        head: how its record begins.
        part: its partial sum, where the stream's last record lies.
    """

    __slots__ = ("head", "index", "part", "stream")

    def __init__(self, index: int, head: bytearray) -> None:
        self.index = index
        self.head = head
        self.stream: SealedStream | None = None
        self.part: Array | None = None


class Lane:
    """What is the same each time that so many tokens are handed over after a row.

    Attributes:
        part_bytes: of a rounded partial sum.
        head: how this device's record begins.
        theirs: for each contributor in device order; None for this device.
    """

    __slots__ = ("head", "part_bytes", "record_bytes", "row", "shape", "theirs", "way", "wire")

    def __init__(
        self, row: int, way: Way, wire: str, epoch: int, me: int, shape: tuple[int, int]
    ) -> None:
        """Args: shape: of a partial sum. way: `is_swap` holds."""
        self.row, self.way, self.wire, self.shape = row, way, wire, shape
        self.part_bytes = direct_form.part_bytes(wire, shape)
        self.record_bytes = direct_form.PART_PLACE + self.part_bytes
        self.head = direct_form.part_head(epoch, row, me, wire, shape)
        self.theirs = [
            None
            if index == me
            else _Theirs(index, direct_form.part_head(epoch, row, index, wire, shape))
            for index in way.table.contributors
        ]


class Swap:
    """One device's side."""

    def __init__(self, links: PeerLinks) -> None:
        """Args: links: to the other devices."""
        self._links = links

    def send(self, lane: Lane, step_id: int, own: Array, counters: Counters) -> list[int]:
        """Send this device's part.

        Args: own: in the wire format, of the lane's shape.
        Returns: peers whose streams do not take it now.
        """
        links, head, num_bytes = self._links, lane.head, lane.part_bytes
        assert own.nbytes == num_bytes
        direct_form.write_step(head, step_id)
        left: list[int] = []
        for target in lane.way.others:
            times = direct_form.times(*links.stamp(target))
            if links.send_record(target, (head, times, own)):
                counters.sent_bytes += num_bytes
                counters.link(target).sent_bytes += num_bytes
            else:
                left.append(target)
        return left

    def receive(
        self, lane: Lane, step_id: int, own: Array, counters: Counters
    ) -> tuple[Activations | None, dict[int, bytes]]:
        """Look for the others' parts for a short time.

        Args: own: what was sent.
        Returns: the sum of all parts, or None where one is not what comes next; and then the
            records that came, by device.
        Raises: ProtocolError: what came is no record of a hand-over.
        """
        links, num_bytes = self._links, lane.part_bytes
        parts: list[Array] = []
        heard: list[LinkCounters] = []
        started = time.perf_counter_ns()
        deadline_ns = started + LOOK_NS
        for theirs in lane.theirs:
            if theirs is None:
                parts.append(own)
                continue
            index = theirs.index
            stream = links.next_record(index, deadline_ns, SLEEP_MILLISECONDS)
            ended = time.perf_counter_ns()
            waited, started = ended - started, ended
            traffic = counters.link(index)
            heard.append(traffic)
            counters.wait_ns += waited
            traffic.wait_ns += waited
            if stream is None:
                return None, self._records(lane, parts)
            if theirs.stream is not stream or theirs.part is None:
                theirs.stream = stream
                theirs.part = direct_form.part_view(stream.record, lane.wire, lane.shape)
            head = theirs.head
            direct_form.write_step(head, step_id)
            parts.append(theirs.part)
            if stream.num_bytes != lane.record_bytes or not stream.record.startswith(head):
                return None, self._records(lane, parts)
            # Checked even where the wait was too short to say something about the link.
            sent_ns, heard_ns = direct_form.read_times(stream.record, direct_form.TIMES_PLACE)
            if waited > SHORTEST_WAIT_NS:
                links.note_message(index, num_bytes, waited, sent_ns, heard_ns)
        for traffic in heard:
            counters.received_bytes += num_bytes
            traffic.received_bytes += num_bytes
        if lane.wire != "float32":
            parts = [from_wire(part) for part in parts]
        total = parts[0] + parts[1]
        for part in parts[2:]:
            np.add(total, part, out=total)
        return total, {}

    @staticmethod
    def _records(lane: Lane, parts: list[Array]) -> dict[int, bytes]:
        """The records of those who have been heard: of as many contributors as there are parts."""
        found: dict[int, bytes] = {}
        for theirs, _ in zip(lane.theirs, parts, strict=False):
            if theirs is not None and theirs.stream is not None:
                found[theirs.index] = bytes(theirs.stream.record[: theirs.stream.num_bytes])
        return found
