"""What a cluster costs: encryption, two processes instead of two threads, telemetry, loading.

`python benchmarks/cluster.py [--model FILE] [--rounds 3]`: without a model, one of the shape of 1B
with random weights is written first. Everything runs on this computer, over the loopback. Every
configuration is started afresh once per round and is alone while it runs, because an idle one sends
telemetry too; the order turns round every other round. Figures are medians, ratios are medians of
the ratios within a round.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import machine
import make_random_model
import msgspec
import psutil

from engine.cluster.messages import Message
from engine.cluster.plaintext import PLAINTEXT_VARIABLE
from engine.host import messages as api
from engine.host.telemetry_rate import RATE_VARIABLE
from engine.kernels.available import has_native_kernels, kernels_in_use
from engine.plan.plan import Plan, PlanShape
from engine.session import Session, SessionOptions
from engine.weights.checkpoint import open_checkpoint
from engine.weights.formats import num_bytes

CACHE_VARIABLE = "SHARDMIX_CACHE"
LOCAL_FILES_VARIABLE = "SHARDMIX_LOCAL_FILES"


@dataclass(frozen=True, slots=True)
class Case:
    """A configuration that is timed."""

    num_workers: int
    num_threads: int
    variables: dict[str, str] = field(default_factory=dict)


TWO_WORKERS = "2 workers of 1 thread"
PLAIN = "2 workers of 1 thread, without encryption"
ONE_RUNNER = "1 runner of 2 threads"
RARE, OFTEN = "2 workers, telemetry at 0.2 Hz", "2 workers, telemetry at 10 Hz"

CASES = {
    TWO_WORKERS: Case(2, 1),
    PLAIN: Case(2, 1, {PLAINTEXT_VARIABLE: "1"}),
    ONE_RUNNER: Case(0, 2),
    RARE: Case(2, 1, {RATE_VARIABLE: "0.2"}),
    OFTEN: Case(2, 1, {RATE_VARIABLE: "10"}),
}
# What is asked, one configuration by another, and the ratio of decode speed that is promised.
QUESTIONS = (
    ("with encryption, by without", TWO_WORKERS, PLAIN, 0.90),
    ("two workers, by two threads", TWO_WORKERS, ONE_RUNNER, 0.85),
    ("telemetry at 10 Hz, by 0.2 Hz", OFTEN, RARE, 0.99),
)


@dataclass(frozen=True, slots=True)
class Sample:
    """One measurement; `overhead_cores` is what host and workers used while the runners decoded."""

    prefill_tps: float
    decode_tps: float
    overhead_cores: float


@dataclass(frozen=True, slots=True)
class LoadSample:
    """One load: seconds from the runners' start to the plan in force, and bytes by where from."""

    seconds: float
    received: int
    cached: int
    local: int


@contextlib.contextmanager
def variables(values: dict[str, str]) -> Iterator[None]:
    """Set environment variables for processes that a block starts."""
    saved = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in saved.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def measure(case: Case, model: Path, prompt_tokens: int, generated_tokens: int) -> Sample:
    """Start a configuration, warm it up, time it."""
    options = SessionOptions(
        model=str(model), num_workers=case.num_workers, num_threads=case.num_threads
    )
    with variables(case.variables), Session(options) as session:
        session.benchmark(prompt_tokens, 4)
        helpers = _helpers(session)
        before, started = _cpu_seconds(helpers), time.perf_counter()
        finished = session.benchmark(prompt_tokens, generated_tokens)
        overhead = (_cpu_seconds(helpers) - before) / (time.perf_counter() - started)
    return Sample(finished.prefill_tps, finished.decode_tps, overhead)


def _helpers(session: Session) -> list[psutil.Process]:
    """Engine host and workers: every process of a session but its runners."""
    host = psutil.Process(session.client.host_pid)
    children = host.children(recursive=True)
    return [host, *(child for child in children if "shardmix-runner" not in child.cmdline())]


def _cpu_seconds(processes: Sequence[psutil.Process]) -> float:
    return sum(sum(process.cpu_times()[:2]) for process in processes)


class LoadWatch:
    """Hears a session's events and times its loads."""

    def __init__(self) -> None:
        """Nothing was loaded yet."""
        self.samples: list[LoadSample] = []
        self.begin()

    def begin(self) -> None:
        """A plan is about to be applied."""
        self._started = time.perf_counter()

    def hear(self, message: Message) -> None:
        """An event of the session."""
        if isinstance(message, api.Progress) and message.phase == "start":
            self.begin()
        elif isinstance(message, api.PlanApplied):
            seconds = time.perf_counter() - self._started
            sizes = [
                sum(getattr(part, kind) for part in message.loaded)
                for kind in ("received", "cached", "local")
            ]
            self.samples.append(LoadSample(seconds, *sizes))


def moved_by_one(plan: Plan) -> Plan:
    """The plan with one quantum of every mlp row moved from the first device to the second."""
    cells = [
        (row[0] - 1, row[1] + 1, *row[2:]) if plan.shape.row_kind(number) == "mlp" else row
        for number, row in enumerate(plan.cells)
    ]
    return msgspec.structs.replace(plan, cells=tuple(cells)).validate()


def moved_bytes(model: Path, shape: PlanShape) -> int:
    """Bytes in file format of one quantum of every mlp row."""
    checkpoint = open_checkpoint(model)
    try:
        infos = [checkpoint.tensors[name] for name in checkpoint.tensors if _is_mlp(name)]
        whole = sum(num_bytes(info.format, info.shape) for info in infos)
    finally:
        checkpoint.close()
    width = shape.units(shape.mlp_row(0))
    return whole * shape.quantum_size(shape.mlp_row(0)) // width


