"""The nodes an engine host knows: what their workers report, and the runners on them.

In: workers to start, messages from all of them. Out: node states for the window, runner addresses
for plans. Workers of other computers come and go in `neighbours`. Everything runs in the host's
main thread, except starting a process.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import zmq

from engine.cluster import messages as m
from engine.cluster.identity import TrustedPeers
from engine.cluster.processes import Address, Child, Greeting
from engine.cluster.runner_links import RunnerAddress
from engine.cluster.security import KeyPair
from engine.errors import EngineError, PlanError, WorkerLost, error_by_name
from engine.host.messages import NodeState
from engine.host.neighbours import RETRY_SECONDS, Neighbours
from engine.host.node import Node, Runner, Wanted
from engine.host.node_report import checked
from engine.host.telemetry_rate import wanted_hz
from engine.plan.plan import Transport

logger = logging.getLogger(__name__)

WORKER_START_SECONDS = 30.0
# A worker of this computer may be starved by what its runners compute.
LOCAL_SILENCE_SECONDS = 10.0
MAX_SIMULATED = 16
# Of one worker in one round.
MAX_MESSAGES = 100
SIMULATED_PREFIX = "local-"
THIS_NODE = "this"


class Nodes:
    """All nodes of a host."""

    def __init__(
        self,
        context: zmq.Context[Any],
        keys: KeyPair,
        trusted: TrustedPeers,
        call_soon: Callable[[Callable[[], None]], None],
        on_change: Callable[[], None],
        on_runner_lost: Callable[[str, bytes, str], None],
    ) -> None:
        """Know nobody yet.

        Args:
            keys: the host's own; workers it starts let in its public half.
            trusted: nodes on other computers that a person has paired with.
            call_soon: runs a function in the main thread.
            on_change: something a plan waits for may have happened.
            on_runner_lost: (device, the runner's public key or b"" if it never listened, cause).
        """
        self._context = context
        self._keys = keys
        self._call_soon = call_soon
        self._on_change = on_change
        self._on_runner_lost = on_runner_lost
        self._nodes: dict[str, Node] = {}
        self._is_closing = False
        self._enders: list[threading.Thread] = []
        self.host_name = socket.gethostname()
        self._hello = m.Hello(host_name=self.host_name, telemetry_hz=wanted_hz())
        self.neighbours = Neighbours(
            context, keys, trusted, self._hello, self._nodes, self._lose, on_change
        )

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
        if self._is_closing:
            return
        node.connect_child(self._context, address.public_key.encode("ascii"), address.endpoints[0])
        self._tell(node, self._hello)
        self._on_change()

    def _tell(self, node: Node, message: m.Message) -> None:
        """Send, if the node is connected; one that takes nothing is lost."""
        if node.channel is None:
            return
        try:
            node.channel.send(message)
        except WorkerLost as error:
            self._lose(node, str(error))

    # ---- hearing -----------------------------------------------------------------------------

    def sockets(self) -> list[zmq.Socket[Any]]:
        """To poll."""
        return [socket for node in self._nodes.values() for socket in node.sockets()]

    def hear(self) -> bool:
        """Take what the workers said; True if something changed for the window."""
        changed = False
        for node in list(self._nodes.values()):
            changed = self._hear(node) or changed
        self.neighbours.tick()
        return changed

    def _hear(self, node: Node) -> bool:
        changed = False
        channel = node.channel
        for _ in range(MAX_MESSAGES):  # One that floods does not keep the others waiting.
            if channel is None or node.channel is not channel:
                break
            try:
                received = channel.receive(0)
                message = (
                    None
                    if received is None
                    else checked(received.message, is_local=node.kind != "remote")
                )
            except EngineError as error:
                if node.kind == "remote":
                    self.neighbours.failed(node, str(error))
                else:
                    self._lose(node, str(error))
                return True
            if message is None:
                break
            node.heard_at = time.monotonic()
            self._take(node, message)
            changed = True
        silence = time.monotonic() - node.heard_at
        if node.child is not None and channel is not None and silence > LOCAL_SILENCE_SECONDS:
            limit = f"{LOCAL_SILENCE_SECONDS:.0f} s"
            self._lose(node, f"no word from its worker for {limit}; is it frozen or cut off?")
            return True
        return changed

    def _take(self, node: Node, message: m.Message) -> None:
        if node.kind == "remote" and self.neighbours.take(node, message):
            return
        if isinstance(message, m.NodeDescription):
            # A worker that introduces itself again has forgotten this host and its runners.
            self._forget_runners(node, "its worker started over")
            node.description = message
            node.state = "ready"
            self._on_change()
        elif isinstance(message, m.Telemetry):
            node.telemetry = message
        elif isinstance(message, m.SpeedReport):
            node.speeds = message.devices
        elif isinstance(message, m.RunnerStarted):
            device = node.own_name(message.device)
            address = RunnerAddress(
                device,
                message.control_endpoint,
                message.exchange_endpoint,
                message.public_key,
                node.keys,
                message.rendezvous,
            )
            wanted = node.starting.pop(device, None)
            if wanted is None:
                return  # Nobody wants it any more, or ever did.
            node.runners[device] = Runner(address, wanted, message.pid)
            self._on_change()
        elif isinstance(message, m.RunnerExited):
            device = node.own_name(message.device)
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
        """Put a node in state "lost"; one that is lost already has another reason for it now."""
        node.disconnect()
        node.next_attempt_at = time.monotonic() + RETRY_SECONDS
        if node.state == "lost":
            node.reason = cause
            return
        logger.warning("%s is lost: %s", node.name, cause)
        node.state, node.reason, node.code = "lost", cause, ""
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
        """The node a device belongs to, if it may be used."""
        return self.get(device.rpartition("/")[0])

    def info(self, device: str) -> m.DeviceInfo | None:
        """What is known of a device, once its node has said who it is."""
        node = self.node_of(device)
        if node is None or node.description is None:
            return None
        kind = device.rpartition("/")[2]
        return next(
            (d for d in node.description.devices if d.device.rpartition("/")[2] == kind), None
        )

    def start_runner(self, device: str, listen_address: str, transport: Transport) -> None:
        """Start a device's runner, or restart it where it listens elsewhere or otherwise."""
        node = self.node_of(device)
        assert node is not None
        assert node.description is not None
        kind = device.rpartition("/")[2]
        worker_name = f"{node.description.name}/{kind}"
        wanted = Wanted(listen_address, transport)
        if device in node.runners:
            if node.runners[device].wanted == wanted:
                return
            del node.runners[device]
            self._tell(node, m.StopRunner(device=worker_name))
        if device not in node.starting:
            node.starting[device] = wanted
            start = m.StartRunner(
                device=worker_name, listen_address=listen_address, transport=transport
            )
            self._tell(node, start)

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

    def ready_devices(self) -> list[str]:
        """Devices that could take a share at once, this computer's first."""
        ready = [node for node in self._nodes.values() if node.state == "ready"]
        ready.sort(key=lambda node: node.name != THIS_NODE)
        return [node.own_name(device) for node in ready for device in node.devices()]

    def names(self) -> list[str]:
        """Nodes that may be used, in order of joining."""
        return [node.name for node in self._nodes.values() if node.is_trusted]

    def get(self, name: str) -> Node | None:
        """A node that may be used, by name."""
        node = self._nodes.get(name)
        return node if node is not None and node.is_trusted else None

    def find(self, name: str) -> Node:
        """A node, trusted or not, by name.

        Raises: PlanError: there is none.
        """
        if name not in self._nodes:
            raise PlanError(
                f"there is no node {name!r}; known are {', '.join(self._nodes)}. Choose one of them, "
                "or add the node by its address"
            )
        return self._nodes[name]

    def states(self, busy: set[str], loading: set[str], in_use: set[str]) -> tuple[NodeState, ...]:
        """All nodes as the window lists them.

        Args:
            busy, loading: devices that compute, or take weights, right now.
            in_use: devices with a share in the plan in force.
        """
        return tuple(node.to_state(busy, loading, in_use) for node in self._nodes.values())

    def close(self) -> None:
        """End what this host started, all at once."""
        self._is_closing = True
        self.neighbours.let_go()
        for node in self._nodes.values():
            node.disconnect()
        children = [n.child for n in self._nodes.values() if n.child is not None]
        enders = [threading.Thread(target=child.end, daemon=True) for child in children]
        for ender in enders:
            ender.start()
        self.neighbours.close()
        for ender in [*enders, *self._enders]:
            ender.join(4)
