"""Who may talk to whom: CURVE keys, and the handler that checks them.

Every ZeroMQ socket of ours is encrypted and authenticated, loopback too. A listening socket has a
*domain*; the gatekeeper lets a peer in when its public key is on that domain's list, and keeps
every refusal with its reason. It knows nothing of messages, and where keys come from.
"""

from __future__ import annotations

import collections
import logging
import struct
import threading
import time
from typing import Any, NamedTuple

import msgspec
import zmq
import zmq.utils.z85

from engine.cluster.plaintext import is_plaintext_wanted

logger = logging.getLogger(__name__)

ZAP_ENDPOINT = "inproc://zeromq.zap.01"
MAX_REFUSALS = 100
# A refused peer that tries again and again fills the list of refusals, not the log.
REFUSAL_LOG_SECONDS = 10.0


class KeyPair(msgspec.Struct, frozen=True):
    """A CURVE key pair in Z85, 40 bytes each."""

    public: bytes
    secret: bytes

    def __repr__(self) -> str:
        """The public half only: this may end in a log."""
        return f"KeyPair(public={self.public!r})"


def new_key_pair() -> KeyPair:
    """Draw a fresh CURVE key pair."""
    public, secret = zmq.curve_keypair()
    return KeyPair(public, secret)


def is_public_key(key: bytes) -> bool:
    """Whether `key` is a CURVE key in Z85."""
    try:
        return len(key) == 40 and len(zmq.utils.z85.decode(key)) == 32
    except (KeyError, ValueError, struct.error):
        return False


def public_half(secret: bytes) -> bytes:
    """The public key of a secret one, both Z85.

    Raises: ValueError: it is not a key.
    """
    if not is_public_key(secret):
        raise ValueError("not a key")
    return zmq.curve_public(secret)


class Refusal(NamedTuple):
    """Somebody who was not let in.

    Attributes:
        time_s: when, seconds since the epoch.
        address: where from.
        domain: of the listening socket.
        key: in Z85; b"" for a peer that did not show one.
        reason: for a person.
    """

    time_s: float
    address: str
    domain: str
    key: bytes
    reason: str


class Gatekeeper:
    """Answers libzmq's authentication requests for all sockets of one context.

    Must be started before the first socket that listens, and closed before the context.
    """

    def __init__(self, context: zmq.Context[Any]) -> None:
        """Bind the handler and start its thread."""
        self._allowed: dict[str, frozenset[bytes] | None] = {}
        self._refusals: collections.deque[Refusal] = collections.deque(maxlen=MAX_REFUSALS)
        self._lock = threading.Lock()
        self._socket = context.socket(zmq.REP)
        self._socket.linger = 0
        self._socket.bind(ZAP_ENDPOINT)
        self._stop = context.socket(zmq.PAIR)
        stop_endpoint = f"inproc://gatekeeper-{id(self)}"
        self._stop.bind(stop_endpoint)
        self._stop_listener = context.socket(zmq.PAIR)
        self._stop_listener.connect(stop_endpoint)
        self._thread = threading.Thread(target=self._run, name="gatekeeper", daemon=True)
        self._thread.start()

    def allow(self, domain: str, *public_keys: bytes) -> None:
        """Make `public_keys` (Z85) the whole allow list of `domain`.

        Peers that are connected stay so: who takes a key off must look at what still comes with it
        (`Received.peer_key`).
        """
        with self._lock:
            self._allowed[domain] = frozenset(public_keys)

    def allow_any(self, domain: str) -> None:
        """Let every peer into `domain` that shows a CURVE key, whichever it is."""
        with self._lock:
            self._allowed[domain] = None

    def refusals(self) -> tuple[Refusal, ...]:
        """The latest ones, oldest first."""
        with self._lock:
            return tuple(self._refusals)

    def refuse(self, address: str, domain: str, key: bytes, reason: str) -> None:
        """Record and log a refusal; also for those who find a reason of their own.

        Args: as in `Refusal`.
        """
        now = time.time()
        with self._lock:
            is_told = any(
                (r.domain, r.key, r.reason) == (domain, key, reason)
                and now - r.time_s < REFUSAL_LOG_SECONDS
                for r in self._refusals
            )
            self._refusals.append(Refusal(now, address, domain, key, reason))
        shown = f" (key {key.decode('ascii', 'replace')})" if key else ""
        level = logging.DEBUG if is_told else logging.WARNING
        logger.log(level, "refused %s on %s: %s%s", address, domain, reason, shown)

    def close(self) -> None:
        """End the thread and close its sockets."""
        self._stop.send(b"")
        self._thread.join(2)
        for socket in (self._stop, self._stop_listener, self._socket):
            socket.close(linger=0)

    def _run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        poller.register(self._stop_listener, zmq.POLLIN)
        while True:
            ready = dict(poller.poll())
            if self._stop_listener in ready:
                return
            self._answer(self._socket.recv_multipart())

    def _answer(self, request: list[bytes]) -> None:
        version, request_id, domain_bytes, address, _identity, mechanism, *credentials = request
        domain = domain_bytes.decode("utf-8", "replace")
        key = b""
        if mechanism == b"CURVE" and len(credentials) == 1 and len(credentials[0]) == 32:
            key = zmq.utils.z85.encode(credentials[0])
        elif (
            mechanism == b"PLAIN"
            and is_plaintext_wanted()
            and len(credentials) == 2
            and is_public_key(credentials[0])
        ):
            # Only a socket of `plaintext` offers it: the peer says its key, and proves nothing.
            key = credentials[0]
        with self._lock:
            allowed = self._allowed.get(domain, frozenset())
        reason = ""
        if not key:
            reason = f"it shows no key ({mechanism[:20].decode('ascii', 'replace')})"
        elif allowed is not None and key not in allowed:
            reason = "its key is not on the allow list"
        if not reason:
            # The key becomes User-Id of every message, for `Received.peer_key`.
            reply = [version, request_id, b"200", b"OK", key, b""]
        else:
            self.refuse(address.decode("ascii", "replace"), domain, key, reason)
            reply = [version, request_id, b"400", reason.encode(), b"", b""]
        self._socket.send_multipart(reply)
