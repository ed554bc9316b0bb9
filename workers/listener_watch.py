"""Sees who knocks at a listening socket without speaking its language.

In: libzmq's events of the socket. Out: where from and why, for peers that never came as far as
showing a key: plain text, another protocol, another server's key. Wrong keys are the gatekeeper's.
"""

from __future__ import annotations

import contextlib
import os
import socket
from typing import Any, NamedTuple, cast

import zmq
from zmq.utils.monitor import recv_monitor_message

EVENTS = (
    zmq.EVENT_ACCEPTED
    | zmq.EVENT_HANDSHAKE_SUCCEEDED
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_DISCONNECTED
)
FOREIGN = "it does not speak this protocol (plain text, or another program); nothing was read"
NOT_ENCRYPTED = "it does not speak this protocol: every peer must encrypt (CURVE)"
OTHER_KEY = "it takes this worker for another one: the key it has for it is wrong"
UNKNOWN_ADDRESS = "an unknown address"


class Knock(NamedTuple):
    """A connection that came to nothing."""

    address: str
    reason: str


class ListenerWatch:
    """Watches one listening socket; used by the thread that owns it."""

    def __init__(self, watched: zmq.Socket[Any]) -> None:
        """Start to watch."""
        self._watched = watched
        self.socket: zmq.Socket[Any] = watched.get_monitor_socket(EVENTS)
        # By descriptor. Events of a handshake do not say whose it was, only its end does; so with
        # several at once it is counted how many of them went well.
        self._handshaking: dict[int, str] = {}
        self._num_succeeded = 0
        self._failure: str | None = None

    def take_all(self) -> list[Knock]:
        """Peers that were turned away since the last call."""
        knocks: list[Knock] = []
        with contextlib.suppress(zmq.Again):
            while True:
                message = cast("dict[str, Any]", recv_monitor_message(self.socket, zmq.DONTWAIT))
                knock = self._take(int(message["event"]), int(message["value"]))
                if knock is not None:
                    knocks.append(knock)
        return knocks

    def close(self) -> None:
        """Stop watching; before the watched socket closes."""
        self._watched.disable_monitor()
        self.socket.close(linger=0)

    def _take(self, event: int, value: int) -> Knock | None:
        if event == zmq.EVENT_ACCEPTED:
            self._handshaking[value] = _peer_address(value)
        elif event == zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL:
            self._failure = _describe(value)
        elif event == zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL:
            self._failure = FOREIGN
        elif event == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
            self._failure = ""  # The gatekeeper has told it.
        elif event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
            self._num_succeeded += 1
            self._forget_if_all_succeeded()
        elif event == zmq.EVENT_DISCONNECTED:
            return self._disconnected(value)
        return None

    def _disconnected(self, descriptor: int) -> Knock | None:
        address = self._handshaking.pop(descriptor, None)
        failure, self._failure = self._failure, None
        if address is None:
            return None
        if failure is None:
            if len(self._handshaking) < self._num_succeeded:
                self._num_succeeded -= 1
                return None
            failure = FOREIGN  # A greeting that is none is no event of its own.
        self._forget_if_all_succeeded()
        return Knock(address, failure) if failure else None

    def _forget_if_all_succeeded(self) -> None:
        if self._num_succeeded >= len(self._handshaking):
            self._handshaking.clear()
            self._num_succeeded = 0


def _describe(code: int) -> str:
    if code == zmq.PROTOCOL_ERROR_ZMTP_MECHANISM_MISMATCH:
        return NOT_ENCRYPTED
    return OTHER_KEY if code == zmq.PROTOCOL_ERROR_ZMTP_CRYPTOGRAPHIC else FOREIGN


def _peer_address(descriptor: int) -> str:
    """Address of the other end, "IP:PORT", for a log: the descriptor is libzmq's and may be gone."""
    with contextlib.suppress(OSError), socket.socket(fileno=os.dup(descriptor)) as connection:
        if connection.family in (socket.AF_INET, socket.AF_INET6):
            host, port, *_ = connection.getpeername()
            return f"{host}:{port}"
        return "this computer"
    return UNKNOWN_ADDRESS
