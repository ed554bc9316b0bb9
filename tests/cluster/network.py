"""Computers on a bench: network namespaces on one switch, with cables that can be cut or slow.

In: names of computers, the rate and delay of their cables. Out: `Computer`s, each with an address,
a loopback, a home and Shardmix folders of its own, in which programs and sessions run as they
would on separate machines; multicast reaches all of them. Needs Linux, root, `ip` and `tc`;
`why_impossible` says what is missing. What a crashed run left behind is removed by the next one.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path

import psutil

# A namespace is called PREFIX, process id of the tests, number of the network, computer.
PREFIX = "shardmix-bench-"
NAMESPACES = Path("/run/netns")
# What a limited cable carries in this time, it carries at once; a real one never does.
BURST_SECONDS = 0.0005
MIN_BURST_BYTES = 64 << 10
QUEUE_MS = 100
COMMAND_SECONDS = 20.0
LINK_SECONDS = 10.0
END_SECONDS = 5.0
POLL_SECONDS = 0.02
CLONE_NEWNET = 0x40000000
DELAY_LINE = Path(__file__).with_name("delay_line.py")

_numbers = itertools.count(1)


class BenchError(RuntimeError):
    """The bench itself, not what is tested on it, does not work."""


@cache
def why_impossible() -> str:
    """Why there can be no namespaces here; "" where there can."""
    if sys.platform != "linux":
        return "network namespaces exist on Linux only"
    missing = [program for program in ("ip", "tc") if shutil.which(program) is None]
    if missing:
        return f"no {' and no '.join(missing)} here (Debian: apt install iproute2)"
    if os.geteuid() != 0:
        return "network namespaces need root"
    try:
        with contextlib.closing(Network(Path("/nonexistent"))) as network:
            network.add("probe", rate_mbit=1000)
    except (BenchError, OSError) as error:
        return f"this system allows no network namespaces: {error}"
    return ""


class Network:
    """A switch, and the computers plugged into it."""

    def __init__(self, folder: Path) -> None:
        """Set up the switch alone.

        Args:
            folder: what the computers keep and say, one folder each.
        Raises: BenchError: the system does not allow it.
        """
        remove_stale()
        self.folder = folder
        self.computers: dict[str, Computer] = {}
        self._prefix = f"{PREFIX}{os.getpid()}-{next(_numbers)}-"
        self._subnet = f"10.77.{os.getpid() % 254 + 1}"
        self.switch = f"{self._prefix}switch"
        try:
            _ip("netns", "add", self.switch)
            # Multicast goes to every port; a port works as soon as it is plugged in.
            bridge = ("type", "bridge", "forward_delay", "0", "mcast_snooping", "0")
            _ip("-n", self.switch, "link", "add", "bridge", *bridge)
            _ip("-n", self.switch, "link", "set", "bridge", "up")
        except BaseException:
            self.close()
            raise

    def add(self, name: str, *, rate_mbit: float = 0, delay_seconds: float = 0) -> Computer:
        """Plug a computer in.

        Args:
            rate_mbit: of its cable in each direction; 0 is as fast as the machine.
            delay_seconds: of its cable in each direction.
        """
        number = len(self.computers) + 1
        computer = Computer(self, name, f"{self._prefix}{name}", f"{self._subnet}.{number}", number)
        self.computers[name] = computer
        computer.plug_in(delay_seconds)
        if rate_mbit:
            computer.limit(rate_mbit)
        return computer

    def close(self) -> list[str]:
        """End every program, remove everything.

        Returns: programs that were still there although nobody of the bench had started them.
        """
        for computer in self.computers.values():
            computer.end_programs()
        names = [computer.namespace for computer in self.computers.values()] + [self.switch]
        left = [
            f"{name.removeprefix(self._prefix)}: {words}"
            for name in names
            for words in _end_all_in(name)
        ]
        for name in names:
            _remove_namespace(name)
        return left


class Computer:
    """One namespace, its cable, its folders, and the programs that run there."""

    def __init__(
        self, network: Network, name: str, namespace: str, address: str, number: int
    ) -> None:
        """Made by `Network.add`."""
        self.name = name
        self.namespace = namespace
        self.address = address
        self.folder = network.folder / name
        self._switch = network.switch
        self._cable = f"cable{number}"
        self._programs: list[Program] = []
        # A computer of its own has its own folders, and discovers on its own network.
        self.environment = {
            "HOME": str(self.folder / "home"),
            "SHARDMIX_CONFIG": str(self.folder / "config"),
            "SHARDMIX_CACHE": str(self.folder / "cache"),
            "SHARDMIX_DISCOVERY": address,
        }

    def plug_in(self, delay_seconds: float) -> None:
        """Make the namespace and its cable to the switch; called once, by `Network.add`."""
        _ip("netns", "add", self.namespace)
        with self.entered():
            # Its addresses are not usable for seconds, and nothing here is about them.
            Path("/proc/sys/net/ipv6/conf/all/disable_ipv6").write_text("1")
        ends = ("type", "veth", "peer", "name", "eth0", "netns", self.namespace)
        _ip("-n", self._switch, "link", "add", self._cable, *ends)
        _ip("-n", self._switch, "link", "set", self._cable, "up")
        port = self._cable
        if delay_seconds:
            port, far = f"{self._cable}-port", f"{self._cable}-far"
            _ip("-n", self._switch, "link", "add", port, "type", "veth", "peer", "name", far)
            for end in (port, far):
                _ip("-n", self._switch, "link", "set", end, "up")
            self._start_delay_line(far, delay_seconds)
        _ip("-n", self._switch, "link", "set", port, "master", "bridge")
        _ip("-n", self.namespace, "link", "set", "lo", "up")
        _ip("-n", self.namespace, "addr", "add", f"{self.address}/24", "dev", "eth0")
        _ip("-n", self.namespace, "link", "set", "eth0", "up")
        # Like most computers it has a way out, which programs ask for their own address.
        for destination in ("default", "224.0.0.0/4"):
            _ip("-n", self.namespace, "route", "add", destination, "dev", "eth0")
        self._wait_for_link(is_up=True)

    def limit(self, rate_mbit: float) -> None:
        """Let the cable carry this much in each direction, from now on."""
        burst = max(MIN_BURST_BYTES, int(rate_mbit * 1e6 / 8 * BURST_SECONDS))
        shape = ("tbf", "rate", f"{rate_mbit}mbit", "burst", str(burst), "latency", f"{QUEUE_MS}ms")
        for namespace, end in ((self.namespace, "eth0"), (self._switch, self._cable)):
            _command("tc", "-n", namespace, "qdisc", "replace", "dev", end, "root", *shape)

    def cut(self) -> None:
        """Pull the cable; the computer keeps its address, as one with a pulled cable does."""
        _ip("-n", self._switch, "link", "set", self._cable, "down")
        self._wait_for_link(is_up=False)

    def mend(self) -> None:
        """Plug the cable in again."""
        _ip("-n", self._switch, "link", "set", self._cable, "up")
        self._wait_for_link(is_up=True)

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """Run a block of this thread here.

        Sockets, threads and processes that the block makes stay here for good, so a session or a
        server made in it can be used outside of it. Its variables are the computer's.
        """
        saved = {name: os.environ.get(name) for name in self.environment}
        with _inside(self.namespace):
            os.environ.update(self.environment)
            try:
                yield
            finally:
                for name, value in saved.items():
                    if value is None:
                        os.environ.pop(name, None)
                    else:
                        os.environ[name] = value

    def start(
        self, name: str, command: Sequence[str], environment: dict[str, str] | None = None
    ) -> Program:
        """Start a program that the bench ends, at the latest when the network is closed.

        Args:
            name: of the program, for its log and for messages.
            environment: variables besides the computer's own.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        log = self.folder / f"{len(self._programs)}-{name}.log"
        with self.entered(), log.open("wb") as output:
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONUNBUFFERED": "1", **(environment or {})},
            )
        program = Program(f"{name} on {self.name}", process, log)
        self._programs.append(program)
        return program

    def run(self, command: Sequence[str], timeout_seconds: float) -> str:
        """Run a program to its end.

        Returns: what it said, standard output and error together.
        Raises: BenchError: it failed or did not end in time.
        """
        program = self.start(Path(command[0]).name, command)
        program.close_input()
        code = program.wait(timeout_seconds)
        if code:
            raise BenchError(f"{program.name} ended with {code}:\n{program.output()}")
        return program.output()

    def end_programs(self) -> None:
        """End what `start` started and still runs."""
        for program in reversed(self._programs):
            program.end()

    def _start_delay_line(self, far: str, delay_seconds: float) -> None:
        command = [sys.executable, "-P", str(DELAY_LINE), self._cable, far, str(delay_seconds)]
        # It belongs to the switch: its two interfaces are there.
        self.folder.mkdir(parents=True, exist_ok=True)
        log = self.folder / "delay-line.log"
        with _inside(self._switch), log.open("wb") as output:
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=output, stderr=subprocess.STDOUT
            )
        program = Program(f"delay line of {self.name}", process, log)
        self._programs.append(program)
        program.wait_for("ready", COMMAND_SECONDS)

    def _wait_for_link(self, is_up: bool) -> None:
        def has_come() -> bool:
            (link,) = json.loads(_ip("-n", self.namespace, "-j", "link", "show", "eth0"))
            return ("LOWER_UP" in link["flags"]) == is_up

        wait_until(
            has_come, LINK_SECONDS, f"the cable of {self.name} to be {'in' if is_up else 'out'}"
        )


