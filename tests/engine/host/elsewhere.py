"""Another computer, as far as one machine can play it: a worker process of another installation.

And a desk: an engine host of the installation of the test, whose nodes can be waited for.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Self

from engine.client import EngineClient, Event
from engine.cluster.identity import TrustedPeer, TrustedPeers, config_dir, load_identity
from engine.cluster.messages import Message
from engine.host import messages as api

# Generous: the machines that run this are slow and busy. Nothing waits for it to pass.
PATIENCE_SECONDS = 30.0


def free_port() -> int:
    """A port whose followers are free too, as far as one can tell."""
    for _ in range(100):
        port = 20000 + secrets.randbelow(12000)  # Below the range that systems give away.
        with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
            for number in range(port, port + 6):
                probe = stack.enter_context(socket.socket())
                probe.bind(("127.0.0.1", number))
            return port
    raise AssertionError("no free ports")


class Elsewhere:
    """A computer with a worker that can be started, ended and paired with."""

    def __init__(self, folder: Path, name: str = "attic", discovery: str = "off") -> None:
        self.folder = folder
        self.name = name
        self.port = free_port()
        self.token = ""
        self._environment = {
            **os.environ,
            "SHARDMIX_CONFIG": str(folder),
            "SHARDMIX_CACHE": str(folder / "cache"),
            "SHARDMIX_DISCOVERY": discovery,
        }
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    @property
    def endpoint(self) -> str:
        return f"tcp://127.0.0.1:{self.port}"

    @property
    def key(self) -> str:
        return load_identity(self.folder).public.decode()

    def start(self) -> None:
        """Start the worker; returns when it listens."""
        self._process = self._run("run", "--name", self.name, "--host", "127.0.0.1", "--port", str(self.port), "--token")  # fmt: skip
        assert self._process.stdout is not None
        self.token = self._process.stdout.readline().strip()
        assert self.token, "the worker did not start"

    def send(self, number: int) -> None:
        """Send its worker a signal."""
        assert self._process is not None
        self._process.send_signal(number)

    def end(self, number: int = signal.SIGTERM) -> None:
        """End the worker."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(signal.SIGCONT)
                self._process.send_signal(number)
            self._process.communicate(timeout=PATIENCE_SECONDS)
            self._process = None

    def trust(self, key: bytes, name: str = "desk") -> None:
        """Let an engine host in without further ado."""
        peers = TrustedPeers(self.folder / "trusted_hosts.json")
        peers.add(TrustedPeer(public_key=key, name=name, added_s=time.time()))

    def distrust(self, key: bytes) -> None:
        """Let an engine host in no longer."""
        assert TrustedPeers(self.folder / "trusted_hosts.json").remove(key)

    def wait_for_pairing(self) -> Person:
        """Somebody at that computer runs `shardmix-worker pair`."""
        return Person(self._run("pair"))

    def _run(self, *arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "workers.cli", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE if arguments[0] == "pair" else None,
            text=True,
            env=self._environment,
        )


class Person:
    """Somebody who watches `shardmix-worker pair`, or `shardmix nodes pair`, and answers."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate(timeout=PATIENCE_SECONDS)

    def read_until(self, words: str) -> str:
        """The line with these words, on standard error."""
        stream: IO[str] | None = self.process.stderr
        assert stream is not None
        heard: list[str] = []
        for line in stream:
            heard.append(line)
            if words in line:
                return line
        raise AssertionError(f"{words!r} was not said, but {heard}")

    def code(self) -> str:
        """The digits on that screen."""
        found = re.search(r"(\d{3}) (\d{3})", self.read_until("ode"))
        assert found is not None
        return found[1] + found[2]

    def answer(self, text: str) -> None:
        """Type a line."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{text}\n")
        self.process.stdin.flush()

    def ended(self) -> tuple[int, str, str]:
        """Exit code, output and errors."""
        output, errors = self.process.communicate(timeout=PATIENCE_SECONDS)
        return self.process.returncode, output, errors


class Desk:
    """An engine host process of this installation."""

    def __init__(self) -> None:
        self.client = EngineClient()
        self.nodes: tuple[api.NodeState, ...] = ()
        self.events: list[Message] = []
        # The host tells its news to those it has heard of; this asks for nothing.
        self.client.post(api.Cancel(request_id=self.client.next_request_id()))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.client.close()

    def _hear(self, event: Event) -> None:
        if isinstance(event.message, api.NodesChanged):
            self.nodes = event.message.nodes
        else:
            self.events.append(event.message)

    def post(self, kind: Callable[..., Message], **fields: object) -> int:
        """Begin a call."""
        request_id = self.client.next_request_id()
        self.client.post(kind(request_id=request_id, **fields))
        return request_id

    def call(self, kind: Callable[..., Message], **fields: object) -> None:
        """Make a call and wait for its end."""
        request_id = self.client.next_request_id()
        call = kind(request_id=request_id, **fields)
        self.client.run(call, self._hear, PATIENCE_SECONDS)

    def wait_until(self, is_so: Callable[[], bool], what: str) -> None:
        """Listen until something is so."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not is_so():
            assert time.monotonic() < deadline, f"not {what}, but {self.nodes}, {self.events[-3:]}"
            event = self.client.receive(0.2)
            if event is not None:
                self._hear(event)

    def event(self, kind: type[Message], request_id: int) -> Message:
        """The event of this kind that answers a call."""

        def fits(event: Message) -> bool:
            return isinstance(event, kind) and getattr(event, "request_id", 0) == request_id

        self.wait_until(lambda: any(map(fits, self.events)), f"a {kind.__name__}")
        return next(filter(fits, self.events))

    def node(self, name: str, *states: str) -> api.NodeState:
        """A node, as soon as it is in one of these states."""

        def is_there() -> bool:
            return any(n.name == name and (n.state in states or not states) for n in self.nodes)

        self.wait_until(is_there, f"{name} {' or '.join(states)}")
        return next(node for node in self.nodes if node.name == name)

    def names(self) -> set[str]:
        """Of other computers."""
        return {node.name for node in self.nodes if node.kind == "remote"}


def own_key() -> bytes:
    """The permanent key of the desk's installation."""
    return load_identity(config_dir()).public


def remembered() -> list[TrustedPeer]:
    """What the desk's installation has written down."""
    return list(TrustedPeers(config_dir() / "nodes.json"))


def remember(there: Elsewhere, endpoint: str = "") -> None:
    """Let both installations trust each other without a look at digits."""
    there.trust(own_key())
    TrustedPeers(config_dir() / "nodes.json").add(
        TrustedPeer(
            public_key=load_identity(there.folder).public,
            name=there.name,
            added_s=time.time(),
            endpoint=endpoint or there.endpoint,
        )
    )
