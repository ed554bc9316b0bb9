"""Which worker runs for this installation, and how this computer's commands speak with it.

In: the folder of settings. Out: a lock that one worker holds for as long as it lives, a small file
that says where it listens, and a connection for commands. The system drops the lock of a worker
that dies, so a file that it left behind is known to be stale.
"""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import msgspec
import zmq

from engine.cluster.identity import load_identity
from engine.cluster.messages import Failed, Message
from engine.cluster.private_file import read_private, write_private
from engine.cluster.transport import Channel, connect
from engine.errors import Cancelled, ConfigError, WorkerLost, error_by_name
from engine.weights.file_lock import FileLock
from workers.local_messages import LOCAL_ANSWERS, LocalRequest

FILE = "worker.json"
LOCK = "worker.lock"
# A command that looks whether a worker runs holds the lock for a moment.
LOCK_SECONDS = 1.0
ANSWER_SECONDS = 5.0
NOBODY = "no worker runs on this computer; start one with `shardmix-worker run`"

A = TypeVar("A", bound=Message)


class Presence(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A worker that runs: its control endpoint and its process."""

    endpoint: str
    pid: int


class PresenceLock:
    """Held by the one worker of an installation."""

    def __init__(self, folder: Path) -> None:
        """Args: folder: of settings; made if absent."""
        self._folder = folder
        deadline = time.monotonic() + LOCK_SECONDS
        self._lock = FileLock(folder / LOCK, cancelled=lambda: time.monotonic() > deadline)

    def __enter__(self) -> Self:
        """Raises: ConfigError: another worker runs, or the folder cannot be written."""
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock.__enter__()
        except Cancelled:
            who = _read(self._folder)
            where = f" (process {who.pid}, {who.endpoint})" if who is not None else ""
            raise ConfigError(
                f"a worker of this installation runs already{where}, and one is the limit; end it "
                "first, or set SHARDMIX_CONFIG to another folder"
            ) from None
        except OSError as error:
            raise ConfigError(
                f"{self._folder} cannot be written: {error.strerror}. Make it writable, or set "
                "SHARDMIX_CONFIG to another folder"
            ) from error
        return self

    def publish(self, endpoint: str) -> None:
        """Tell this computer's commands where the worker listens.

        Raises: ConfigError: the file cannot be written.
        """
        presence = Presence(endpoint, os.getpid())
        write_private(self._folder / FILE, msgspec.json.encode(presence) + b"\n")

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Take the file away, then let go."""
        with contextlib.suppress(OSError):
            (self._folder / FILE).unlink()
        self._lock.__exit__(kind, error, trace)


def find_worker(folder: Path) -> Presence | None:
    """The worker that runs for this installation; the file of a dead one is taken away."""
    presence = _read(folder)
    if presence is None:
        return None
    try:
        with FileLock(folder / LOCK, cancelled=lambda: True):
            with contextlib.suppress(OSError):
                (folder / FILE).unlink()
            return None
    except Cancelled:
        return presence


def _read(folder: Path) -> Presence | None:
    content = read_private(folder / FILE)
    try:
        return None if content is None else msgspec.json.decode(content, type=Presence)
    except msgspec.DecodeError:
        return None


class LocalConnection:
    """A command's connection to this installation's worker; a context manager."""

    def __init__(self, folder: Path) -> None:
        """Connect.

        Args: folder: of settings.
        Raises: ConfigError: no worker runs.
        """
        presence = find_worker(folder)
        if presence is None:
            raise ConfigError(NOBODY)
        self._presence = presence
        keys = load_identity(folder)
        self._context: zmq.Context[Any] = zmq.Context()
        self._channel: Channel[Any] = Channel(
            connect(self._context, zmq.DEALER, keys, keys.public, presence.endpoint),
            LOCAL_ANSWERS,
        )

    def ask(self, request: LocalRequest, expected: type[A]) -> A:
        """Send a request and wait for its answer.

        Raises:
            WorkerLost: it does not answer.
            EngineError: it says why it cannot.
        """
        self._channel.send(request)
        deadline = time.monotonic() + ANSWER_SECONDS
        while (left := deadline - time.monotonic()) > 0:
            received = self._channel.receive(int(left * 1000))
            if received is None:
                break
            if isinstance(received.message, Failed):
                raise error_by_name(received.message.error, received.message.message)
            if isinstance(received.message, expected):
                return received.message
        raise WorkerLost(
            f"the worker (process {self._presence.pid}) at {self._presence.endpoint} did not "
            f"answer within {ANSWER_SECONDS:.0f} s; if it hangs, end it and start it again"
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._channel.close()
        self._context.term()
