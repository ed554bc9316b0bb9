"""How two installations come to trust each other: six digits that two people compare.

In: the messages of the other end, and what the person here says. Out: what to answer, the digits,
and in the end the other's key, or a refusal. Both ends commit to a random number before either
reveals its own, so nobody between them can choose numbers, keys or names that make both ends show
the same digits; they can only guess, once, with a chance of one in a million. This module opens no
socket, reads no clock and stores nothing.
"""

from __future__ import annotations

import hashlib
import hmac
from typing import Annotated, Any, Literal

from msgspec import Meta

from engine.cluster.messages import Message
from engine.cluster.security import KeyPair, is_public_key
from engine.errors import PeerRefused, one_line

# Pairing has a socket of its own, on the port after the worker's.
PAIRING_PORT_OFFSET = 1
PAIRING_DOMAIN = "pairing"
PAIRING_SECONDS = 60.0
MAX_PAIRING_BYTES = 4096
NONCE_BYTES = 32
CODE_DIGITS = 6

# Encrypts the pairing socket and is no secret: whoever has this program has it. Who is at the other
# end is what the digits are for.
PAIRING_KEYS = KeyPair(
    b")&VvusRid}i>*V%UV2@[]d<Hva/O9qgblriki-Ix", b"DHl-AwD3c8mjT>h84H?h!xPn#RiYU<TBfA{i:KqI"
)

_LABEL = b"shardmix pairing 1"
_MAX_NAME = 64

Role = Literal["host", "worker"]
Key = Annotated[bytes, Meta(min_length=40, max_length=40)]
Name = Annotated[str, Meta(min_length=1, max_length=_MAX_NAME)]
Hash = Annotated[bytes, Meta(min_length=32, max_length=32)]
Nonce = Annotated[bytes, Meta(min_length=NONCE_BYTES, max_length=NONCE_BYTES)]


class PairOpen(Message, frozen=True):
    """First word of the engine host: who it says it is, and its commitment."""

    public_key: Key
    name: Name
    commitment: Hash


class PairAnswer(Message, frozen=True):
    """The worker's answer to PairOpen: the same about itself."""

    public_key: Key
    name: Name
    commitment: Hash


class PairReveal(Message, frozen=True):
    """The number behind a commitment; the engine host reveals first."""

    nonce: Nonce


class PairVerdict(Message, frozen=True):
    """What the person at this end says: whether both computers show the same digits."""

    is_same: bool


class PairRefused(Message, frozen=True):
    """There is no pairing, and why."""

    reason: Annotated[str, Meta(max_length=500)]


HOST_SENDS = PairOpen | PairReveal | PairVerdict | PairRefused
WORKER_SENDS = PairAnswer | PairReveal | PairVerdict | PairRefused
PairMessage = PairOpen | PairAnswer | PairReveal | PairVerdict | PairRefused


def commitment(public_key: bytes, nonce: bytes) -> bytes:
    """What binds an end to its key and number before it reveals the number; 32 bytes."""
    return _digest(b"commitment", public_key, nonce)


def pairing_code(
    host: tuple[bytes, str, bytes],
    worker: tuple[bytes, str, bytes],
) -> str:
    """The six digits that both ends show.

    Args:
        host, worker: public key, name and nonce of each end.
    """
    parts = [
        part for key, name, nonce in (host, worker) for part in (key, name.encode("utf-8"), nonce)
    ]
    number = int.from_bytes(_digest(b"code", *parts)[:16], "big")
    return f"{number % 10**CODE_DIGITS:0{CODE_DIGITS}d}"


def pairing_endpoint(control_endpoint: str) -> str:
    """Where a worker pairs, from where it listens ("tcp://ADDRESS:PORT")."""
    address, _, port = control_endpoint.rpartition(":")
    return f"{address}:{int(port) + PAIRING_PORT_OFFSET}"


def _digest(*parts: bytes) -> bytes:
    """SHA-256 over parts whose borders cannot be moved."""
    total = hashlib.sha256(_LABEL)
    for part in parts:
        total.update(len(part).to_bytes(8, "big"))
        total.update(part)
    return total.digest()


