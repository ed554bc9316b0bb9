"""Sockets between processes: ZeroMQ with CURVE, heartbeats, size limits, and no lingering.

In: endpoints and keys. Out: a `Channel` that sends and receives typed messages with tensors. What
a message means is not decided here.
"""

from __future__ import annotations

import os
import re
import socket as socket_module
import sys
import tempfile
import uuid
from collections.abc import Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import zmq

from engine.cluster.codec import Codec
from engine.cluster.connection_watch import ConnectionWatch
from engine.cluster.messages import Array, Message
from engine.cluster.plaintext import is_plaintext
from engine.cluster.security import KeyPair
from engine.errors import ProtocolError, WorkerLost

MAX_MESSAGE_BYTES = 256 << 20
# Messages of one connection that nobody has read yet.
MAX_WAITING = 1000
HEARTBEAT_MS = 500
# A frozen process answers no heartbeat: its libzmq threads stop with it. A slow one answers,
# because those threads do not compute.
HEARTBEAT_TIMEOUT_MS = 2500
HANDSHAKE_MS = 5000
_LATER_THAN_ANY_OWNER_MS = 24 * 3600 * 1000

_MORE = zmq.DONTWAIT | zmq.SNDMORE

M = TypeVar("M")


class Received(NamedTuple, Generic[M]):
    """A decoded message.

    Attributes:
        tensors: read-only views.
        route: on a ROUTER, the way back.
        origin: on a ROUTER, the frame that knows where it came from.
    """

    message: M
    tensors: list[Array]
    route: bytes
    origin: zmq.Frame | None = None

    @property
    def peer_key(self) -> bytes:
        """On a ROUTER, the public key (Z85) that the gatekeeper let in."""
        return _peer_key(self.origin)


class Frames(NamedTuple):
    """A message that nobody has read yet.

    Attributes:
        route, origin: as in `Received`.
    """

    parts: list[bytes]
    route: bytes = b""
    origin: zmq.Frame | None = None

    @property
    def peer_key(self) -> bytes:
        """As of `Received`."""
        return _peer_key(self.origin)

    @property
    def peer_address(self) -> str:
        """On a ROUTER, where it came from, without the port; "" over a local endpoint."""
        address = self.origin.get("Peer-Address") if self.origin is not None else None
        return address if isinstance(address, str) else ""


def new_local_endpoint() -> str:
    """An endpoint only this computer can reach, never used before.

    Linux has names outside the file system, which vanish with their process; other Unixes get a
    file in a private folder; Windows a loopback port.
    """
    name = f"shardmix-{uuid.uuid4().hex}"
    if sys.platform == "linux":
        return f"ipc://@{name}"
    if os.name == "nt":
        return "tcp://127.0.0.1:*"
    return f"ipc://{tempfile.mkdtemp(prefix='shardmix-')}/{name[-8:]}"


def _prepare(
    socket: zmq.Socket[Any],
    is_watched: bool,
    max_message_bytes: int,
    max_waiting: int = MAX_WAITING,
    max_queued: int = MAX_WAITING,
) -> None:
    socket.linger = 0
    socket.setsockopt(zmq.MAXMSGSIZE, max_message_bytes)
    if socket.type == zmq.ROUTER:
        socket.setsockopt(zmq.ROUTER_MANDATORY, 1)  # An answer nobody takes is an error.
    if not is_watched:
        # A reader that pauses must lose nothing, and is not dead: libzmq stops reading at a high
        # water mark, and would take the missing heartbeats for a lost connection.
        socket.sndhwm = socket.rcvhwm = 0
        return
    socket.sndhwm = max_queued
    socket.rcvhwm = max_waiting
    socket.setsockopt(zmq.HEARTBEAT_IVL, HEARTBEAT_MS)
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, HEARTBEAT_TIMEOUT_MS)
    # Behind a frame that the other end does not read there is no place for a heartbeat.
    socket.setsockopt(zmq.TCP_MAXRT, HEARTBEAT_MS + HEARTBEAT_TIMEOUT_MS)
    socket.setsockopt(zmq.HANDSHAKE_IVL, HANDSHAKE_MS)


