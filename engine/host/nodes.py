"""The nodes an engine host knows: connections to their workers, and what those report.

In: workers to start or connect to, messages from them. Out: node states for the window, runner
addresses for plans. Everything runs in the host's main thread, except starting a process.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import zmq

from engine.cluster import messages as m
from engine.cluster.coordinator import RunnerAddress
from engine.cluster.join_token import JoinToken
from engine.cluster.processes import Address, Child, Greeting
from engine.cluster.security import KeyPair
from engine.cluster.transport import Channel, connect
from engine.errors import EngineError, PlanError, WorkerLost, error_by_name
from engine.host.messages import NodeDevice, NodeState
from engine.host.telemetry_rate import wanted_hz

logger = logging.getLogger(__name__)

WORKER_START_SECONDS = 30.0
HELLO_SECONDS = 1.0
# A worker's telemetry comes every second; a longer silence is a lost connection, or a frozen worker.
SILENCE_SECONDS = 5.0
# A worker of this computer may be starved by what its runners compute.
LOCAL_SILENCE_SECONDS = 10.0
MAX_SIMULATED = 16
SIMULATED_PREFIX = "local-"
THIS_NODE = "this"

State = Literal["starting", "ready", "loading", "busy", "lost"]


class Node:
    """One computer's worker as this host sees it."""

    def __init__(
        self, name: str, kind: Literal["this", "simulated", "remote"], keys: KeyPair
    ) -> None:
        """Args: name: first part of its devices' names. keys: what this host shows its worker."""
        self.name = name
        self.keys = keys
        self.kind: Literal["this", "simulated", "remote"] = kind
        self.state: State = "starting"
        self.reason = ""
        self.description: m.NodeDescription | None = None
        self.telemetry: m.Telemetry | None = None
        self.heard_at = time.monotonic()
        self.runners: dict[str, _Runner] = {}
        self.starting: dict[str, str] = {}
        self.channel: Channel[Any] | None = None
        self.child: Child | None = None

    def devices(self) -> dict[str, m.DeviceInfo]:
        """Its devices by name; empty until it has said who it is."""
        return {d.device: d for d in self.description.devices} if self.description else {}


class _Runner(NamedTuple):
    """A runner that listens; `listen_address` is what it was asked to listen on."""

    address: RunnerAddress
    listen_address: str
    pid: int


