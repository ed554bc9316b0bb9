"""Devices that only exchange, each in a process of its own, over either transport."""

from __future__ import annotations

import multiprocessing
from dataclasses import dataclass
from itertools import pairwise
from multiprocessing.connection import Connection
from typing import Any, Self

import numpy as np
import torch
import zmq
from numpy.typing import NDArray

from engine.cluster import messages as m
from engine.cluster.collective import Collective
from engine.cluster.exchange import Exchange
from engine.cluster.peer_links import PeerLinks
from engine.cluster.security import Gatekeeper, new_key_pair
from engine.cluster.torch_exchange import TorchExchange
from engine.cluster.torch_group import Rendezvous
from engine.cluster.transport import Channel, listen
from engine.cluster.wire_format import from_wire, to_wire
from engine.model.batch import StepKind
from engine.plan.plan import Plan

WIDTH = 13
DEADLINE_SECONDS = 60.0

Floats = NDArray[np.float32]
# The residual stream at the entry of every plan row where the device has a share.
Streams = dict[int, Floats]


@dataclass(frozen=True)
class StepJob:
    """What a device does in a step.

    Attributes:
        pieces: tokens of each piece.
        is_given_up: the hand-over of the first row is begun, but not by the first device, and
            never finished.
    """

    step_id: int
    kind: StepKind
    pieces: tuple[int, ...]
    is_given_up: bool = False


@dataclass(frozen=True)
class Job:
    """The steps of an epoch."""

    epoch: int
    plan: Plan
    steps: tuple[StepJob, ...]


def stream_of(step: StepJob) -> Floats:
    """The residual stream before the first row."""
    draw = np.random.default_rng(step.step_id)
    return draw.standard_normal((sum(step.pieces), WIDTH)).astype(np.float32)


def part_of(step: StepJob, row: int, device_index: int) -> Floats:
    """The partial sum of a device: of sizes that rounding shows."""
    draw = np.random.default_rng([step.step_id, row, device_index])
    return (draw.standard_normal((sum(step.pieces), WIDTH)) * 10).astype(np.float32)


def add(row: int, x: Floats, total: Floats) -> Floats:
    """Stands for a norm of the sum: not linear, and another one for every row."""
    return x + total * np.abs(total) * np.float32(row + 1.5)


def expected_streams(plan: Plan, step: StepJob) -> Streams:
    """The hand-over rule in one place: round, add in device order, add to the stream."""
    streams = {0: stream_of(step)}
    for row in range(plan.shape.head_row):
        total: Floats | None = None
        for index in plan.group(row):
            part = from_wire(to_wire(part_of(step, row, index), plan.wire_of(step.kind)))
            total = part if total is None else total + part
        assert total is not None
        streams[row + 1] = add(row, streams[row], total)
    return streams


class Devices:
    """Processes that take part in plans with as many devices."""

    def __init__(self, count: int) -> None:
        """Start them, and introduce them to each other."""
        context = multiprocessing.get_context("spawn")
        self._pipes: list[Connection] = []
        self._processes: list[Any] = []
        for index in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(target=_take_part, args=(index, theirs), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)
        addresses = [self._hear(pipe) for pipe in self._pipes]
        for pipe in self._pipes:
            pipe.send(addresses)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for pipe in self._pipes:
            pipe.send(None)
        for pipe, process in zip(self._pipes, self._processes, strict=True):
            process.join(DEADLINE_SECONDS)
            if process.is_alive():
                process.kill()
                process.join()
            pipe.close()
            process.close()

    def do(self, job: Job) -> list[list[Streams]]:
        """The streams of each device in each step."""
        for pipe in self._pipes:
            pipe.send(job)
        found = [self._hear(pipe) for pipe in self._pipes]
        # Nobody closes before everyone is done.
        for pipe in self._pipes:
            pipe.send("close")
        for pipe in self._pipes:
            self._hear(pipe)
        return found

    @staticmethod
    def _hear(pipe: Connection) -> Any:
        assert pipe.poll(DEADLINE_SECONDS), "a device does not answer"
        return pipe.recv()


def _take_part(index: int, pipe: Connection) -> None:
    """A device's process."""
    torch.set_num_threads(1)
    context: zmq.Context[Any] = zmq.Context()
    gatekeeper = Gatekeeper(context)
    keys = new_key_pair()
    socket, endpoint = listen(context, zmq.PULL, keys, "exchange", "tcp://127.0.0.1:*")
    inbox: Channel[Any] = Channel(socket, m.EXCHANGE_ACCEPTS)
    rendezvous = Rendezvous("tcp://127.0.0.1:*")
    me = m.Peer(device_index=index, exchange_endpoint=endpoint, public_key=keys.public)
    pipe.send((me, rendezvous.endpoint))
    addresses = pipe.recv()
    gatekeeper.allow("exchange", *(peer.public_key for peer, _ in addresses))
    try:
        while (job := pipe.recv()) is not None:
            plan = job.plan
            others = [peer for peer, _ in addresses if peer.device_index in plan.used_devices()]
            others = [peer for peer in others if peer.device_index != index]
            poller = zmq.Poller()
            poller.register(socket, zmq.POLLIN)
            links = PeerLinks(context, keys, inbox, job.epoch, index, plan.devices, others, poller)

            def wait(seconds: float, links: PeerLinks = links, poller: zmq.Poller = poller) -> None:
                poller.poll(int(seconds * 1000))
                links.note_losses()
                links.check()

            exchange: Collective
            if plan.transport == "torch":
                first = plan.used_devices()[0]
                exchange = TorchExchange(
                    job.epoch,
                    plan,
                    index,
                    WIDTH,
                    links,
                    addresses[first][1],
                    rendezvous if first == index else None,
                    torch.device("cpu"),
                    wait,
                    add,
                )
            else:
                exchange = Exchange(job.epoch, plan, index, WIDTH, links, wait, add)
            is_used = index in plan.used_devices()
            pipe.send([_step(exchange, step) for step in job.steps] if is_used else [])
            pipe.recv()
            exchange.close()
            pipe.send(None)
    finally:
        rendezvous.close()
        inbox.close()
        gatekeeper.close()
        context.term()


def _step(exchange: Collective, step: StepJob) -> Streams:
    """Walk through all rows."""
    plan, me = exchange.plan, exchange.device_index
    borders = np.cumsum([0, *step.pieces]).tolist()
    ranges = list(pairwise(borders))
    exchange.begin_step(step.step_id, step.kind)
    streams: Streams = {0: stream_of(step)} if me in plan.group(0) else {}
    for row in range(plan.shape.head_row):
        table = exchange.row(row)
        if not table.contributes and not table.receives:
            continue
        x = streams.get(row)
        part = part_of(step, row, me) if table.contributes else None
        if step.is_given_up:
            if me != plan.used_devices()[0]:
                end = ranges[0][1]
                given = (x[:end], part[:end]) if x is not None and part is not None else (None,) * 2
                exchange.start(row, 0, *given, end)
            exchange.give_up(step.step_id)
            return {}
        if table.is_local:
            assert x is not None
            assert part is not None
            streams[row + 1] = add(row, x, from_wire(to_wire(part, plan.wire_of(step.kind))))
            continue
        for piece, (start, end) in enumerate(ranges):
            exchange.start(
                row,
                piece,
                None if x is None or part is None else x[start:end],
                None if part is None else part[start:end],
                end - start,
            )
        handed = [exchange.finish(row, piece) for piece in range(len(ranges))]
        if table.receives:
            streams[row + 1] = np.concatenate([part for part in handed if part is not None])
    return streams
