"""The engine host's sockets to the runners of a plan, and how it learns that one is lost.

In: runners' addresses. Out: their messages, or a WorkerLost that names the device, its layers and
the cause: as its worker tells it, or from the connection alone. What messages mean is the
coordinator's business. Belongs to one thread, but for `report_lost` and `wake`.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import zmq
import zmq.utils.monitor

from engine.cluster import messages as m
from engine.cluster.security import KeyPair
from engine.cluster.transport import Channel, Received, connect_watched
from engine.errors import PeerRefused, ProtocolError, WorkerLost

# A runner that listens is connected to at once; one behind a cut cable never.
CONNECT_SECONDS = 10.0
# From a closed connection to the worker's word on why: a dying process takes its time.
CAUSE_SECONDS = 1.0
# From a runner's word that it lost a peer to our own knowledge that this one is gone.
BLAME_SECONDS = 2.0
# Messages that a runner has not read: it asks for some 50 at a time. Each may be a slice of weights.
MAX_QUEUED = 128


class RunnerAddress(msgspec.Struct, frozen=True):
    """Where a runner listens, its key, and the key pair it expects the engine host to have.

    Attributes:
        rendezvous: of a runner for transport "torch".
    """

    device: str
    control_endpoint: str
    exchange_endpoint: str
    public_key: bytes
    host_keys: KeyPair
    rendezvous: str = ""


class _Link:
    """The sockets to one runner."""

    def __init__(self, context: zmq.Context[Any], address: RunnerAddress) -> None:
        self.address = address
        socket, self.monitor = connect_watched(
            context,
            zmq.DEALER,
            address.host_keys,
            address.public_key,
            address.control_endpoint,
            zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED,
            max_queued=MAX_QUEUED,
        )
        self.channel: Channel[Any] = Channel(socket, m.RUNNER_SENDS)
        self._connect_by: float | None = time.monotonic() + CONNECT_SECONDS

    def is_disconnected(self) -> bool:
        """Read the monitor's events; True when the connection was lost."""
        is_lost = False
        while self.monitor.poll(0):
            event = zmq.utils.monitor.recv_monitor_message(self.monitor)
            # One that came back at once has lost what was on its way.
            is_lost |= event["event"] == zmq.EVENT_DISCONNECTED
            self._connect_by = None
        return is_lost

    def is_overdue(self) -> bool:
        """Whether a first connection should have come about by now."""
        return self._connect_by is not None and time.monotonic() > self._connect_by

    def close(self) -> None:
        self.channel.socket.disable_monitor()
        self.monitor.close(linger=0)
        self.channel.close()