class Nodes:
    """All nodes of a host."""

    def __init__(
        self,
        context: zmq.Context[Any],
        keys: KeyPair,
        call_soon: Callable[[Callable[[], None]], None],
        on_change: Callable[[], None],
        on_runner_lost: Callable[[str, bytes, str], None],
    ) -> None:
        """Know nobody yet.

        Args:
            keys: the host's own; workers it starts let in its public half.
            call_soon: runs a function in the main thread.
            on_change: something a plan waits for may have happened.
            on_runner_lost: (device, the runner's public key or b"" if it never listened, cause).
        """
        self._context = context
        self._keys = keys
        self._call_soon = call_soon
        self._on_change = on_change
        self._on_runner_lost = on_runner_lost
        self._hello = m.Hello(host_name=socket.gethostname(), telemetry_hz=wanted_hz())
        self._nodes: dict[str, Node] = {}
        self._hello_at = 0.0
        self._is_closing = False
        self._enders: list[threading.Thread] = []

    # ---- adding ------------------------------------------------------------------------------

    def start_local(self, name: str) -> None:
        """Start the worker of this computer, or of a simulated node, unless it runs."""
        node = self._nodes.get(name)
        if node is not None and node.state != "lost":
            return
        node = Node(name, "this" if name == THIS_NODE else "simulated", self._keys)
        self._nodes[name] = node
        threading.Thread(
            target=self._spawn, args=(node,), name=f"start {name}", daemon=True
        ).start()
        self._on_change()

    def start_simulated(self, count: int) -> list[str]:
        """Make sure that local-1 … local-`count` run.

        Returns: their names.
        Raises: PlanError: too many.
        """
        if not 1 <= count <= MAX_SIMULATED:
            raise PlanError(
                f"{count} simulated nodes were asked for, 1 to {MAX_SIMULATED} are possible"
            )
        names = [f"{SIMULATED_PREFIX}{n}" for n in range(1, count + 1)]
        for name in names:
            self.start_local(name)
        return names

    def join(self, token: JoinToken) -> str:
        """Connect to a worker elsewhere.

        Returns: its name here, unique among the nodes.
        """
        name, number = token.name, 2
        while name in self._nodes and self._nodes[name].state != "lost":
            name, number = f"{token.name}-{number}", number + 1
        node = Node(name, "remote", token.guest)
        self._nodes[name] = node
        self._connect(node, token.public_key, token.endpoint)
        return name

    def _spawn(self, node: Node) -> None:
        """In a thread of its own: start a worker process."""
        watched = {str(os.getpid()): "engine host"} if node.kind == "this" else {}
        child = Child(
            "workers.daemon",
            ["shardmix-worker", node.name],
            Greeting(self._keys.public.decode("ascii"), {"watched": watched}),
            on_exit=self._on_worker_exit,
        )
        node.child = child
        if self._is_closing:
            child.end(0)
            return
        try:
            address = child.address(WORKER_START_SECONDS)
        except WorkerLost as error:
            cause = str(error)
            self._call_soon(lambda: self._lose(node, cause))
            return
        self._call_soon(lambda: self._connect_child(node, address))

    def _connect_child(self, node: Node, address: Address) -> None:
        self._connect(node, address.public_key.encode("ascii"), address.endpoints[0])

    def _connect(self, node: Node, server_key: bytes, endpoint: str) -> None:
        if self._is_closing:
            return
        dealer = connect(self._context, zmq.DEALER, node.keys, server_key, endpoint)
        node.channel = Channel(dealer, m.WORKER_SENDS)
        node.heard_at = time.monotonic()
        self._tell(node, self._hello)
        self._on_change()

    def _tell(self, node: Node, message: m.Message) -> None:
        """Send, if the node is connected; one that takes nothing is lost."""
        if node.channel is None:
            return
        try:
            node.channel.send(message)
        except WorkerLost:
            # libzmq drops the connection for good when the other end refuses our key.
            self._lose(node, "it does not let this computer in; copy its join token again")

    # ---- hearing -----------------------------------------------------------------------------

    def sockets(self) -> list[zmq.Socket[Any]]:
        """To poll."""
        return [n.channel.socket for n in self._nodes.values() if n.channel is not None]

    def hear(self) -> bool:
        """Take what the workers said; True if something changed for the window."""
        changed = False
        now = time.monotonic()
        for node in list(self._nodes.values()):
            channel = node.channel
            while channel is not None and node.channel is channel:
                try:
                    received = channel.receive(0)
                except EngineError as error:
                    self._lose(node, str(error))
                    break
                if received is None:
                    break
                node.heard_at = now
                self._take(node, received.message)
                changed = True
            limit = SILENCE_SECONDS if node.kind == "remote" else LOCAL_SILENCE_SECONDS
            if node.channel is not None and now - node.heard_at > limit:
                self._lose(
                    node, f"no word from its worker for {limit:.0f} s; is it frozen or cut off?"
                )
                changed = True
        if now - self._hello_at > HELLO_SECONDS:
            self._hello_at = now
            for node in self._nodes.values():
                if node.kind == "remote" and node.state != "lost":
                    self._tell(node, self._hello)
        return changed

    def _take(self, node: Node, message: m.Message) -> None:
        if isinstance(message, m.NodeDescription):
            # A worker that introduces itself again has forgotten this host and its runners.
            self._forget_runners(node, "its worker started over")
            node.description = message
            node.state = "ready"
            self._on_change()
        elif isinstance(message, m.Telemetry):
            node.telemetry = message
        elif isinstance(message, m.RunnerStarted):
            device = self._own_name(node, message.device)
            listen_address = node.starting.pop(device, "")
            address = RunnerAddress(
                device,
                message.control_endpoint,
                message.exchange_endpoint,
                message.public_key,
                node.keys,
            )
            node.runners[device] = _Runner(address, listen_address, message.pid)
            self._on_change()
        elif isinstance(message, m.RunnerExited):
            device = self._own_name(node, message.device)
            runner = node.runners.get(device)
            if runner is not None and runner.pid == message.pid:
                del node.runners[device]
                self._on_runner_lost(device, runner.address.public_key, message.cause)
            elif node.starting.pop(device, None) is not None:
                self._on_runner_lost(device, b"", message.cause)
            self._on_change()
        elif isinstance(message, m.Failed):
            node.reason = message.message
            self._lose(node, str(error_by_name(message.error, message.message)))

    @staticmethod
    def _own_name(node: Node, device: str) -> str:
        """A device's name here: a remote worker may have chosen a name that is taken."""
        return f"{node.name}/{device.rpartition('/')[2]}"

    def _on_worker_exit(self, child: Child) -> None:
        if child.is_ending:
            return
        cause = f"its worker ended: {child.cause()}"

        def tell() -> None:
            node = next((n for n in self._nodes.values() if n.child is child), None)
            if node is not None:
                self._lose(node, cause)

        self._call_soon(tell)

    def _lose(self, node: Node, cause: str) -> None:
        if node.state == "lost":
            return
        logger.warning("%s is lost: %s", node.name, cause)
        node.state, node.reason = "lost", cause
        if node.channel is not None:
            node.channel.close()
            node.channel = None
        if node.child is not None:  # It may live and be frozen; nobody else would end it.
            self._enders.append(threading.Thread(target=node.child.end, args=(1.0,), daemon=True))
            self._enders[-1].start()
        self._forget_runners(node, cause)
        self._on_change()

    def _forget_runners(self, node: Node, cause: str) -> None:
        runners, starting = dict(node.runners), dict(node.starting)
        node.runners.clear()
        node.starting.clear()
        for device, runner in runners.items():
            self._on_runner_lost(device, runner.address.public_key, cause)
        for device in starting:
            self._on_runner_lost(device, b"", cause)

    # ---- runners -----------------------------------------------------------------------------

    def node_of(self, device: str) -> Node | None:
        """The node a device belongs to, if it is known."""
        return self._nodes.get(device.rpartition("/")[0])

    def info(self, device: str) -> m.DeviceInfo | None:
        """What is known of a device, once its node has said who it is."""
        node = self.node_of(device)
        if node is None or node.description is None:
            return None
        kind = device.rpartition("/")[2]
        return next(
            (d for d in node.description.devices if d.device.rpartition("/")[2] == kind), None
        )

    def start_runner(self, device: str, listen_address: str) -> None:
        """Start a device's runner, or restart it where it listens elsewhere."""
        node = self.node_of(device)
        assert node is not None
        assert node.description is not None
        kind = device.rpartition("/")[2]
        worker_name = f"{node.description.name}/{kind}"
        if device in node.runners:
            if node.runners[device].listen_address == listen_address:
                return
            del node.runners[device]
            self._tell(node, m.StopRunner(device=worker_name))
        if device not in node.starting:
            node.starting[device] = listen_address
            self._tell(node, m.StartRunner(device=worker_name, listen_address=listen_address))

    def stop_runners_except(self, devices: set[str]) -> None:
        """Free the memory of devices that have no share."""
        for node in self._nodes.values():
            for device in [d for d in node.runners if d not in devices]:
                del node.runners[device]
                assert node.description is not None
                kind = device.rpartition("/")[2]
                self._tell(node, m.StopRunner(device=f"{node.description.name}/{kind}"))

    def drop_runner(self, error: EngineError) -> None:
        """End a runner that no longer answers, so that the next plan gets a new one."""
        device = error.device if isinstance(error, WorkerLost) else None
        if device is None:
            return
        node = self.node_of(device)
        if node is not None and device in node.runners and node.description is not None:
            del node.runners[device]
            kind = device.rpartition("/")[2]
            self._tell(node, m.StopRunner(device=f"{node.description.name}/{kind}"))

    def runner(self, device: str) -> RunnerAddress | None:
        """Where a device's runner listens, once it does."""
        node = self.node_of(device)
        if node is None or device not in node.runners:
            return None
        return node.runners[device].address

    def names(self) -> list[str]:
        """All nodes, in order of joining."""
        return list(self._nodes)

    def get(self, name: str) -> Node | None:
        """A node by name."""
        return self._nodes.get(name)

    def states(self, busy: set[str], loading: set[str], in_use: set[str]) -> tuple[NodeState, ...]:
        """All nodes as the window lists them.

        Args:
            busy, loading: devices that compute, or take weights, right now.
            in_use: devices with a share in the plan in force.
        """
        return tuple(self._state(n, busy, loading, in_use) for n in self._nodes.values())

    def _state(self, node: Node, busy: set[str], loading: set[str], in_use: set[str]) -> NodeState:
        own = {self._own_name(node, d): info for d, info in node.devices().items()}
        state = node.state
        if state == "ready" and (own.keys() & loading or node.starting):
            state = "loading"
        elif state == "ready" and own.keys() & busy:
            state = "busy"
        usage = node.telemetry
        return NodeState(
            name=node.name,
            kind=node.kind,
            state=state,
            reason=node.reason,
            host_name=node.description.host_name if node.description else "",
            version=node.description.version if node.description else "",
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
            processes=usage.processes if usage and node.state != "lost" else (),
            cpu_percent=usage.cpu_percent if usage else None,
            memory_used_bytes=usage.memory_used_bytes if usage else None,
            memory_total_bytes=usage.memory_total_bytes if usage else None,
            network_in_bytes_per_second=usage.network_in_bytes_per_second if usage else None,
            network_out_bytes_per_second=usage.network_out_bytes_per_second if usage else None,
        )

    def close(self) -> None:
        """End what this host started, all at once."""
        self._is_closing = True
        for node in self._nodes.values():
            if node.channel is not None:
                if node.kind == "remote":
                    node.channel.socket.linger = 200
                    with contextlib.suppress(WorkerLost):
                        node.channel.send(m.Shutdown())
                node.channel.socket.close()
        children = [n.child for n in self._nodes.values() if n.child is not None]
        enders = [threading.Thread(target=child.end, daemon=True) for child in children]
        for ender in enders:
            ender.start()
        for ender in [*enders, *self._enders]:
            ender.join(4)
