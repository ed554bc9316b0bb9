"""Prefill and decode speed of the default model, beside transformers, in one run.

`python benchmarks/speed.py [--rounds 3]`: every configuration once per round, in turn, so that a
machine that gets slower does so for all of them; figures are medians, ratios are medians of the
ratios within a round. Whole product: engine host, worker, runner, sampling, streaming.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import machine

from engine.session import Session, SessionOptions
from engine.weights.models import fetch_default_model

PROMPT_TOKENS = 512
GENERATED_TOKENS = 64
BASELINE = "transformers bfloat16, 2 threads"

Measure = Callable[[], tuple[float, float]]


def transformers_measure(path: Path, threads: int) -> Measure:
    """Prefill and decode tok/s of transformers in bfloat16, in this process."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    model: Any = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.bfloat16
    ).eval()
    ids = torch.randint(3, 49000, (1, PROMPT_TOKENS), generator=torch.Generator().manual_seed(20))

    def measure() -> tuple[float, float]:
        torch.set_num_threads(threads)
        with torch.inference_mode():
            started = time.perf_counter()
            output = model(ids, use_cache=True, logits_to_keep=1)
            token = output.logits[:, -1].argmax(-1, keepdim=True)
            first = time.perf_counter()
            for _ in range(GENERATED_TOKENS - 1):
                output = model(token, past_key_values=output.past_key_values, use_cache=True)
                token = output.logits[:, -1].argmax(-1, keepdim=True)
            last = time.perf_counter()
        return PROMPT_TOKENS / (first - started), (GENERATED_TOKENS - 1) / (last - first)

    return measure


def our_measure(session: Session) -> Measure:
    """Prefill and decode tok/s of a session."""

    def measure() -> tuple[float, float]:
        finished = session.benchmark(PROMPT_TOKENS, GENERATED_TOKENS)
        return finished.prefill_tps, finished.decode_tps

    return measure


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3, help="how often each is measured")
    rounds: int = parser.parse_args().rounds
    about = machine.describe()
    path = fetch_default_model(lambda _done, _total: None)
    options = {
        "shardmix auto, 1 thread": SessionOptions(num_threads=1),
        "shardmix auto, 2 threads": SessionOptions(num_threads=2),
        "shardmix float32, 2 threads": SessionOptions(num_threads=2, dtype="float32"),
        "shardmix int8, 2 threads": SessionOptions(num_threads=2, dtype="int8"),
        "shardmix auto, 2 workers of 1 core": SessionOptions(num_threads=1, num_workers=2),
    }
    samples: dict[str, list[tuple[float, float]]] = {}
    with ExitStack() as stack:
        measures: dict[str, Measure] = {BASELINE: transformers_measure(path, 2)}
        for name, choice in options.items():
            measures[name] = our_measure(stack.enter_context(Session(choice)))
        for measure in measures.values():
            measure()  # Warm caches and thread pools.
        for _ in range(rounds):
            for name, measure in measures.items():
                samples.setdefault(name, []).append(measure())
    rows: dict[str, Any] = {}
    lines = [
        (
            f"SmolLM2-135M-Instruct Q4_1, prompt of {PROMPT_TOKENS} tokens, {GENERATED_TOKENS} "
            f"generated; medians of {rounds} rounds in one run, ratios to transformers within a round."
        ),
        "",
        "| configuration | prefill tok/s | ratio | decode tok/s | ratio |",
        "|---|---|---|---|---|",
    ]
    base = samples[BASELINE]
    for name, values in samples.items():
        row = {
            "prefill_tps": machine.median([v[0] for v in values]),
            "decode_tps": machine.median([v[1] for v in values]),
            "prefill_ratio": machine.median(
                [v[0] / b[0] for v, b in zip(values, base, strict=True)]
            ),
            "decode_ratio": machine.median(
                [v[1] / b[1] for v, b in zip(values, base, strict=True)]
            ),
            "samples": values,
        }
        rows[name] = row
        lines.append(
            f"| {name} | {row['prefill_tps']:.0f} | {row['prefill_ratio']:.2f} | "
            f"{row['decode_tps']:.1f} | {row['decode_ratio']:.2f} |"
        )
    machine.write("speed", about, rows, lines)


if __name__ == "__main__":
    main()
