"""How long a person has to wait: for a cancel, for closing, and for answers whose device was lost.

`python benchmarks/reaction.py [--rounds 3]`: the default model on three simulated nodes, every case
several times; the largest figure counts, because a promise is about the worst case. A lost device
is noticed when the engine host says so, and the wait for the next token counts from the fault.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable
from typing import Any

import machine
import psutil

from engine.client import Event
from engine.cluster.messages import Message
from engine.host import messages as api
from engine.plan.plan import PlanShape
from engine.plan.presets import even, from_percentages, single
from engine.session import Session, SessionOptions, simulated_devices

VICTIM = "local-2/cpu"
FAULTS = {"killed": "kill", "frozen": "suspend"}
LOAD_SECONDS = 60
PHASES = ("load", "prefill", "decode", "apply")
PROMISED = {
    "cancel while generating": 0.2,
    "cancel while reading a prompt": 0.2,
    **{f"killed in {phase}: noticed": 2.0 for phase in PHASES},
    **{f"frozen in {phase}: noticed": 5.0 for phase in PHASES},
    **{f"{fault} in {phase}: next token": 10.0 for fault in FAULTS for phase in PHASES},
    "closing, all processes gone": 3.0,
}
PROMPT = "The keeper of the lighthouse counted ships, "


def is_token(message: Message) -> bool:
    """Whether a token was generated."""
    return isinstance(message, api.TokensGenerated)


def is_prefill(message: Message) -> bool:
    """Whether a prompt is being read."""
    return isinstance(message, api.Progress) and message.phase == "prefill"


def is_half_loaded(message: Message) -> bool:
    """Whether the victim has a third of its weights."""
    return (
        isinstance(message, api.Progress)
        and (message.phase, message.subject) == ("weights", VICTIM)
        and message.done >= message.total // 3
    )


def runner(session: Session, device: str) -> psutil.Process:
    """The runner process of a device."""
    host = psutil.Process(session.client.host_pid)
    return next(p for p in host.children(recursive=True) if p.cmdline()[-1] == device)


def question(session: Session, prompt: str, max_tokens: int) -> api.Generate:
    """A call for so many of the likeliest tokens."""
    return api.Generate(
        request_id=session.client.next_request_id(),
        raw_prompt=prompt,
        max_tokens=max_tokens,
        sampling=api.SamplingSettings(temperature=0.0),
        ignore_eos=True,
    )


def seconds_to_cancel(session: Session, prompt: str, is_moment: Callable[[Message], bool]) -> float:
    """From a cancel in the middle of an answer to the answer's end."""
    call = question(session, prompt, 2000)
    acted = 0.0

    def on_event(event: Event) -> None:
        nonlocal acted
        if not acted and is_moment(event.message):
            acted = time.perf_counter()
            session.client.post(api.Cancel(request_id=call.request_id))

    session.client.run(call, on_event, timeout_seconds=60)
    return time.perf_counter() - acted


def seconds_to_recover(
    session: Session, phase: str, fault: str, number: int
) -> tuple[float, float]:
    """From a fault to the word that a device was lost, and to the next token."""
    shape = PlanShape.from_config(session.model.config)
    plan = even(shape, simulated_devices(3))
    session.apply(plan)
    acted = noticed = next_token = 0.0
    is_moment = {"prefill": is_prefill, "decode": is_token}.get(phase, is_half_loaded)

    def on_event(event: Event) -> None:
        nonlocal acted, noticed, next_token
        message, now = event.message, time.perf_counter()
        if acted and not noticed and isinstance(message, api.PlanInterrupted):
            noticed = now - acted
        if acted and not next_token and is_token(message):
            next_token = now - acted
        if phase == "apply" and is_token(message) and not acted:
            other = from_percentages(shape, simulated_devices(3), [20, 60, 20])
            session.client.post(
                api.ApplyPlan(request_id=session.client.next_request_id(), plan=other)
            )
        if not acted and is_moment(message):
            acted = time.perf_counter()
            getattr(runner(session, VICTIM), fault)()

    if phase == "load":
        session.apply(single(shape, "local-1/cpu"))  # So that the victim has nothing yet.
        session.client.post(api.ApplyPlan(request_id=session.client.next_request_id(), plan=plan))
        deadline = time.monotonic() + LOAD_SECONDS
        while not acted:  # Only now is a plan on its way that a question can wait for.
            if time.monotonic() > deadline:
                raise SystemExit(f"{VICTIM} did not load within {LOAD_SECONDS} s")
            event = session.client.receive(1.0)
            if event is not None:
                on_event(event)
    prompt = f"{number} " + PROMPT * (30 if phase == "prefill" else 2)
    session.client.run(question(session, prompt, 24), on_event, timeout_seconds=120)
    return noticed, next_token


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3, help="how often each is measured")
    rounds: int = parser.parse_args().rounds
    about = machine.describe()
    samples: dict[str, list[float]] = {name: [] for name in PROMISED}
    numbers = itertools.count()
    for _ in range(rounds):
        session = Session(SessionOptions(num_workers=3))
        wait = seconds_to_cancel(session, PROMPT, is_token)
        samples["cancel while generating"].append(wait)
        wait = seconds_to_cancel(session, "one two three " * 500, is_prefill)
        samples["cancel while reading a prompt"].append(wait)
        for phase in PHASES:
            for name, fault in FAULTS.items():
                noticed, wait = seconds_to_recover(session, phase, fault, next(numbers))
                samples[f"{name} in {phase}: noticed"].append(noticed)
                samples[f"{name} in {phase}: next token"].append(wait)
        host = psutil.Process(session.client.host_pid)
        processes = [host, *host.children(recursive=True)]
        started = time.perf_counter()
        session.close()
        psutil.wait_procs(processes, timeout=10)
        samples["closing, all processes gone"].append(time.perf_counter() - started)
    rows: dict[str, Any] = {}
    lines = [
        f"SmolLM2-135M-Instruct on three simulated nodes; {rounds} rounds.",
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
