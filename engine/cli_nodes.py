"""The command `shardmix nodes`: see, pair, add and forget other computers.

In: arguments, and what the person types. Out: a table or JSON on standard output; what happens on
standard error. An error is one line. What the six digits prove is not decided here.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import sys
import threading
import time
from collections.abc import Callable
from typing import Annotated, Any, NoReturn, TypeVar

import typer

from engine.cli_running import fail
from engine.client import EngineClient, Event
from engine.cluster.identity import fingerprint
from engine.cluster.join_token import decode_token
from engine.cluster.messages import Message
from engine.errors import EngineError, PeerRefused, WorkerLost, error_by_name
from engine.host import messages as api
from engine.host.node_words import parse_address, shown_address

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    help="See, pair, add and forget other computers. Without a command: list them.",
)

# Answers to a question asked by mDNS come within a second or not at all.
DISCOVERY_SECONDS = 2.0
# A trusted node that is not there is called lost by then.
SETTLE_SECONDS = 10.0
ADD_SECONDS = 30.0
# The attempt itself ends after a minute.
PAIR_SECONDS = 90.0
YES = ("y", "yes")

T = TypeVar("T")


class _Desk:
    """An engine host, and the nodes as it last told them."""

    def __init__(self) -> None:
        self.client = EngineClient()
        self.nodes: tuple[api.NodeState, ...] = ()
        # The host tells its news to those it has heard of; this asks for nothing.
        self.client.post(api.Cancel(request_id=self.new_id()))

    def receive(self, seconds: float) -> Message | None:
        event = self.client.receive(seconds)
        if event is not None:
            self.hear(event)
        return event.message if event is not None else None

    def hear(self, event: Event) -> None:
        if isinstance(event.message, api.NodesChanged):
            self.nodes = event.message.nodes

    def wait_for(self, find: Callable[[], T | None], seconds: float) -> T | None:
        """What `find` gives, as soon as it gives something; None after `seconds`."""
        deadline = time.monotonic() + seconds
        while (found := find()) is None and time.monotonic() < deadline:
            self.receive(0.2)
        return found

    def run(self, call: Message, seconds: float) -> None:
        self.client.run(call, self.hear, seconds)

    def new_id(self) -> int:
        return self.client.next_request_id()

    def named(self, name: str) -> api.NodeState | None:
        return next((node for node in self.nodes if node.name == name), None)

    def settled(self, key: str) -> api.NodeState | None:
        """The trusted node with this key, once it is known how it is."""
        unsettled = ("starting", "discovered", "pairing")
        nodes = (node for node in self.nodes if node.key and node.key == key)
        return next((node for node in nodes if node.state not in unsettled), None)


@app.callback(invoke_without_command=True)
def list_nodes(
    context: typer.Context,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON list.")] = False,
) -> None:
    """List this computer, those it trusts, and those it finds on the network."""
    if context.invoked_subcommand is not None:
        return

    def work(desk: _Desk) -> None:
        end_of_look = time.monotonic() + DISCOVERY_SECONDS

        def is_complete() -> bool | None:
            is_settled = desk.nodes and not any(n.state == "starting" for n in desk.nodes)
            return True if is_settled and time.monotonic() > end_of_look else None

        desk.wait_for(is_complete, SETTLE_SECONDS)
        if as_json:
            print(json.dumps([_as_dict(node) for node in desk.nodes]))
        else:
            print("\n".join(_table(desk.nodes)))

    _with_desk(work)


@app.command()
def pair(
    who: Annotated[str, typer.Argument(help="Name of a discovered node, or HOST:PORT.")],
) -> None:
    """Trust another computer, after a look at six digits. It must run `shardmix-worker pair`.

    Asked whether the code is the same, answer y, or type the code that the other computer shows.
    """

    def work(desk: _Desk) -> None:
        node = _find(desk, who)
        request_id = desk.new_id()
        desk.client.post(api.PairNode(request_id=request_id, name=node.name))
        deadline = time.monotonic() + PAIR_SECONDS
        answers: queue.SimpleQueue[bool] = queue.SimpleQueue()
        while time.monotonic() < deadline:
            message = desk.receive(0.1)
            if isinstance(message, api.CallFailed):
                raise error_by_name(message.error, message.message)
            if isinstance(message, api.Done) and message.request_id == request_id:
                _tell_how_it_is(desk, lambda: _key_at(desk, node), "paired")
                return
            if isinstance(message, api.PairingCode):
                _ask(message.code, answers)
            with contextlib.suppress(queue.Empty):
                is_same = answers.get_nowait()
                if is_same:
                    _say("Waiting for the other computer to confirm.")
                desk.client.post(
                    api.ConfirmPairing(request_id=desk.new_id(), name=node.name, is_same=is_same)
                )
        raise WorkerLost(f"pairing took longer than {PAIR_SECONDS:.0f} s; begin again")

    _with_desk(work)


@app.command()
def add(
    token: Annotated[str, typer.Argument(help="Join token that `shardmix-worker` printed.")],
) -> None:
    """Trust the computer that made a join token."""

    def work(desk: _Desk) -> None:
        key = decode_token(token).public_key.decode("ascii")
        desk.run(api.AddNode(request_id=desk.new_id(), token=token), ADD_SECONDS)
        _tell_how_it_is(desk, lambda: key, "added")

    _with_desk(work)


@app.command()
def forget(
    name: Annotated[str, typer.Argument(help="Name of the node, as `shardmix nodes` shows it.")],
) -> None:
    """Trust another computer no longer."""

    def work(desk: _Desk) -> None:
        desk.run(api.ForgetNode(request_id=desk.new_id(), name=name), ADD_SECONDS)
        print(f"{name} is forgotten.")

    _with_desk(work)


def _with_desk(work: Callable[[_Desk], None]) -> None:
    """Start an engine host, do the work, end the host; errors become exit codes."""
    try:
        desk = _Desk()
        try:
            work(desk)
        finally:
            desk.client.close()
    except EngineError as error:
        fail(error)


def _find(desk: _Desk, who: str) -> api.NodeState:
    """The node that a person names, once it is there.

    Raises: EngineError: there is none.
    """
    node = desk.wait_for(lambda: desk.named(who), DISCOVERY_SECONDS)
    if node is not None:
        return node
    if ":" not in who and "." not in who:
        known = ", ".join(node.name for node in desk.nodes)
        raise PeerRefused(
            f"no node called {who!r} was found, only {known}. Give its address as HOST:PORT"
        )
    endpoint = parse_address(who)
    desk.run(api.AddAddress(request_id=desk.new_id(), endpoint=endpoint), ADD_SECONDS)

    def at_endpoint() -> api.NodeState | None:
        return next((node for node in desk.nodes if node.endpoint == endpoint), None)

    return desk.wait_for(at_endpoint, ADD_SECONDS) or _never(endpoint)


def _never(endpoint: str) -> NoReturn:
    raise WorkerLost(f"the engine host does not list {endpoint}; please report this")


def _key_at(desk: _Desk, before: api.NodeState) -> str:
    """The key of a node that has just been paired with."""
    if before.key:
        return before.key
    return next((node.key for node in desk.nodes if node.endpoint == before.endpoint), "")


def _ask(code: str, answers: queue.SimpleQueue[bool]) -> None:
    """Have somebody say whether the codes are the same; the answer comes in `answers`."""
    _say(f"Code: {code[:3]} {code[3:]}")
    _say("Does the other computer show the same code? [y/N, or that code] ")

    def read() -> None:
        # Not through sys.stdin, whose lock this thread would hold when the interpreter ends.
        text = os.read(0, 1024).decode("utf-8", "replace").strip().lower()
        answers.put(text in YES or text.replace(" ", "") == code)

    # Reading blocks, and the other end may refuse meanwhile.
    threading.Thread(target=read, name="answer", daemon=True).start()


def _tell_how_it_is(desk: _Desk, key: Callable[[], str], verb: str) -> None:
    """Say what became of a node that is trusted now."""
    node = desk.wait_for(lambda: desk.settled(key()), SETTLE_SECONDS)
    if node is None:
        print(f"{verb}; it has not answered yet")
    elif node.state == "lost":
        print(f"{node.name} is {verb}, and not to be had now: {node.reason}")
    else:
        devices = ", ".join(device.device for device in node.devices)
        print(f"{node.name} is {verb} and ready: {devices}")


def _table(nodes: tuple[api.NodeState, ...]) -> list[str]:
    """Aligned lines, the reason last: it is as long as it is."""
    rows = [("NAME", "STATE", "FINGERPRINT", "ADDRESS", "")]
    rows += [
        (
            node.name,
            node.state,
            fingerprint(node.key.encode("ascii")) if node.key else "-",
            shown_address(node.endpoint) or "-",
            node.reason,
        )
        for node in nodes
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return [
        "  ".join([*(row[c].ljust(widths[c]) for c in range(4)), row[4]]).rstrip() for row in rows
    ]


def _as_dict(node: api.NodeState) -> dict[str, Any]:
    return {
        "name": node.name,
        "state": node.state,
        "since_s": node.since_s,
        "reason": node.reason,
        "fingerprint": fingerprint(node.key.encode("ascii")) if node.key else None,
        "address": shown_address(node.endpoint) or None,
        "host_name": node.host_name,
        "version": node.version,
        "devices": [device.device for device in node.devices],
        "round_trip_seconds": node.round_trip_seconds,
    }


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
