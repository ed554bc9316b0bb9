"""The one way to turn encryption off: for the benchmark that measures its cost, on one computer.

In: an endpoint, and a variable of the environment. Out: whether its socket is to be plain. Peers of
a plain socket still say their public keys, so that everything but CURVE goes on as ever, but they
need not have the secret ones. Nobody else sets the variable, and no socket that another computer
can reach obeys it.
"""

from __future__ import annotations

import ipaddress
import os

from engine.errors import ProtocolError

PLAINTEXT_VARIABLE = "SHARDMIX_BENCHMARK_PLAINTEXT"


def is_plaintext(endpoint: str) -> bool:
    """Whether a socket at `endpoint` goes without CURVE.

    Args: endpoint: as `transport.listen` and `transport.connect` take it.
    Raises: ProtocolError: it is asked for where it is not allowed.
    """
    if os.environ.get(PLAINTEXT_VARIABLE) != "1":
        return False
    if not _is_on_this_computer(endpoint):
        raise ProtocolError(
            f"{PLAINTEXT_VARIABLE}=1 asks for sockets without encryption, but {endpoint[:100]} is "
            "not on the loopback, and only benchmarks on the loopback may do without. Unset it"
        )
    return True


def _is_on_this_computer(endpoint: str) -> bool:
    transport, _, place = endpoint.partition("://")
    if transport == "ipc":
        return True
    host = place.rpartition(":")[0].strip("[]")
    try:
        return transport == "tcp" and ipaddress.ip_address(host).is_loopback
    except ValueError:  # "*", or a name, which may mean anything
        return False
