"""One computer's worker, as an engine host sees it: what it is, how it is, and the line to it.

In: what its owners (`nodes`, `neighbours`) decide about it. Out: its state for the window. It
opens and closes the line, and decides nothing.
"""

from __future__ import annotations

import time
from typing import Any, Literal, NamedTuple

import zmq
from msgspec.structs import replace

from engine.cluster import messages as m
from engine.cluster.codec import MAX_HEADER_BYTES
from engine.cluster.connection_watch import Connection, ConnectionWatch
from engine.cluster.join_token import JoinToken
from engine.cluster.processes import Child
from engine.cluster.runner_links import RunnerAddress
from engine.cluster.security import KeyPair
from engine.cluster.transport import Channel, Frames, connect, connect_once
from engine.host.messages import NodeDevice, NodeState, NodeStateName
from engine.host.worker_words import checked, host_of
from engine.plan.plan import Transport

# How many measurements of the round trip the smallest is taken of: the others waited for something.
ROUND_TRIPS = 8
MAX_UNANSWERED = 16


class Wanted(NamedTuple):
    """What a runner was asked for at its start."""

    listen_address: str
    transport: Transport


class Runner(NamedTuple):
    """A runner that listens."""

    address: RunnerAddress
    wanted: Wanted
    pid: int


class Node:
    """See the module.

    Attributes:
        keys: what this host shows its worker.
        public_key: the worker's permanent key; b"" for a child, and while it is not known.
        endpoint: where a worker elsewhere listens, or listened last.
        announced: where discovery says that it listens; "" where it says nothing.
        is_trusted: it is ours, paired with, or let in by its token.
        is_unlisted: it is ours, and the list on disk could not be changed to say so.
        is_named_here: its name was made up here, because it has not said its own yet.
        starting: devices whose runner is on its way, with what it was asked for.
        dialled: where the line goes, or went last.
        attempt_until: when an attempt to connect is given up; None while there is none.
        attempted_at, next_attempt_at: when the last one began, when to try again.
        patience_until: until when a failed attempt is not yet a lost node.
        token: of a person who wants this node to join.
        is_enrolling: the next attempt uses the token, not our own key.
    """

    def __init__(
        self, name: str, kind: Literal["this", "simulated", "remote"], keys: KeyPair
    ) -> None:
        """Args: name: first part of its devices' names."""
        self.name = name
        self.kind: Literal["this", "simulated", "remote"] = kind
        self.keys = keys
        self.public_key = b""
        self.endpoint = ""
        self.announced = ""
        self.is_trusted = kind != "remote"
        self.is_unlisted = False
        self.is_named_here = False
        self.state: NodeStateName = "starting"
        self.reason = ""
        self.code = ""
        self.version = ""
        self.description: m.NodeDescription | None = None
        self.telemetry: m.Telemetry | None = None
        self.speeds: tuple[m.DeviceSpeed, ...] = ()
        self.disk_bytes_per_second: float | None = None
        self.heard_at = time.monotonic()
        self.runners: dict[str, Runner] = {}
        self.starting: dict[str, Wanted] = {}
        self.channel: Channel[Any] | None = None
        self.child: Child | None = None
        self.attempt_until: float | None = None
        self.attempted_at = self.next_attempt_at = 0.0
        self.patience_until = 0.0
        self.token: JoinToken | None = None
        self.is_enrolling = False
        self.dialled = ""
        self._watch: ConnectionWatch | None = None
        self._probes: dict[int, float] = {}
        self._num_probes = 0
        self._round_trips: list[float] = []
        self._shown: tuple[str, str] = ("", "")
        self._since_s = time.time()

    @property
    def is_usable(self) -> bool:
        """Whether its devices can take a share now, or as soon as it has started again."""
        return self.description is not None and self.state in ("ready", "starting")

    # ---- the line ----------------------------------------------------------------------------

    def connect_child(self, context: zmq.Context[Any], server_key: bytes, endpoint: str) -> None:
        """Connect to a worker that this host started."""
        socket = connect(
            context,
            zmq.DEALER,
            self.keys,
            server_key,
            endpoint,
            max_message_bytes=MAX_HEADER_BYTES,
        )
        self._open(socket)

    def connect(self, context: zmq.Context[Any], keys: KeyPair, endpoint: str) -> None:
        """Connect to a worker elsewhere, once.

        Raises: ProtocolError: the endpoint is not one.
        """
        self.disconnect()
        socket, watch = connect_once(
            context, keys, self.public_key, endpoint, max_message_bytes=MAX_HEADER_BYTES
        )
        self._open(socket)
        self._watch = watch
        self.dialled = endpoint

    def _open(self, socket: zmq.Socket[Any]) -> None:
        self.channel = Channel(socket, m.WORKER_SENDS)
        self.heard_at = time.monotonic()
        self._probes.clear()
        self._round_trips.clear()

    def receive(self) -> m.Message | None:
        """What its worker said next, checked; None where it has said nothing (more).

        Raises:
            ProtocolError: the worker breaks the rules.
            PeerRefused: it speaks another protocol version.
        """
        assert self.channel is not None
        socket = self.channel.socket
        # Asked first: an exception takes ten times as long, and every node's turn ends this way.
        if not int(socket.get(zmq.EVENTS)) & zmq.POLLIN:
            return None
        # Only a frame that is not copied knows where it came from.
        first = socket.recv(zmq.DONTWAIT, copy=False)
        parts = [bytes(first.buffer), *(socket.recv_multipart() if first.more else ())]
        own_addresses = None
        if self.kind == "remote":
            came_from = first.get("Peer-Address")
            own_addresses = [host_of(self.dialled)]
            if isinstance(came_from, str) and came_from:
                own_addresses.append(came_from)
        received = self.channel.decode(Frames(parts))
        return checked(received.message, own_addresses)

    def disconnect(self, linger_ms: int = 0) -> None:
        """Close the line.

        Args:
            linger_ms: how long what was not sent yet may take.
        """
        if self._watch is not None:
            self._watch.close()
            self._watch = None
        if self.channel is not None:
            self.channel.socket.close(linger=linger_ms)
            self.channel = None
        self.attempt_until = None

    def connection(self) -> Connection:
        """How the line stands; that of a child is always "open"."""
        return self._watch.connection() if self._watch is not None else "open"

    def has_news(self) -> bool:
        """Whether the worker has said something that nobody has heard yet."""
        return self.channel is not None and self.channel.has_message()

    def sockets(self) -> list[zmq.Socket[Any]]:
        """To poll."""
        sockets = [self.channel.socket] if self.channel is not None else []
        return [*sockets, self._watch.socket] if self._watch is not None else sockets

    # ---- the round trip ----------------------------------------------------------------------

    def next_probe(self, now: float) -> m.Probe:
        """A message that times the way there and back."""
        self._num_probes += 1
        self._probes[self._num_probes] = now
        if len(self._probes) > MAX_UNANSWERED:
            del self._probes[min(self._probes)]
        return m.Probe(number=self._num_probes)

    def take_probe_answer(self, message: m.ProbeAnswer, now: float) -> None:
        """Its answer; one that was not asked for changes nothing."""
        sent_at = self._probes.pop(message.number, None)
        if sent_at is not None:
            self._round_trips = [*self._round_trips[1 - ROUND_TRIPS :], now - sent_at]

    # ---- what it is --------------------------------------------------------------------------

    def devices(self) -> dict[str, m.DeviceInfo]:
        """Its devices by name; empty until it has said who it is."""
        return {d.device: d for d in self.description.devices} if self.description else {}

    def own_name(self, device: str) -> str:
        """A device's name here: a remote worker may have chosen a name that is taken."""
        return f"{self.name}/{device.rpartition('/')[2]}"

    def to_state(self, busy: set[str], loading: set[str], in_use: set[str]) -> NodeState:
        """The node as the window lists it.

        Args: as `Nodes.states`.
        """
        own = {self.own_name(d): info for d, info in self.devices().items()}
        state = self.state
        if state == "ready" and (own.keys() & loading or self.starting):
            state = "loading"
        elif state == "ready" and own.keys() & busy:
            state = "busy"
        if self._shown != (state, self.reason):
            self._shown = (state, self.reason)
            self._since_s = time.time()
        usage = self.telemetry if state != "lost" else None
        gpus = usage.gpus if usage else ()
        return NodeState(
            name=self.name,
            kind=self.kind,
            state=state,
            reason=self.reason,
            host_name=self.description.host_name if self.description else "",
            version=self.description.version if self.description else self.version,
            devices=tuple(
                NodeDevice(
                    device=name,
                    kind=info.kind,
                    label=info.label,
                    memory_bytes=info.memory_bytes,
                    in_use=name in in_use,
                )
                for name, info in own.items()
            ),
            processes=usage.processes if usage else (),
            cpu_percent=usage.cpu_percent if usage else None,
            memory_used_bytes=usage.memory_used_bytes if usage else None,
            memory_total_bytes=usage.memory_total_bytes if usage else None,
            network_in_bytes_per_second=usage.network_in_bytes_per_second if usage else None,
            network_out_bytes_per_second=usage.network_out_bytes_per_second if usage else None,
            since_s=self._since_s,
            key=self.public_key.decode("ascii"),
            endpoint=self.endpoint,
            code=self.code,
            round_trip_seconds=min(self._round_trips) if self._round_trips else None,
            cpu_temperature_c=usage.cpu_temperature_c if usage else None,
            cpu_power_w=usage.cpu_power_w if usage else None,
            gpus=tuple(replace(g, device=self.own_name(g.device)) for g in gpus),
            speeds=tuple(replace(s, device=self.own_name(s.device)) for s in self.speeds),
            system=self.description.system if self.description else "",
            disk_bytes_per_second=self.disk_bytes_per_second,
        )
