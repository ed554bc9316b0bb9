"""Names, addresses and reasons of nodes, as people read and write them.

In: what a person typed, what became of a connection. Out: endpoints, names, one-line reasons.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator

from engine.cluster.connection_watch import Connection
from engine.errors import ConfigError

DEFAULT_PORT = 47500
_MAX_NAME = 63


def parse_address(text: str) -> str:
    """An endpoint from what a person writes.

    Args:
        text: "HOST", "HOST:PORT" or "tcp://HOST:PORT"; an IPv6 address in brackets.
    Raises: ConfigError: it is no address.
    """
    found = re.fullmatch(
        r"(?:tcp://)?([A-Za-z0-9][A-Za-z0-9_.-]{0,252}|\[[0-9A-Fa-f:.%a-z]{2,64}\])(?::([0-9]{1,5}))?",
        text.strip(),
    )
    port = int(found[2] or DEFAULT_PORT) if found is not None else 0
    # The port after it is the one to pair on.
    if found is None or not 0 < port < 65535:
        raise ConfigError(
            f"{text[:100]!r} is no address of a worker; write HOST or HOST:PORT, such as "
            f"192.168.1.7:{DEFAULT_PORT}"
        )
    return f"tcp://{found[1]}:{port}"


def shown_address(endpoint: str) -> str:
    """An endpoint without its transport."""
    return endpoint.removeprefix("tcp://")


def numbered(name: str) -> Iterator[str]:
    """The name, name-2, name-3 …, for one to be chosen that is free."""
    yield name
    for number in itertools.count(2):
        ending = f"-{number}"
        yield name[: _MAX_NAME - len(ending)] + ending


def why_no_line(name: str, endpoint: str, connection: Connection, is_enrolling: bool) -> str:
    """Why there is no connection to a node.

    Args:
        endpoint: where it was looked for.
        is_enrolling: whether it was with a join token.
    """
    where = shown_address(endpoint)
    if connection == "nobody":
        return f"nothing listens at {where}; is the worker running there?"
    if connection == "cut":
        return "the connection to its worker was cut"
    if connection == "refused" and is_enrolling:
        return (
            f"{name} does not let this computer in: the join token was used or has expired. Make "
            "another one there with `shardmix-worker token`"
        )
    if connection == "refused":
        return f"{name} does not let this computer in: pair with it again"
    return f"what listens at {where} is not {name}: it has another key, or is no worker"
