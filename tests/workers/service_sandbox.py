"""Where the service is installed in tests: a home folder, and service managers that can be looked at.

`FakeManager` puts small scripts named systemctl and loginctl on PATH, which write down how they were
called. `UserManager` is systemd itself in namespaces of its own, where this computer allows them.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import psutil

START_SECONDS = 20.0
COMMAND_SECONDS = 60.0

_FAKE = """#!/bin/sh
# Writes down how it was called; fails where the test says so.
echo "$(basename "$0") $*" >>"$SANDBOX_LOG"
case "$(basename "$0") $*" in
    *"show-user"*) cat "$SANDBOX_LINGER" ;;
    *" show --property=UnitPath"*) echo "$HOME/.config/systemd/user /usr/lib/systemd/user" ;;
    *" show "*) cat "$SANDBOX_STATE" ;;
    *journalctl*) echo "the port is taken" ;;
esac
if [ -n "$SANDBOX_HANG" ]; then
    case " $* " in *" $SANDBOX_HANG "*) exec sleep 60 ;; esac
fi
if [ -n "$SANDBOX_FAIL" ]; then
    case " $* " in *" $SANDBOX_FAIL "*) echo "refused by the test" >&2; exit 7 ;; esac
fi
"""


COMMANDS = """
import typer
from workers.install.commands import install, uninstall

app = typer.Typer(pretty_exceptions_enable=False)
app.command()(install)
app.command()(uninstall)
app()
"""


def snapshot(folder: Path) -> dict[str, bytes | str]:
    """Everything below a folder: files with their bytes, links with their target, folders."""
    found: dict[str, bytes | str] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        mode = oct(path.lstat().st_mode)
        if path.is_symlink():
            found[name] = f"link to {path.readlink()}"
        elif path.is_file():
            found[name] = f"{mode} ".encode() + path.read_bytes()
        else:
            found[name] = f"{mode} folder"
    return found


class FakeManager:
    """A home folder, and a PATH on which systemctl, loginctl and journalctl only write down."""

    def __init__(self, folder: Path) -> None:
        self.home = folder / "home"
        self.home.mkdir()
        programs = folder / "programs"
        programs.mkdir()
        for name in ("systemctl", "loginctl", "journalctl"):
            (programs / name).write_text(_FAKE, encoding="utf-8")
            (programs / name).chmod(0o755)
        self._log = folder / "log"
        self._linger = folder / "linger"
        self._state = folder / "state"
        self.environment = {
            "HOME": str(self.home),
            "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
            "SANDBOX_LOG": str(self._log),
            "SANDBOX_LINGER": str(self._linger),
            "SANDBOX_STATE": str(self._state),
        }
        self.set_linger(False)
        self.set_state("ActiveState=active\nSubState=running\nMainPID=12\n")

    @property
    def unit(self) -> Path:
        """Where the unit belongs."""
        return self.home / ".config" / "systemd" / "user" / "shardmix-worker.service"

    def set_linger(self, lingers: bool) -> None:
        """What loginctl says of the user."""
        self._linger.write_text("yes\n" if lingers else "no\n", encoding="utf-8")

    def set_state(self, shown: str) -> None:
        """What systemctl shows of the unit."""
        self._state.write_text(shown, encoding="utf-8")

    def run(self, *arguments: str, fail_on: str = "") -> subprocess.CompletedProcess[str]:
        """A command of `workers.install` in this sandbox, without the rest of the worker.

        Args:
            fail_on: the argument at which systemctl or loginctl fails.
        """
        return self.run_python("-c", COMMANDS, *arguments, variables={"SANDBOX_FAIL": fail_on})

    def start(self, *arguments: str, hang_on: str) -> subprocess.Popen[str]:
        """Begin a command in this sandbox; systemctl or loginctl hangs at an argument."""
        return subprocess.Popen(
            [sys.executable, "-P", "-c", COMMANDS, *arguments],
            env=self._variables({"SANDBOX_HANG": hang_on}),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
        )

    def run_python(
        self, *arguments: str, variables: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Python in this sandbox."""
        return subprocess.run(
            [sys.executable, "-P", *arguments],
            env=self._variables(variables or {}),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            timeout=COMMAND_SECONDS,
            check=False,
        )

    def _variables(self, further: Mapping[str, str]) -> dict[str, str]:
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("SHARDMIX_", "XDG_"))}
        return {**kept, **self.environment, **further}

    def is_called(self, argument: str) -> bool:
        """Whether systemctl or loginctl was called with this argument."""
        return self._log.exists() and f" {argument} " in self._log.read_text(encoding="utf-8")

    def commands(self) -> list[str]:
        """The commands that change something, since the last call."""
        lines = self._log.read_text(encoding="utf-8").splitlines() if self._log.exists() else []
        self._log.unlink(missing_ok=True)
        asks = ("systemctl --user show ", "loginctl show-user ", "journalctl ")
        return [line for line in lines if not line.startswith(asks)]


