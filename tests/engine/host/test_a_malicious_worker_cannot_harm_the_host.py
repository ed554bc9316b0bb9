"""Table D1, a paired worker against the engine host's list of nodes: the node is lost with one line
that names the field, and is ready again as soon as it keeps the rules."""

from __future__ import annotations

import contextlib
import pickle
import queue
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest
import zmq
from msgspec.structs import replace

from engine.cluster import messages as m
from engine.cluster.codec import MAX_HEADER_BYTES
from engine.cluster.identity import TrustedPeer, TrustedPeers
from engine.cluster.security import Gatekeeper, new_key_pair
from engine.cluster.transport import Channel, listen
from engine.host.node import Node
from engine.host.nodes import Nodes

pytestmark = pytest.mark.network

PATIENCE_SECONDS = 30.0
GROWTH_BYTES = 64 << 20
DEVICE = m.DeviceInfo(device="box/cpu", kind="cpu", label="CPU", num_cores=2, memory_bytes=1 << 30)
GOOD = m.NodeDescription(
    name="box",
    host_name="box",
    machine="1",
    system="Linux",
    version="0.1.0",
    pid=1,
    devices=(DEVICE,),
)
USAGE = m.Telemetry(
    cpu_percent=1.0,
    memory_used_bytes=1,
    memory_total_bytes=2,
    network_in_bytes_per_second=0.0,
    network_out_bytes_per_second=0.0,
    processes=(),
)
Said = m.Message | bytes


