"""The worker: offers a node's devices to one engine host and supervises a runner for each in use.

In: messages of the engine host (start and stop runners). Out: who this node is, what its runners
do, and why one ended. It computes nothing. The engine host of this computer starts it as
`python -m workers.daemon shardmix-worker NAME` and it ends with that host; `shardmix-worker run`
starts it for a host elsewhere.
"""

from __future__ import annotations

import logging
import os
import queue
import socket
import sys
import threading
import time
from importlib import metadata
from typing import Any

import zmq

from engine.cluster import messages as m
from engine.cluster.processes import (
    Child,
    Greeting,
    answer_address,
    end_with_parent,
    read_greeting,
)
from engine.cluster.security import Gatekeeper, KeyPair, new_key_pair
from engine.cluster.transport import Channel, listen, new_local_endpoint
from engine.errors import EngineError, WorkerLost
from workers.telemetry import Meter, list_devices, machine_id, system_label

logger = logging.getLogger(__name__)

TELEMETRY_SECONDS = 1.0
RUNNER_START_SECONDS = 60.0
# A frozen runner does not hear that it should end; it is killed after this, well before this
# process must be gone itself.
RUNNER_END_SECONDS = 1.0
# Threads that wait for each other inside an operator spin briefly, then sleep: sleeping at once
# slows decoding on an idle machine, spinning as long as libgomp likes to slows it on a busy one.
OMP_SPINS = "10000"
# A remote host says Hello every second; without it, its runners must not keep memory for ever.
LEASE_SECONDS = 10.0
# Two ports a runner, from the port after the worker's own.
RUNNER_PORTS = 64


