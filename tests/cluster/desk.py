"""Workers and an engine host on computers of the bench, used as a person uses them.

In: computers, a model. Out: real `shardmix-worker` processes, and a `Desk` that sees, pairs and uses
them through the messages that the window sends.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

from engine.client import Event
from engine.cluster.messages import Message
from engine.host import messages as api
from engine.plan.plan import Plan, PlanShape
from engine.session import Session, SessionOptions
from tests.cluster.network import BenchError, Computer, Program
from tests.processes import processes_below

# Generous: several processes share two cores, and each imports torch.
START_SECONDS = 60.0
PAIRING_SECONDS = 60.0


def worker_command(*words: str) -> list[str]:
    """`shardmix-worker …`."""
    return [sys.executable, "-P", "-m", "workers.cli", *words]


def start_workers(computers: Sequence[Computer], *options: str) -> list[Program]:
    """`shardmix-worker run` on each computer, named like it, once all listen."""
    programs = [
        computer.start("worker", worker_command("run", "--name", computer.name, *options))
        for computer in computers
    ]
    for program in programs:
        program.wait_for("listens on", START_SECONDS)
    return programs


def runner_of(worker: Program) -> psutil.Process:
    """The one runner that a worker has started."""
    (runner,) = processes_below(psutil.Process(worker.process.pid), "shardmix-runner")
    return runner


class Desk:
    """An engine host on a computer, with a model on that computer alone; a context manager."""

    def __init__(self, computer: Computer, model: Path) -> None:
        """Start the host and open the model in float32."""
        self.computer = computer
        self.nodes: dict[str, api.NodeState] = {}
        self.notes: list[Message] = []
        options = SessionOptions(model=str(model), dtype="float32", num_threads=1)
        with computer.entered():
            self.session = Session(options, self.hear)
        self.shape = PlanShape.from_config(self.session.model.config)

    def __enter__(self) -> Self:
        """The desk itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End the host."""
        self.session.close()

    def wait_for_node(
        self, name: str, states: Sequence[str], timeout_seconds: float = START_SECONDS
    ) -> api.NodeState:
        """Wait until a node is in one of some states.

        Raises: BenchError: it does not come into one in time.
        """
        deadline = time.monotonic() + timeout_seconds
        while name not in self.nodes or self.nodes[name].state not in states:
            if time.monotonic() > deadline:
                seen = {node.name: (node.state, node.reason) for node in self.nodes.values()}
                raise BenchError(f"{name} is not {' or '.join(states)}; nodes are {seen}")
            event = self.session.client.receive(0.2)
            if event is not None:
                self.hear(event.message)
        return self.nodes[name]

    def pair(self, computer: Computer) -> str:
        """Pair with the worker of a computer, which discovery has shown; both persons say yes.

        Returns: the code that both saw.
        """
        name = computer.name
        self.wait_for_node(name, ["discovered"])
        there = computer.start("pair", worker_command("pair"))
        there.wait_for("Waiting", START_SECONDS)
        client = self.session.client
        codes: list[str] = []

        def on_event(event: Event) -> None:
            self.hear(event.message)
            if isinstance(event.message, api.PairingCode):
                shown = there.wait_for(r"(\d{3}) (\d{3})$", PAIRING_SECONDS)
                codes.extend([event.message.code, shown[1] + shown[2]])
                there.say("y\n")
                confirm = api.ConfirmPairing(
                    request_id=client.next_request_id(), name=name, is_same=True
                )
                client.post(confirm)

        call = api.PairNode(request_id=client.next_request_id(), name=name)
        client.run(call, on_event, timeout_seconds=PAIRING_SECONDS)
        assert there.wait(PAIRING_SECONDS) == 0
        assert len(codes) == 2
        assert codes[0] == codes[1]
        self.wait_for_node(name, ["ready"])
        return codes[0]

    def apply(self, devices: Sequence[str], cells: Sequence[Sequence[int]]) -> None:
        """Put a table in force, one row of cells per plan row."""
        self.session.apply(self.plan(devices, cells))

    def plan(self, devices: Sequence[str], cells: Sequence[Sequence[int]]) -> Plan:
        """A table as a plan."""
        rows = tuple(tuple(row) for row in cells)
        return Plan(self.shape, tuple(devices), rows).validate()

    def wait_for_end(self, request_id: int, timeout_seconds: float) -> Message:
        """The event that ends a call.

        Raises: BenchError: it does not come in time.
        """
        deadline = time.monotonic() + timeout_seconds
        while time.monotonic() < deadline:
            event = self.session.client.receive(0.2)
            if event is None:
                continue
            self.hear(event.message)
            ends = (api.Finished, api.Done, api.CallFailed)
            if isinstance(event.message, ends) and event.message.request_id == request_id:
                return event.message
        raise BenchError(f"call {request_id} did not end in {timeout_seconds:.0f} s")

    def generate(
        self, prompt: str, num_tokens: int, on_token: Callable[[int], None] | None = None
    ) -> api.Finished:
        """A greedy answer of so many tokens.

        Args: on_token: hears how many tokens there are so far.
        """
        count = 0

        def on_event(message: Message) -> None:
            nonlocal count
            self.hear(message)
            if isinstance(message, api.TokensGenerated):
                count += len(message.token_ids)
                if on_token is not None:
                    on_token(count)

        self.session.listen(on_event)
        try:
            return self.session.generate(prompt, raw=True, max_tokens=num_tokens, ignore_eos=True)
        finally:
            self.session.listen(self.hear)

    def hear(self, message: Message) -> None:
        """Take note of what the host says."""
        if isinstance(message, api.NodesChanged):
            self.nodes = {node.name: node for node in message.nodes}
        elif isinstance(message, api.PlanInterrupted | api.PlanApplied | api.PlanLost):
            self.notes.append(message)