_ISOLATE = ("unshare", "--mount", "--cgroup", "--pid", "--fork", "--mount-proc", "--kill-child")
_MOUNT = """
set -e
mount -t tmpfs tmpfs /run
mount -t tmpfs tmpfs /sys/fs/cgroup
mount -t cgroup2 cgroup2 /sys/fs/cgroup
"""
_BOOT = f"""{_MOUNT}
mkdir -p /run/systemd/system "$XDG_RUNTIME_DIR"
chmod 700 "$XDG_RUNTIME_DIR"
# Not by exec: as the first process of a computer systemd is no user's manager.
/lib/systemd/systemd --user
exit $?
"""


class UserManager:
    """systemd as a user's manager, in mount, process and control group namespaces of its own."""

    def __init__(self, target: int, environment: Mapping[str, str]) -> None:
        self._target = target
        self._environment = dict(environment)

    def run(self, command: Sequence[str]) -> subprocess.CompletedProcess[str]:
        """A command that sees this manager."""
        return subprocess.run(
            ["nsenter", f"--target={self._target}", "--mount", "--pid", "--cgroup", *command],
            env=self._environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            timeout=COMMAND_SECONDS,
            check=False,
        )

    def systemctl(self, *arguments: str) -> str:
        """What systemctl answers."""
        return self.run(["systemctl", "--user", *arguments]).stdout.strip()


def why_no_user_manager() -> str:
    """Why systemd cannot be started here; empty where it can."""
    if sys.platform != "linux" or os.getuid() != 0:
        return "starting a user manager in namespaces needs Linux and root"
    for program in ("unshare", "nsenter", "systemctl"):
        if shutil.which(program) is None:
            return f"{program} is missing"
    if not Path("/lib/systemd/systemd").exists():
        return "systemd is not installed"
    groups = _unified_control_groups()
    if groups is None or not os.access(groups, os.W_OK):
        return "unified control groups are not mounted, or read only"
    tried = subprocess.run(
        [*_ISOLATE, "sh", "-c", _MOUNT],
        capture_output=True,
        encoding="utf-8",
        timeout=COMMAND_SECONDS,
        check=False,
    )
    return f"no namespaces: {tried.stderr.strip()}" if tried.returncode else ""


@contextlib.contextmanager
def user_manager(fake: FakeManager, variables: Mapping[str, str]) -> Iterator[UserManager]:
    """Start a manager for the sandbox's home; only loginctl stays the script.

    Args:
        variables: variables of the manager, and so of what it starts.
    """
    (Path(fake.environment["PATH"].partition(os.pathsep)[0]) / "systemctl").unlink()
    groups = _unified_control_groups()
    assert groups is not None
    group = groups / f"shardmix-test-{os.getpid()}"
    environment = {**os.environ, **fake.environment, "XDG_RUNTIME_DIR": "/run/user-of-test"}
    environment.update(variables)
    environment.pop("DBUS_SESSION_BUS_ADDRESS", None)
    group.mkdir()
    script = f"""
        echo $$ >{shlex.quote(str(group / "cgroup.procs"))} || exit 3
        exec {shlex.join([*_ISOLATE, "sh", "-c", _BOOT])}
    """
    outside = subprocess.Popen(["sh", "-c", script], env=environment, stdin=subprocess.DEVNULL)
    try:
        manager = _await_manager(outside, environment)
        yield manager
    finally:
        outside.kill()
        outside.wait()
        _remove_control_groups(group)


def _await_manager(outside: subprocess.Popen[bytes], environment: Mapping[str, str]) -> UserManager:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and outside.poll() is None:
        children = psutil.Process(outside.pid).children()
        if children:
            manager = UserManager(children[0].pid, environment)
            if manager.systemctl("is-system-running") in ("running", "degraded"):
                return manager
        time.sleep(0.05)
    raise AssertionError(f"the user manager did not start; unshare: {outside.poll()}")


def _unified_control_groups() -> Path | None:
    for line in Path("/proc/mounts").read_text(encoding="utf-8").splitlines():
        _, place, kind, *_ = line.split()
        if kind == "cgroup2":
            return Path(place)
    return None


def _remove_control_groups(group: Path) -> None:
    """The kernel keeps a group until its last process is reaped."""
    deadline = time.monotonic() + START_SECONDS
    while group.exists():
        folders = [Path(folder) for folder, _, _ in os.walk(group, topdown=False)]
        try:
            for folder in folders:
                folder.rmdir()
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)