class Pairing:
    """One attempt, as one end sees it.

    Attributes:
        peer_key, peer_name: who the other end says it is; b"" and "" until it has said so.
        code: the digits to compare, once both numbers are known.
        is_paired: both persons have said that the digits are the same.
        reason: why the attempt ended without that; "" while it goes on.
    """

    def __init__(
        self, role: Role, public_key: bytes, name: str, nonce: bytes, deadline_s: float
    ) -> None:
        """Begin.

        Args:
            public_key: this installation's permanent one.
            name: what this end calls itself, 1 to 64 characters; more are cut.
            nonce: 32 random bytes, used for nothing else.
            deadline_s: on the clock that `take` and `judge` are told.
        """
        assert len(nonce) == NONCE_BYTES
        self._role: Role = role
        self._public_key = public_key
        self._name = name[:_MAX_NAME]
        self._nonce = nonce
        self._deadline_s = deadline_s
        self._expected: type[Message] = PairAnswer if role == "host" else PairOpen
        self._is_opened = False
        self._commitment = b""
        self._own_verdict: bool | None = None
        self._peer_verdict: bool | None = None
        self.peer_key = b""
        self.peer_name = ""
        self.code = ""
        self.is_paired = False
        self.reason = ""

    def open(self) -> PairOpen:
        """The engine host's first message."""
        assert self._role == "host"
        self._is_opened = True
        return PairOpen(
            public_key=self._public_key,
            name=self._name,
            commitment=commitment(self._public_key, self._nonce),
        )

    def take(self, message: PairMessage, shown_key: bytes, now_s: float) -> PairMessage | None:
        """Hear the other end.

        Args:
            shown_key: the key it proved to have when it connected; a host, which connects to a
                key that everybody has, gives b"" and relies on the digits.
            now_s: the time.
        Returns: what to answer, if anything.
        Raises: PeerRefused: the attempt is over; tell the other end PairRefused with the reason.
        """
        self.check_deadline(now_s)
        if self._is_over():
            raise PeerRefused("this attempt to pair is over; begin another one")
        if isinstance(message, PairRefused):
            self._end(f"the other computer refused to pair: {one_line(message.reason)}")
        if self.peer_key and shown_key not in (b"", self.peer_key):
            self._end("somebody else answered in the middle of pairing")
        if isinstance(message, PairVerdict):
            self._take_verdict(message.is_same)
            return None
        if not isinstance(message, self._expected) or (
            self._role == "host" and not self._is_opened
        ):
            self._end(f"{type(message).__name__} came out of turn")
        if isinstance(message, PairOpen | PairAnswer):
            return self._take_introduction(message, shown_key)
        assert isinstance(message, PairReveal)
        return self._take_number(message.nonce)

    def judge(self, is_same: bool, now_s: float) -> PairVerdict:
        """Hear the person here.

        Returns: what to tell the other end.
        Raises: PeerRefused: there are no digits to judge, or not any more.
        """
        self.check_deadline(now_s)
        if self._is_over() or not self.code or self._own_verdict is not None:
            raise PeerRefused("there is no code to confirm (any more); begin to pair again")
        self._own_verdict = is_same
        if not is_same:
            self.reason = "the codes were not the same, says the person at this computer"
        self._conclude()
        return PairVerdict(is_same=is_same)

    def check_deadline(self, now_s: float) -> None:
        """Give up when the time is over.

        Raises: PeerRefused: it is.
        """
        if not self._is_over() and now_s > self._deadline_s:
            self._end(f"pairing took longer than {PAIRING_SECONDS:.0f} s; begin again")

    def give_up(self, reason: str) -> None:
        """End the attempt from outside; nothing happens to one that is over."""
        if not self._is_over():
            self.reason = reason

    # ---- inside ------------------------------------------------------------------------------

    def _is_over(self) -> bool:
        return bool(self.reason) or self.is_paired

    def _end(self, reason: str) -> Any:
        self.reason = reason
        raise PeerRefused(reason)

    def _take_introduction(self, message: PairOpen | PairAnswer, shown_key: bytes) -> PairMessage:
        if not is_public_key(message.public_key):
            self._end("the other computer's key is not one")
        if shown_key not in (b"", message.public_key):
            self._end("the other computer shows one key and names another")
        if message.public_key == self._public_key:
            self._end("that is this computer itself")
        if not message.name.isprintable():
            self._end("the other computer's name cannot be shown")
        self.peer_key, self.peer_name = message.public_key, message.name
        self._commitment = message.commitment
        self._expected = PairReveal
        if self._role == "host":
            return PairReveal(nonce=self._nonce)
        return PairAnswer(
            public_key=self._public_key,
            name=self._name,
            commitment=commitment(self._public_key, self._nonce),
        )

    def _take_number(self, nonce: bytes) -> PairMessage | None:
        if not hmac.compare_digest(commitment(self.peer_key, nonce), self._commitment):
            self._end("the other computer revealed another number than it had committed to")
        self._expected = PairVerdict
        own = (self._public_key, self._name, self._nonce)
        other = (self.peer_key, self.peer_name, nonce)
        if self._role == "host":
            self.code = pairing_code(own, other)
            return None
        self.code = pairing_code(other, own)
        return PairReveal(nonce=self._nonce)

    def _take_verdict(self, is_same: bool) -> None:
        if not self.code or self._peer_verdict is not None:
            self._end("PairVerdict came out of turn")
        self._peer_verdict = is_same
        if not is_same:
            self._end("the codes were not the same, says the person at the other computer")
        self._conclude()

    def _conclude(self) -> None:
        self.is_paired = self._own_verdict is True and self._peer_verdict is True
