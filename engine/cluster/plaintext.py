"""The one way to turn encryption off: for the benchmark that measures its cost, on one computer.

In: an endpoint, and a variable of the environment. Out: whether its socket is to be plain. Peers of
a plain socket still say their public keys, so that everything but CURVE goes on as ever, but they
need not have the secret ones. Local endpoints and the loopback are open to every user of the
computer, so any of them who has seen a public key may come as its owner: that is accepted for a
benchmark, and for nothing else. Nobody else sets the variable, no socket that another computer can
reach obeys it, and `shardmix-worker run` does not start with it.
"""

from __future__ import annotations

import functools
import ipaddress
import logging
import os

from engine.errors import ConfigError, ProtocolError

logger = logging.getLogger(__name__)

PLAINTEXT_VARIABLE = "SHARDMIX_BENCHMARK_PLAINTEXT"


def is_plaintext_wanted() -> bool:
    """Whether this process was started with the switch."""
    return os.environ.get(PLAINTEXT_VARIABLE) == "1"


def refuse_plaintext(command: str) -> None:
    """For commands that other computers talk to.

    Raises: ConfigError: the switch is set.
    """
    if is_plaintext_wanted():
        raise ConfigError(
            f"{PLAINTEXT_VARIABLE}=1 turns encryption off, which {command} never does: only "
            "benchmarks on the loopback may do without. Unset it"
        )


def is_plaintext(endpoint: str) -> bool:
    """Whether a socket at `endpoint` goes without CURVE; the first that does is warned of.

    Args: endpoint: as `transport.listen` and `transport.connect` take it.
    Raises: ProtocolError: it is asked for where it is not allowed.
    """
    if not is_plaintext_wanted():
        return False
    if not _is_on_this_computer(endpoint):
        raise ProtocolError(
            f"{PLAINTEXT_VARIABLE}=1 asks for sockets without encryption, but {endpoint[:100]} is "
            "not on the loopback, and only benchmarks on the loopback may do without. Unset it"
        )
    _warn()
    return True


@functools.cache
def _warn() -> None:
    """Once in a process."""
    logger.warning(
        "%s=1: NOTHING IS ENCRYPTED, and every user of this computer can take part. For benchmarks "
        "alone; unset it",
        PLAINTEXT_VARIABLE,
    )


def _is_on_this_computer(endpoint: str) -> bool:
    transport, _, place = endpoint.partition("://")
    if transport == "ipc":
        return True
    host = place.rpartition(":")[0].strip("[]")
    try:
        return transport == "tcp" and ipaddress.ip_address(host).is_loopback
    except ValueError:  # "*", or a name, which may mean anything
        return False
