"""A trusted worker that says what none may say: it is lost, or not believed; the host goes on."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import zmq
from msgspec.structs import replace

from engine.cluster import messages as m
from engine.cluster.identity import TrustedPeer, TrustedPeers
from engine.cluster.security import Gatekeeper, new_key_pair
from engine.cluster.transport import Channel, listen
from engine.errors import ProtocolError
from engine.host.nodes import MESSAGES_PER_TURN, Nodes
from engine.host.worker_words import MAX_DEVICES, checked

pytestmark = pytest.mark.network

PATIENCE_SECONDS = 20.0
CPU = m.DeviceInfo(device="attic/cpu", kind="cpu", label="CPU", num_cores=2, memory_bytes=1 << 30)
DESCRIPTION = m.NodeDescription(
    name="attic", host_name="attic", machine="m", system="Linux", version="1", pid=2, devices=(CPU,)
)
TELEMETRY = m.Telemetry(
    cpu_percent=1.0,
    memory_used_bytes=1,
    memory_total_bytes=2,
    network_in_bytes_per_second=0.0,
    network_out_bytes_per_second=0.0,
    processes=(m.ProcessUsage(role="worker", pid=2, cpu_percent=1.0, memory_bytes=1),),
)
OWN = frozenset({"127.0.0.1"})


def started(device: str = "attic/cpu", **changes: Any) -> m.RunnerStarted:
    """What a worker says of its runner."""
    return replace(
        m.RunnerStarted(
            device=device,
            pid=3,
            control_endpoint="tcp://127.0.0.1:4000",
            exchange_endpoint="tcp://127.0.0.1:4001",
            public_key=new_key_pair().public,
        ),
        **changes,
    )


class Stage:
    """The nodes of a host, and a worker of this test that it trusts."""

    def __init__(self, folder: Path) -> None:
        self._context: zmq.Context[Any] = zmq.Context()
        self._own, worker = new_key_pair(), new_key_pair()
        self._gatekeeper = Gatekeeper(self._context)
        self._gatekeeper.allow("worker", self._own.public)
        socket, endpoint = listen(self._context, zmq.ROUTER, worker, "worker", "tcp://127.0.0.1:*")
        self.worker: Channel[Any] = Channel(socket, m.WORKER_ACCEPTS)
        trusted = TrustedPeers(folder / "nodes.json")
        trusted.add(
            TrustedPeer(public_key=worker.public, name="attic", added_s=1.0, endpoint=endpoint)
        )
        self.lost: list[tuple[str, bytes, str]] = []
        self.nodes = Nodes(
            self._context,
            self._own,
            trusted,
            lambda function: function(),
            lambda: None,
            lambda device, key, cause: self.lost.append((device, key, cause)),
        )
        self.nodes.neighbours.start(lambda function: function())
        self._route = b""
        self.heard: list[m.Message] = []
        self.until(lambda: bool(self._route), "a Hello")

    def close(self) -> None:
        self.nodes.close()
        self.worker.close()
        self._gatekeeper.close()
        self._context.term()

    def turn(self) -> None:
        """Both ends do what there is to do."""
        self.nodes.hear()
        received = self.worker.receive(20)
        if received is not None:
            self._route = received.route
            self.heard.append(received.message)

    def until(self, is_so: Callable[[], object], what: str) -> None:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not is_so():
            assert time.monotonic() < deadline, f"not {what}: {self.reason}, {self.heard[-3:]}"
            self.turn()

    def say(self, message: m.Message) -> None:
        self.worker.send(message, (), self._route)

    def become_ready(self) -> None:
        self.say(DESCRIPTION)
        self.until(lambda: self.state == "ready", "ready")

    @property
    def state(self) -> str:
        return self.nodes.find("attic").state

    @property
    def reason(self) -> str:
        return self.nodes.find("attic").reason


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    stage = Stage(tmp_path)
    yield stage
    stage.close()


def test_a_runner_that_nobody_asked_for_is_not_believed(stage: Stage) -> None:
    stage.say(started())  # Before it has said what it has.
    stage.become_ready()
    stage.say(started())
    stage.say(replace(TELEMETRY, cpu_percent=7.0))
    node = stage.nodes.find("attic")
    stage.until(lambda: node.telemetry is not None, "heard")
    assert (stage.state, node.runners) == ("ready", {})
    stage.nodes.stop_runners_except(set())


def test_a_runner_on_another_computer_ends_the_node_and_not_the_host(stage: Stage) -> None:
    stage.become_ready()
    stage.nodes.start_runner("attic/cpu", "", "zmq")
    stage.say(started(control_endpoint="tcp://10.9.8.7:22"))
    stage.until(lambda: stage.state == "lost", "lost")
    assert "10.9.8.7:22, which is not on the worker's own address 127.0.0.1" in stage.reason
    assert [device for device, _, _ in stage.lost] == ["attic/cpu"]


def test_a_worker_that_talks_without_end_leaves_turns_to_others(stage: Stage) -> None:
    stage.become_ready()
    total = 3 * MESSAGES_PER_TURN
    for number in range(1, total + 1):
        stage.say(replace(TELEMETRY, memory_used_bytes=number))
    node = stage.nodes.find("attic")
    seen: list[int] = []

    def is_over() -> bool:
        if node.telemetry is not None:
            seen.append(node.telemetry.memory_used_bytes)
        return bool(seen) and seen[-1] == total

    stage.until(is_over, "all heard")
    steps = [after - before for before, after in zip([0, *seen], seen, strict=False)]
    assert max(steps) <= MESSAGES_PER_TURN


def test_what_a_person_sees_cannot_steer_the_terminal(stage: Stage) -> None:
    evil = "\x1b[2Jall is\nwell\u202e"
    stage.say(replace(DESCRIPTION, system=evil, devices=(replace(CPU, label=evil),)))
    stage.say(replace(TELEMETRY, processes=(replace(TELEMETRY.processes[0], role=evil),)))
    node = stage.nodes.find("attic")
    stage.until(lambda: node.telemetry is not None, "heard")
    stage.say(m.Failed(epoch=0, error="EngineError", message=evil))
    stage.until(lambda: stage.state == "lost", "lost")
    assert stage.reason == "[2Jall is well"
    assert stage.nodes.why_not("attic") == "attic is lost: [2Jall is well"
    (state,) = stage.nodes.states(set(), set(), set())
    assert (state.devices[0].label, state.system) == ("[2Jall is well", "[2Jall is well")
    exited = m.RunnerExited(device="attic/cpu", pid=1, cause=evil)
    assert checked(exited, OWN) == replace(exited, cause="[2Jall is well")
    assert checked(m.Busy(holder=evil), OWN) == m.Busy(holder="[2Jall is well")


@pytest.mark.parametrize(
    "message",
    [
        replace(DESCRIPTION, devices=(CPU, replace(CPU, device="other/cpu"))),
        replace(DESCRIPTION, devices=(replace(CPU, device="attic/\x1b[31m"),)),
        replace(DESCRIPTION, devices=(replace(CPU, device="attic/cuda0"),)),
        replace(DESCRIPTION, devices=(replace(CPU, memory_bytes=-1),)),
        replace(DESCRIPTION, devices=(replace(CPU, num_cores=1 << 40),)),
        replace(
            DESCRIPTION,
            devices=tuple(
                replace(CPU, device=f"attic/cuda{n}", kind="cuda") for n in range(MAX_DEVICES + 1)
            ),
        ),
        replace(TELEMETRY, processes=TELEMETRY.processes * 1000),
        m.SpeedReport(
            devices=(m.DeviceSpeed(device="a/cpu", flops=math.nan, memory_bytes_per_second=1.0),)
        ),
        m.SpeedReport(devices=(), disk_bytes_per_second=-1.0),
        m.RunnerExited(device="attic/", pid=1, cause=""),
        started("attic/gpu"),
        started(public_key=b"short"),
        started(control_endpoint="ipc://@somewhere"),
        started(control_endpoint="tcp://127.0.0.1:99999"),
        started(exchange_endpoint="tcp://192.168.1.1:4000"),
        started(exchange_endpoint="tcp://127.0.0.1;192.168.1.1:4000"),
        started(rendezvous="192.168.1.1:4000"),
    ],
    ids=lambda message: type(message).__name__,
)
def test_what_no_worker_would_say_is_refused_in_one_line(message: m.Message) -> None:
    with pytest.raises(ProtocolError) as caught:
        checked(message, OWN)
    assert str(caught.value).isprintable()


def test_a_broken_sensor_is_no_broken_worker() -> None:
    broken = replace(
        TELEMETRY, cpu_percent=math.nan, memory_used_bytes=-5, cpu_temperature_c=math.inf
    )
    mended = checked(broken, OWN)
    assert mended == replace(TELEMETRY, cpu_percent=0.0, memory_used_bytes=0)


@pytest.mark.parametrize(
    ("endpoint", "own"),
    [
        ("tcp://127.0.0.1:4000", "127.0.0.1"),
        ("tcp://[FE80::1]:4000", "[fe80::1%eth0]"),
        ("tcp://10.0.0.1:4000", "::ffff:10.0.0.1"),
        ("tcp://Attic.local:4000", "attic.local"),
    ],
)
def test_the_same_address_may_be_written_in_other_ways(endpoint: str, own: str) -> None:
    message = started(control_endpoint=endpoint, exchange_endpoint=endpoint)
    assert checked(message, {own}) == message
