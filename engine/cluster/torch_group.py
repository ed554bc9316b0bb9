"""A group of torch.distributed: tensors from point to point between the devices of one plan.

In: tensors to send and buffers to fill, in the order of the plan's hand-overs, which is the same
on every device. Out: filled buffers, or an error that names the peer. It knows no plan.

Whatever waits does so in a thread of the group, because torch.distributed waits without listening
to anybody, and its messages do not tell when they are complete (Gloo's `is_completed` stays False
until someone waits). The owner waits for an event instead, and hears its engine host meanwhile.
Gloo moves tensors in main memory, NCCL those of GPUs.

Nothing here is encrypted or authenticated: whoever reaches the ports can read and write. Besides
the rendezvous port, which is in the worker's range, Gloo and NCCL take any free port.
"""

from __future__ import annotations

import collections
import contextlib
import datetime
import logging
import os
import queue
import socket
import threading
import time
from collections.abc import Sequence
from typing import NamedTuple

import psutil
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import TCPStore
from torch.distributed.distributed_c10d import PrefixStore, Store

from engine.cluster.transport import address_that_reaches
from engine.errors import EngineError, ProtocolError

logger = logging.getLogger(__name__)

CONNECT_SECONDS = 5.0
# Nobody waits this long: the owner gives up before, and ends the group.
OPERATION_SECONDS = 600.0
# Until a group whose connections were closed has ended its thread.
CLOSE_SECONDS = 5.0
# Transfers whose sends are not complete: so far may a device be ahead of its slowest receiver.
MAX_SENDING = 32
_POLL_SECONDS = 0.005
# Tags of transfers lie below.
MAX_TAG = (1 << 31) - 2
_INTERRUPT_TAG = MAX_TAG + 1
_INTERRUPT_SECONDS = 0.001


class GroupError(Exception):
    """torch.distributed could not do it; `peer` is the rank it was about, where that is known."""

    def __init__(self, reason: str, peer: int | None) -> None:
        super().__init__(reason)
        self.peer = peer


class Rendezvous:
    """Where the devices of a plan meet: a listening socket, later a TCPStore on it.

    The first device of the plan has it. It listens from the runner's start on, so that its port is
    known, and ours, before anybody is told about it.
    """

    def __init__(self, endpoint: str) -> None:
        """Listen.

        Args: endpoint: "tcp://ADDRESS:PORT", where PORT may be "*" or "FIRST-LAST".
        Raises: ProtocolError: there is no free port.
        """
        host, _, ports = endpoint.removeprefix("tcp://").rpartition(":")
        host = host.strip("[]")
        first, _, last = ports.replace("*", "0").partition("-")
        self._socket = _listen(host, range(int(first), int(last or first) + 1))
        self.endpoint = f"{host}:{self._socket.getsockname()[1]}"
        self._store: TCPStore | None = None

    def store(self) -> TCPStore:
        """The store, served by this process from now on."""
        if self._store is None:
            host, port = _split(self.endpoint)
            self._store = TCPStore(
                host,
                port,
                is_master=True,
                timeout=datetime.timedelta(seconds=CONNECT_SECONDS),
                wait_for_workers=False,
                master_listen_fd=self._socket.detach(),
            )
        return self._store

    def close(self) -> None:
        """Stop listening."""
        self._store = None
        self._socket.close()


class _Moving(NamedTuple):
    """A message that may not be complete; its tensor must live until then."""

    peer: int | None
    tensor: torch.Tensor
    work: dist.Work


class Transfer:
    """Tensors on their way, or, without any, the connecting of the group.

    Attributes:
        done: set when the receive buffers are full, or `error` tells why they never will be.
        waiting_for: the rank whose tensor is awaited.
    """

    def __init__(self) -> None:
        self.done = threading.Event()
        self.error: GroupError | None = None
        self.waiting_for: int | None = None
        self.receiving: list[_Moving] = []
        self.sending: list[_Moving] = []

    def fail(self, error: GroupError) -> None:
        """End without success."""
        self.error = error
        self.done.set()


