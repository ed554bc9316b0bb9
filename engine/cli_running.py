"""How a command runs: with a session, in another program's place, or not at all.

In: what a command wants done. Out: exit codes, and errors told in one line.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from typing import NoReturn

import typer

from engine.cli_output import ProgressDisplay
from engine.errors import EngineError
from engine.host import messages as api
from engine.session import Session, SessionOptions


def fail(error: EngineError) -> NoReturn:
    """One line on standard error, exit code 1."""
    line = " ".join(str(error).split())
    print(f"shardmix: {line}", file=sys.stderr)
    raise typer.Exit(1)


def run_session(
    options: SessionOptions,
    work: Callable[[Session, ProgressDisplay], None],
    check_model: Callable[[api.ModelOpened], None] | None = None,
) -> None:
    """Open a session, do the work, and turn errors into exit codes."""
    display = ProgressDisplay()
    try:
        with Session(options, display.show, check_model) as session:
            for name in session.unused_nodes:
                print(
                    f"note: node {name} computes nothing: no plan names {name}/cpu (see --plan)",
                    file=sys.stderr,
                )
            work(session, display)
    except EngineError as error:
        display.stop()
        fail(error)
    except BrokenPipeError:
        # The reader of our output is gone; so is its interest.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(1) from None
    finally:
        display.stop()


def has_display() -> bool:
    """Whether a window can be shown."""
    names = ("DISPLAY", "WAYLAND_DISPLAY", "QT_QPA_PLATFORM")
    return sys.platform != "linux" or any(os.environ.get(name) for name in names)


def become(module: str, arguments: list[str]) -> NoReturn:
    """Run another program in this one's place, so that what ends this one ends it."""
    command = [sys.executable, "-P", "-m", module, *arguments]
    if os.name != "nt":
        os.execv(command[0], command)
    process = subprocess.Popen(command)
    try:
        raise typer.Exit(process.wait())
    except KeyboardInterrupt:
        process.terminate()
        process.wait()
        raise typer.Exit(130) from None
