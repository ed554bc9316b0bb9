"""A runner's sockets to its peers for one epoch: sending, pinging, measuring, and noticing a loss.

In: the peers of a plan and the runner's inbox. Out: hand-overs as they come, figures of each link,
and `WorkerLost` that names the peer whose connection broke. Small hand-overs go by a stream of
their own where there is one (`direct_links`), so two of one peer may overtake each other. What a
hand-over means is not known here. It belongs to one thread.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import zmq
import zmq.utils.monitor

from engine.cluster import direct_form
from engine.cluster import messages as m
from engine.cluster.direct_links import DirectLinks
from engine.cluster.link_estimate import LinkEstimate
from engine.cluster.sealed_stream import SealedStream, StreamEndedError
from engine.cluster.security import KeyPair
from engine.cluster.transport import Channel, Received, connect_watched
from engine.errors import ProtocolError, WorkerLost

ANSWER_SECONDS = 5.0
NUM_PINGS = 10
# Transfers grow until two took this long, or had this many bytes; one alone may have been unlucky.
TRANSFER_SECONDS = 0.02
LARGEST_TRANSFER = 8 << 20
_FIRST_TRANSFER = 64 << 10
# Tensors of a hand-over that goes by a direct stream; larger ones are sealed and sent by libzmq's
# threads while this one computes.
DIRECT_BYTES = 64 << 10
# A poll that finds something takes less; what took longer came while nobody computed, so that its
# arrival is now and says something about the link.
SHORTEST_WAIT_NS = 50_000
# From the first bytes of a record to its last, on a link that is not much slower than 1 Gbit/s.
REST_NS = 100_000
# Messages in a row that are not hand-overs of this epoch.
MAX_PASSED_OVER = 200
# From the last ping on; without a stream everything goes by libzmq.
OPENING_SECONDS = 2.0
_ENDED = "its connection broke"
_LOSSES = {
    zmq.EVENT_DISCONNECTED: "its connection broke, or it is frozen",
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL: "it does not finish the handshake",
    zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL: "it breaks the rules of the handshake",
    zmq.EVENT_HANDSHAKE_FAILED_AUTH: "it refused this device's key",
}

Wait = Callable[[float], None]
# Windows has no such call; giving up the rest of a time slice is what it has.
_let_others_run: Callable[[], object] = getattr(os, "sched_yield", partial(time.sleep, 0))


class PeerLinks:
    """The links of one device to all others of its plan."""

    def __init__(
        self,
        context: zmq.Context[Any],
        keys: KeyPair,
        inbox: Channel[Any],
        epoch: int,
        device_index: int,
        devices: Sequence[str],
        peers: Sequence[m.Peer],
        poller: zmq.Poller,
        listen_endpoint: str = "",
        *,
        offers_local: bool = True,
    ) -> None:
        """Begin to connect.

        Args:
            inbox: takes EXCHANGE_ACCEPTS; it stays the caller's.
            devices: names of the plan's columns.
            poller: gets what wakes whoever waits for a peer, or for the loss of one, besides the
                inbox.
            listen_endpoint: where this device may listen for direct streams, as `transport.listen`
                takes it; "" offers none.
            offers_local: whether peers on this computer may open them without TCP.
        Raises: ProtocolError: a peer's endpoint or key is none.
        """
        self._inbox = inbox
        self._poller = poller
        self.direct = DirectLinks(device_index, listen_endpoint, poller, offers_local=offers_local)
        self._is_measuring = False
        self._endpoints = {peer.device_index: peer.exchange_endpoint for peer in peers}
        self._epoch = epoch
        self._index = device_index
        self._devices = devices
        self._outboxes: dict[int, Channel[Any]] = {}
        self._monitors: dict[int, zmq.Socket[Any]] = {}
        self._losses: dict[int, str] = {}
        self._estimates: dict[int, LinkEstimate] = {}
        # The last answer to a ping: its bytes, and when it came.
        self._pongs: deque[tuple[m.Pong, int, int]] = deque(maxlen=1)
        # Sent without a copy, so that a thousand unread answers take no memory.
        self._ballast = np.zeros(LARGEST_TRANSFER, np.uint8)
        for peer in peers:
            socket, monitor = connect_watched(
                context,
                zmq.PUSH,
                keys,
                peer.public_key,
                peer.exchange_endpoint,
                sum(_LOSSES),
            )
            self._outboxes[peer.device_index] = Channel(socket, m.HandOver)
            poller.register(monitor, zmq.POLLIN)
            self._monitors[peer.device_index] = monitor
            self._estimates[peer.device_index] = LinkEstimate()

    def note_losses(self) -> None:
        """Something of the poller's woke: go on sending, remember the connections that broke."""
        self.direct.flush()
        for index, monitor in self._monitors.items():
            while monitor.poll(0):
                event = zmq.utils.monitor.recv_monitor_message(monitor)
                self._losses.setdefault(index, _LOSSES[zmq.Event(event["event"])])

    def check(self) -> None:
        """Raise if a connection is known to have broken: what was on its way then is gone.

        Raises: WorkerLost: names the peer.
        """
        for index, reason in self._losses.items():
            raise self.lost(index, reason)

    def lost(self, index: int, reason: str) -> WorkerLost:
        """The error that says that a peer cannot be reached."""
        device = self._devices[index]
        error = WorkerLost(
            f"{self._devices[self._index]} needs {device} and cannot reach it: {reason}. Apply the "
            "plan again, or choose one without it"
        )
        error.device = device
        return error

    def stamp(self, index: int) -> tuple[int, int | None]:
        """This end's clock, and what a hand-over tells a peer of its earlier ones."""
        return time.perf_counter_ns(), self._estimates[index].heard_ns

    def send(self, index: int, message: m.Message, tensors: Sequence[m.Array] = ()) -> int:
        """Queue a message to a peer.

        Returns: bytes of the tensors, and of the header where the message goes by libzmq.
        Raises: WorkerLost: names the peer, which has read nothing for a thousand messages.
        """
        try:
            if index in self.direct.streams and isinstance(message, m.HandOver):
                size = self._send_directly(index, message, tensors)
                if size:
                    return size
            return self._outboxes[index].send(message, tensors)
        except WorkerLost as error:
            # libzmq drops the queue of a connection that was refused, and tells why at the monitor.
            self.note_losses()
            raise self.lost(index, self._losses.get(index, str(error))) from error

    def _send_directly(self, index: int, message: m.HandOver, tensors: Sequence[m.Array]) -> int:
        """Bytes of the tensors, or 0 where the message has to go the other way."""
        num_bytes = sum([tensor.nbytes for tensor in tensors])
        if num_bytes > DIRECT_BYTES:
            return 0
        is_taken = self.send_record(index, direct_form.encode(message, tensors))
        return num_bytes if is_taken else 0

    def _end_stream(self, index: int, error: Exception) -> None:
        self.direct.drop(index)
        self._losses.setdefault(index, str(error) or _ENDED)

    def comes_directly(self, index: int, num_bytes: int) -> bool:
        """Whether a hand-over of so many bytes from a peer is likely to come by a stream."""
        return num_bytes <= DIRECT_BYTES and index in self.direct.streams

    def send_record(self, index: int, parts: Sequence[Any]) -> bool:
        """Send a record of `direct_form` by a peer's stream; False where it has to go another way.

        Args: parts: of DIRECT_BYTES and a head, together.
        """
        stream = self.direct.streams.get(index)
        if stream is None:
            return False
        try:
            is_taken = stream.send(parts)
        except StreamEndedError as error:
            self._end_stream(index, error)
            return False  # libzmq says what became of the peer.
        if stream.has_unsent:
            self.direct.await_room(index)
        return is_taken

    def next_record(
        self, index: int, deadline_ns: int, sleep_milliseconds: int = 0
    ) -> SealedStream | None:
        """A peer's stream with its next record taken, if that comes in time.

        Args:
            deadline_ns: of `time.perf_counter_ns`; until then this thread stays awake.
            sleep_milliseconds: how long it may sleep afterwards, heeding nothing else.
        """
        stream = self.direct.streams.get(index)
        if stream is None:
            return None
        try:
            while not stream.take():
                while True:
                    if time.perf_counter_ns() > deadline_ns:
                        if not sleep_milliseconds or not stream.has_more(sleep_milliseconds):
                            return None
                        # Whoever sends byte by byte gets no more time than this.
                        sleep_milliseconds = 0
                        deadline_ns = time.perf_counter_ns() + REST_NS
                        break
                    if stream.has_more():
                        break
                    # A peer on the same core, or libzmq's threads, may have to run first.
                    _let_others_run()
        except StreamEndedError as error:
            self._end_stream(index, error)
            return None
        return stream

    def read_record(self, index: int, record: bytes) -> Received[m.HandOver]:
        """The hand-over of a peer's record.

        Raises: ProtocolError: it is none, or not that peer's of this epoch.
        """
        try:
            message, tensors = direct_form.decode(record)
        except ProtocolError as error:
            self.direct.drop(index)
            raise ProtocolError(f"{self._devices[index]}: {error}") from error
        if (message.epoch, message.device_index) != (self._epoch, index):
            self.direct.drop(index)
            raise ProtocolError(
                f"{self._devices[index]} handed over as device {message.device_index} of "
                f"epoch {message.epoch}; it is device {index} of epoch {self._epoch}"
            )
        return Received(message, tensors, b"")

    def look_for(self, nanoseconds: int) -> bool:
        """Look at the streams for some time without sleeping; whether one has something.

        Waking a thread takes longer than a small message between neighbours.
        """
        deadline = time.perf_counter_ns() + nanoseconds
        streams = self.direct.streams
        while True:
            for index, stream in streams.items():
                try:
                    if stream.has_record():
                        return True
                except StreamEndedError as error:
                    self._end_stream(index, error)
                    return True  # `receive` finds nothing, and a wait what became of the peer.
            if time.perf_counter_ns() > deadline:
                return False
            _let_others_run()

    def _receive_directly(self) -> Received[m.HandOver] | None:
        for index in list(self.direct.streams):
            stream = self.next_record(index, 0)  # Only what is here.
            if stream is not None:
                return self.read_record(index, bytes(stream.record[: stream.num_bytes]))
        return None

    def note_message(
        self, index: int, num_bytes: int, waited_ns: int, sent_ns: int, heard_ns: int | None
    ) -> None:
        """A hand-over came, after a wait for it.

        Args:
            sent_ns: by the peer's clock.
            heard_ns: what it last heard of this device's hand-overs; see `HandOver`.
        """
        if waited_ns > SHORTEST_WAIT_NS:
            now_ns = time.perf_counter_ns()
            self._estimates[index].take_message(num_bytes, sent_ns, now_ns, heard_ns)

    def _note_received(self, received: Received[m.HandOver], waited_ns: int) -> None:
        message = received.message
        num_bytes = sum([tensor.nbytes for tensor in received.tensors])
        index, sent_ns, heard_ns = message.device_index, message.sent_ns, message.heard_ns
        self.note_message(index, num_bytes, waited_ns, sent_ns, heard_ns)

    def receive(self, waited_ns: int = 0) -> Received[m.HandOver] | None:
        """The next hand-over of this epoch, if one is there; pings on the way are answered.

        A peer that sends without end does not keep this thread: after some messages it returns,
        though more may be there.

        Args:
            waited_ns: how long this thread had waited until now.
        Raises: ProtocolError, PeerRefused: a peer sent something else.
        """
        if self.direct.is_opening:
            self.direct.progress()
        received = self._receive_directly() if self.direct.streams else None
        if received is not None:
            self._note_received(received, waited_ns)
            return received
        for _ in range(MAX_PASSED_OVER):
            received = self._inbox.receive(0)
            if received is None:
                return None
            message = received.message
            if message.epoch != self._epoch:
                continue  # Late, from a plan that is no longer in force.
            index = message.device_index
            if index not in self._outboxes:
                raise ProtocolError(
                    f"{type(message).__name__} from device {index}, which is no peer of this plan"
                )
            if isinstance(message, m.HandOver):
                self._note_received(received, waited_ns)
                return received
            if isinstance(message, m.Ping):
                self._answer(message)
            elif isinstance(message, m.DirectOffer):
                if not self._is_measuring:
                    raise ProtocolError(f"{self._devices[index]} offers a stream out of turn")
                self.direct.dial(message, self._endpoints[index])
            else:
                arrived = sum(tensor.nbytes for tensor in received.tensors)
                self._pongs.append((message, arrived, time.perf_counter_ns()))
        return None

    def measure(self, wait: Wait) -> tuple[m.LinkFigures, ...]:
        """Prove that every peer hears this device and is heard, and measure the links.

        Args:
            wait: returns when the inbox may hold something; takes seconds at most.
        Raises: WorkerLost: names the first peer that did not answer in ANSWER_SECONDS.
        """
        self._is_measuring = True
        for index, offer in self.direct.offers(self._epoch, self._outboxes).items():
            self.send(index, offer)
        # Everyone begins with the device after itself, so that not all ask the same one at once.
        after = sorted(self._outboxes, key=lambda index: (index < self._index, index))
        for index in after:
            estimate = self._estimates[index]
            for number in range(NUM_PINGS):
                estimate.take_ping(self._ping(index, number, 0, wait))
            num_bytes, num_telling = _FIRST_TRANSFER, 0
            while num_telling < 2:
                seconds = self._ping(index, num_bytes, num_bytes, wait)
                travelled = seconds - estimate.round_trip_seconds
                if travelled >= TRANSFER_SECONDS or num_bytes == LARGEST_TRANSFER:
                    # A short one may fit what a cable or switch lets pass at once.
                    estimate.take_transfer(num_bytes, seconds)
                    num_telling += 1
                else:
                    num_bytes = min(4 * num_bytes, LARGEST_TRANSFER)
        # Whoever has answered a ping has heard the offer before it.
        deadline = time.monotonic() + OPENING_SECONDS
        while self.direct.is_opening and time.monotonic() < deadline:
            wait(0.05)
            self._take_no_hand_over()
        self._is_measuring = False
        self.direct.stop_opening()
        return self._figures(self._estimates)

    def fresh_figures(self) -> tuple[m.LinkFigures, ...]:
        """Links whose figures the traffic has changed since this was last called."""
        fresh = {index: e for index, e in self._estimates.items() if e.is_fresh}
        for estimate in fresh.values():
            estimate.is_fresh = False
        return self._figures(fresh)

    def close(self) -> None:
        """Close the sockets to the peers."""
        self.direct.close()
        for index, outbox in self._outboxes.items():
            outbox.socket.disable_monitor()
            self._poller.unregister(self._monitors[index])
            self._monitors[index].close(linger=0)
            outbox.close()

    @staticmethod
    def _figures(estimates: dict[int, LinkEstimate]) -> tuple[m.LinkFigures, ...]:
        return tuple(
            m.LinkFigures(
                device_index=index,
                round_trip_seconds=estimate.round_trip_seconds,
                bytes_per_second=estimate.bytes_per_second,
            )
            for index, estimate in estimates.items()
        )

    def _ping(self, index: int, number: int, reply_bytes: int, wait: Wait) -> float:
        """Seconds until a peer's answer was here."""
        self._pongs.clear()
        ping = m.Ping(
            epoch=self._epoch, device_index=self._index, number=number, reply_bytes=reply_bytes
        )
        started = time.perf_counter_ns()
        deadline = time.monotonic() + ANSWER_SECONDS
        self.send(index, ping)
        while True:
            self._take_no_hand_over()
            while self._pongs:
                pong, arrived, arrived_ns = self._pongs.pop()
                if (pong.device_index, pong.number, arrived) == (index, number, reply_bytes):
                    return (arrived_ns - started) * 1e-9
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                raise self.lost(index, f"no answer in {ANSWER_SECONDS:.0f} s")
            if index in self._losses:
                raise self.lost(index, self._losses[index])
            wait(remaining)

    def _take_no_hand_over(self) -> None:
        """Answer what peers ask before the first step."""
        received = self.receive()
        if received is not None:
            raise ProtocolError(
                f"{self._devices[received.message.device_index]} handed over before the step"
            )

    def _answer(self, ping: m.Ping) -> None:
        if not 0 <= ping.reply_bytes <= LARGEST_TRANSFER:
            raise ProtocolError(
                f"{self._devices[ping.device_index]} asks for an answer of "
                f"{ping.reply_bytes:,} bytes, at most {LARGEST_TRANSFER:,} are sent"
            )
        pong = m.Pong(epoch=self._epoch, device_index=self._index, number=ping.number)
        payload = [self._ballast[: ping.reply_bytes]] if ping.reply_bytes else []
        self.send(ping.device_index, pong, payload)