class TorchGroup:
    """This process's membership in a group; torch.distributed has one default group at a time."""

    def __init__(
        self,
        name: str,
        rank: int,
        size: int,
        meeting_point: str,
        rendezvous: Rendezvous | None,
        memory: torch.device,
    ) -> None:
        """Begin to connect; the first transfer is done no earlier than that.

        Args:
            name: the same on all members, and never used before at this meeting point.
            meeting_point: "ADDRESS:PORT" of rank 0's rendezvous.
            rendezvous: on rank 0.
            memory: where the tensors are that NCCL moves; the CPU is for Gloo.
        """
        self._name, self._rank, self._size = name, rank, size
        self._meeting_point, self._rendezvous = meeting_point, rendezvous
        self._memory = memory
        self._under_way: queue.SimpleQueue[Transfer | None] = queue.SimpleQueue()
        self._sending: collections.deque[_Moving] = collections.deque()
        self._error: GroupError | None = None
        self._should_end = threading.Event()
        self.connecting = Transfer()
        self._thread = threading.Thread(target=self._serve, name=f"torch group {name}", daemon=True)
        self._thread.start()

    def start(
        self,
        sends: Sequence[tuple[int, torch.Tensor]],
        receives: Sequence[tuple[int, torch.Tensor]],
        tag: int,
    ) -> Transfer:
        """Begin to move tensors; `connecting` must be done.

        Args:
            sends: receiving rank and contiguous tensor, not to be changed afterwards.
            receives: sending rank and the contiguous buffer it fills.
            tag: what tells this hand-over from others under way, 0 to MAX_TAG.
        """
        transfer = Transfer()
        if self._error is not None:
            transfer.fail(self._error)
            return transfer
        operations = [dist.P2POp(dist.irecv, t, peer, tag=tag) for peer, t in receives]
        operations += [dist.P2POp(dist.isend, t, peer, tag=tag) for peer, t in sends]
        try:
            works = dist.batch_isend_irecv(operations)
        except (RuntimeError, ValueError) as error:  # A connection, or the group, was closed.
            transfer.fail(GroupError(_one_line(error), None))
            return transfer
        if len(works) == len(operations):
            moving = [
                _Moving(peer, tensor, work)
                for (peer, tensor), work in zip([*receives, *sends], works, strict=True)
            ]
            transfer.receiving, transfer.sending = moving[: len(receives)], moving[len(receives) :]
        else:  # NCCL completes a batch as one.
            transfer.receiving = [_Moving(None, op.tensor, works[0]) for op in operations]
        self._under_way.put(transfer)
        return transfer

    def close(self) -> None:
        """Leave, whatever is under way.

        Raises: SystemExit: torch.distributed does not come back; only the process's end helps.
        """
        self._should_end.set()
        self._under_way.put(None)
        if self.connecting.done.is_set():
            self._interrupt()
        self._thread.join(CLOSE_SECONDS)
        if self._thread.is_alive():
            raise SystemExit(
                f"torch.distributed did not leave group {self._name} within {CLOSE_SECONDS:.0f} s; "
                "this runner ends instead"
            )

    # ---- the group's thread ------------------------------------------------------------------

    def _serve(self) -> None:
        transfer: Transfer | None = self.connecting
        try:
            self._connect()
            transfer.done.set()
            while (transfer := self._under_way.get()) is not None:
                self._complete(transfer)
        except GroupError as error:
            # Not the one that was raised: its traceback would keep the group, and its connections,
            # until the next collection of garbage.
            self._error = GroupError(str(error), error.peer)
        except (EngineError, OSError, RuntimeError) as error:
            self._error = GroupError(_one_line(error), None)
        if self._error is not None:
            logger.info("group %s: %s", self._name, self._error)
            # Whoever waits, or will until the group is closed, hears why.
            while transfer is not None:
                transfer.fail(self._error)
                transfer = self._under_way.get()
        self._interrupt()
        self._sending.clear()
        if dist.is_initialized():
            dist.destroy_process_group()

    def _connect(self) -> None:
        host, port = _split(self._meeting_point)
        timeout = datetime.timedelta(seconds=CONNECT_SECONDS)
        deadline = time.monotonic() + CONNECT_SECONDS
        if self._rendezvous is not None:
            base: Store = self._rendezvous.store()
        else:
            base = TCPStore(host, port, is_master=False, timeout=timeout, wait_for_workers=False)
        store = PrefixStore(self._name, base)
        # Connecting cannot be interrupted; once everyone is here it takes milliseconds.
        store.set(f"here/{self._rank}", "")
        for rank in range(self._size):
            while not store.check([f"here/{rank}"]):
                if self._should_end.wait(_POLL_SECONDS):
                    raise GroupError("the group was closed", None)
                if time.monotonic() > deadline:
                    raise GroupError(f"it did not come within {CONNECT_SECONDS:.0f} s", rank)
        address = host if self._rank == 0 else address_that_reaches(host)
        interface = interface_of(address)
        os.environ["GLOO_SOCKET_IFNAME"] = os.environ["NCCL_SOCKET_IFNAME"] = interface
        is_gpu = self._memory.type == "cuda"
        dist.init_process_group(
            "nccl" if is_gpu else "gloo",
            store=store,
            rank=self._rank,
            world_size=self._size,
            timeout=datetime.timedelta(seconds=OPERATION_SECONDS),
            device_id=self._memory if is_gpu else None,
        )

    def _complete(self, transfer: Transfer) -> None:
        for moving in transfer.receiving:
            transfer.waiting_for = moving.peer
            _wait(moving)
        if self._memory.type == "cuda":
            # Waiting only put the transfer in the stream's order.
            torch.cuda.current_stream(self._memory).synchronize()
        transfer.done.set()
        self._sending += transfer.sending
        while len(self._sending) > MAX_SENDING:
            _wait(self._sending.popleft())

    def _interrupt(self) -> None:
        """Make whoever waits in this group stop, here and on the peers."""
        if self._memory.type == "cuda":
            group = dist.group.WORLD
            if group is not None:
                group.abort()
            return
        # Gloo knows no abort, but a message that comes too late closes its connections.
        for peer in range(self._size):
            if peer == self._rank or not dist.is_initialized():
                continue
            with contextlib.suppress(RuntimeError, ValueError):  # They are closed already.
                work = dist.irecv(torch.empty(1), peer, tag=_INTERRUPT_TAG)
                if work is not None:
                    work.wait(datetime.timedelta(seconds=_INTERRUPT_SECONDS))