class Desk:
    """The nodes of a host, and one paired worker that is good at first and then says anything."""

    def __init__(self, folder: Path) -> None:
        self._context: zmq.Context[Any] = zmq.Context()
        self._gatekeeper = Gatekeeper(self._context)
        keys, worker_keys = new_key_pair(), new_key_pair()
        self._gatekeeper.allow("worker", keys.public)
        socket, endpoint = listen(
            self._context, zmq.ROUTER, worker_keys, "worker", "tcp://127.0.0.1:*"
        )
        self._channel: Channel[Any] = Channel(socket, m.WORKER_ACCEPTS)
        self._to_say: queue.SimpleQueue[Said] = queue.SimpleQueue()
        self._should_end = threading.Event()
        self._thread = threading.Thread(target=self._serve, name="malicious worker")
        self._thread.start()
        trusted = TrustedPeers(folder / "nodes.json")
        trusted.add(
            TrustedPeer(public_key=worker_keys.public, name="box", added_s=1.0, endpoint=endpoint)
        )
        self.lost_runners: list[str] = []
        self.nodes = Nodes(
            self._context,
            keys,
            trusted,
            lambda function: function(),
            lambda: None,
            lambda _device, _key, cause: self.lost_runners.append(cause),
        )
        self.nodes.neighbours.start(lambda function: function())

    def close(self) -> None:
        self._should_end.set()
        self._thread.join()
        self.nodes.close()
        self._channel.close()
        self._gatekeeper.close()
        self._context.destroy(linger=0)

    def _serve(self) -> None:
        route = b""
        while not self._should_end.is_set():
            received = self._channel.receive(5)
            if received is not None and received.route != route:
                route = received.route
                self._channel.send(GOOD, route=route)
            with contextlib.suppress(queue.Empty):
                while True:
                    said = self._to_say.get_nowait()
                    if isinstance(said, bytes):
                        self._channel.socket.send_multipart([route, said])
                    else:
                        self._channel.send(said, route=route)

    def say(self, *said: Said) -> None:
        """As the worker, over the line that is open."""
        for one in said:
            self._to_say.put(one)

    @property
    def node(self) -> Node:
        return self.nodes.find("box")

    def wait(self, is_so: Callable[[Node], bool]) -> Node:
        """Hear the nodes until something is so of the worker's."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not is_so(self.node):
            assert time.monotonic() < deadline, f"{self.node.state}: {self.node.reason}"
            for socket in self.nodes.sockets():
                if socket.poll(20):
                    break
            self.nodes.hear()
        return self.node

    def be_good(self) -> None:
        """Until the node is ready again."""
        self.node.next_attempt_at = 0.0  # Not after the usual two seconds.
        self.wait(lambda node: node.state == "ready")
        assert self.nodes.ready_devices() == ["box/cpu"]


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    desk = Desk(tmp_path)
    try:
        desk.be_good()
        yield desk
    finally:
        desk.close()


def header(*body: Any) -> bytes:
    return msgspec.msgpack.encode((m.PROTOCOL_VERSION, body, ()))


def with_device(**changes: Any) -> m.NodeDescription:
    return replace(GOOD, devices=(replace(DEVICE, **changes),))


def gpu(**changes: Any) -> m.Telemetry:
    fields: dict[str, Any] = {
        "device": "box/cuda0",
        "percent": 1.0,
        "memory_used_bytes": 1,
        "memory_total_bytes": 2,
        "temperature_c": 50.0,
        "power_w": 9.0,
    }
    return replace(USAGE, gpus=(m.GpuUsage(**{**fields, **changes}),))


def speeds(*devices: tuple[str, float]) -> m.SpeedReport:
    return m.SpeedReport(
        devices=tuple(
            m.DeviceSpeed(device=device, flops=flops, memory_bytes_per_second=1.0)
            for device, flops in devices
        )
    )


def started(**changes: Any) -> m.RunnerStarted:
    fields: dict[str, Any] = {
        "device": "box/cpu",
        "pid": 5,
        "control_endpoint": "tcp://127.0.0.1:5",
        "exchange_endpoint": "tcp://127.0.0.1:6",
        "public_key": new_key_pair().public,
    }
    return m.RunnerStarted(**{**fields, **changes})


CONTROL = "\x1b[2J\n\x07"
NONSENSE: dict[str, tuple[Said, str]] = {
    "pickle": (pickle.dumps([1]), "first bytes 80 0"),
    "nothing": (b"", "part 0"),
    "deep nesting": (b"\x91" * 100_000, "first bytes 91 91"),
    "a message for a worker": (header("Hello", "x", 1.0), "Hello"),
    "an older protocol": (msgspec.msgpack.encode((2, ["Old"], ())), "install the same version"),
    "negative memory": (
        header(*msgspec.to_builtins(GOOD)[:7], [["DeviceInfo", "x/cpu", "cpu", "", 2, -1]], False),
        "which is devices",
    ),
    "a device of another kind": (with_device(device="box/tpu" + CONTROL), "is no device"),
    "no devices": (replace(GOOD, devices=()), "without devices"),
    "a device twice": (replace(GOOD, devices=(DEVICE, DEVICE)), "more than once"),
    "30,000 devices": (
        replace(GOOD, devices=tuple(replace(DEVICE, device=f"box/cuda{n}") for n in range(30_000))),
        "30000 devices; a node may",
    ),
    "a CPU without cores": (with_device(num_cores=0), "0 cores"),
    "a GPU nobody knows": (gpu(device=CONTROL), "is no device"),
    "processes without end": (
        replace(
            USAGE,
            processes=(m.ProcessUsage(role="x", pid=1, cpu_percent=0.0, memory_bytes=1),) * 9999,
        ),
        "Telemetry of 9999 processes",
    ),
    "a speed that is no number": (speeds(("box/cpu", float("nan"))), "a speed that is none"),
    "a speed below nothing": (speeds(("box/cpu", -1.0)), "a speed that is none"),
    "a speed twice": (speeds(("box/cpu", 1.0), ("y/cpu", 1.0)), "more than once"),
    "a runner at a local socket": (
        started(control_endpoint="ipc:///run/dbus"),
        "is no address of a runner",
    ),
    "a runner that exchanges nowhere": (
        started(exchange_endpoint="inproc://zeromq.zap.01"),
        "is no address of a runner",
    ),
    "a runner without a key": (started(public_key=b"x"), "the key of the runner"),
    "a runner that meets nowhere": (started(rendezvous=CONTROL), "is no address of a runner"),
}


def test_nonsense_makes_a_lost_node_with_the_field(desk: Desk) -> None:
    process = psutil.Process()
    before = process.memory_info().rss
    for what, (said, words) in NONSENSE.items():
        desk.say(said)
        node = desk.wait(lambda node: node.state != "ready")
        assert node.reason.isprintable(), what
        assert len(node.reason) < 2000, what
        with pytest.raises(AssertionError, match=words):
            raise AssertionError(node.reason)
        desk.be_good()
    assert process.memory_info().rss - before < GROWTH_BYTES


def test_texts_for_people_come_in_one_line(desk: Desk) -> None:
    desk.say(
        replace(
            with_device(label=CONTROL * 9999),
            **dict.fromkeys(("name", "host_name", "machine", "system", "version"), CONTROL * 9999),
        ),
        replace(
            USAGE,
            processes=(
                m.ProcessUsage(role=CONTROL * 9999, pid=1, cpu_percent=0.0, memory_bytes=1),
            ),
        ),
    )
    desk.wait(lambda node: node.telemetry is not None)
    [state] = desk.nodes.states(set(), set(), set())
    texts = [state.host_name, state.version, state.devices[0].label, state.processes[0].role]
    assert all(text.isprintable() and len(text) <= 200 for text in texts)
    assert state.name == "box"
    desk.nodes.start_runner("box/cpu", "", "zmq")
    desk.say(m.RunnerExited(device="box/cpu", pid=0, cause=CONTROL * 100_000))
    desk.wait(lambda _: bool(desk.lost_runners))
    assert desk.lost_runners[0].isprintable()
    assert len(desk.lost_runners[0]) <= 1000
    desk.say(m.Failed(epoch=0, error="\x1b", message=CONTROL * 100_000))
    node = desk.wait(lambda node: node.state == "lost")
    assert node.reason.isprintable()
    assert len(node.reason) <= 1000
    desk.be_good()


def test_a_runner_that_nobody_started_is_none(desk: Desk) -> None:
    desk.say(started(), started(device="box/cuda7"), replace(USAGE, cpu_percent=77.0))
    desk.wait(lambda node: node.telemetry is not None and node.telemetry.cpu_percent == 77.0)
    assert desk.node.runners == {}
    assert desk.node.state == "ready"


def test_a_flood_keeps_nobody_else_waiting(desk: Desk) -> None:
    """One round of the host's loop takes some messages of each worker, however many there are."""
    desk.say(*[USAGE] * 900, replace(USAGE, cpu_percent=77.0))
    rounds = 0

    def is_over(node: Node) -> bool:
        nonlocal rounds
        rounds += 1
        return node.telemetry is not None and node.telemetry.cpu_percent == 77.0

    desk.wait(is_over)
    assert rounds >= 9
    desk.be_good()


def test_a_frame_past_the_limit_cuts_the_line(desk: Desk) -> None:
    """Row 5."""
    desk.say(bytes(MAX_HEADER_BYTES + 1))
    desk.wait(lambda node: node.state == "lost")
    desk.be_good()
