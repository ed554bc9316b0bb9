"""Encrypted records on a connected stream socket that the computing thread reads itself.

In: bytes, and keys that both ends have from a connection that proved who they are. Out: the other
end's records, in order, none twice, none changed. It never waits; who connects to whom, and what
records mean, is not known here.

On the wire a record is its length as 4 little-endian bytes, then its bytes sealed with
ChaCha20-Poly1305 (RFC 8439) or AES-256-GCM (NIST SP 800-38D), whichever is quicker where the keys
are made. Each direction has a key of its own and counts its records, so the nonce needs no place in
them.
"""

from __future__ import annotations

import contextlib
import functools
import math
import select
import socket
import struct
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal

from cryptography.exceptions import InvalidTag, UnsupportedAlgorithm
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305

KEY_BYTES = 32
Cipher = Literal["chacha20-poly1305", "aes-256-gcm"]
CIPHERS: dict[Cipher, type[ChaCha20Poly1305 | AESGCM]] = {
    "chacha20-poly1305": ChaCha20Poly1305,
    "aes-256-gcm": AESGCM,
}
# What one record may hold: far less than fits between two records of a plan's rows, so that the
# other end's socket takes it whole and nobody waits for both to read.
MAX_RECORD_BYTES = 80 << 10
# Seconds of silence, then between questions, how many, and milliseconds without an answer.
_WATCHFUL = {"TCP_KEEPIDLE": 1, "TCP_KEEPINTVL": 1, "TCP_KEEPCNT": 3, "TCP_USER_TIMEOUT": 3000}
_SOCKET_BYTES = 4 * MAX_RECORD_BYTES
_TAG_BYTES = 16
_LONGEST = MAX_RECORD_BYTES + _TAG_BYTES
_LENGTH = struct.Struct("<I")
_NONCE = struct.Struct("<4xQ")
_NOT_SEALED = (
    "a record was not sealed with the key agreed on: it was changed on its way, or comes from "
    "somebody else"
)


@functools.cache
def quickest_cipher() -> Cipher:
    """What seals a small record in the least time here: processors without AES are slow at it."""
    record, nonce = bytes(8192), bytes(12)

    def seconds(name: Cipher) -> float:
        try:
            cipher = CIPHERS[name](bytes(KEY_BYTES))
        except UnsupportedAlgorithm:  # As some organisations set up OpenSSL.
            return math.inf
        found: list[float] = []
        for _ in range(20):
            started = time.perf_counter()
            cipher.decrypt(nonce, cipher.encrypt(nonce, record, None), None)
            found.append(time.perf_counter() - started)
        return min(found)

    return min(CIPHERS, key=seconds)


class StreamEndedError(Exception):
    """The other end closed the connection, or it broke, or somebody changed what came over it."""


def _asker(connected: socket.socket) -> Callable[[int], Any]:
    """What tells whether a socket has something to read, after some milliseconds at most."""
    if not hasattr(select, "poll"):  # Windows.
        return lambda milliseconds: select.select([connected], [], [], milliseconds / 1000)[0]
    poll = select.poll()
    poll.register(connected, select.POLLIN)
    return poll.poll