def _is_mlp(name: str) -> bool:
    return name.rpartition(".")[2] in ("gate", "up", "down")


def measure_loads(model: Path) -> dict[str, LoadSample]:
    """Load with an empty cache, again, with moved dividers; and from the node's own copy."""
    found: dict[str, LoadSample] = {}
    options = SessionOptions(model=str(model), num_workers=2, num_threads=1)
    with tempfile.TemporaryDirectory() as cache:
        values = {CACHE_VARIABLE: cache, LOCAL_FILES_VARIABLE: "off"}
        for name in ("cold", "again"):
            watch = LoadWatch()
            with variables(values), Session(options, watch.hear) as session:
                found[name] = watch.samples[-1]
                if name == "again":
                    watch.begin()
                    session.apply(moved_by_one(session.plan))
                    found["dividers moved by one quantum"] = watch.samples[-1]
    with tempfile.TemporaryDirectory() as cache, variables({CACHE_VARIABLE: cache}):
        watch = LoadWatch()
        with Session(options, watch.hear):
            found["cold, same file on the node"] = watch.samples[-1]
    return found


def speed_lines(samples: dict[str, list[Sample]], rows: dict[str, Any]) -> list[str]:
    """The tables of speeds and ratios; fills `rows` for the JSON file."""
    lines = [
        "| configuration | prefill tok/s | decode tok/s | host and workers, cores |",
        "|---|---|---|---|",
    ]
    for name, values in samples.items():
        row = {
            key: machine.median([getattr(value, key) for value in values])
            for key in Sample.__slots__
        }
        rows[name] = {**row, "samples": [msgspec.to_builtins(value) for value in values]}
        lines.append(
            f"| {name} | {row['prefill_tps']:.1f} | {row['decode_tps']:.2f} | "
            f"{row['overhead_cores']:.3f} |"
        )
    lines += [
        "",
        "| ratio | promised (decode) | decode | lowest, highest | prefill |",
        "|---|---|---|---|---|",
    ]
    for question, over, under, promised in QUESTIONS:
        pairs = list(zip(samples[over], samples[under], strict=True))
        decode = [a.decode_tps / b.decode_tps for a, b in pairs]
        prefill = [a.prefill_tps / b.prefill_tps for a, b in pairs]
        rows[question] = {"promised": promised, "decode": decode, "prefill": prefill}
        lines.append(
            f"| {question} | ≥ {promised:.2f} | {machine.median(decode):.3f} | "
            f"{min(decode):.3f}, {max(decode):.3f} | {machine.median(prefill):.3f} |"
        )
    return lines


def load_lines(
    samples: list[dict[str, LoadSample]], ideal_bytes: int, rows: dict[str, Any]
) -> list[str]:
    """The table of loads; fills `rows` for the JSON file."""
    lines = [
        f"One quantum of every mlp row is {ideal_bytes:,} bytes in the file.",
        "",
        "| load | seconds | by cold | MB over the wire | from the cache | from the node's file |",
        "|---|---|---|---|---|---|",
    ]
    for name in samples[0]:
        values = [round_of[name] for round_of in samples]
        seconds = machine.median([value.seconds for value in values])
        ratio = machine.median([r[name].seconds / r["cold"].seconds for r in samples])
        sizes = [
            machine.median([getattr(value, key) for value in values])
            for key in ("received", "cached", "local")
        ]
        rows[f"load: {name}"] = {
            "seconds": seconds,
            "by_cold": ratio,
            "samples": [msgspec.to_builtins(value) for value in values],
        }
        shown = " | ".join(f"{size / 1e6:.3f}" for size in sizes)
        lines.append(f"| {name} | {seconds:.2f} | {ratio:.2f} | {shown} |")
    rows["moved_bytes"] = ideal_bytes
    return lines


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, help="default: random weights of --shape")
    parser.add_argument("--shape", choices=make_random_model.SHAPES, default="1b")
    parser.add_argument("--rounds", type=int, default=3, help="how often each is measured")
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--generated-tokens", type=int, default=32)
    options = parser.parse_args()
    about = machine.describe()
    samples: dict[str, list[Sample]] = {name: [] for name in CASES}
    loads: list[dict[str, LoadSample]] = []
    with tempfile.TemporaryDirectory() as folder:
        model = options.model
        if model is None:
            model = Path(folder) / f"random-{options.shape}.gguf"
            vocabulary = make_random_model.read_vocabulary()
            shape = make_random_model.SHAPES[options.shape]
            make_random_model.write_gguf(model, shape, vocabulary, "q4_0", seed=0)
        for round_number in range(options.rounds):
            names = list(CASES) if round_number % 2 == 0 else list(reversed(CASES))
            for name in names:
                print(f"round {round_number + 1}: {name}", file=sys.stderr, flush=True)
                sizes = (options.prompt_tokens, options.generated_tokens)
                samples[name].append(measure(CASES[name], model, *sizes))
            loads.append(measure_loads(model))
        checkpoint = open_checkpoint(model)
        plan_shape = PlanShape.from_config(checkpoint.config)
        checkpoint.close()
        ideal = moved_bytes(model, plan_shape)
    rows: dict[str, Any] = {}
    lines = [
        (
            f"`{model.name}`, prompt of {options.prompt_tokens} tokens, {options.generated_tokens} "
            f"generated; medians of {options.rounds} rounds, ratios within a round. Kernels: "
            f"{kernels_in_use()}."
        ),
        "",
        *speed_lines(samples, rows),
        "",
        *load_lines(loads, ideal, rows),
    ]
    name = "cluster" if has_native_kernels() else "cluster-torch"
    machine.write(name, about, rows, lines)


if __name__ == "__main__":
    main()
