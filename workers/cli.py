"""The command `shardmix-worker`: offer this computer to engine hosts.

In: arguments. Out: on standard output what was asked for, such as a join token; what happens on
standard error. An error is one line; exit codes are 0, 1 for an error, 2 for usage, 130 when
interrupted.
"""

from __future__ import annotations

import contextlib
import logging
import signal
import socket
import sys
import threading
import time
from collections.abc import Generator
from typing import Annotated

import typer

from engine.cluster.discovery import Advertiser
from engine.cluster.identity import TrustedPeers, config_dir, fingerprint, load_identity
from engine.cluster.join_token import NODE_NAME, TOKEN_SECONDS
from engine.cluster.plaintext import refuse_plaintext
from engine.cluster.transport import address_that_reaches
from engine.errors import ConfigError, EngineError
from engine.host.node_words import DEFAULT_PORT
from engine.weights.models import cache_folder
from workers import local_messages as local
from workers.cli_pair import pair as pair_with_a_host
from workers.cli_speed import speed
from workers.cli_status import status_lines
from workers.daemon import LEASE_SECONDS, Worker
from workers.install.commands import install, service_lines, uninstall
from workers.limits import Limits, parse_devices, parse_size
from workers.options import WorkerOptions
from workers.presence import LocalConnection, PresenceLock
from workers.slice_cache_settings import choose_cache
from workers.speed_test import SpeedTest
from workers.telemetry import list_devices

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    help="Offer this computer's CPU and GPUs to Shardmix on another one.",
)

# TEST-NET-1: an address of nobody, to ask the system which way out it would take.
ELSEWHERE = "192.0.2.1"
# Pairing has the port after the worker's own; two for each runner follow.
FIRST_RUNNER_PORT = 2
NUM_RUNNER_PORTS = 64
TRUSTED_FILE = "trusted_hosts.json"


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
        int,
        typer.Option(
            min=1024,
            max=65000,
            help="Port; the next one is for pairing, runners use the 64 after that.",
        ),
    ] = DEFAULT_PORT,
    devices: Annotated[
        str | None, typer.Option(help='Lend these alone, such as "cpu,cuda0".')
    ] = None,
    memory_limit: Annotated[
        str | None, typer.Option(help='Memory of the CPU to lend, "8GB" or "75%".')
    ] = None,
    threads: Annotated[int | None, typer.Option(help="Cores to lend.")] = None,
    leave_cores: Annotated[
        int | None, typer.Option(help="Cores to keep; the rest is lent.")
    ] = None,
    trusted_network: Annotated[
        bool,
        typer.Option(
            "--trusted-network",
            help="Allow plans whose devices exchange without encryption (torch.distributed).",
        ),
    ] = False,
    cache_dir: Annotated[str | None, typer.Option(help="Where slices of weights are kept.")] = None,
    cache_limit: Annotated[
        str | None,
        typer.Option(
            help='The most that they take, "20GB"; "0" keeps none. Default: a tenth of the free '
            "disk, at most 50GB."
        ),
    ] = None,
    token: Annotated[
        bool,
        typer.Option("--token", help="Print a join token even where the output is no terminal."),
    ] = False,
) -> None:
    """Serve paired engine hosts until interrupted. In a terminal, prints a token to join with."""
    logging.basicConfig(level="INFO", format="%(message)s")
    # Its own news at this level are of no use to the person here.
    logging.getLogger("zeroconf").setLevel(logging.WARNING)
    with _told_in_one_line():
        refuse_plaintext("shardmix-worker run")
        own_name = name or socket.gethostname().partition(".")[0] or "node"
        address = _check_address(own_name, host)
        limits = Limits(
            devices=parse_devices(devices),
            memory=memory_limit,
            threads=threads,
            leave_cores=leave_cores,
        )
        limit_bytes = None if cache_limit is None else parse_size(cache_limit, "--cache-limit")
        folder = config_dir()
        with PresenceLock(folder) as presence:
            keys = load_identity(folder)
            options = WorkerOptions(
                name=own_name,
                endpoint=f"tcp://{address}:{port}",
                keys=keys,
                owner=keys.public,
                devices=limits.apply(list_devices(own_name)),
                cache=choose_cache(cache_dir, limit_bytes),
                trusted=TrustedPeers(folder / TRUSTED_FILE),
                lease_seconds=LEASE_SECONDS,
                runner_ports=(
                    port + FIRST_RUNNER_PORT,
                    port + FIRST_RUNNER_PORT + NUM_RUNNER_PORTS,
                ),
                is_network_trusted=trusted_network,
            )
            speeds = SpeedTest(own_name, options.devices, cache_folder())
            was_interrupted = _serve(options, speeds, presence, token or sys.stdout.isatty())
    if was_interrupted:
        raise typer.Exit(130)


