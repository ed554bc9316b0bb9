"""Whether a plan's transport may be used on the networks of its nodes.

In: the transport of a plan and what each of its nodes says. Out: nothing, or one error. Pure.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from engine.errors import PlanError
from engine.plan.plan import Transport

# Marks the worker that an engine host starts on its own computer.
TRUSTED_NETWORK_VARIABLE = "SHARDMIX_TRUSTED_NETWORK"


class NodeTrust(NamedTuple):
    """What a node says of its network; `is_local` if this engine host starts its worker."""

    name: str
    is_trusted: bool
    is_local: bool


def check_trusted_network(transport: Transport, nodes: Iterable[NodeTrust]) -> None:
    """Refuse a transport without encryption where a network is not trusted.

    Raises: PlanError: names the nodes that lack it, and what to do.
    """
    if transport != "torch":
        return
    lacking = [node for node in nodes if not node.is_trusted]
    if not lacking:
        return
    advice: list[str] = []
    remote = [node.name for node in lacking if not node.is_local]
    if remote:
        advice.append(f"start shardmix-worker with --trusted-network on {' and '.join(remote)}")
    if len(remote) < len(lacking):
        advice.append(f"start shardmix with {TRUSTED_NETWORK_VARIABLE}=1 on this computer")
    names = ", ".join(node.name for node in lacking)
    raise PlanError(
        "the plan asks for transport torch, which neither encrypts nor authenticates, and the "
        f"network of {names} is not marked as trusted; {' and '.join(advice)}, or use transport zmq"
    )
