"""How long one exchange of 8 KiB between two processes takes, beside a raw TCP socket's time.

`python benchmarks/exchange.py [--rounds 7] [--json FILE]`: two processes on the loopback; each sends
8 KiB to the other and receives as much, over and over. All ways take turns within a round, so that
a machine that gets slower does so for all of them. A sample is the mean of a run of exchanges,
since one side's short one is the other's long one; ratios are to raw TCP within a round.
"""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import socket
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import machine
import numpy as np
import zmq

from engine.cluster import messages as m
from engine.cluster.exchange import Exchange
from engine.cluster.peer_links import PeerLinks
from engine.cluster.security import Gatekeeper, new_key_pair
from engine.cluster.transport import Channel, listen
from engine.plan.plan import Plan, PlanShape

NUM_BYTES = 8192
SAMPLE_EXCHANGES = 20
SAMPLES = 60
WARM_UP_SAMPLES = 10
PROMISED_MICROSECONDS = 90.0
BASELINE = "raw TCP socket"

Swap = Callable[[], None]


def time_samples(swap: Swap) -> list[float]:
    """Microseconds of one exchange, the mean of each sample."""
    found: list[float] = []
    for _ in range(WARM_UP_SAMPLES + SAMPLES):
        started = time.perf_counter_ns()
        for _ in range(SAMPLE_EXCHANGES):
            swap()
        found.append((time.perf_counter_ns() - started) / SAMPLE_EXCHANGES / 1000)
    return found[WARM_UP_SAMPLES:]


def run_tcp(side: int, pipe: Connection) -> list[float]:
    """Blocking send and receive on one connection."""
    if side == 0:
        with socket.create_server(("127.0.0.1", 0)) as server:
            pipe.send(server.getsockname()[1])
            connection, _ = server.accept()
    else:
        connection = socket.create_connection(("127.0.0.1", pipe.recv()))
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    data, buffer = bytes(NUM_BYTES), memoryview(bytearray(NUM_BYTES))

    def swap() -> None:
        connection.sendall(data)
        count = 0
        while count < NUM_BYTES:
            count += connection.recv_into(buffer[count:])

    with connection:
        return time_samples(swap)


def run_plain_zmq(side: int, pipe: Connection) -> list[float]:
    """PUSH and PULL without encryption, a header frame and a tensor frame."""
    with zmq.Context() as context:
        inbox, outbox = context.socket(zmq.PULL), context.socket(zmq.PUSH)
        inbox.bind("tcp://127.0.0.1:*")
        pipe.send(inbox.getsockopt_string(zmq.LAST_ENDPOINT).rstrip("\0"))
        outbox.connect(pipe.recv())
        frames = [bytes(40), bytes(NUM_BYTES)]

        def swap() -> None:
            outbox.send_multipart(frames)
            inbox.recv_multipart()

        samples = time_samples(swap)
        leave_together(pipe)
        for one in (inbox, outbox):
            one.close(linger=0)
    return samples


