"""Who may talk to whom: CURVE keys made per start, and the handler that checks them.

Every ZeroMQ socket of ours is encrypted and authenticated, loopback too. A listening socket has a
*domain*; the gatekeeper lets a peer in when its public key is on that domain's list, and reports
every refusal with its reason. It knows nothing of messages.
"""

from __future__ import annotations

import logging
import threading
from typing import Any

import msgspec
import zmq
import zmq.utils.z85

logger = logging.getLogger(__name__)

ZAP_ENDPOINT = "inproc://zeromq.zap.01"


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


class Gatekeeper:
    """Answers libzmq's authentication requests for all sockets of one context.

    Must be started before the first socket that listens, and closed before the context.
    """

    def __init__(self, context: zmq.Context[Any]) -> None:
        """Bind the handler and start its thread."""
        self._allowed: dict[str, frozenset[bytes]] = {}
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
        """Make `public_keys` (Z85) the whole allow list of `domain`."""
        with self._lock:
            self._allowed[domain] = frozenset(public_keys)

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
        elif mechanism == b"PLAIN" and len(credentials) == 2:
            # Only a socket of `plaintext` offers it: the peer says its key, and proves nothing.
            key = credentials[0]
        with self._lock:
            is_allowed = key in self._allowed.get(domain, frozenset())
        if is_allowed:
            reply = [version, request_id, b"200", b"OK", key, b""]
        else:
            shown = key.decode("ascii") or mechanism.decode("ascii", "replace")
            where = address.decode("ascii", "replace")
            logger.warning("refused %s on %s: key %s is not on its list", where, domain, shown)
            reply = [version, request_id, b"400", b"key is not on the allow list", b"", b""]
        self._socket.send_multipart(reply)