class RunnerLinks:
    """See the module."""

    def __init__(self, context: zmq.Context[Any], describe: Callable[[str], str]) -> None:
        """Know no runner yet.

        Args:
            describe: what a device computes, for messages.
        """
        self._context = context
        self._describe = describe
        self._links: dict[str, _Link] = {}
        self._lost: deque[tuple[bytes, str]] = deque()
        # Keys are new with each start of a runner, so a dead one stays dead.
        self._causes: dict[bytes, str] = {}
        self._wake_receiver = context.socket(zmq.PULL)
        endpoint = f"inproc://runner-links-{id(self)}"
        self._wake_receiver.bind(endpoint)
        self._wake_sender = context.socket(zmq.PUSH)
        self._wake_sender.connect(endpoint)
        self._poller = zmq.Poller()
        self._poller.register(self._wake_receiver, zmq.POLLIN)

    def report_lost(self, public_key: bytes, cause: str) -> None:
        """A worker says that the runner with a key ended. Any one thread besides the owner."""
        self._lost.append((public_key, cause))
        self.wake()

    def wake(self) -> None:
        """Make a waiting `receive` return. The same thread as `report_lost`."""
        with contextlib.suppress(zmq.Again):  # Enough unread wakes do as well as one more.
            self._wake_sender.send(b"", zmq.DONTWAIT)

    def connect(self, runners: Sequence[RunnerAddress]) -> None:
        """Have a connection to each of these runners and to no others."""
        wanted = {runner.device: runner for runner in runners}
        for device, link in list(self._links.items()):
            if wanted.get(device) != link.address:
                self._drop(device)
        for device, address in wanted.items():
            if device not in self._links:
                link = _Link(self._context, address)
                self._links[device] = link
                self._poller.register(link.channel.socket, zmq.POLLIN)
                self._poller.register(link.monitor, zmq.POLLIN)

    def send(self, device: str, message: m.Message, tensors: Sequence[m.Array] = ()) -> None:
        """Send to a runner.

        Raises:
            WorkerLost: it takes nothing, or was lost before.
            PromptError: the message is too large.
        """
        link = self._links.get(device)
        if link is None:
            raise self.lost(device, "its connection was closed")
        try:
            link.channel.send(message, tensors)
        except WorkerLost as error:
            raise self.lost(device, str(error)) from error

    def tell_all(self, message: m.Message) -> None:
        """Send to every runner that takes it."""
        for link in self._links.values():
            with contextlib.suppress(WorkerLost):  # It may be the one that is gone.
                link.channel.send(message)

    def receive(self, timeout_seconds: float) -> list[tuple[str, Received[Any]]]:
        """Messages that are there, after waiting for the first.

        Raises:
            WorkerLost: a runner ended, or its connection broke.
            ProtocolError: a runner sent something that is no message.
        """
        ready = dict(self._poller.poll(int(timeout_seconds * 1000)))
        if self._wake_receiver in ready:
            while self._wake_receiver.poll(0):
                self._wake_receiver.recv()
        self._take_causes()
        for device, link in self._links.items():
            if link.address.public_key in self._causes:
                raise self.lost(device, self._causes[link.address.public_key])
        messages: list[tuple[str, Received[Any]]] = []
        for device, link in self._links.items():
            if link.channel.socket in ready:
                try:
                    received = link.channel.receive(0)
                except (ProtocolError, PeerRefused) as error:
                    raise type(error)(f"{device}: {error}") from error
                if received is not None:
                    messages.append((device, received))
            if link.monitor in ready and link.is_disconnected():
                # The worker knows the cause, a moment later.
                raise self.lost(device, self._wait_for_cause(device))
            if link.is_overdue():
                raise self.lost(
                    device, f"it could not be connected to within {CONNECT_SECONDS:.0f} s"
                )
        return messages

    def blame(self, reporter: str, peer: str, reason: str) -> WorkerLost:
        """Who is lost when a runner lost its peer: that one, itself, or only the way between them.

        Waits a moment for our own word on one of the two.
        """
        deadline = time.monotonic() + BLAME_SECONDS
        while time.monotonic() < deadline:
            try:
                self.receive(0.05)
            except WorkerLost as error:
                return error
        error = WorkerLost(f"{reporter} and {peer} cannot reach each other: {reason}")
        error.link = (reporter, peer)
        return error

    def lost(self, device: str, cause: str) -> WorkerLost:
        """The error that says a device is lost; its connection is closed."""
        link = self._links.get(device)
        self._drop(device)
        error = WorkerLost(f"{device}, which computes {self._describe(device)}, was lost: {cause}")
        error.device = device
        if link is not None:
            error.public_key = link.address.public_key
        return error

    def close(self) -> None:
        """Close all sockets."""
        for device in list(self._links):
            self._drop(device)
        self._wake_sender.close(linger=0)
        self._wake_receiver.close(linger=0)

    def _drop(self, device: str) -> None:
        link = self._links.pop(device, None)
        if link is not None:
            self._poller.unregister(link.channel.socket)
            self._poller.unregister(link.monitor)
            link.close()

    def _take_causes(self) -> None:
        while self._lost:
            public_key, cause = self._lost.popleft()
            self._causes[public_key] = cause

    def _wait_for_cause(self, device: str) -> str:
        public_key = self._links[device].address.public_key
        deadline = time.monotonic() + CAUSE_SECONDS
        while time.monotonic() < deadline:
            self._take_causes()
            if public_key in self._causes:
                return self._causes[public_key]
            self._wake_receiver.poll(50)
        return "it no longer answers (frozen, or its connection is cut)"
