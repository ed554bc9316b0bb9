"""Starting our own processes, and ending with the one that started us.

A parent writes one line (its public key and settings) to its child's standard input and reads one
line (where the child listens) from its standard output. The pipe stays open for as long as the
parent lives: when it closes, for whatever reason, the child ends. No secret is in an argument list.
"""

from __future__ import annotations

import collections
import contextlib
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from queue import Empty, Queue
from typing import Any, TypeVar

import msgspec

from engine.errors import WorkerLost, one_line

logger = logging.getLogger(__name__)

LAST_WORDS = 20
# Of them, in the line that tells why a process ended.
SHOWN_LINES = 3
MAX_WORDS = 300
# How Python, C++ and torch put it.
OUT_OF_MEMORY = re.compile(r"MemoryError|bad_alloc|OutOfMemoryError|out of memory|can't allocate")
T = TypeVar("T")


class Greeting(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """First line from parent to child.

    Attributes:
        parent_key: the one public key the child lets in.
        settings: flags of the child's command, by name.
    """

    parent_key: str
    settings: dict[str, Any]


class Address(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """First line from child to parent: where it listens, and its own public key."""

    endpoints: tuple[str, ...]
    public_key: str


class Child:
    """A process of ours that ends when this one does."""

    def __init__(
        self,
        module: str,
        arguments: Sequence[str],
        greeting: Greeting,
        *,
        environment: Mapping[str, str] | None = None,
        on_exit: Callable[[Child], None] | None = None,
    ) -> None:
        """Start `python -m module arguments…`.

        Args:
            environment: variables set besides our own.
            on_exit: called once from a thread of its own when the process has ended.
        """
        self.name = " ".join(arguments) or module
        self._last_words: collections.deque[str] = collections.deque(maxlen=LAST_WORDS)
        self._first_line: Queue[bytes] = Queue()
        self._is_ending = False
        # -P: a folder named `engine` in the current directory must not shadow ours.
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", module, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, **(environment or {})},
        )
        self._threads = [
            threading.Thread(target=target, name=f"{self.name} {what}", daemon=True)
            for what, target in (("stdout", self._read_stdout), ("stderr", self._read_stderr))
        ]
        for thread in self._threads:
            thread.start()
        self._waiter = threading.Thread(
            target=self._wait, args=(on_exit,), name=f"{self.name} exit", daemon=True
        )
        self._waiter.start()
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):  # It died at once; `address` says why.
            self.process.stdin.write(msgspec.json.encode(greeting) + b"\n")
            self.process.stdin.flush()

    @property
    def pid(self) -> int:
        """Process id."""
        return self.process.pid

    def address(self, timeout_seconds: float) -> Address:
        """Wait for the child's first line.

        Raises: WorkerLost: it ended, or said nothing in time.
        """
        try:
            line = self._first_line.get(timeout=timeout_seconds)
        except Empty:
            self.end(0)
            raise WorkerLost(
                f"{self.name} did not start within {timeout_seconds:.0f} s; it was ended"
            ) from None
        if not line:
            self._waiter.join(2)
            cause = self.cause()
            self.end(0)
            raise WorkerLost(f"{self.name} ended at its start: {cause}")
        try:
            return msgspec.json.decode(line, type=Address)
        except msgspec.DecodeError:
            self.end(0)
            raise WorkerLost(
                f"{self.name} said {line[:80]!r} instead of where it listens"
            ) from None

    def cause(self, *, is_out_of_memory: bool = False) -> str:
        """Why the process ended, in one line: exit code or signal, and its last words.

        Args:
            is_out_of_memory: whether the kernel says that it ended a process for memory.
        """
        code = self.process.poll()
        if code is None:
            return "it still runs"
        return describe_exit(code, tuple(self._last_words), is_out_of_memory)

    def end(self, patience_seconds: float = 2.0) -> None:
        """Close its standard input, wait, then kill; returns when it is gone."""
        self._is_ending = True
        if self.process.stdin is not None:
            with contextlib.suppress(OSError):
                self.process.stdin.close()
        try:
            self.process.wait(patience_seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        for thread in [*self._threads, self._waiter]:
            if thread is not threading.current_thread():
                thread.join(1)

    @property
    def is_ending(self) -> bool:
        """Whether `end` was called: its exit is no surprise."""
        return self._is_ending

    def _read_stdout(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as stream:
            self._first_line.put(stream.readline())
            for line in stream:
                self._last_words.append(line.decode("utf-8", "replace").rstrip())

    def _read_stderr(self) -> None:
        assert self.process.stderr is not None
        with self.process.stderr as stream:
            for raw in stream:
                line = raw.decode("utf-8", "replace").rstrip()
                self._last_words.append(line)
                logger.info("%s: %s", self.name, line)

    def _wait(self, on_exit: Callable[[Child], None] | None) -> None:
        self.process.wait()
        # Its last words; but what it started may hold the pipes for ever.
        for thread in self._threads:
            thread.join(0.5)
        if on_exit is not None:
            on_exit(self)


def describe_exit(code: int, words: Sequence[str], is_out_of_memory: bool) -> str:
    """One line on a process that ended.

    Args:
        code: exit code, or the negative number of the signal.
        words: lines that it wrote, the last one last.
        is_out_of_memory: whether the kernel says that it ended a process for memory.
    """
    lines = [one_line(line, MAX_WORDS) for line in words]
    said = [line for line in lines if line][-SHOWN_LINES:]
    if code >= 0:
        how = f"exit code {code}"
    else:
        try:
            name = signal.Signals(-code).name
        except ValueError:
            name = f"signal {-code}"
        how = f"killed by {name}"
        if name == "SIGKILL" and is_out_of_memory:
            how = "out of memory: the system killed it by SIGKILL"
        elif name == "SIGKILL":
            how += " (ended by someone, or out of memory)"
    if code not in (0, -signal.SIGTERM) and any(OUT_OF_MEMORY.search(line) for line in said):
        how = f"out of memory, {how}"
    return f"{how}; last words: {' / '.join(said)}" if said else how


def read_greeting() -> Greeting:
    """In a child: the parent's first line.

    Raises: SystemExit: standard input holds none, because nobody of ours started this process.
    """
    line = sys.stdin.buffer.readline()
    try:
        return msgspec.json.decode(line, type=Greeting)
    except msgspec.DecodeError:
        print("this process is started by shardmix, not by hand", file=sys.stderr)  # noqa: T201
        raise SystemExit(2) from None


def answer_address(endpoints: Sequence[str], public_key: bytes) -> None:
    """In a child: tell the parent where we listen; standard output is silent from then on."""
    line = msgspec.json.encode(Address(tuple(endpoints), public_key.decode("ascii")))
    sys.stdout.buffer.write(line + b"\n")
    sys.stdout.buffer.flush()


def end_with_parent(on_lost: Callable[[], None], grace_seconds: float = 1.0) -> None:
    """In a child: when the parent's pipe closes, call `on_lost`, then end within the grace time.

    Args:
        on_lost: called from a thread; asks the main loop to end.
    """

    def watch() -> None:
        # Not through sys.stdin, whose lock this thread would hold when the interpreter ends.
        while os.read(0, 4096):
            pass
        on_lost()
        time.sleep(grace_seconds)
        # The main thread did not make it: it may be in a long computation.
        os._exit(0)

    # Ctrl+C in a terminal reaches the whole group; the parent decides what ends when.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=watch, name="parent watch", daemon=True).start()
