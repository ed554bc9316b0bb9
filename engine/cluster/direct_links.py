"""Connections straight between two runners' computing threads, for small hand-overs.

A message through libzmq wakes its thread on both sides, and on two cores that costs more than
everything else about it. So each pair of a plan's devices also opens one stream: the device with
the lower index listens for it and tells the other, over the connection that has proved who both
are, where and with which keys. A stream that cannot be opened (a firewall) is done without.

In: what peers offer. Out: one `SealedStream` per peer, and who of them is gone. What is said
over them is not known here.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import socket
import struct
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import zmq

from engine.cluster import messages as m
from engine.cluster.plaintext import is_plaintext
from engine.cluster.sealed_stream import (
    KEY_BYTES,
    SealedStream,
    StreamEndedError,
    quickest_cipher,
)
from engine.errors import ProtocolError

logger = logging.getLogger(__name__)

DIAL_SECONDS = 2.0
# A stranger who found the port keeps others waiting no longer than this.
GREETING_SECONDS = 0.5
MAX_STRANGERS = 8
_INDEX = struct.Struct("<I")
_GREETING = b"shardmix"


@dataclass(frozen=True, slots=True)
class _Awaited:
    """What the device of one stream will prove that it was told."""

    send_key: bytes
    receive_key: bytes


class DirectLinks:
    """The streams of one device to the others of its plan."""

    def __init__(self, device_index: int, endpoint: str, poller: zmq.Poller) -> None:
        """Open nothing yet.

        Args:
            endpoint: where this device may listen, as `transport.listen` takes it, without a name.
            poller: is told of every stream, so that whoever polls it wakes when one has something.
        """
        self.streams: dict[int, SealedStream] = {}
        self._index = device_index
        self._endpoint = endpoint
        self._poller = poller
        self._listener: socket.socket | None = None
        self._awaited: dict[int, _Awaited] = {}

    def offers(self, epoch: int, peers: Collection[int]) -> dict[int, m.DirectOffer]:
        """What to tell each peer that is to connect here; those before this device offer, too."""
        later = [index for index in peers if index > self._index]
        if later and self._listener is None:
            self._listener = _listen(self._endpoint)
        if self._listener is None:
            return {}
        port = self._listener.getsockname()[1]
        offers: dict[int, m.DirectOffer] = {}
        for index in later:
            awaited = _Awaited(os.urandom(KEY_BYTES), os.urandom(KEY_BYTES))
            self._awaited[index] = awaited
            offers[index] = m.DirectOffer(
                epoch=epoch,
                device_index=self._index,
                port=port,
                cipher=quickest_cipher(),
                key_there=awaited.receive_key,
                key_back=awaited.send_key,
            )
        return offers

    def dial(self, offer: m.DirectOffer, exchange_endpoint: str) -> None:
        """Open the stream that a peer offers, on the computer that it is known to be on.

        Raises: ProtocolError: it is not the peer's turn to offer, or it has offered already.
        """
        index = offer.device_index
        if index >= self._index or index in self.streams:
            raise ProtocolError(f"device {index} offers a stream that this device did not expect")
        host = exchange_endpoint.removeprefix("tcp://").rpartition(":")[0].strip("[]")
        try:
            connected = socket.create_connection((host, offer.port), timeout=DIAL_SECONDS)
            connected.sendall(_INDEX.pack(self._index))
        except OSError as error:
            logger.warning("no direct stream to device %d: %s", index, error.strerror or error)
            return
        keys = (
            (None, None) if is_plaintext(exchange_endpoint) else (offer.key_there, offer.key_back)
        )
        stream = SealedStream(connected, offer.cipher, *keys)
        self._keep(index, stream)
        try:
            stream.send([_GREETING])
        except StreamEndedError:
            self.drop(index)

    def accept(self) -> None:
        """Take the streams that peers have opened; the others are done without."""
        if self._listener is None:
            return
        deadline = time.monotonic() + DIAL_SECONDS
        strangers = 0
        while self._awaited and strangers <= MAX_STRANGERS:
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                break
            self._listener.settimeout(remaining)
            try:
                connected, _ = self._listener.accept()
            except OSError:
                break
            strangers += not self._greet(connected)
        for index in self._awaited:
            logger.warning("no direct stream from device %d: it did not connect", index)
        self._awaited.clear()
        self._listener.close()
        self._listener = None

    def send(self, index: int, parts: Sequence[Any]) -> bool:
        """Whether a peer's stream took a record; see `SealedStream.send`.

        Raises: StreamEndedError.
        """
        stream = self.streams[index]
        is_taken = stream.send(parts)
        if stream.has_unsent:
            self._poller.modify(stream.fileno(), zmq.POLLIN | zmq.POLLOUT)
        return is_taken

    def flush(self) -> None:
        """Go on with what a stream has not sent yet; its end is seen where it is read."""
        for stream in self.streams.values():
            if not stream.has_unsent:
                continue
            with contextlib.suppress(StreamEndedError):
                if not stream.flush():
                    continue
            self._poller.modify(stream.fileno(), zmq.POLLIN)

    def drop(self, index: int) -> None:
        """Do without a stream from now on."""
        stream = self.streams.pop(index, None)
        if stream is not None:
            self._poller.unregister(stream.fileno())
            stream.close()

    def close(self) -> None:
        """Close all streams."""
        for index in list(self.streams):
            self.drop(index)
        if self._listener is not None:
            self._listener.close()
            self._listener = None

    def _keep(self, index: int, stream: SealedStream) -> None:
        self.streams[index] = stream
        self._poller.register(stream.fileno(), zmq.POLLIN)

    def _greet(self, connected: socket.socket) -> bool:
        """Whether somebody proved to be an awaited peer; else the connection is closed."""
        deadline = time.monotonic() + GREETING_SECONDS
        connected.settimeout(GREETING_SECONDS)
        try:
            (index,) = _INDEX.unpack(_exactly(connected, _INDEX.size))
        except (OSError, struct.error):
            connected.close()
            return False
        awaited = self._awaited.get(index)
        if awaited is None:
            connected.close()
            return False
        is_plain = is_plaintext(self._endpoint)
        keys = (None, None) if is_plain else (awaited.send_key, awaited.receive_key)
        stream = SealedStream(connected, quickest_cipher(), *keys)
        if not _greets(stream, lambda: deadline - time.monotonic()):
            stream.close()
            return False
        del self._awaited[index]
        self._keep(index, stream)
        return True


def _greets(stream: SealedStream, remaining: Callable[[], float]) -> bool:
    poller = zmq.Poller()
    poller.register(stream.fileno(), zmq.POLLIN)
    try:
        while not stream.has_record():
            if not poller.poll(max(0, int(remaining() * 1000))):
                return False
        return stream.receive() == _GREETING
    except (StreamEndedError, ProtocolError):
        return False


def _exactly(connected: socket.socket, count: int) -> bytes:
    found = b""
    while len(found) < count and (part := connected.recv(count - len(found))):
        found += part
    return found


def _listen(endpoint: str) -> socket.socket | None:
    """Listen at "tcp://HOST:PORT", where PORT may be "*" or "FIRST-LAST"; None without a port."""
    found = re.fullmatch(r"tcp://(.+):(?:\*|(\d+)(?:-(\d+))?)", endpoint)
    if found is None:
        return None
    host = "" if found[1] == "*" else found[1].strip("[]")
    first = int(found[2] or 0)
    for port in range(first, int(found[3] or first) + 1):
        try:
            return socket.create_server((host, port), reuse_port=False)
        except OSError:
            continue
    logger.warning("no direct streams: no port of %s is free", endpoint)
    return None
