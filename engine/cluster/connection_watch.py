"""What became of a connection: whether the other end let us in, refused us, or is gone.

In: libzmq's events of one connecting socket. Out: one word. What is said over the connection is
not seen here.
"""

from __future__ import annotations

from typing import Any, Literal

import zmq
from zmq.utils.monitor import parse_monitor_message

# "nobody": nothing listens there. "refused": our key is not on its list. "foreign": it has another
# key than we expect, or is no program of ours. "cut": it was open.
Connection = Literal["connecting", "open", "nobody", "refused", "foreign", "cut"]

_EVENTS = (
    zmq.EVENT_CLOSED
    | zmq.EVENT_DISCONNECTED
    | zmq.EVENT_HANDSHAKE_SUCCEEDED
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
)


class ConnectionWatch:
    """Watches a socket that connects once; its first failure stays.

    Attributes:
        socket: to poll.
    """

    def __init__(self, watched: zmq.Socket[Any]) -> None:
        """Begin, before the socket connects."""
        self._watched = watched
        self.socket: zmq.Socket[Any] = watched.get_monitor_socket(_EVENTS)
        self._connection: Connection = "connecting"

    def connection(self) -> Connection:
        """How it stands now."""
        while self.socket.poll(0):
            event = int(parse_monitor_message(self.socket.recv_multipart())["event"])
            if self._connection in ("connecting", "open"):
                self._connection = self._after(event)
        return self._connection

    def close(self) -> None:
        """Watch no longer; before the watched socket closes."""
        self._watched.disable_monitor()
        self.socket.close(linger=0)

    def _after(self, event: int) -> Connection:
        if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
            return "open"
        if event == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
            return "refused"
        if event in (zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL, zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL):
            return "foreign"
        if self._connection == "open":
            return "cut"
        return "nobody" if event == zmq.EVENT_CLOSED else "foreign"
