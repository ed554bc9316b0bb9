"""Devices of a plan that only exchange: real sockets with CURVE, no model, one thread each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Self, TypeVar

import numpy as np
import zmq
from numpy.typing import NDArray

from engine.cluster import messages as m
from engine.cluster.exchange import Exchange
from engine.cluster.peer_links import PeerLinks
from engine.cluster.security import Gatekeeper, new_key_pair
from engine.cluster.transport import Channel, listen
from engine.plan.plan import Plan, PlanShape

T = TypeVar("T")
Add = Callable[[int, m.Array, m.Array], m.Array]
WIDTH = 96
EPOCH = 3


def plan_of_groups(
    groups: Sequence[Sequence[int]], num_devices: int, wire: str = "float32", **changes: Any
) -> Plan:
    """A plan whose rows have these groups, whatever they compute.

    Args:
        groups: of an odd number of rows, at least three.
    """
    shape = PlanShape(
        num_layers=len(groups) // 2,
        num_heads=num_devices,
        num_kv_heads=1,
        mlp_width=32 * num_devices,
        vocab_size=256 * num_devices,
    )
    rows: list[tuple[int, ...]] = []
    for group in groups:
        cells = [int(index in group) for index in range(num_devices)]
        cells[group[0]] += num_devices - len(group)
        rows.append(tuple(cells))
    devices = tuple(f"node-{index}/cpu" for index in range(num_devices))
    return Plan(shape, devices, tuple(rows), wire, **changes).validate()  # type: ignore[arg-type]


class Member:
    """One device; whoever makes it also closes it."""

    def __init__(self, plan: Plan, index: int, width: int = WIDTH, add: Add | None = None) -> None:
        """Listen."""
        self.plan, self.index = plan, index
        self._width, self._add = width, add or add_doubled
        self.context: zmq.Context[Any] = zmq.Context()
        self._gatekeeper = Gatekeeper(self.context)
        self._keys = new_key_pair()
        socket, endpoint = listen(
            self.context, zmq.PULL, self._keys, "exchange", "tcp://127.0.0.1:*"
        )
        self.inbox: Channel[Any] = Channel(socket, m.EXCHANGE_ACCEPTS)
        self.peer = m.Peer(
            device_index=index, exchange_endpoint=endpoint, public_key=self._keys.public
        )
        self.poller = zmq.Poller()
        self.poller.register(socket, zmq.POLLIN)
        self.links: PeerLinks | None = None
        self.offers_local = True

    def allow(self, peers: Sequence[m.Peer]) -> None:
        """Let the others in."""
        self._gatekeeper.allow("exchange", *(peer.public_key for peer in peers))

    def connect(self, peers: Sequence[m.Peer]) -> None:
        """Begin to connect to the others."""
        others = [peer for peer in peers if peer.device_index != self.index]
        self.links = PeerLinks(
            self.context,
            self._keys,
            self.inbox,
            EPOCH,
            self.index,
            self.plan.devices,
            others,
            self.poller,
            "tcp://127.0.0.1:*",
            offers_local=self.offers_local,
        )
        self.exchange = Exchange(
            EPOCH, self.plan, self.index, self._width, self.links, self.wait, self._add
        )

    def wait(self, seconds: float) -> None:
        """As a runner waits."""
        ready = dict(self.poller.poll(int(seconds * 1000)))
        if self.links is not None and ready.keys() - {self.inbox.socket}:
            self.links.note_losses()
            self.links.check()

    def close(self) -> None:
        """Close everything."""
        if self.links is not None:
            self.links.close()
        self.inbox.close()
        self._gatekeeper.close()
        self.context.term()


def add_doubled(row: int, x: NDArray[Any], total: NDArray[Any]) -> NDArray[Any]:
    """Stands for a norm of the sum: not linear, and another one for every row."""
    return x + total * np.abs(total) * np.float32(row + 1.5)


class Members:
    """All devices of a plan, each in a thread."""

    def __init__(
        self,
        plan: Plan,
        width: int = WIDTH,
        add_of: Callable[[int, int, m.Array, m.Array], m.Array] | None = None,
        *,
        offers_local: bool = True,
    ) -> None:
        """Connect everyone with everyone.

        Args:
            add_of: by device, row, stream and sum; `add_doubled` for all if None.
            offers_local: as `PeerLinks` takes it.
        """
        adds = [None if add_of is None else partial(add_of, n) for n in range(len(plan.devices))]
        self.members = [Member(plan, n, width, add) for n, add in enumerate(adds)]
        self._threads = ThreadPoolExecutor(len(self.members))
        peers = [member.peer for member in self.members]
        for member in self.members:
            member.allow(peers)
        for member in self.members:
            member.offers_local = offers_local
            member.connect(peers)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End threads and sockets."""
        self._threads.shutdown()
        for member in self.members:
            member.close()

    def all_do(self, work: Callable[[Member], T]) -> list[T]:
        """Each does it in its thread; results in device order."""
        futures = [self._threads.submit(work, member) for member in self.members]
        return [future.result(timeout=60) for future in futures]
