"""The most frequent hand-over, in one go: everyone gives everyone a small partial sum.

In: this device's rounded partial sum. Out: everybody's, in device order, where they are what comes
next on the peers' streams; else what did come, for `exchange` to sort out. It compares records with
what they must be instead of reading them, because a step of one token has two hand-overs a layer
and each costs both processes this thread's time. It adds nothing up.
"""

from __future__ import annotations

import time

from engine.cluster import direct_form
from engine.cluster.collectives import Way
from engine.cluster.messages import Array
from engine.cluster.peer_links import PeerLinks
from engine.cluster.step_counters import Counters

# A core waits awake for a small hand-over for so long.
LOOK_NS = 50_000


class Swap:
    """One device's side; `way.is_swap` holds for everything it is asked."""

    def __init__(self, epoch: int, device_index: int, links: PeerLinks) -> None:
        """Args: links: to the other devices."""
        self._epoch = epoch
        self._index = device_index
        self._links = links

    def send(self, step_id: int, row: int, way: Way, own: Array, counters: Counters) -> list[int]:
        """Send this device's part.

        Args: own: [N, width] in the wire format.
        Returns: peers whose streams do not take it now.
        """
        links, left = self._links, list[int]()
        head = self._head(step_id, row, self._index, own)
        for target in way.others:
            if links.send_record(target, (head, direct_form.times(*links.stamp(target)), own)):
                counters.sent_bytes += own.nbytes
                counters.link(target).sent_bytes += own.nbytes
            else:
                left.append(target)
        return left

    def receive(
        self, step_id: int, row: int, way: Way, own: Array, counters: Counters
    ) -> tuple[list[Array] | None, dict[int, bytes]]:
        """Look for the others' parts for a short time.

        Returns: all parts in device order, or None where one is not what comes next; and the
            records that came, by device.
        Raises: ProtocolError: what came is no record of a hand-over.
        """
        links, records = self._links, dict[int, bytes]()
        parts: list[Array] = []
        deadline_ns = time.perf_counter_ns() + LOOK_NS
        for index in way.table.contributors:
            if index == self._index:
                parts.append(own)
                continue
            started = time.perf_counter_ns()
            record = links.next_record(index, deadline_ns)
            waited = time.perf_counter_ns() - started
            traffic = counters.link(index)
            counters.wait_ns += waited
            traffic.wait_ns += waited
            if record is None:
                return None, records
            records[index] = record
            head = self._head(step_id, row, index, own)
            part = direct_form.part_of(record, head, own.dtype, own.shape)
            if part is None:
                return None, records
            parts.append(part)
            links.note_message(
                index, own.nbytes, waited, *direct_form.read_times(record, len(head))
            )
        for index in records:
            counters.received_bytes += own.nbytes
            counters.link(index).received_bytes += own.nbytes
        return parts, records

    def _head(self, step_id: int, row: int, device_index: int, own: Array) -> bytes:
        return direct_form.part_head(self._epoch, step_id, row, device_index, own.dtype, own.shape)
