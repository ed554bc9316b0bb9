"""A worker in this process, and the least of an engine host, to talk to workers over real sockets."""

from __future__ import annotations

import contextlib
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self, TypeVar

import msgspec
import zmq

from engine.cluster import messages as m
from engine.cluster import pairing as p
from engine.cluster.identity import TrustedPeer, TrustedPeers, load_identity
from engine.cluster.security import KeyPair, new_key_pair
from engine.cluster.transport import Channel, connect
from engine.errors import WorkerLost
from workers.daemon import Worker
from workers.options import WorkerOptions
from workers.slice_cache_settings import CacheSettings
from workers.telemetry import list_devices

# Generous: the machines that run this are slow and busy. Nothing waits for it to pass.
PATIENCE_SECONDS = 30.0

M = TypeVar("M", bound=m.Message)


class Host:
    """Connects to one worker, says what it is told to, and remembers nothing else."""

    def __init__(self, endpoint: str, worker_key: bytes, keys: KeyPair) -> None:
        self.keys = keys
        self._context: zmq.Context[Any] = zmq.Context()
        self.channel: Channel[Any] = Channel(
            connect(self._context, zmq.DEALER, keys, worker_key, endpoint), m.WORKER_SENDS
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.channel.close()
        self._context.term()

    def say(self, message: m.Message) -> None:
        self.channel.send(message)

    def hello(self, name: str = "desk", telemetry_hz: float = 1.0) -> None:
        self.say(m.Hello(host_name=name, telemetry_hz=telemetry_hz))

    def hear(self, kind: type[M], seconds: float = PATIENCE_SECONDS) -> M:
        """The next message of a kind; others are passed over."""
        heard: list[str] = []
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            received = self.channel.receive(int(left * 1000))
            if received is not None and isinstance(received.message, kind):
                return received.message
            heard += [] if received is None else [type(received.message).__name__]
        raise AssertionError(f"no {kind.__name__} within {seconds} s; heard {heard}")

    def wait_for_refusal(self) -> None:
        """Until the worker has refused the key: libzmq gives such a connection up for good."""

        def is_refused() -> bool:
            try:
                self.hello()
            except WorkerLost:
                return True
            return False

        wait_until(is_refused, "the key is refused")


class RunningWorker:
    """A worker with paired hosts, served by a thread of this process."""

    def __init__(self, folder: Path, hosts: tuple[KeyPair, ...], **changes: Any) -> None:
        self.folder = folder
        self.keys = load_identity(folder)
        trusted = TrustedPeers(folder / "trusted_hosts.json")
        for number, keys in enumerate(hosts, start=1):
            trusted.add(TrustedPeer(public_key=keys.public, name=f"desk-{number}", added_s=1.0))
        values = {
            "name": "box",
            "endpoint": f"tcp://127.0.0.1:{free_port()}",
            "keys": self.keys,
            "owner": self.keys.public,
            "devices": list_devices("box"),
            "cache": CacheSettings("", 0),
            "trusted": trusted,
            "lease_seconds": 10.0,
        }
        self.worker = Worker(WorkerOptions(**{**values, **changes}))
        self._thread = threading.Thread(target=self.worker.run, name="worker")
        self._thread.start()

    def host(self, keys: KeyPair) -> Host:
        return Host(self.worker.endpoint, self.keys.public, keys)

    def close(self) -> None:
        self.worker.end_soon()
        self._thread.join(PATIENCE_SECONDS)
        self.worker.close()


@contextlib.contextmanager
def running_worker(folder: Path, *hosts: KeyPair, **changes: Any) -> Iterator[RunningWorker]:
    """Args: hosts: that are paired. changes: of WorkerOptions."""
    worker = RunningWorker(folder, hosts, **changes)
    try:
        yield worker
    finally:
        worker.close()


def free_port() -> int:
    """A port whose followers are free too, as far as one can tell."""
    for _ in range(100):
        port = 20000 + secrets.randbelow(12000)  # Below the range that systems give away.
        with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
            for number in (port, port + 1, port + 2):
                probe = stack.enter_context(socket.socket())
                probe.bind(("127.0.0.1", number))
            return port
    raise AssertionError("no free ports")


def wait_until(is_so: Callable[[], bool], what: str) -> None:
    """Ask again and again."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not is_so():
        assert time.monotonic() < deadline, f"not within {PATIENCE_SECONDS} s: {what}"
        time.sleep(0.02)


class PairingHost:
    """An engine host at a worker's pairing socket."""

    def __init__(self, control_endpoint: str, keys: KeyPair | None = None, name: str = "desk"):
        self.keys = keys or new_key_pair()
        self.pairing = p.Pairing(
            "host",
            self.keys.public,
            name,
            secrets.token_bytes(p.NONCE_BYTES),
            time.monotonic() + p.PAIRING_SECONDS,
        )
        self._context: zmq.Context[Any] = zmq.Context()
        endpoint = p.pairing_endpoint(control_endpoint)
        self.channel: Channel[Any] = Channel(
            connect(self._context, zmq.DEALER, self.keys, p.PAIRING_KEYS.public, endpoint),
            p.WORKER_SENDS,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.channel.close()
        self._context.term()

    def open(self) -> None:
        self.channel.send(self.pairing.open())

    def hear(self) -> m.Message:
        """The next message of the worker, answered as the rules say.

        Raises: PeerRefused: it refuses.
        """
        received = self.channel.receive(int(PATIENCE_SECONDS * 1000))
        assert received is not None, "the worker says nothing"
        answer = self.pairing.take(received.message, b"", time.monotonic())
        if answer is not None:
            self.channel.send(answer)
        return received.message

    def reach_code(self) -> str:
        """Open, and go on until there are digits."""
        self.open()
        while not self.pairing.code:
            self.hear()
        return self.pairing.code

    def judge(self, is_same: bool) -> None:
        self.channel.send(self.pairing.judge(is_same, time.monotonic()))


def older_hello() -> bytes:
    """What an engine host of the protocol before this one says first."""
    return msgspec.msgpack.encode((m.PROTOCOL_VERSION - 1, ["Hello", "old desk"], []))
