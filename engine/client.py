"""What the window and the command line hold: an engine host process and a typed conversation.

In: calls (`engine.host.messages`). Out: events, in order. The client starts the host, and the host
ends with it: closing the client, or losing its process, ends everything the host started.
This module imports no torch and no Qt.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

import zmq

from engine.cluster.messages import Array, Message
from engine.cluster.processes import Child, Greeting
from engine.cluster.security import new_key_pair
from engine.cluster.transport import Channel, connect
from engine.errors import EngineError, WorkerLost, error_by_name
from engine.host import messages as api

logger = logging.getLogger(__name__)

START_SECONDS = 60.0


class Event(NamedTuple):
    """Something the engine host said, with the tensors it brought."""

    message: Message
    tensors: list[Array]


class EngineClient:
    """A running engine host.

    `receive`, `wait_for` and `close` belong to the thread that made the client; `post` and
    `next_request_id` may be called from any thread.
    """

    def __init__(self) -> None:
        """Start the host process.

        Raises: WorkerLost: it did not start; the message says why.
        """
        self._context: zmq.Context[Any] = zmq.Context()
        self._ids = itertools.count(1)
        self._outgoing: deque[Message] = deque()
        self._failed: deque[Message] = deque()
        self._wake_lock = threading.Lock()
        self._is_closed = False
        self._wake_receiver = self._context.socket(zmq.PAIR)
        endpoint = f"inproc://client-{id(self)}"
        self._wake_receiver.bind(endpoint)
        self._wake_sender = self._context.socket(zmq.PAIR)
        self._wake_sender.connect(endpoint)
        keys = new_key_pair()
        self._host_exit = threading.Event()
        self._child = Child(
            "engine.host",
            ["shardmix-host"],
            Greeting(keys.public.decode("ascii"), {}),
            on_exit=self._on_host_exit,
        )
        try:
            address = self._child.address(START_SECONDS)
        except WorkerLost:
            self._child.end(0)
            self._close_sockets()
            raise
        socket = connect(
            self._context,
            zmq.DEALER,
            keys,
            address.public_key.encode("ascii"),
            address.endpoints[0],
            is_watched=False,
        )
        self._channel: Channel[Any] = Channel(socket, api.EVENTS)
        self._poller = zmq.Poller()
        self._poller.register(socket, zmq.POLLIN)
        self._poller.register(self._wake_receiver, zmq.POLLIN)

    @property
    def host_pid(self) -> int:
        """Process id of the engine host."""
        return self._child.pid

    def next_request_id(self) -> int:
        """A number no other call of this client has."""
        return next(self._ids)

    def post(self, call: Message) -> None:
        """Queue a call, which the next `receive` sends; returns at once. Any thread."""
        self._outgoing.append(call)
        self.wake()

    def wake(self) -> None:
        """Make a waiting `receive` return. Any thread."""
        with self._wake_lock:
            if not self._is_closed:
                with contextlib.suppress(zmq.Again):  # Enough unread wakes do as well as one more.
                    self._wake_sender.send(b"", zmq.DONTWAIT)

    def receive(self, timeout_seconds: float | None = None) -> Event | None:
        """The next event; None after `timeout_seconds`, or after `wake`.

        Raises: WorkerLost: the engine host has ended.
        """
        self._send_outgoing()
        if self._failed:
            return Event(self._failed.popleft(), [])
        received = self._channel.receive(0)
        if received is None:
            timeout = None if timeout_seconds is None else max(0, int(timeout_seconds * 1000))
            ready = dict(self._poller.poll(timeout))
            if self._wake_receiver in ready:
                while self._wake_receiver.poll(0):
                    self._wake_receiver.recv()
            self._send_outgoing()
            received = self._channel.receive(0)
        if received is not None:
            return Event(received.message, received.tensors)
        if self._host_exit.is_set():
            raise WorkerLost(f"the engine host ended: {self._child.cause()}")
        return None

    def run(
        self,
        call: Message,
        on_event: Callable[[Event], None] | None = None,
        timeout_seconds: float | None = None,
    ) -> Message:
        """Post a call and wait for its end; for programs without an event loop.

        Args:
            on_event: hears every event on the way, those of other calls too.
        Returns: the `Done` or `Finished` event.
        Raises: EngineError: the call failed, with the class the host named.
        """
        request_id = call.request_id  # type: ignore[attr-defined]
        deadline = None if timeout_seconds is None else time.monotonic() + timeout_seconds
        self.post(call)
        while True:
            event = self.receive(0.5)
            if event is not None:
                message = event.message
                if on_event is not None:
                    on_event(event)
                if isinstance(message, api.CallFailed) and message.request_id == request_id:
                    raise error_by_name(message.error, message.message)
                if (
                    isinstance(message, api.Done | api.Finished)
                    and message.request_id == request_id
                ):
                    return message
            if deadline is not None and time.monotonic() > deadline:
                raise EngineError(f"{type(call).__name__} took longer than {timeout_seconds:.0f} s")

    def close(self) -> None:
        """End the host and everything it started; returns when it is gone."""
        self._child.end(patience_seconds=3.0)
        self._channel.close()
        self._close_sockets()

    def _close_sockets(self) -> None:
        with self._wake_lock:
            self._is_closed = True
            self._wake_sender.close(linger=0)
        self._wake_receiver.close(linger=0)
        self._context.term()

    def _send_outgoing(self) -> None:
        while self._outgoing:
            call = self._outgoing.popleft()
            try:
                self._channel.send(call)
            except EngineError as error:
                self._failed.append(
                    api.CallFailed(
                        request_id=call.request_id,  # type: ignore[attr-defined]
                        error=type(error).__name__,
                        message=str(error),
                    )
                )

    def _on_host_exit(self, _child: Child) -> None:
        self._host_exit.set()
        self.wake()
