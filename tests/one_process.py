"""All devices of a plan in one process: the oracle for the exchange between processes."""

from __future__ import annotations

from engine.cluster.lockstep import Lockstep


class OneProcess(Lockstep):
    """The shards of a plan, run in lockstep."""
