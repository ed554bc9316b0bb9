"""How long a person or a fault has to wait: cancel, a killed and a frozen runner, closing.

`python benchmarks/reaction.py [--rounds 5]`: the default model on two simulated nodes, every case
several times; the largest figure counts, because a promise is about the worst case.
"""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Callable
from typing import Any

import machine
import psutil

from engine.client import Event
from engine.cluster.messages import Message
from engine.errors import WorkerLost
from engine.host import messages as api
from engine.session import Session, SessionOptions

PROMISED = {
    "cancel while generating": 0.2,
    "cancel while reading a prompt": 0.2,
    "killed runner named": 5.0,
    "frozen runner named": 5.0,
    "closing, all processes gone": 3.0,
}


def runner(session: Session, device: str) -> psutil.Process:
    """The runner process of a device."""
    host = psutil.Process(session.client.host_pid)
    return next(p for p in host.children(recursive=True) if p.cmdline()[-1] == device)


def wait_after(
    session: Session, prompt: str, is_moment: Callable[[Message], bool], act: Callable[[int], None]
) -> float:
    """Seconds from an act in the middle of an answer to the answer's end."""
    call = api.Generate(
        request_id=session.client.next_request_id(),
        raw_prompt=prompt,
        max_tokens=2000,
        sampling=api.SamplingSettings(temperature=0.0),
        ignore_eos=True,
    )
    acted = 0.0

    def on_event(event: Event) -> None:
        nonlocal acted
        if not acted and is_moment(event.message):
            acted = time.perf_counter()
            act(call.request_id)

    with contextlib.suppress(WorkerLost):
        session.client.run(call, on_event, timeout_seconds=60)
    return time.perf_counter() - acted


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5, help="how often each is measured")
    rounds: int = parser.parse_args().rounds
    about = machine.describe()
    samples: dict[str, list[float]] = {name: [] for name in PROMISED}

    def is_token(message: Message) -> bool:
        return isinstance(message, api.TokensGenerated)

    def is_prefill(message: Message) -> bool:
        return isinstance(message, api.Progress) and message.phase == "prefill"

    for _ in range(rounds):
        session = Session(SessionOptions(num_workers=2))

        def cancel(request_id: int, session: Session = session) -> None:
            session.client.post(api.Cancel(request_id=request_id))

        name = "cancel while generating"
        samples[name].append(wait_after(session, "Once upon a time", is_token, cancel))
        name = "cancel while reading a prompt"
        samples[name].append(wait_after(session, "one two three " * 500, is_prefill, cancel))
        victim = runner(session, "local-1/cpu")
        name = "killed runner named"
        samples[name].append(wait_after(session, "Once", is_token, lambda _, v=victim: v.kill()))
        session.apply(session.plan)
        frozen = runner(session, "local-2/cpu")
        name = "frozen runner named"
        samples[name].append(wait_after(session, "Once", is_token, lambda _, v=frozen: v.suspend()))
        host = psutil.Process(session.client.host_pid)
        processes = [host, *host.children(recursive=True)]
        started = time.perf_counter()
        session.close()
        psutil.wait_procs(processes, timeout=10)
        samples["closing, all processes gone"].append(time.perf_counter() - started)
    rows: dict[str, Any] = {}
    lines = [
        f"SmolLM2-135M-Instruct on two simulated nodes; {rounds} rounds.",
        "",
        "| what | promised | median | worst |",
        "|---|---|---|---|",
    ]
    for name, values in samples.items():
        rows[name] = {"promised_s": PROMISED[name], "samples_s": values}
        lines.append(
            f"| {name} | {PROMISED[name]:.1f} s | {machine.median(values):.3f} s | "
            f"{max(values):.3f} s |"
        )
    machine.write("reaction", about, rows, lines)


if __name__ == "__main__":
    main()
