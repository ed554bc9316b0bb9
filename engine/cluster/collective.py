"""The interface between computing a step and moving its activations.

In: after each plan row, this device's residual stream and partial sum. Out: the residual stream at
the entry of the next row. `exchange.Exchange` does it over encrypted sockets,
`torch_exchange.TorchExchange` over torch.distributed; both give the same bits.
"""

from __future__ import annotations

from typing import Protocol

from engine.cluster.collectives import RowHandOver
from engine.cluster.peer_links import PeerLinks
from engine.cluster.step_counters import Counters
from engine.cluster.wire_format import Activations
from engine.model.batch import StepKind
from engine.plan.plan import Plan


class Collective(Protocol):
    """One device's side of all hand-overs of an epoch.

    Attributes:
        device_index: this device's column in the plan.
        links: sockets to the peers; a runner waits on them, too.
        counters: of the step since `begin_step`.
    """

    plan: Plan
    device_index: int
    links: PeerLinks
    counters: Counters

    def row(self, row: int) -> RowHandOver:
        """What this device does after `row`."""
        ...

    def begin_step(self, step_id: int, kind: StepKind) -> None:
        """Start a step, with nothing left of steps that were given up.

        Raises: WorkerLost: a peer is gone.
        """
        ...

    def hand_over(
        self, row: int, x: Activations | None, partial: Activations | None, num_tokens: int
    ) -> Activations | None:
        """`start` and `finish` in one."""
        ...

    def start(
        self,
        row: int,
        piece: int,
        x: Activations | None,
        partial: Activations | None,
        num_tokens: int,
    ) -> None:
        """Send what this device owes after `row`, and get ready for what it needs.

        Args:
            piece: which of the step's pieces crosses.
            x: the residual stream float32 [num_tokens, width], where this device contributed.
            partial: its partial sum [num_tokens, width], likewise.
            num_tokens: tokens of the piece that cross, at least 1.
        Raises:
            EngineError: the partial sum does not fit the wire format.
            ProtocolError: a peer sent something else than the plan says.
            WorkerLost: a peer takes nothing.
        """
        ...

    def finish(self, row: int, piece: int) -> Activations | None:
        """The residual stream at the next row, of a piece; None without a share there.

        Raises:
            ProtocolError: a peer sent something else than the plan says.
            WorkerLost: a peer is gone, or said nothing for too long.
        """
        ...

    def take_early(self) -> None:
        """While idle: answer the peers' pings, and keep what they sent for the next step."""
        ...

    def give_up(self, step_id: int) -> None:
        """A step was given up, here or on another device: nobody completes its hand-overs."""
        ...

    def close(self) -> None:
        """Take leave of the peers."""
        ...