def listen(
    context: zmq.Context[Any],
    kind: int,
    keys: KeyPair,
    domain: str,
    endpoint: str,
    *,
    is_watched: bool = True,
    max_message_bytes: int = MAX_MESSAGE_BYTES,
    max_waiting: int = MAX_WAITING,
) -> tuple[zmq.Socket[Any], str]:
    """Bind a socket that lets in the peers on the gatekeeper's list for `domain`.

    Args:
        endpoint: "ipc://…", or "tcp://ADDRESS:PORT" where PORT may be "*" or "FIRST-LAST".
        is_watched: whether heartbeats tell that the other end is gone; the same on both ends.
        max_message_bytes: a peer that sends a longer frame is disconnected.
        max_waiting: messages of each peer that nobody has read yet; more wait at the peer. Only
            for sockets that are watched.
    Returns: the socket and the endpoint it got.
    Raises: ProtocolError: the address is taken or is not one.
    """
    is_encrypted = not is_plaintext(endpoint)
    socket = context.socket(kind)
    _prepare(socket, is_watched, max_message_bytes, max_waiting)
    socket.setsockopt_string(zmq.ZAP_DOMAIN, domain)
    if is_encrypted:
        socket.curve_server = True  # Must be set before bind.
        socket.curve_secretkey = keys.secret
    else:
        socket.plain_server = True
    reason = "no port in the range"
    for candidate in _port_range(endpoint):
        try:
            socket.bind(candidate)
        except zmq.ZMQError as error:
            reason = str(error.strerror)
        else:
            return socket, socket.getsockopt_string(zmq.LAST_ENDPOINT).rstrip("\0")
    socket.close(linger=0)
    raise ProtocolError(
        f"cannot listen on {endpoint}: {reason}. Choose another port, or end the program that "
        "holds it"
    )


def _port_range(endpoint: str) -> list[str]:
    """Endpoints to try, in order."""
    found = re.fullmatch(r"(tcp://.+:)(\d+)-(\d+)", endpoint)
    if found is None:
        return [endpoint]
    return [f"{found[1]}{port}" for port in range(int(found[2]), int(found[3]) + 1)]


def connect(
    context: zmq.Context[Any],
    kind: int,
    keys: KeyPair,
    server_key: bytes,
    endpoint: str,
    *,
    is_watched: bool = True,
    max_message_bytes: int = MAX_MESSAGE_BYTES,
    max_queued: int = MAX_WAITING,
) -> zmq.Socket[Any]:
    """Connect to a listening socket whose public key is known.

    Args:
        is_watched: whether heartbeats tell that the other end is gone; the same on both ends.
        max_message_bytes: a peer that sends a longer frame is disconnected.
        max_queued: messages that wait to be sent before one more is an error.
    Raises: ProtocolError: the endpoint or the key is not one.
    """
    socket = context.socket(kind)
    _prepare(socket, is_watched, max_message_bytes, max_queued=max_queued)
    try:
        _dial(socket, keys, server_key, endpoint)
    except ProtocolError:
        socket.close(linger=0)
        raise
    return socket


def connect_watched(
    context: zmq.Context[Any],
    kind: int,
    keys: KeyPair,
    server_key: bytes,
    endpoint: str,
    events: int,
    *,
    max_queued: int = MAX_WAITING,
) -> tuple[zmq.Socket[Any], zmq.Socket[Any]]:
    """As `connect`, with a monitor that misses nothing: a neighbour connects at once.

    Args: events: of libzmq's monitor.
    Returns: the socket and its monitor.
    Raises: ProtocolError: the endpoint or the key is not one.
    """
    socket = context.socket(kind)
    _prepare(socket, True, MAX_MESSAGE_BYTES, max_queued=max_queued)
    monitor = socket.get_monitor_socket(events)
    try:
        _dial(socket, keys, server_key, endpoint)
    except ProtocolError:
        socket.disable_monitor()
        monitor.close(linger=0)
        socket.close(linger=0)
        raise
    return socket, monitor


def connect_once(
    context: zmq.Context[Any],
    keys: KeyPair,
    server_key: bytes,
    endpoint: str,
    *,
    max_message_bytes: int = MAX_MESSAGE_BYTES,
) -> tuple[zmq.Socket[Any], ConnectionWatch]:
    """Connect a DEALER whose owner is told how it ends, and who then makes another one.

    A socket that connects again by itself would deliver what was meant for a worker that has since
    forgotten it.

    Args: as `connect`.
    Raises: ProtocolError: the endpoint or the key is not one.
    """
    socket = context.socket(zmq.DEALER)
    _prepare(socket, True, max_message_bytes)
    # "Never" (-1) would drop what came ahead of a cut and was not yet read: often the reason for it.
    socket.setsockopt(zmq.RECONNECT_IVL, _LATER_THAN_ANY_OWNER_MS)
    watch = ConnectionWatch(socket)
    try:
        _dial(socket, keys, server_key, endpoint)
    except ProtocolError:
        watch.close()
        socket.close(linger=0)
        raise
    return socket, watch