def run_exchange(
    side: int, pipe: Connection, *, is_direct: bool, offers_local: bool = True
) -> list[float]:
    """`Exchange` as runners have it: encrypted, headers coded and checked, sums added.

    Args:
        is_direct: by streams between the computing threads, or by ZeroMQ with CURVE alone.
        offers_local: whether streams may be local sockets, as runners of one computer have them.
    """
    context: zmq.Context[Any] = zmq.Context()
    gatekeeper = Gatekeeper(context)
    keys = new_key_pair()
    bound, endpoint = listen(context, zmq.PULL, keys, "exchange", "tcp://127.0.0.1:*")
    inbox: Channel[Any] = Channel(bound, m.EXCHANGE_ACCEPTS)
    pipe.send((endpoint, keys.public))
    other_endpoint, other_key = pipe.recv()
    gatekeeper.allow("exchange", other_key)
    leave_together(pipe)
    peer = m.Peer(device_index=1 - side, exchange_endpoint=other_endpoint, public_key=other_key)
    shape = PlanShape(num_layers=1, num_heads=2, num_kv_heads=1, mlp_width=64, vocab_size=512)
    plan = Plan(shape, ("a/cpu", "b/cpu"), ((1, 1), (1, 1), (1, 1))).validate()
    control = context.socket(zmq.ROUTER)  # A runner listens to its engine host, too.
    poller = zmq.Poller()
    for one in (control, bound):
        poller.register(one, zmq.POLLIN)
    place = "tcp://127.0.0.1:*" if is_direct else ""
    links = PeerLinks(
        context,
        keys,
        inbox,
        1,
        side,
        plan.devices,
        [peer],
        poller,
        place,
        offers_local=offers_local,
    )

    def wait(seconds: float) -> None:
        ready = dict(poller.poll(int(seconds * 1000)))
        if ready.keys() - {bound}:
            links.note_losses()
            links.check()

    exchange = Exchange(
        1, plan, side, NUM_BYTES // 4, links, wait, lambda _row, x, total: x + total
    )
    links.measure(wait)
    pipe.send(None)
    while not pipe.poll():  # The other end may still measure.
        wait(0.01)
        exchange.take_early()
    pipe.recv()
    values = np.ones((1, NUM_BYTES // 4), np.float32)
    row = step_id = 0

    def swap() -> None:
        nonlocal row, step_id
        if row == 0:
            step_id += 1
            exchange.begin_step(step_id, "generated")
        exchange.hand_over(row, values, values, 1)
        row = 1 - row

    samples = time_samples(swap)
    leave_together(pipe)
    links.close()
    inbox.close()
    control.close(linger=0)
    gatekeeper.close()
    context.term()
    return samples


def leave_together(pipe: Connection) -> None:
    """Both ends are here."""
    pipe.send(None)
    pipe.recv()


WAYS: dict[str, Callable[[int, Connection], list[float]]] = {
    BASELINE: run_tcp,
    "ZeroMQ, no encryption": run_plain_zmq,
    "our exchange": functools.partial(run_exchange, is_direct=True),
    "our exchange, its streams by TCP": functools.partial(
        run_exchange, is_direct=True, offers_local=False
    ),
    "our exchange, all of it through ZeroMQ with CURVE": functools.partial(
        run_exchange, is_direct=False
    ),
}


def serve(pipe: Connection, rounds: int) -> None:
    """The second process."""
    for _ in range(rounds):
        for way in WAYS.values():
            way(1, pipe)


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=7, help="how often each way is measured")
    parser.add_argument("--json", type=Path, help="write the figures to this file alone")
    options = parser.parse_args()
    about = machine.describe()
    processes = multiprocessing.get_context("spawn")
    pipe, other_end = processes.Pipe()
    second = processes.Process(target=serve, args=(other_end, options.rounds), daemon=True)
    second.start()
    rounds: dict[str, list[list[float]]] = {name: [] for name in WAYS}
    for _ in range(options.rounds):
        for name, way in WAYS.items():
            rounds[name].append(sorted(way(0, pipe)))
    second.join(10)
    rows: dict[str, Any] = {}
    lines = [
        (
            f"One exchange of {NUM_BYTES} bytes each way between two processes, in microseconds; "
            f"{options.rounds} rounds of {SAMPLES} samples, a sample the mean of "
            f"{SAMPLE_EXCHANGES} exchanges; median of the rounds. Promised for ours: "
            f"{PROMISED_MICROSECONDS:.0f}."
        ),
        "",
        "| way | p10 | median | p90 | best sample | ratio of the medians to raw TCP |",
        "|---|---|---|---|---|---|",
    ]
    for name, samples in rounds.items():
        row = {
            f"p{percent}_us": machine.median([s[len(s) * percent // 100] for s in samples])
            for percent in (10, 50, 90)
        }
        row["best_us"] = min(s[0] for s in samples)
        row["ratio"] = machine.median(
            [
                machine.median(own) / machine.median(base)
                for own, base in zip(samples, rounds[BASELINE], strict=True)
            ]
        )
        rows[name] = {**row, "samples_us": samples}
        figures = " | ".join(f"{value:.0f}" for key, value in row.items() if key != "ratio")
        lines.append(f"| {name} | {figures} | {row['ratio']:.1f} |")
    if options.json is not None:
        options.json.write_text(json.dumps({"machine": about, "rows": rows}), encoding="utf-8")
        print("\n".join(lines))
    else:
        machine.write("exchange", about, rows, lines)


if __name__ == "__main__":
    main()