class Worker:
    """One node's daemon; everything but starting and watching children is in one thread."""

    def __init__(
        self,
        name: str,
        host_key: bytes,
        endpoint: str,
        *,
        keys: KeyPair | None = None,
        runner_ports: tuple[int, int] | None = None,
        watched: dict[int, str] | None = None,
        has_lease: bool = False,
    ) -> None:
        """Listen.

        Args:
            host_key: public key of the one engine host that is let in.
            endpoint: where this worker listens.
            runner_ports: TCP ports runners may listen on; None lets runners of this computer use
                local endpoints and any loopback port.
            watched: further processes whose use is reported, with their roles.
            has_lease: end the runners when the host falls silent.
        """
        self.name = name
        self.keys = keys or new_key_pair()
        self._context: zmq.Context[Any] = zmq.Context()
        self._gatekeeper = Gatekeeper(self._context)
        self._host_key = host_key
        self._gatekeeper.allow("worker", host_key)
        control, self.endpoint = listen(self._context, zmq.ROUTER, self.keys, "worker", endpoint)
        self._control: Channel[Any] = Channel(control, m.WORKER_ACCEPTS)
        self._runner_ports = runner_ports
        self._watched = dict(watched or {})
        self._has_lease = has_lease
        self._runners: dict[str, Child] = {}
        self._route = b""
        self._heard_at = time.monotonic()
        self._meter = Meter(name)
        self._events: queue.SimpleQueue[m.Message] = queue.SimpleQueue()
        self._should_end = threading.Event()
        self._helpers: list[threading.Thread] = []

    def end_soon(self) -> None:
        """Ask the loop to end; any thread."""
        self._should_end.set()

    def run(self) -> None:
        """Serve until asked to end."""
        next_telemetry = time.monotonic()
        while not self._should_end.is_set():
            try:
                received = self._control.receive(50)
                if received is not None:
                    self._handle(received.message, received.route)
            except EngineError as error:
                logger.warning("%s: %s", type(error).__name__, error)
            self._send_events()
            now = time.monotonic()
            if now >= next_telemetry:
                next_telemetry = now + TELEMETRY_SECONDS
                self._send(self._meter.read(self._roles()))
            if self._has_lease and self._route and now - self._heard_at > LEASE_SECONDS:
                logger.warning("the engine host fell silent; its runners are ended")
                self._end_runners()
                self._route = b""

    def close(self) -> None:
        """End all runners and release sockets."""
        self._end_runners()
        for thread in self._helpers:
            thread.join(RUNNER_END_SECONDS)
        self._meter.close()
        self._control.close()
        self._gatekeeper.close()
        self._context.term()

    def _handle(self, message: m.Message, route: bytes) -> None:
        if isinstance(message, m.Shutdown):
            if route != self._route:
                return  # Another host's, which is not served.
            self._end_runners()
            if not self._has_lease:
                self._should_end.set()
            self._route = b""
            return
        if self._route and route != self._route and self._runners:
            self._control.send(
                m.Failed(
                    epoch=0,
                    error="WorkerLost",
                    message=f"{self.name} is busy with another engine host; end that one first",
                ),
                route=route,
            )
            return
        is_new = route != self._route
        self._route = route
        self._heard_at = time.monotonic()
        if isinstance(message, m.Hello):
            if is_new:
                self._send(self._description())
        elif isinstance(message, m.StartRunner):
            self._start_runner(message)
        elif isinstance(message, m.StopRunner):
            child = self._runners.pop(message.device, None)
            if child is not None:
                self._meter.forget(child.pid)
                ender = threading.Thread(
                    target=child.end, args=(RUNNER_END_SECONDS,), name=f"end {message.device}"
                )
                self._helpers = [t for t in self._helpers if t.is_alive()] + [ender]
                ender.start()

    def _description(self) -> m.NodeDescription:
        return m.NodeDescription(
            name=self.name,
            host_name=socket.gethostname(),
            machine=machine_id(),
            system=system_label(),
            version=metadata.version("shardmix"),
            pid=os.getpid(),
            devices=list_devices(self.name),
        )

    def _roles(self) -> dict[int, str]:
        roles = {os.getpid(): "worker", **self._watched}
        roles.update({child.pid: f"runner {device}" for device, child in self._runners.items()})
        return roles

    def _start_runner(self, message: m.StartRunner) -> None:
        known = {info.device for info in list_devices(self.name)}
        if message.device not in known:
            cause = f"this node has no device {message.device!r}"
            self._send(m.RunnerExited(device=message.device, pid=0, cause=cause))
            return
        old = self._runners.pop(message.device, None)
        if old is not None:  # A host that came back knows nothing of it.
            old.end(0)
        settings: dict[str, Any] = {}
        if self._runner_ports is None:
            address = message.listen_address or "127.0.0.1"
            settings["control_endpoint"] = new_local_endpoint()
            settings["exchange_endpoint"] = f"tcp://{address}:*"
        else:
            host = self.endpoint.rpartition(":")[0].removeprefix("tcp://")
            first, end = self._runner_ports
            settings["control_endpoint"] = f"tcp://{host}:{first}-{end}"
            settings["exchange_endpoint"] = f"tcp://{host}:{first}-{end}"
        child = Child(
            "engine.cluster.runner_process",
            ["shardmix-runner", message.device],
            Greeting(self._host_key.decode("ascii"), settings),
            environment={
                "GOMP_SPINCOUNT": os.environ.get("GOMP_SPINCOUNT", OMP_SPINS),
                "CUDA_DEVICE_ORDER": "PCI_BUS_ID",  # As the driver numbers GPUs in list_devices.
            },
            on_exit=self._on_runner_exit,
        )
        self._runners[message.device] = child
        # torch takes seconds to import; the loop must go on answering meanwhile.
        thread = threading.Thread(
            target=self._await_runner,
            args=(message.device, child),
            name=f"start {message.device}",
            daemon=True,
        )
        self._helpers = [t for t in self._helpers if t.is_alive()] + [thread]
        thread.start()

    def _await_runner(self, device: str, child: Child) -> None:
        try:
            address = child.address(RUNNER_START_SECONDS)
        except WorkerLost as error:
            self._events.put(m.RunnerExited(device=device, pid=child.pid, cause=str(error)))
            return
        control, exchange = address.endpoints
        self._events.put(
            m.RunnerStarted(
                device=device,
                pid=child.pid,
                control_endpoint=control,
                exchange_endpoint=exchange,
                public_key=address.public_key.encode("ascii"),
            )
        )

    def _on_runner_exit(self, child: Child) -> None:
        if child.is_ending:
            return
        device = child.name.partition(" ")[2]
        self._events.put(m.RunnerExited(device=device, pid=child.pid, cause=child.cause()))

    def _send_events(self) -> None:
        while True:
            try:
                event = self._events.get_nowait()
            except queue.Empty:
                return
            if isinstance(event, m.RunnerExited):
                child = self._runners.get(event.device)
                if child is not None and child.pid == event.pid:
                    del self._runners[event.device]
                    self._meter.forget(event.pid)
                    child.end(0)
            self._send(event)

    def _send(self, message: m.Message) -> None:
        if self._route:
            try:
                self._control.send(message, route=self._route)
            except WorkerLost as error:
                logger.info("the engine host takes no messages: %s", error)

    def _end_runners(self) -> None:
        runners, self._runners = self._runners, {}
        enders = [
            threading.Thread(target=child.end, args=(RUNNER_END_SECONDS,), daemon=True)
            for child in runners.values()
        ]
        for ender in enders:
            ender.start()
        for ender in enders:
            ender.join(4)


def main() -> None:
    """Entry of a worker that this computer's engine host starts."""
    logging.basicConfig(level=os.environ.get("SHARDMIX_LOG", "WARNING"), format="%(message)s")
    greeting = read_greeting()
    watched = {int(pid): str(role) for pid, role in greeting.settings.get("watched", {}).items()}
    worker = Worker(
        sys.argv[2],
        greeting.parent_key.encode("ascii"),
        new_local_endpoint(),
        watched=watched,
    )
    end_with_parent(worker.end_soon, grace_seconds=2.0)
    answer_address([worker.endpoint], worker.keys.public)
    try:
        worker.run()
    finally:
        worker.close()


if __name__ == "__main__":
    main()
