"""What installing changes, as a list that can be shown, carried out, or taken back.

In: steps. Out: their text for a person, or the changed computer. A dry run and a real run walk the
same list, so that what is shown is what is done. It knows no service manager.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from engine.errors import EngineError

COMMAND_SECONDS = 60.0


class InstallError(EngineError):
    """The service could not be installed, removed or asked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MakeFolder:
    """Make one folder that is not there; its parent is."""

    path: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class WriteFile:
    """Write a file in UTF-8, in place of one that may be there."""

    path: Path
    content: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RunCommand:
    """Run a program to its end.

    Attributes:
        undo: the command that takes its effect back; empty where there is nothing to take back.
        may_fail: it has nothing to do where it fails.
    """

    command: tuple[str, ...]
    undo: tuple[str, ...] = ()
    may_fail: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoveFile:
    """Remove a file, if it is there."""

    path: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoveFolder:
    """Remove a folder if nothing is in it any more."""

    path: Path


Step = MakeFolder | WriteFile | RunCommand | RemoveFile | RemoveFolder


def describe(step: Step) -> str:
    """A step as a person reads it: one line, and for a file its content, indented."""
    match step:
        case MakeFolder(path=path):
            return f"make folder {path}"
        case WriteFile(path=path, content=content):
            lines = "".join(f"    {line}".rstrip() + "\n" for line in content.splitlines())
            return f"write file {path}\n{lines}".rstrip("\n")
        case RunCommand(command=command):
            return f"run {shlex.join(command)}"
        case RemoveFile(path=path):
            return f"remove file {path}"
        case RemoveFolder(path=path):
            return f"remove folder {path}, if it is empty"


def execute(
    steps: Sequence[Step],
    *,
    announce: Callable[[str], None],
    after_undo: Sequence[RunCommand] = (),
) -> None:
    """Carry out all steps, or none: at the first failure those done are taken back.

    Args:
        announce: hears about each step before it is done.
        after_undo: commands that follow when steps were taken back.

    Raises: InstallError: a step failed; its message says what, if anything, is left behind.
    """
    undo: list[Step] = []
    for step in steps:
        announce(describe(step))
        try:
            undo[:0] = perform(step)
        except InstallError as error:
            left = _perform_all([*undo, *after_undo] if undo else [])
            state = f"left behind: {'; '.join(left)}" if left else "nothing was left behind"
            raise InstallError(f"{error}; {state}") from None
        except KeyboardInterrupt:
            _perform_all([*undo, *after_undo] if undo else [])
            raise


def execute_all(steps: Sequence[Step], *, announce: Callable[[str], None]) -> None:
    """Carry out every step, also after one that failed.

    Raises: InstallError: steps failed; its message names each, so that they can be done by hand.
    """
    failures = _perform_all(steps, announce)
    if failures:
        raise InstallError(f"not all could be removed, do by hand: {'; '.join(failures)}")


def perform(step: Step) -> tuple[Step, ...]:
    """Carry out one step.

    Returns: the steps that take it back, in order.
    Raises: InstallError: it failed and changed nothing.
    """
    try:
        match step:
            case MakeFolder(path=path):
                path.mkdir()
                return (RemoveFolder(path=path),)
            case WriteFile(path=path, content=content):
                before = path.read_text(encoding="utf-8") if path.exists() else None
                _write(path, content)
                if before is None:
                    return (RemoveFile(path=path),)
                return (WriteFile(path=path, content=before),)
            case RunCommand(command=command, undo=undo, may_fail=may_fail):
                try:
                    run_command(command)
                except InstallError:
                    if not may_fail:
                        raise
                return (RunCommand(command=undo),) if undo else ()
            case RemoveFile(path=path):
                if not path.exists():
                    return ()
                before = path.read_text(encoding="utf-8")
                path.unlink()
                return (WriteFile(path=path, content=before),)
            case RemoveFolder(path=path):
                if not path.is_dir() or any(path.iterdir()):
                    return ()
                path.rmdir()
                return (MakeFolder(path=path),)
    except (OSError, UnicodeDecodeError) as error:
        raise InstallError(f"could not {describe(step).splitlines()[0]}: {error}") from None


def run_command(command: Sequence[str], environment: Mapping[str, str] | None = None) -> str:
    """Run a program of the system and wait for it.

    Args:
        environment: variables set besides our own.

    Returns: its standard output.
    Raises: InstallError: it is missing, failed, or did not end in time.
    """
    shown = shlex.join(command)
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=COMMAND_SECONDS,
            check=False,
            env={**os.environ, **(environment or {})},
        )
    except OSError as error:
        raise InstallError(f"`{shown}` could not be run: {error.strerror}") from None
    except subprocess.TimeoutExpired:
        raise InstallError(f"`{shown}` did not end within {COMMAND_SECONDS:.0f} s") from None
    if done.returncode:
        words = " ".join((done.stderr or done.stdout).split())[:300] or "it said nothing"
        raise InstallError(f"`{shown}` failed with exit code {done.returncode}: {words}")
    return done.stdout


def _perform_all(steps: Sequence[Step], announce: Callable[[str], None] | None = None) -> list[str]:
    """Carry out what can be; returns the failures, one line each."""
    failures: list[str] = []
    for step in steps:
        if announce is not None:
            announce(describe(step))
        try:
            perform(step)
        except InstallError as error:
            failures.append(str(error))
    return failures


def _write(path: Path, content: str) -> None:
    """All or nothing: a full disk must not leave half a file in place of a whole one."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    temporary = Path(name)
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as stream:
            stream.write(content)
        temporary.chmod(0o644)
        temporary.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
