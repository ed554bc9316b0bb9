"""What a person typed to add a node: a join token, an address, or neither. No Qt."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

TOKEN = re.compile(r"shardmix1-[A-Za-z0-9_-]+")
# A name, an IPv4 address, or an IPv6 address in brackets; then a port.
ADDRESS = re.compile(r"(?:tcp://)?([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+(?:%[\w.-]+)?\]):(\d{1,5})/?")
MAX_PORT = 65535


@dataclass(frozen=True, slots=True)
class Entry:
    """What was typed.

    Attributes:
        value: the token, or the address as "tcp://HOST:PORT".
    """

    kind: Literal["empty", "token", "address", "unknown"]
    value: str = ""

    @property
    def is_usable(self) -> bool:
        """Whether a node can be added by it."""
        return self.kind in ("token", "address")


def read_entry(text: str) -> Entry:
    """Recognise a token or an address, whatever white space surrounds it or breaks it."""
    joined = "".join(text.split())
    if not joined:
        return Entry("empty")
    if TOKEN.fullmatch(joined):
        return Entry("token", joined)
    address = ADDRESS.fullmatch(joined)
    if address is not None and 0 < int(address[2]) <= MAX_PORT:
        return Entry("address", f"tcp://{address[1]}:{int(address[2])}")
    return Entry("unknown", joined)