@app.command()
def pair(
    yes_if: Annotated[
        str | None,
        typer.Option(
            help="For scripts: join an attempt that another `pair` waits in already and whose code "
            "the other computer shows; confirm if it is this one, refuse any other."
        ),
    ] = None,
) -> None:
    """Let an engine host in, after a look at six digits. Needs `shardmix-worker run`."""
    with _told_in_one_line(), LocalConnection(config_dir()) as connection:
        pair_with_a_host(connection, yes_if)


@app.command()
def token() -> None:
    """Print a join token: it lets one engine host in, once, within ten minutes."""
    with _told_in_one_line(), LocalConnection(config_dir()) as connection:
        print(connection.ask(local.MakeToken(), local.Token).token)


@app.command()
def status() -> None:
    """Tell who this worker is, who has it, who may, and who was not let in; and the service."""
    print("\n".join(service_lines()))
    with _told_in_one_line(), LocalConnection(config_dir()) as connection:
        answer = connection.ask(local.AskStatus(), local.Status)
        print("\n".join(status_lines(answer, time.time())))


@app.command()
def unpair(
    who: Annotated[str, typer.Argument(help="Name or fingerprint, as `status` shows them.")],
) -> None:
    """Let an engine host in no longer; one that is at work is ended."""
    with _told_in_one_line(), LocalConnection(config_dir()) as connection:
        gone = connection.ask(local.Unpair(who=who), local.Unpaired)
        print(f"No longer paired with {gone.name} ({gone.fingerprint}).")


app.command()(install)
app.command()(uninstall)
app.command()(speed)


@contextlib.contextmanager
def _told_in_one_line() -> Generator[None]:
    try:
        yield
    except EngineError as error:
        print(f"shardmix-worker: {error}", file=sys.stderr)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


def _check_address(name: str, host: str | None) -> str:
    """Where to listen.

    Raises: ConfigError: the name or the address is none that others can use.
    """
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
    return host or address_that_reaches(ELSEWHERE)


def _serve(
    options: WorkerOptions, speeds: SpeedTest, presence: PresenceLock, shows_token: bool
) -> bool:
    """Serve until a signal comes.

    Args:
        shows_token: whether a person reads along: a token in a log would let in whoever reads that.
    Returns: whether that was Ctrl+C.
    """
    worker = Worker(options, speeds)
    was_interrupted = False

    def end(number: int, _frame: object) -> None:
        nonlocal was_interrupted
        was_interrupted = number == signal.SIGINT
        worker.end_soon()

    signal.signal(signal.SIGINT, end)
    signal.signal(signal.SIGTERM, end)
    advertiser = None
    try:
        presence.publish(worker.endpoint)
        advertiser = Advertiser(options.name, options.keys.public, worker.endpoint)
        listens = (
            f"{options.name} listens on {worker.endpoint}, fingerprint "
            f"{fingerprint(options.keys.public)}."
        )
        if shows_token:
            print(
                f"{listens} On the other computer: Add node in the window, or --node on the "
                "command line, with this token (it lets one computer in, once, within "
                f"{TOKEN_SECONDS / 60:.0f} minutes; `shardmix-worker token` makes another, "
                "`shardmix-worker pair` needs none):",
                file=sys.stderr,
            )
            print(worker.make_token(), flush=True)
        else:
            print(
                f"{listens} To let another computer in, run `shardmix-worker pair` here, or "
                "`shardmix-worker token` for a join token.",
                file=sys.stderr,
            )
        speeds.start()
        worker.run()
    finally:
        speeds.close()
        # Saying goodbye on the network takes as long as ending runners: at once.
        closer = threading.Thread(target=worker.close, name="close")
        closer.start()
        if advertiser is not None:
            advertiser.close()
        closer.join()
    return was_interrupted


def main() -> None:
    """Entry of `shardmix-worker`."""
    app()


if __name__ == "__main__":
    main()
