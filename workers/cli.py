"""The command `shardmix-worker`: offer this computer to an engine host.

In: arguments. Out: one join token on standard output; what happens on standard error. An error is
one line; exit codes are 0, 1 for an error, 2 for usage, 130 when interrupted.
"""

from __future__ import annotations

import logging
import signal
import socket
import sys
from typing import Annotated

import typer

from engine.cluster.join_token import NODE_NAME, JoinToken
from engine.cluster.security import new_key_pair
from engine.cluster.transport import address_that_reaches
from engine.errors import ConfigError, EngineError
from workers.cli_speed import speed
from workers.daemon import RUNNER_PORTS, Worker
from workers.install.commands import install, uninstall

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    help="Offer this computer's CPU and GPUs to Shardmix on another one.",
)

# TEST-NET-1: an address of nobody, to ask the system which way out it would take.
ELSEWHERE = "192.0.2.1"


@app.callback()
def worker() -> None:
    """Offer this computer's CPU and GPUs to Shardmix on another one."""


@app.command()
def run(
    name: Annotated[str | None, typer.Option(help="What this node is called.")] = None,
    host: Annotated[
        str | None, typer.Option(help="Address to listen on. Default: the one that leads outside.")
    ] = None,
    port: Annotated[
        int, typer.Option(min=1024, max=65000, help="Port; runners use the 64 after it.")
    ] = 47500,
) -> None:
    """Serve until interrupted. Prints the token that the engine host joins with."""
    logging.basicConfig(level="INFO", format="%(message)s")
    try:
        _serve(name or socket.gethostname().partition(".")[0] or "node", host, port)
    except EngineError as error:
        print(f"shardmix-worker: {error}", file=sys.stderr)
        raise typer.Exit(1) from None


app.command()(install)
app.command()(uninstall)
app.command()(speed)


def _serve(name: str, host: str | None, port: int) -> None:
    if not NODE_NAME.fullmatch(name):
        raise ConfigError(
            f"--name {name!r} cannot be used: up to 63 letters, digits, '.', '_' or '-', and not "
            "this or local-N, which are taken"
        )
    if host in ("0.0.0.0", "::", "*"):
        raise ConfigError(
            f"--host {host} is no address that another computer can connect to; give the one of "
            "the network they share"
        )
    address = host or address_that_reaches(ELSEWHERE)
    guest = new_key_pair()
    worker = Worker(
        name,
        guest.public,
        f"tcp://{address}:{port}",
        runner_ports=(port + 1, port + RUNNER_PORTS),
        has_lease=True,
    )

    was_interrupted = False

    def end(number: int, _frame: object) -> None:
        nonlocal was_interrupted
        was_interrupted = number == signal.SIGINT
        worker.end_soon()

    signal.signal(signal.SIGINT, end)
    signal.signal(signal.SIGTERM, end)
    token = JoinToken(name, worker.endpoint, worker.keys.public, guest)
    print(
        f"{name} listens on {worker.endpoint}. On the other computer: Add node in the window, or "
        "--node on the command line, with this token (whoever has it may use this computer until "
        "this command ends):",
        file=sys.stderr,
    )
    print(token.encode(), flush=True)
    try:
        worker.run()
    finally:
        worker.close()
    if was_interrupted:
        raise typer.Exit(130)


def main() -> None:
    """Entry of `shardmix-worker`."""
    app()


if __name__ == "__main__":
    main()