def _dial(socket: zmq.Socket[Any], keys: KeyPair, server_key: bytes, endpoint: str) -> None:
    is_encrypted = not is_plaintext(endpoint)
    try:
        if is_encrypted:
            socket.curve_publickey = keys.public
            socket.curve_secretkey = keys.secret
            socket.curve_serverkey = server_key
        else:
            socket.plain_username, socket.plain_password = keys.public, b"-"
        socket.connect(endpoint)
    except zmq.ZMQError as error:
        raise ProtocolError(
            f"cannot connect to {endpoint[:100]!r}: address or key is wrong ({error.strerror})"
        ) from error


def address_that_reaches(host: str) -> str:
    """This computer's address on the way to another; no packet is sent."""
    with socket_module.socket(socket_module.AF_INET, socket_module.SOCK_DGRAM) as probe:
        try:
            probe.connect((host, 9))  # UDP only chooses a route.
        except OSError:
            return "127.0.0.1"
        return str(probe.getsockname()[0])


def _peer_key(frame: zmq.Frame | None) -> bytes:
    """The key that the gatekeeper let in, which came with a frame."""
    user_id = frame.get("User-Id") if frame is not None else None
    return user_id.encode("ascii") if isinstance(user_id, str) else b""


class Channel(Generic[M]):
    """Typed messages over one socket; not for use by two threads at once."""

    def __init__(self, socket: zmq.Socket[Any], accepted: Any) -> None:
        """Args: accepted: the union of messages this end takes."""
        self.socket = socket
        self._codec: Codec[M] = Codec(accepted)
        self._is_router = socket.type == zmq.ROUTER

    def send(self, message: Message, tensors: Sequence[Array] = (), route: bytes = b"") -> int:
        """Queue a message.

        Args:
            route: on a ROUTER, whom to send to.
        Returns: bytes of all frames, the route not counted.
        Raises:
            WorkerLost: the peer is gone, refused us, or has read nothing for a thousand messages.
            PromptError, ProtocolError: the message is too large, or has text that is not Unicode.
        """
        frames = self._codec.encode(message, tensors)
        # Small frames are cheaper to copy than to track.
        size = sum([memoryview(frame).nbytes for frame in frames])
        parts = [route, *frames] if self._is_router else frames
        copies, last = size < 65536, len(parts) - 1
        try:
            # What send_multipart does, without its checks of types that are known here.
            for n, part in enumerate(parts):
                self.socket.send(part, _MORE if n < last else zmq.DONTWAIT, copy=copies)
        except zmq.ZMQError:
            raise WorkerLost(
                f"{type(message).__name__} cannot be sent: the other end takes no messages"
            ) from None
        return size

    def has_message(self) -> bool:
        """Whether `receive` would not wait."""
        return bool(self.socket.poll(0))

    def receive(self, timeout_ms: int = -1) -> Received[M] | None:
        """The next message, or None when none comes within `timeout_ms`.

        Raises:
            ProtocolError: the frames are not a message this end takes.
            PeerRefused: the peer speaks another protocol version.
        """
        frames = self.receive_frames(timeout_ms)
        return None if frames is None else self.decode(frames)

    def receive_frames(self, timeout_ms: int = -1) -> Frames | None:
        """What came within `timeout_ms`, unread, for who must know from whom it came anyway."""
        if timeout_ms != 0 and not self.socket.poll(timeout_ms):
            return None
        try:
            if not self._is_router:
                return Frames(self.socket.recv_multipart(zmq.DONTWAIT))
            # Only a frame that is not copied knows where it came from.
            origin = self.socket.recv(zmq.DONTWAIT, copy=False)
            parts = self.socket.recv_multipart(zmq.DONTWAIT)
        except zmq.Again:
            return None
        return Frames(parts, bytes(origin.buffer), origin)

    def decode(self, frames: Frames) -> Received[M]:
        """Read what `receive_frames` gave.

        Raises: ProtocolError, PeerRefused: as `receive`.
        """
        message, tensors = self._codec.decode(frames.parts)
        return Received(message, tensors, frames.route, frames.origin)

    def close(self) -> None:
        """Close the socket; what was not sent is dropped."""
        self.socket.close(linger=0)
