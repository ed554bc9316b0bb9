"""The bench does what the tests on it rely on: separate computers, cables that limit, cut, delay."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psutil
import pytest
from zeroconf import IPVersion, ServiceInfo, Zeroconf

from tests.cluster.network import NAMESPACES, PREFIX, Computer, Network, remove_stale

pytestmark = pytest.mark.network

PORT = 40000
DEADLINE_SECONDS = 20.0
SERVICE = "_shardmix-test._tcp.local."
SLEEP = [sys.executable, "-c", "print('up', flush=True); import time; time.sleep(100)"]


@contextmanager
def connection(near: Computer, far: Computer) -> Iterator[tuple[socket.socket, socket.socket]]:
    """A TCP connection between two computers: the end here, the end there."""
    with ExitStack() as stack:
        with far.entered():
            listener = stack.enter_context(socket.create_server((far.address, PORT)))
        with near.entered():
            here = stack.enter_context(
                socket.create_connection((far.address, PORT), DEADLINE_SECONDS)
            )
        there = stack.enter_context(listener.accept()[0])
        for end in (here, there):
            end.settimeout(DEADLINE_SECONDS)
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        yield here, there


def receive(end: socket.socket, count: int) -> bytes:
    """Exactly `count` bytes."""
    found = b""
    while len(found) < count:
        piece = end.recv(count - len(found))
        assert piece
        found += piece
    return found


def transfer_seconds(sender: socket.socket, receiver: socket.socket, count: int) -> float:
    """How long `count` bytes take."""
    thread = threading.Thread(target=sender.sendall, args=(bytes(count),))
    started = time.perf_counter()
    thread.start()
    receive(receiver, count)
    seconds = time.perf_counter() - started
    thread.join()
    return seconds


def test_computers_have_addresses_loopbacks_and_folders_of_their_own(network: Network) -> None:
    first, second = network.add("first"), network.add("second")
    show = "import os; print(os.environ['SHARDMIX_CONFIG'], os.environ['HOME'])"
    shown = [computer.run([sys.executable, "-c", show], 20) for computer in (first, second)]
    assert shown[0] != shown[1]
    with first.entered():
        listener = socket.create_server(("127.0.0.1", PORT))
    with listener:
        with second.entered(), pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", PORT), DEADLINE_SECONDS)
        with first.entered():
            socket.create_connection(("127.0.0.1", PORT), DEADLINE_SECONDS).close()


@pytest.mark.parametrize("is_towards_it", [False, True])
def test_a_limited_cable_carries_no_more_than_its_rate(
    network: Network, is_towards_it: bool
) -> None:
    near, far = network.add("near", rate_mbit=100), network.add("far")
    count = 4_000_000
    with connection(near, far) as (here, there):
        ends = (there, here) if is_towards_it else (here, there)
        # What fits the burst (64 kB) is not limited.
        assert transfer_seconds(*ends, count) > 0.8 * count / (100e6 / 8)


def test_a_limit_can_change_while_the_cable_is_used(network: Network) -> None:
    near, far = network.add("near"), network.add("far")
    count = 4_000_000
    with connection(near, far) as (here, there):
        free = transfer_seconds(here, there, count)
        near.limit(100)
        assert transfer_seconds(here, there, count) > max(2 * free, 0.8 * count / (100e6 / 8))


def test_a_cut_cable_carries_nothing_until_it_is_mended(network: Network) -> None:
    near, far = network.add("near"), network.add("far")
    with connection(near, far) as (here, there):
        here.sendall(b"before")
        assert receive(there, 6) == b"before"
        near.cut()
        here.sendall(b"meanwhile")
        there.settimeout(0.5)
        with pytest.raises(TimeoutError):
            there.recv(1)
        near.mend()
        there.settimeout(DEADLINE_SECONDS)
        assert receive(there, 9) == b"meanwhile"


def test_a_delayed_cable_delays_both_ways_and_survives_a_cut(network: Network) -> None:
    near, far = network.add("near", delay_seconds=0.05), network.add("far")
    with connection(near, far) as (here, there):
        for _ in range(2):
            started = time.perf_counter()
            here.sendall(b"?")
            receive(there, 1)
            one_way = time.perf_counter()
            there.sendall(b"!")
            receive(here, 1)
            assert one_way - started >= 0.05
            assert time.perf_counter() - one_way >= 0.05
            near.cut()
            near.mend()


def test_large_transfers_cross_a_delayed_cable_whole(network: Network) -> None:
    near, far = network.add("near", delay_seconds=0.005), network.add("far")
    sent = bytes(range(251)) * 20_000
    with connection(near, far) as (here, there):
        thread = threading.Thread(target=here.sendall, args=(sent,))
        thread.start()
        assert receive(there, len(sent)) == sent
        thread.join()


def test_a_service_announced_on_one_computer_is_found_on_another(network: Network) -> None:
    near, far = network.add("near"), network.add("far", delay_seconds=0.01)
    info = ServiceInfo(
        SERVICE,
        f"box.{SERVICE}",
        addresses=[socket.inet_aton(far.address)],
        port=PORT,
        properties={"name": "box"},
    )
    with far.entered():
        announcer = Zeroconf(ip_version=IPVersion.V4Only)
    try:
        announcer.register_service(info)
        with near.entered():
            finder = Zeroconf(ip_version=IPVersion.V4Only)
        try:
            found = finder.get_service_info(SERVICE, f"box.{SERVICE}", timeout=10_000)
        finally:
            finder.close()
    finally:
        announcer.close()
    assert found is not None
    assert found.parsed_addresses() == [far.address]
    assert found.properties[b"name"] == b"box"


def test_what_a_test_forgot_is_named_and_ended(network: Network) -> None:
    computer = network.add("first")
    with computer.entered():
        forgotten = subprocess.Popen(SLEEP, stdout=subprocess.PIPE)
    assert forgotten.stdout is not None
    assert forgotten.stdout.readline() == b"up\n"
    kept = computer.start("sleep", SLEEP)
    kept.wait_for("up", DEADLINE_SECONDS)
    (left,) = network.close()
    assert left.startswith(f"first: process {forgotten.pid}")
    assert not psutil.pid_exists(forgotten.pid)
    forgotten.wait(DEADLINE_SECONDS)
    forgotten.stdout.close()
    assert kept.process.returncode is not None
    assert not (NAMESPACES / computer.namespace).exists()


def test_what_a_killed_run_left_is_removed_by_the_next(network: Network, tmp_path: Path) -> None:
    script = """if True:
        import sys, os, signal
        from pathlib import Path
        from tests.cluster.network import Network
        computer = Network(Path(sys.argv[1])).add("first", delay_seconds=0.01)
        computer.start("sleep", ["sleep", "100"])
        os.kill(os.getpid(), signal.SIGKILL)
    """
    killed = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)])
    assert killed.wait(60) < 0
    prefix = f"{PREFIX}{killed.pid}-"
    assert any(path.name.startswith(prefix) for path in NAMESPACES.iterdir())
    removed = remove_stale()
    assert sorted(name for name in removed if name.startswith(prefix)) == [
        f"{prefix}1-first",
        f"{prefix}1-switch",
    ]
    assert not any(path.name.startswith(prefix) for path in NAMESPACES.iterdir())
    assert network.switch not in removed
