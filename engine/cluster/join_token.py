"""The one line that lets an engine host in: where a worker listens, its key, and a key to come with.

It works once and not for long: whoever comes with its guest key may name a permanent key to be
trusted (`messages.Enroll`), and the worker then drops the guest key. Until then whoever has the
line may do so; it is shown to the person at the worker's terminal and sent nowhere.
"""

from __future__ import annotations

import base64
import binascii
import re

import msgspec

from engine.cluster.security import KeyPair, is_public_key
from engine.errors import PeerRefused

PREFIX = "shardmix2-"
TOKEN_SECONDS = 600.0
NODE_NAME = re.compile(r"(?!(?:this|local-\d+)$)[A-Za-z0-9][A-Za-z0-9_.-]{0,62}")


class JoinToken(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What the line holds.

    Attributes:
        endpoint: the worker's control socket, "tcp://ADDRESS:PORT".
        public_key: the worker's.
        guest: the key pair that the engine host comes with the first time.
        expires_s: when the worker drops the guest key, seconds since the epoch by its clock.
    """

    name: str
    endpoint: str
    public_key: bytes
    guest: KeyPair
    expires_s: float

    def encode(self) -> str:
        """The line."""
        raw = base64.urlsafe_b64encode(msgspec.msgpack.encode(self)).decode("ascii")
        return PREFIX + raw.rstrip("=")


def decode_token(line: str) -> JoinToken:
    """Read a line made by `JoinToken.encode`.

    Raises: PeerRefused: it is not one.
    """
    text = line.strip()
    try:
        if not text.startswith(PREFIX):
            raise ValueError
        body = text[len(PREFIX) :]
        raw = base64.b64decode(body + "=" * (-len(body) % 4), altchars=b"-_", validate=True)
        token = msgspec.msgpack.decode(raw, type=JoinToken)
        keys = (token.public_key, token.guest.public, token.guest.secret)
        if not all(is_public_key(key) for key in keys):
            raise ValueError
        if not NODE_NAME.fullmatch(token.name) or not token.endpoint.startswith("tcp://"):
            raise ValueError
        return token
    except (ValueError, binascii.Error, msgspec.DecodeError):
        raise PeerRefused(
            f"{text[:20]!r}… is not a join token ({PREFIX}…); copy the whole line that "
            "`shardmix-worker token` prints on the other computer"
        ) from None
