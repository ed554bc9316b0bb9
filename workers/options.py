"""What a worker is told at its start.

In: nothing. Out: the options, and what a worker asks of the measurement of its speed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from engine.cluster.identity import TrustedPeers
from engine.cluster.messages import DeviceInfo, SpeedReport
from engine.cluster.security import KeyPair
from workers.slice_cache_settings import CacheSettings


class SpeedSource(Protocol):
    """Knows how fast this node is, once it has measured itself."""

    def report(self) -> SpeedReport | None:
        """The figures; None until they are known. Returns at once."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerOptions:
    """Everything that does not change while the worker runs.

    Attributes:
        name: of the node; first part of its devices' names.
        endpoint: where it listens.
        keys: its own.
        owner: public key that may do everything: of the engine host that started this worker, or
            this installation's own.
        devices: that it lends.
        trusted: paired engine hosts; None for a worker that serves its starter alone.
        lease_seconds: of silence that end a lease; None for never.
        runner_ports: TCP ports runners may listen on, first and last; None lets runners of this
            computer use local endpoints and any port.
        watched: further processes whose use is reported, with their roles.
    """

    name: str
    endpoint: str
    keys: KeyPair
    owner: bytes
    devices: tuple[DeviceInfo, ...]
    cache: CacheSettings
    trusted: TrustedPeers | None = None
    lease_seconds: float | None = None
    runner_ports: tuple[int, int] | None = None
    is_network_trusted: bool = False
    watched: dict[int, str] = field(default_factory=dict[int, str])