def interface_of(address: str) -> str:
    """The network interface that has an address of this computer.

    Raises: EngineError: none has.
    """
    for name, entries in psutil.net_if_addrs().items():
        if any(entry.address.partition("%")[0] == address for entry in entries):
            return name
    raise EngineError(
        f"transport torch should listen on {address}, but no network interface of this computer "
        "has that address. Start its worker on an address that it has, or use transport zmq"
    )


def _wait(moving: _Moving) -> None:
    try:
        moving.work.wait()
    except RuntimeError as error:
        raise GroupError(_one_line(error), moving.peer) from error


def _one_line(error: Exception) -> str:
    """An error of torch's without the place in its sources, its advice and its line breaks."""
    text = " ".join(str(error).split())
    if "Connection closed by peer" in text or "Connection reset" in text:
        return "it closed the connection"
    return text.rpartition(".cc:")[2].partition("] ")[2][:200] or text[:200]


def _split(meeting_point: str) -> tuple[str, int]:
    host, _, port = meeting_point.rpartition(":")
    if not host or not port.isdecimal():
        raise ProtocolError(f"the rendezvous {meeting_point!r} is not an ADDRESS:PORT")
    return host, int(port)


def _listen(host: str, ports: range) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    reason = "no port in the range"
    for port in ports:
        try:
            return socket.create_server((host, port), family=family, backlog=64)
        except OSError as error:
            reason = error.strerror or str(error)
    raise ProtocolError(
        f"cannot listen on {host} for transport torch: {reason}. Choose another range of ports"
    )
