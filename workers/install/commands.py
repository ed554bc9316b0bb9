"""The commands `install` and `uninstall`, and the service's part of `status`.

In: flags. Out: the service set up or removed; each step on standard output as it is shown or done.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from engine.cluster.join_token import NODE_NAME
from engine.errors import ConfigError, EngineError
from workers.install import choose_service
from workers.install.service import Launch, Service
from workers.install.steps import InstallError, describe, execute, execute_all

# Where settings and weights lie; a service starts without the shell that chose them.
KEPT_VARIABLES = ("SHARDMIX_CONFIG", "SHARDMIX_CACHE")

DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Show every file and command; change nothing.")
]


def install(
    name: Annotated[str | None, typer.Option(help="What this node is called.")] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on.")] = None,
    port: Annotated[int | None, typer.Option(min=1024, max=65000, help="Port.")] = None,
    devices: Annotated[str | None, typer.Option(help="Devices to offer.")] = None,
    memory_limit: Annotated[str | None, typer.Option(help="Memory to offer.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads to compute with.")] = None,
    leave_cores: Annotated[int | None, typer.Option(min=0, help="Cores to leave free.")] = None,
    trusted_network: Annotated[
        bool, typer.Option("--trusted-network", help="Allow exchanges that are not encrypted.")
    ] = False,
    cache_dir: Annotated[
        Path | None, typer.Option(help="Where slices of weights are kept.")
    ] = None,
    cache_limit: Annotated[str | None, typer.Option(help="The most that they take.")] = None,
    dry_run: DryRun = False,
) -> None:
    """Start the worker at boot from now on, with these flags of `run`."""
    flags: dict[str, str | int | None] = {
        "--name": name,
        "--host": host,
        "--port": port,
        "--devices": devices,
        "--memory-limit": memory_limit,
        "--threads": threads,
        "--leave-cores": leave_cores,
        "--cache-dir": None if cache_dir is None else str(cache_dir.absolute()),
        "--cache-limit": cache_limit,
    }
    arguments = [f"{flag}={value}" for flag, value in flags.items() if value is not None]
    if trusted_network:
        arguments.append("--trusted-network")
    try:
        if name is not None and not NODE_NAME.fullmatch(name):
            raise ConfigError(
                f"--name {name!r} cannot be used: up to 63 letters, digits, '.', '_' or '-', and "
                "not this or local-N, which are taken"
            )
        _install(choose_service(sys.platform), launch_of(arguments), dry_run)
    except EngineError as error:
        _fail(error)


def uninstall(dry_run: DryRun = False) -> None:
    """Stop the service and leave nothing of it."""
    service = choose_service(sys.platform)
    try:
        steps = service.uninstall_steps()
        if not steps:
            typer.echo("the service is not installed; nothing to remove")
        elif dry_run:
            typer.echo("\n".join(describe(step) for step in steps))
        else:
            execute_all(steps, announce=typer.echo)
    except EngineError as error:
        _fail(error)


def service_lines() -> list[str]:
    """How the service is, for `status`."""
    try:
        return choose_service(sys.platform).lines()
    except InstallError as error:
        return [f"service: {error}"]


def launch_of(arguments: list[str]) -> Launch:
    """The worker as this very installation runs it.

    Args:
        arguments: flags of `run`.
    """
    return Launch(
        # -P: a folder named `engine` in the current directory must not shadow ours.
        command=(sys.executable, "-P", "-m", "workers.cli", "run", *arguments),
        environment={
            # The service starts in another folder than this shell.
            name: str(Path(os.environ[name]).absolute())
            for name in KEPT_VARIABLES
            if os.environ.get(name)
        },
    )


def _install(service: Service, launch: Launch, dry_run: bool) -> None:
    if not dry_run:
        service.check()
        execute(service.install_steps(launch), announce=typer.echo, after_undo=service.after_undo())
        typer.echo("\n".join(service.lines()))
        return
    typer.echo("\n".join(describe(step) for step in service.install_steps(launch)))
    try:
        service.check()
    except InstallError as error:
        typer.echo(f"shardmix-worker: nothing of this could be done now: {error}", err=True)


def _fail(error: EngineError) -> None:
    typer.echo(f"shardmix-worker: {error}", err=True)
    raise typer.Exit(1) from None
