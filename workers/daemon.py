"""The worker: offers a node's devices to one engine host and supervises a runner for each in use.

In: messages of engine hosts (start and stop runners), and of this computer's own commands. Out: who
this node is, what its runners do, and why one ended. It computes nothing. The engine host of this
computer starts it as `python -m workers.daemon shardmix-worker NAME` and it ends with that host;
`shardmix-worker run` starts it for paired hosts elsewhere.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
import threading
import time
from importlib import metadata
from typing import Any, cast

import zmq

from engine.cluster import messages as m
from engine.cluster.codec import MAX_HEADER_BYTES
from engine.cluster.identity import fingerprint
from engine.cluster.load_check import is_host
from engine.cluster.processes import Greeting, answer_address, end_with_parent, read_greeting
from engine.cluster.runner_start import runner_settings
from engine.cluster.security import Gatekeeper, new_key_pair
from engine.cluster.transport import Channel, Frames, listen, new_local_endpoint
from engine.errors import EngineError, PeerRefused, WorkerLost
from engine.host.trusted_network import TRUSTED_NETWORK_VARIABLE
from workers import local_messages as local
from workers.access import DOMAIN, Access, printable
from workers.lease import Lease
from workers.listener_watch import ListenerWatch
from workers.mailbox import Mailbox
from workers.options import SpeedSource, WorkerOptions
from workers.reception import Activity, Reception
from workers.runners import RunnerEvent, Runners
from workers.slice_cache_settings import choose_cache
from workers.telemetry import Meter, list_devices, machine_id, system_label
from workers.telemetry_thread import TelemetryThread

logger = logging.getLogger(__name__)

POLL_MS = 100
# Of one socket in one round: whoever floods it does not keep the others waiting.
MAX_MESSAGES = 100
# A remote host says Hello every second; without it, its runners must not keep memory for ever.
LEASE_SECONDS = 10.0


class Worker:
    """One node's daemon; starting, ending and measuring apart, everything is in one thread."""

    def __init__(self, options: WorkerOptions, speed: SpeedSource | None = None) -> None:
        """Listen.

        Raises: ProtocolError: a port is taken.
        """
        self._options = options
        self._speed = speed
        self._is_speed_told = False
        self._context: zmq.Context[Any] = zmq.Context()
        self._gatekeeper = Gatekeeper(self._context)
        self._access = Access(self._gatekeeper, options.owner, options.trusted)
        accepted: Any = m.WORKER_ACCEPTS
        if options.trusted is not None:
            accepted = m.WORKER_ACCEPTS | local.LOCAL_REQUESTS
        try:
            control, self.endpoint = listen(
                self._context,
                zmq.ROUTER,
                options.keys,
                DOMAIN,
                options.endpoint,
                max_message_bytes=MAX_HEADER_BYTES,  # No message to a worker has tensors.
            )
        except EngineError:
            self._gatekeeper.close()
            self._context.term()
            raise
        self._control: Channel[Any] = Channel(control, accepted)
        self._watch = ListenerWatch(control)
        self._description = m.NodeDescription(
            name=options.name,
            host_name=socket.gethostname(),
            machine=machine_id(),
            system=system_label(),
            version=metadata.version("shardmix"),
            pid=os.getpid(),
            devices=options.devices,
            trusted_network=options.is_network_trusted,
        )
        self._reception: Reception | None = None
        if options.trusted is not None:
            self._reception = Reception(
                self._context,
                self._gatekeeper,
                self._description,
                options.keys,
                self.endpoint,
                options.trusted,
                self._access,
            )
        self._lease = Lease(options.lease_seconds)
        self._mailbox: Mailbox[RunnerEvent | m.Telemetry] = Mailbox()
        self._runners = Runners(self._mailbox.put)
        self._telemetry = TelemetryThread(Meter(options.name), self._mailbox.put)
        self._last_telemetry: m.Telemetry | None = None
        self._should_end = threading.Event()

    def end_soon(self) -> None:
        """Ask the loop to end; any thread, and signal handlers."""
        self._should_end.set()
        self._mailbox.wake()

    def make_token(self) -> str:
        """A join token, before `run`; only for a worker that pairs."""
        assert self._reception is not None
        return self._reception.make_token(time.monotonic()).token

    def run(self) -> None:
        """Serve until asked to end."""
        poller = zmq.Poller()
        reception = self._reception
        for waited in (self._control.socket, self._watch.socket, self._mailbox.near):
            poller.register(waited, zmq.POLLIN)
        while not self._should_end.is_set():
            poller.poll(POLL_MS)
            self._hear()
            for item in self._mailbox.take_all():
                self._take_item(item)
            now = time.monotonic()
            if reception is not None:
                reception.step(now)
            self._look_after_lease(now)
            self._tell_speed()
            self._telemetry.set_roles(self._roles())

    def close(self) -> None:
        """End all runners and release sockets."""
        self._runners.close()
        self._telemetry.close()
        self._mailbox.close()
        self._close_sockets()

    def _close_sockets(self) -> None:
        if self._reception is not None:
            self._reception.close()
        self._watch.close()
        self._control.close()
        self._gatekeeper.close()
        self._context.term()

    # ---- hearing -----------------------------------------------------------------------------

    def _hear(self) -> None:
        for knock in self._watch.take_all():
            self._gatekeeper.refuse(knock.address, DOMAIN, b"", knock.reason)
        for _ in range(MAX_MESSAGES):
            frames = self._control.receive_frames(0)
            if frames is None:
                return
            try:
                self._handle(self._control.decode(frames).message, frames)
            except EngineError as error:
                self._refuse(frames, error)

    def _refuse(self, frames: Frames, error: EngineError) -> None:
        """Answer what cannot be served; an older version may not understand even that."""
        key = frames.peer_key
        if isinstance(error, PeerRefused) and self._access.standing(key) != "owner":
            self._gatekeeper.refuse(frames.peer_address, DOMAIN, key, str(error))
        else:
            logger.info("%s from %s: %s", type(error).__name__, fingerprint(key), error)
        self._send(m.Failed(epoch=0, error=type(error).__name__, message=str(error)), frames.route)

    def _handle(self, message: m.Message, frames: Frames) -> None:
        key, route = frames.peer_key, frames.route
        standing = self._access.standing(key)
        now = time.monotonic()
        if standing == "guest":
            if not isinstance(message, m.Enroll) or self._reception is None:
                raise PeerRefused("a join token is for enrolling alone; come with your own key")
            self._send(self._reception.enroll(message, key), route)
        elif standing == "stranger":
            raise PeerRefused(
                f"{self._options.name} does not trust this computer (any more); pair again"
            )
        elif isinstance(message, local.LocalRequest):
            if standing != "owner" or self._reception is None:
                raise PeerRefused(f"{type(message).__name__} is for the commands of this computer")
            self._send(self._reception.answer(message, self._activity(), now), route)
        elif isinstance(message, m.Hello):
            self._hello(message, key, route, now)
        elif isinstance(message, m.Probe):
            self._send(m.ProbeAnswer(number=message.number), route)
        elif isinstance(message, m.Enroll):
            self._send(m.Enrolled(), route)  # Its first answer was lost; it is let in already.
        elif self._lease.is_held_by(key, route):
            self._serve(message)
        else:
            self._turn_away(message, route)

    def _hello(self, message: m.Hello, key: bytes, route: bytes, now: float) -> None:
        name = printable(message.host_name)
        claim = self._lease.claim(key, route, name, now, self._is_holder_reachable)
        if claim == "busy":
            self._turn_away(message, route)
            return
        if claim == "taken over":
            logger.info("the engine host before is gone; its runners are ended")
            self._runners.end_all()
        self._telemetry.set_rate(message.telemetry_hz)
        if claim != "kept":
            logger.info("%s (%s) has this worker now", name, fingerprint(key))
            self._tell(self._description)
            self._is_speed_told = False

    def _is_holder_reachable(self) -> bool:
        """Whether the holder's connection stands: a message to a closed one cannot be sent."""
        holder = self._lease.holder
        assert holder is not None
        return self._last_telemetry is None or self._send(self._last_telemetry, holder.route)

    def _turn_away(self, message: m.Message, route: bytes) -> None:
        """Answer an engine host that does not have the lease."""
        holder = self._lease.holder
        if isinstance(message, m.Hello) and holder is not None:
            self._send(m.Busy(holder=holder.host_name), route)
        elif isinstance(message, m.StartRunner):
            whom = f"{holder.host_name} has it" if holder is not None else "say Hello first"
            cause = f"{self._options.name} does not serve this engine host: {whom}"
            self._send(m.RunnerExited(device=message.device, pid=0, cause=cause), route)

    def _serve(self, message: m.Message) -> None:
        """Do what the holder of the lease asks."""
        if isinstance(message, m.StartRunner):
            self._start_runner(message)
        elif isinstance(message, m.StopRunner):
            self._runners.end(message.device)
        elif isinstance(message, m.Shutdown):
            self._free("the engine host is done")
            if self._options.trusted is None:
                self._should_end.set()

    # ---- the lease ---------------------------------------------------------------------------

    def _look_after_lease(self, now: float) -> None:
        holder = self._lease.holder
        if holder is None:
            return
        if self._access.standing(holder.key) == "stranger":
            refused = PeerRefused(f"{self._options.name} was told to trust this computer no longer")
            self._tell(m.Failed(epoch=0, error=type(refused).__name__, message=str(refused)))
            self._free(f"{holder.host_name} is not trusted any more")
        elif self._lease.is_expired(now):
            self._free(f"{holder.host_name} fell silent")

    def _free(self, reason: str) -> None:
        logger.info("%s; its runners are ended", reason)
        self._lease.free()
        self._runners.end_all()
        self._telemetry.set_rate(None)

    def _tell(self, message: m.Message) -> None:
        """Send to the holder of the lease; one whose connection is gone loses it."""
        holder = self._lease.holder
        if holder is None or self._send(message, holder.route):
            return
        # A worker whose starter is gone ends by other means; one that is slow to listen is alive.
        if self._options.lease_seconds is not None:
            self._free(f"the connection to {holder.host_name} is gone")

    def _send(self, message: m.Message, route: bytes) -> bool:
        """Returns: whether it could be sent."""
        try:
            self._control.send(message, route=route)
        except WorkerLost as error:
            logger.debug("%s", error)
            return False
        return True

    # ---- runners, telemetry, speed -----------------------------------------------------------

    def _start_runner(self, message: m.StartRunner) -> None:
        options = self._options
        cause = ""
        if message.device not in {info.device for info in options.devices}:
            cause = f"this node does not lend a device {message.device[:100]!r}"
        elif message.listen_address and not is_host(message.listen_address):
            cause = f"listen_address {printable(message.listen_address)!r} is no address"
        elif message.transport == "torch" and not options.is_network_trusted:
            cause = (
                'a plan with transport "torch" is not encrypted and needs --trusted-network on '
                f"every node; {options.name} was started without it"
            )
        if cause:
            self._tell(m.RunnerExited(device=message.device, pid=0, cause=cause))
            return
        if options.runner_ports is None:
            address = message.listen_address or "127.0.0.1"
            control_endpoint, exchange_endpoint = new_local_endpoint(), f"tcp://{address}:*"
        else:
            first, last = options.runner_ports
            control_endpoint = f"{self.endpoint.rpartition(':')[0]}:{first}-{last}"
            exchange_endpoint = control_endpoint
        holder = self._lease.holder
        assert holder is not None
        settings = runner_settings(
            control_endpoint,
            exchange_endpoint,
            message.transport,
            options.cache.folder,
            options.cache.limit_bytes,
            is_host_here=options.trusted is None,
        )
        self._runners.start(message.device, Greeting(holder.key.decode("ascii"), settings))

    def _take_item(self, item: RunnerEvent | m.Telemetry) -> None:
        if isinstance(item, m.Telemetry):
            self._last_telemetry = item
            self._tell(item)
            return
        message = self._runners.take(item)
        if message is not None:
            self._tell(message)

    def _tell_speed(self) -> None:
        if self._is_speed_told or self._speed is None or self._lease.holder is None:
            return
        report = self._speed.report()
        if report is not None:
            self._is_speed_told = True
            self._tell(report)

    def _roles(self) -> dict[int, str]:
        roles = {os.getpid(): "worker", **self._options.watched}
        runners = self._runners.processes
        return roles | {pid: f"runner {device}" for device, pid in runners.items()}

    def _activity(self) -> Activity:
        holder = self._lease.holder
        runners = self._runners.processes
        if holder is None:
            return Activity("", b"", runners)
        return Activity(holder.host_name, holder.key, runners)


def main() -> None:
    """Entry of a worker that this computer's engine host starts."""
    logging.basicConfig(level=os.environ.get("SHARDMIX_LOG", "WARNING"), format="%(message)s")
    greeting = read_greeting()
    watched = cast("dict[str, str]", greeting.settings.get("watched", {}))
    name = sys.argv[2]
    keys = new_key_pair()
    worker = Worker(
        WorkerOptions(
            name=name,
            endpoint=new_local_endpoint(),
            keys=keys,
            owner=greeting.parent_key.encode("ascii"),
            devices=list_devices(name),
            cache=choose_cache(),
            is_network_trusted=os.environ.get(TRUSTED_NETWORK_VARIABLE) == "1",
            watched={int(pid): str(role) for pid, role in watched.items()},
        )
    )
    end_with_parent(worker.end_soon, grace_seconds=2.0)
    answer_address([worker.endpoint], keys.public)
    try:
        worker.run()
    finally:
        worker.close()


if __name__ == "__main__":
    main()