class Program:
    """A process on a computer; what it says goes to a file."""

    def __init__(self, name: str, process: subprocess.Popen[bytes], log: Path) -> None:
        """Made by `Computer.start`."""
        self.name = name
        self.process = process
        self._log = log

    def output(self) -> str:
        """What it has said so far."""
        return self._log.read_text(encoding="utf-8", errors="replace")

    def say(self, text: str) -> None:
        """Write to its standard input."""
        assert self.process.stdin is not None
        self.process.stdin.write(text.encode())
        self.process.stdin.flush()

    def close_input(self) -> None:
        """End its standard input."""
        assert self.process.stdin is not None
        self.process.stdin.close()

    def wait_for(self, pattern: str, timeout_seconds: float) -> re.Match[str]:
        """Wait until its output has a match of a regular expression.

        Raises: BenchError: it ended, or the time passed, without one.
        """
        deadline = time.monotonic() + timeout_seconds
        while True:
            has_ended = self.process.poll() is not None
            found = re.search(pattern, self.output(), re.MULTILINE)
            if found is not None:
                return found
            if has_ended or time.monotonic() > deadline:
                how = "ended" if has_ended else f"ran for {timeout_seconds} s"
                raise BenchError(f"{self.name} {how} without {pattern!r}:\n{self.output()}")
            time.sleep(POLL_SECONDS)

    def wait(self, timeout_seconds: float) -> int:
        """Its exit code.

        Raises: BenchError: it did not end in time; it is killed then.
        """
        try:
            return self.process.wait(timeout_seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise BenchError(
                f"{self.name} did not end within {timeout_seconds} s:\n{self.output()}"
            ) from None

    def end(self) -> None:
        """Interrupt it as Ctrl+C would, kill it where that does not end it."""
        if self.process.poll() is None:
            # One that a test stopped hears nothing.
            self.process.send_signal(signal.SIGCONT)
            self.process.send_signal(signal.SIGINT)
            try:
                self.process.wait(END_SECONDS)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        if self.process.stdin is not None:
            with contextlib.suppress(OSError):
                self.process.stdin.close()


def wait_until(is_so: Callable[[], bool], timeout_seconds: float, what: str) -> None:
    """Wait until something is so.

    Raises: BenchError: the time passed.
    """
    deadline = time.monotonic() + timeout_seconds
    while not is_so():
        if time.monotonic() > deadline:
            raise BenchError(f"waited {timeout_seconds} s in vain for {what}")
        time.sleep(POLL_SECONDS)


def remove_stale() -> list[str]:
    """Remove what tests left that were killed, programs included.

    Returns: names of the namespaces that were removed.
    """
    found: list[str] = []
    if not NAMESPACES.is_dir():
        return found
    for path in NAMESPACES.glob(f"{PREFIX}*"):
        owner = path.name.removeprefix(PREFIX).partition("-")[0]
        with contextlib.suppress(OSError):
            if owner.isdigit() and not _is_older(int(owner), path.stat().st_mtime):
                _end_all_in(path.name)
                _remove_namespace(path.name)
                found.append(path.name)
    return found


def _is_older(pid: int, time_s: float) -> bool:
    """Whether a process lives and began before a time; a later one has the number by chance."""
    try:
        return psutil.Process(pid).create_time() <= time_s + 1
    except psutil.Error:
        return False


def _end_all_in(namespace: str) -> list[str]:
    """Kill what runs in a namespace; returns the command lines."""
    if not (NAMESPACES / namespace).exists():
        return []
    words: list[str] = []
    processes: list[psutil.Process] = []
    for pid in _ip("netns", "pids", namespace).split():
        with contextlib.suppress(psutil.Error):
            process = psutil.Process(int(pid))
            if process.pid != os.getpid():
                words.append(f"process {pid} {' '.join(process.cmdline())}")
                processes.append(process)
                process.kill()
    psutil.wait_procs(processes, END_SECONDS)
    return words


def _remove_namespace(namespace: str) -> None:
    if (NAMESPACES / namespace).exists():
        _ip("netns", "del", namespace)


@contextlib.contextmanager
def _inside(namespace: str) -> Iterator[None]:
    """Run a block of this thread in a namespace."""
    with open("/proc/thread-self/ns/net") as before, open(NAMESPACES / namespace) as inside:
        _set_namespace(inside.fileno())
        try:
            yield
        finally:
            _set_namespace(before.fileno())


def _set_namespace(descriptor: int) -> None:
    # os.setns is newer than Python 3.11.
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(descriptor, CLONE_NEWNET):
        number = ctypes.get_errno()
        raise OSError(number, f"setns: {os.strerror(number)}")


def _ip(*arguments: str) -> str:
    return _command("ip", *arguments)


def _command(*words: str) -> str:
    done = subprocess.run(
        words,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=COMMAND_SECONDS,
        check=False,
    )
    if done.returncode:
        raise BenchError(f"{' '.join(words)}: {done.stderr.strip()}")
    return done.stdout
