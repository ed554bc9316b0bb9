"""The one thread that talks to the engine host.

In: calls, from any thread. Out: batches of event structs as queued signals, at most one batch a
frame, and never a second one before the window has taken the first: however slow the window or
fast the engine, what waits is one coalesced batch. This module decides nothing about the events.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Protocol

import msgspec
from PySide6.QtCore import QObject, Qt, Signal

from engine.client import EngineClient
from engine.cluster.messages import Message
from engine.errors import EngineError
from engine.host.messages import NodesChanged, Progress, TokensGenerated

logger = logging.getLogger(__name__)

FRAME_SECONDS = 0.025
CLOSE_SECONDS = 8.0


class ClientEvent(Protocol):
    """What a client's `receive` returns."""

    @property
    def message(self) -> Message:
        """The event."""
        ...


class Client(Protocol):
    """The part of `engine.client.EngineClient` that the bridge uses."""

    def post(self, call: Message) -> None:
        """Send a call; any thread."""
        ...

    def wake(self) -> None:
        """Make a waiting `receive` return; any thread."""
        ...

    def receive(self, timeout_seconds: float | None = None) -> ClientEvent | None:
        """The next event, or None."""
        ...

    def close(self) -> None:
        """End the engine host."""
        ...


class EventBuffer:
    """Events that wait for the next frame, with repetition removed.

    New text of one request becomes one `TokensGenerated`; of `NodesChanged` and of each kind of
    `Progress` only the latest stays. Everything else stays, and no event overtakes an earlier one
    of another kind of its own request.
    """

    def __init__(self) -> None:
        """An empty buffer."""
        self._events: list[Message] = []
        # By request: where its mergeable events lie, by what makes two of them the same.
        self._places: dict[int | None, dict[object, int]] = {}

    def __bool__(self) -> bool:
        return bool(self._events)

    def add(self, event: Message) -> None:
        """Take one event."""
        key = _merge_key(event)
        request_id: int | None = getattr(event, "request_id", None)
        places = self._places.setdefault(request_id, {})
        place = places.get(key)
        if key is not None and place is not None:
            self._events[place] = _merged(self._events[place], event)
            return
        if request_id is not None and any(
            type(event) is not type(self._events[place]) for place in places.values()
        ):
            places.clear()
        if key is not None:
            places[key] = len(self._events)
        self._events.append(event)

    def take(self) -> tuple[Message, ...]:
        """All events in order; the buffer is empty afterwards."""
        events = tuple(self._events)
        self._events.clear()
        self._places.clear()
        return events


def _merge_key(event: Message) -> object:
    """What two events of one request must share to become one; None for never."""
    match event:
        case TokensGenerated():
            return TokensGenerated
        case Progress():
            return Progress, event.phase, event.subject
        case NodesChanged():
            return NodesChanged
        case _:
            return None


def _merged(earlier: Message, later: Message) -> Message:
    """Two events with the same key as one."""
    if isinstance(earlier, TokensGenerated) and isinstance(later, TokensGenerated):
        return msgspec.structs.replace(
            later,
            token_ids=earlier.token_ids + later.token_ids,
            text=earlier.text + later.text,
        )
    return later


class Bridge(QObject):
    """Starts the engine host, posts calls, and hands its events to the window's thread."""

    engine_started = Signal()
    events_arrived = Signal(tuple)
    engine_lost = Signal(str)
    _batch_made = Signal(tuple)

    def __init__(
        self,
        make_client: Callable[[], Client] = EngineClient,
        parent: QObject | None = None,
    ) -> None:
        """Nothing is started yet.

        Args:
            make_client: called in the bridge's thread; blocks until the host runs.
        """
        super().__init__(parent)
        self._make_client = make_client
        self._lock = threading.Lock()
        self._client: Client | None = None
        self._early_calls: list[Message] = []
        self._is_closing = False
        self._may_emit = threading.Event()
        self._thread: threading.Thread | None = None
        self._batch_made.connect(self._on_batch_made, Qt.ConnectionType.QueuedConnection)

    def start(self) -> None:
        """Start an engine host; `engine_started` or `engine_lost` follows."""
        assert self._thread is None or not self._thread.is_alive(), "one engine host at a time"
        with self._lock:
            self._is_closing = False
        self._may_emit.set()
        # A daemon: a window that ends in an unforeseen way must not wait for its engine.
        self._thread = threading.Thread(target=self._run, name="engine bridge", daemon=True)
        self._thread.start()

    def post(self, call: Message) -> None:
        """Send a call; before the host runs it waits here. Any thread, returns at once."""
        with self._lock:
            if self._client is None:
                self._early_calls.append(call)
            else:
                self._client.post(call)

    def close(self) -> None:
        """End the engine host and everything it started; returns when it is gone."""
        with self._lock:
            self._is_closing = True
            if self._client is not None:
                self._client.wake()
        if self._thread is not None:
            self._thread.join(CLOSE_SECONDS)
            if self._thread.is_alive():
                logger.warning("the engine host did not end within %.0f s", CLOSE_SECONDS)

    def _on_batch_made(self, events: Sequence[Message]) -> None:
        try:
            if not self._is_closing:
                self.events_arrived.emit(events)
        finally:
            self._may_emit.set()

    def _run(self) -> None:
        try:
            client = self._make_client()
        except EngineError as error:
            self._forget_client()
            self.engine_lost.emit(str(error))
            return
        with self._lock:
            self._client = client
            for call in self._early_calls:
                client.post(call)
            self._early_calls.clear()
        self.engine_started.emit()
        reason: str | None = None
        try:
            self._pump(client)
        except EngineError as error:
            reason = str(error)
        finally:
            self._forget_client()
            client.close()
        if reason is not None:
            self.engine_lost.emit(reason)

    def _forget_client(self) -> None:
        with self._lock:
            self._client = None
            self._early_calls.clear()

    def _pump(self, client: Client) -> None:
        """Receive until closing; a frame's events leave together."""
        buffer = EventBuffer()
        next_frame = 0.0
        try:
            while not self._is_closing:
                # With events at hand: until the frame is due, or the window has taken the last one.
                wait = None if not buffer else max(0.005, next_frame - time.monotonic())
                event = client.receive(wait)
                if event is not None:
                    buffer.add(event.message)
                if buffer and time.monotonic() >= next_frame and self._may_emit.is_set():
                    self._may_emit.clear()
                    self._batch_made.emit(buffer.take())
                    next_frame = time.monotonic() + FRAME_SECONDS
        except EngineError:
            # The last words of a host that ends are worth hearing.
            if buffer and not self._is_closing:
                self._batch_made.emit(buffer.take())
            raise