class SealedStream:
    """One end of a connection; it belongs to one thread.

    Attributes:
        record: memory that begins with the record taken last; it stays where it is.
        num_bytes: of the record taken last.
    """

    def __init__(
        self,
        connected: socket.socket,
        cipher: Cipher,
        send_key: bytes | None,
        receive_key: bytes | None,
    ) -> None:
        """Take over a socket.

        Args: send_key, receive_key: KEY_BYTES each; None leaves records as they are.
        """
        connected.setblocking(False)
        with contextlib.suppress(OSError):  # Only TCP has it.
            connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # A firewall that forgets the connection says nothing; libzmq's heartbeats are on another one.
        connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in _WATCHFUL.items():
            if hasattr(socket, name):
                with contextlib.suppress(OSError):
                    connected.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            connected.setsockopt(socket.SOL_SOCKET, option, _SOCKET_BYTES)
        self._socket = connected
        self._is_readable = _asker(connected)
        self._sealer = None if send_key is None else CIPHERS[cipher](send_key)
        self._opener = None if receive_key is None else CIPHERS[cipher](receive_key)
        self._num_sent = self._num_received = self.num_bytes = 0
        self.record = bytearray(_LONGEST)
        self._record_view = memoryview(self.record)
        self._unsent: memoryview | None = None
        self._outgoing = memoryview(bytearray(_LENGTH.size + _LONGEST))
        self._buffer = bytearray(2 * (_LENGTH.size + _LONGEST))
        self._view = memoryview(self._buffer)
        # Of what has come and nobody took, and of its first record once that is whole, else 0.
        self._start = self._end = self._record_end = 0
        # Most records are as long as the one before, and then lie in the same places.
        self._sent_bytes = -1
        self._sealed = self._framed = self._outgoing
        self._opened = self._record_view

    def fileno(self) -> int:
        """For a poller."""
        return self._socket.fileno()

    @property
    def has_unsent(self) -> bool:
        """Whether a part of a record waits for the other end to read; `flush` goes on."""
        return self._unsent is not None

    def send(self, parts: Sequence[Any]) -> bool:
        """Send a record, unless an earlier one is still on its way out.

        Args: parts: contiguous buffers that make up the record, MAX_RECORD_BYTES together.
        Returns: whether it was taken; False leaves nothing behind.
        Raises: StreamEndedError.
        """
        if self._unsent is not None and not self.flush():
            return False
        record = b"".join(parts)
        num_bytes = len(record)
        if num_bytes != self._sent_bytes:
            if num_bytes > MAX_RECORD_BYTES:
                return False
            self._frame(num_bytes)
        if self._sealer is None:
            self._sealed[:] = record
        else:
            self._sealer.encrypt_into(_NONCE.pack(self._num_sent), record, None, self._sealed)
            self._num_sent += 1
        self._unsent = self._framed
        self.flush()
        return True

    def flush(self) -> bool:
        """Send what is left of the last record; whether nothing is left.

        Raises: StreamEndedError.
        """
        unsent = self._unsent
        if unsent is None:
            return True
        try:
            count = self._socket.send(unsent)
        except BlockingIOError:
            return False
        except OSError as error:
            raise StreamEndedError from error
        self._unsent = None if count == len(unsent) else unsent[count:]
        return self._unsent is None

    def has_more(self, milliseconds: int = 0) -> bool:
        """Whether there is something to read, if only the end; costs less than to try.

        Args: milliseconds: to wait for it, at most.
        """
        return bool(self._is_readable(milliseconds))

    def has_record(self) -> bool:
        """Whether a whole record is here; reads what has come.

        Raises: StreamEndedError.
        """
        return self._record_end > 0 or self._read()

    def take(self) -> bool:
        """Whether the next record is here; `record` begins with it until the next call.

        Raises: StreamEndedError: also where what came is no record of the other end's: whoever can
            change it can as well cut the connection.
        """
        if not self._record_end and not self._read():
            return False
        first, end = self._start + _LENGTH.size, self._record_end
        num_bytes = end - first
        if self._opener is None:
            self.record[:num_bytes] = self._view[first:end]
        else:
            num_bytes -= _TAG_BYTES
            if num_bytes != len(self._opened):
                if num_bytes < 0:
                    raise StreamEndedError(_NOT_SEALED)
                self._opened = self._record_view[:num_bytes]
            nonce = _NONCE.pack(self._num_received)
            try:
                self._opener.decrypt_into(nonce, self._view[first:end], None, self._opened)
            except InvalidTag:
                raise StreamEndedError(_NOT_SEALED) from None
            self._num_received += 1
        self._start = end
        if end == self._end:
            self._start = self._end = self._record_end = 0
        else:
            self._find_record()
        self.num_bytes = num_bytes
        return True

    def receive(self) -> bytes | None:
        """The next record, if it is here.

        Raises: StreamEndedError: as `take` does.
        """
        return bytes(self._record_view[: self.num_bytes]) if self.take() else None

    def receive_is(self, record: bytes) -> bool:
        """Whether the next record is here, which must be this one.

        Raises: StreamEndedError: also where it is another.
        """
        said = self.receive()
        if said is not None and said != record:
            raise StreamEndedError("it says something else than it must")
        return said is not None

    def close(self) -> None:
        """Close the connection; what was not sent is dropped."""
        self._socket.close()

    def _frame(self, num_bytes: int) -> None:
        """Where a record of so many bytes lies on its way out, sealed and with its length."""
        length = num_bytes if self._sealer is None else num_bytes + _TAG_BYTES
        _LENGTH.pack_into(self._outgoing, 0, length)
        self._framed = self._outgoing[: _LENGTH.size + length]
        self._sealed = self._framed[_LENGTH.size :]
        self._sent_bytes = num_bytes

    def _find_record(self) -> bool:
        """Note where the record at the start of the buffer ends; whether it is whole."""
        self._record_end = 0
        held = self._end - self._start
        if held < _LENGTH.size:
            return False
        (length,) = _LENGTH.unpack_from(self._buffer, self._start)
        if not 0 < length <= _LONGEST:
            raise StreamEndedError(
                f"a record of {length:,} bytes was announced, from 1 to {_LONGEST:,} are read"
            )
        if held < _LENGTH.size + length:
            return False
        self._record_end = self._start + _LENGTH.size + length
        return True

    def _read(self) -> bool:
        """Read what has come; whether a whole record is there."""
        if self._start:  # So that the longest record always has room.
            held = bytes(self._view[self._start : self._end])
            self._view[: len(held)] = held
            self._start, self._end = 0, len(held)
        try:
            count = self._socket.recv_into(self._view[self._end :] if self._end else self._view)
        except BlockingIOError:
            return False
        except OSError as error:
            raise StreamEndedError from error
        if not count:
            raise StreamEndedError
        self._end += count
        return self._find_record()
