"""Connections straight between two runners' computing threads, for small hand-overs.

A message through libzmq wakes its thread on both sides, and on two cores that costs more than
everything else about it. So each pair of a plan's devices also opens one stream: the device with
the lower index listens for it and tells the other, over the connection that has proved who both
are, where and with which keys. Both greet, so that either knows that the other has it. A stream
that does not come about (a firewall) is done without. Two runners of one Linux computer meet at a
local socket, which costs half of what TCP does; that they are on one is known from their meeting.

In: what peers offer. Out: one `SealedStream` per peer. Nothing here waits. What is said over the
streams is not known here.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
import select
import socket
import struct
import sys
from collections.abc import Collection, Sequence
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

# Connections whose other end has not said which peer it is; a new one drives the oldest out.
MAX_STRANGERS = 16
_INDEX = struct.Struct("<I")
_GREETING = b"shardmix"
_LOCAL_NAME_BYTES = 16
_PROGRESS = {0, errno.EINPROGRESS, errno.EWOULDBLOCK}


@dataclass(slots=True)
class _Opening:
    """A connection that may become a stream.

    Attributes:
        offer: what a dialled one answers; None for one that came in.
        stream: once it is connected, or has said which peer it is.
    """

    socket: socket.socket
    index: int = -1
    offer: m.DirectOffer | None = None
    stream: SealedStream | None = None


class DirectLinks:
    """The streams of one device to the others of its plan.

    Attributes:
        streams: by peer; both ends have greeted.
    """

    def __init__(
        self, device_index: int, endpoint: str, poller: zmq.Poller, *, offers_local: bool = True
    ) -> None:
        """Open nothing yet.

        Args:
            endpoint: where this device may listen, as `transport.listen` takes it, without a name.
            poller: is told of every socket, so that whoever polls it wakes when one has something.
            offers_local: whether peers may meet this device at a local socket, if they can.
        """
        self.streams: dict[int, SealedStream] = {}
        self._index = device_index
        self._endpoint = endpoint
        self._poller = poller
        self._offers_local = offers_local
        self._listeners: list[socket.socket] = []
        self._awaited: dict[int, m.DirectOffer] = {}
        self._offered: set[int] = set()
        self._opening: list[_Opening] = []

    @property
    def is_opening(self) -> bool:
        """Whether a stream may still come about: `progress` is to be called."""
        return bool(self._awaited) or any(one.offer is not None for one in self._opening)

    def offers(self, epoch: int, peers: Collection[int]) -> dict[int, m.DirectOffer]:
        """What to tell each peer that is to connect here; those before this device offer, too."""
        later = [index for index in peers if index > self._index]
        listener = _listen(self._endpoint) if later else None
        if listener is None:
            return {}
        self._listeners.append(listener)
        port, local_name = listener.getsockname()[1], ""
        if self._offers_local and _HAS_LOCAL_NAMES:
            local_name = os.urandom(_LOCAL_NAME_BYTES).hex()
            self._listeners.append(_listen_locally(local_name))
        for one in self._listeners:
            one.setblocking(False)
            self._poller.register(one.fileno(), zmq.POLLIN)
        for index in later:
            self._awaited[index] = m.DirectOffer(
                epoch=epoch,
                device_index=self._index,
                port=port,
                local_name=local_name,
                cipher=quickest_cipher(),
                key_there=os.urandom(KEY_BYTES),
                key_back=os.urandom(KEY_BYTES),
            )
        return dict(self._awaited)

    def dial(self, offer: m.DirectOffer, exchange_endpoint: str) -> None:
        """Begin to open the stream that a peer offers, on the computer that it is known to be on.

        Only the first offer counts: who makes another cannot take a stream away.

        Raises: ProtocolError: it is not the peer's turn to offer.
        """
        index = offer.device_index
        if index >= self._index:
            raise ProtocolError(f"device {index} offers a stream that this device is to offer")
        if index in self._offered:
            return
        self._offered.add(index)
        connecting = _connect_locally(offer.local_name) if offer.local_name else None
        if connecting is None:
            connecting = self._connect_far(offer, exchange_endpoint)
        if connecting is not None:
            self._opening.append(_Opening(connecting, index, offer))
            self._poller.register(connecting.fileno(), zmq.POLLIN | zmq.POLLOUT)

    def progress(self) -> None:
        """Do what can be done for streams that are not open yet."""
        for listener in self._listeners:
            self._accept(listener)
        for one in list(self._opening):
            try:
                if one.offer is not None:
                    self._go_on_dialling(one, one.offer)
                else:
                    self._go_on_greeting(one)
            except (OSError, StreamEndedError, ProtocolError) as error:
                self._give_up(one, str(error))

    def stop_opening(self) -> None:
        """Do without the streams that have not come about."""
        for index in self._awaited:
            logger.warning("no direct stream from device %d: it did not connect", index)
        self._awaited.clear()
        for one in list(self._opening):
            self._give_up(one, "it did not come about in time")
        for listener in self._listeners:
            self._poller.unregister(listener.fileno())
            listener.close()
        self._listeners.clear()

    def send(self, index: int, parts: Sequence[Any]) -> bool:
        """Whether a peer's stream took a record; see `SealedStream.send`.

        Raises: StreamEndedError.
        """
        is_taken = self.streams[index].send(parts)
        if self.streams[index].has_unsent:
            self.await_room(index)
        return is_taken

    def await_room(self, index: int) -> None:
        """Have the poller wake when a stream takes more of what it has not sent: `flush`."""
        self._poller.modify(self.streams[index].fileno(), zmq.POLLIN | zmq.POLLOUT)

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
        """Close everything."""
        self._awaited.clear()
        self.stop_opening()
        for index in list(self.streams):
            self.drop(index)

    @staticmethod
    def _connect_far(offer: m.DirectOffer, exchange_endpoint: str) -> socket.socket | None:
        """Begin to connect by TCP; None where that cannot be."""
        host = exchange_endpoint.removeprefix("tcp://").rpartition(":")[0].strip("[]")
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        connecting = socket.socket(family, socket.SOCK_STREAM)
        connecting.setblocking(False)
        try:
            code = connecting.connect_ex((host, offer.port))
        except OSError as error:  # A name that is not known.
            code = error.errno or errno.EINVAL
        if code not in _PROGRESS:
            reason = os.strerror(code)
            logger.warning("no direct stream to device %d: %s", offer.device_index, reason)
            connecting.close()
            return None
        return connecting

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                connected, _ = listener.accept()
            except OSError:  # Nobody is there, or nobody any more.
                return
            connected.setblocking(False)
            strangers = [one for one in self._opening if one.index < 0]
            if len(strangers) >= MAX_STRANGERS:
                self._give_up(strangers[0], "")
            self._opening.append(_Opening(connected))
            self._poller.register(connected.fileno(), zmq.POLLIN)

    def _go_on_dialling(self, one: _Opening, offer: m.DirectOffer) -> None:
        """Say who this is once connected, and keep the stream once the peer has greeted."""
        if one.stream is None:
            if not select.select([], [one.socket], [one.socket], 0)[1]:
                return
            code = one.socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if code:
                raise OSError(code, os.strerror(code))
            one.socket.send(_INDEX.pack(self._index))
            keys = self._keys(offer.key_there, offer.key_back)
            one.stream = SealedStream(one.socket, offer.cipher, *keys)
            one.stream.send([_GREETING])
            self._poller.modify(one.socket.fileno(), zmq.POLLIN)
        if one.stream.receive_is(_GREETING):
            self._keep(one, one.stream)

    def _go_on_greeting(self, one: _Opening) -> None:
        """Hear who has connected, and greet back whoever proves it."""
        if one.stream is None:
            try:
                said = one.socket.recv(_INDEX.size, socket.MSG_PEEK)
            except BlockingIOError:
                return
            if not said:
                raise StreamEndedError("it left without a word")
            if len(said) < _INDEX.size:
                return
            (index,) = _INDEX.unpack(one.socket.recv(_INDEX.size))
            offer = self._awaited.get(index)
            if offer is None:
                raise StreamEndedError("it is no device that was asked")
            one.index = index
            keys = self._keys(offer.key_back, offer.key_there)
            one.stream = SealedStream(one.socket, offer.cipher, *keys)
        if one.stream.receive_is(_GREETING):
            if one.index not in self._awaited:
                raise StreamEndedError("it has a stream already")
            one.stream.send([_GREETING])
            del self._awaited[one.index]
            self._keep(one, one.stream)

    def _keep(self, one: _Opening, stream: SealedStream) -> None:
        self._opening.remove(one)
        self.streams[one.index] = stream

    def _keys(self, send_key: bytes, receive_key: bytes) -> tuple[bytes | None, bytes | None]:
        is_plain = bool(self._endpoint) and is_plaintext(self._endpoint)
        return (None, None) if is_plain else (send_key, receive_key)

    def _give_up(self, one: _Opening, reason: str) -> None:
        if one.offer is not None:
            logger.warning("no direct stream to device %d: %s", one.index, reason)
        self._opening.remove(one)
        self._poller.unregister(one.socket.fileno())
        one.socket.close()


# Names that are no files and vanish with their socket, for each network namespace its own.
_HAS_LOCAL_NAMES = sys.platform == "linux"


def _local_address(name: str) -> str:
    return f"\0shardmix-{name}"


def _listen_locally(name: str) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(_local_address(name))
    listener.listen()
    return listener


def _connect_locally(name: str) -> socket.socket | None:
    """A connection to a peer that listens on this computer; None where none does."""
    if not _HAS_LOCAL_NAMES:
        return None
    connecting = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connecting.setblocking(False)
    if connecting.connect_ex(_local_address(name)):
        connecting.close()
        return None
    return connecting


def _listen(endpoint: str) -> socket.socket | None:
    """Listen at "tcp://HOST:PORT", where PORT may be "*" or "FIRST-LAST"; None without a port."""
    found = re.fullmatch(r"tcp://(.+):(?:\*|(\d+)(?:-(\d+))?)", endpoint)
    if found is None:
        return None
    host = "" if found[1] == "*" else found[1].strip("[]")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    first = int(found[2] or 0)
    for port in range(first, int(found[3] or first) + 1):
        try:
            return socket.create_server((host, port), family=family)
        except OSError:
            continue
    logger.warning("no direct streams: no port of %s is free", endpoint)
    return None
