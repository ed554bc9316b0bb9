"""What a device's own part of a step takes with native kernels.

`python benchmarks/native_steps.py`: SmolLM2 in one process, without engine host or exchange.
Milliseconds of all rows and the head, by threads, tokens in the step and context, and of prompts.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import machine
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from engine.cluster.lockstep import Lockstep
from engine.kernels.available import kernels_in_use
from engine.kernels.threads import set_num_threads
from engine.model.batch import Segment
from engine.model.shard import ModelShard
from engine.plan.plan import PlanShape
from engine.plan.presets import single
from engine.weights.checkpoint import open_checkpoint
from engine.weights.models import resolve_model

STEPS = 100
PROMPT_STEPS = 8
# Tokens in a step, each of a conversation of its own, and positions before them.
SHORT, LONG = 128, 4000
CASES = ((1, SHORT), (4, SHORT), (16, SHORT), (1, LONG))
LONG_SLOT, PROMPT_SLOT = 100, 101
PROMPTS = (16, 128, 512)


def step_ms(shard: ModelShard, num_tokens: int, context: int) -> list[float]:
    """Times of steps, ascending; every step has the same positions before it."""
    head_row = shard.plan.shape.head_row
    x = torch.randn(num_tokens, shard.config.width)
    slots = [LONG_SLOT] if context == LONG else list(range(num_tokens))
    segments = tuple(
        Segment(slot=slot, first_position=context, token_count=1, logit_offsets=(0,))
        for slot in slots
    )
    times: list[float] = []
    for _ in range(STEPS):
        for slot in slots:
            shard.cache.truncate(slot, context)
        started = time.perf_counter()
        batch = shard.batch("generated", segments)
        stream, row, logits = x, 0, None
        while row < head_row:
            stream, row, logits = shard.advance(row, head_row, stream, batch, range(num_tokens))
        if logits is None:
            shard.logits(stream)
        times.append((time.perf_counter() - started) * 1e3)
    return sorted(times)


def prompt_ms(shard: ModelShard, num_tokens: int) -> list[float]:
    """Times of prompts with the logits of the last token, ascending."""
    head_row = shard.plan.shape.head_row
    last = num_tokens - 1
    x = torch.randn(num_tokens, shard.config.width)
    segment = Segment(
        slot=PROMPT_SLOT, first_position=0, token_count=num_tokens, logit_offsets=(last,)
    )
    times: list[float] = []
    for _ in range(PROMPT_STEPS):
        shard.cache.free(PROMPT_SLOT)
        started = time.perf_counter()
        batch = shard.batch("prompt", (segment,))
        stream, row, logits = x, 0, None
        while row < head_row:
            stream, row, logits = shard.advance(row, head_row, stream, batch, (last,))
        if logits is None:
            shard.logits(stream[last:])
        times.append((time.perf_counter() - started) * 1e3)
    return sorted(times)


def main() -> None:
    """Measure and write the result."""
    about = machine.describe()
    path = resolve_model(None, lambda _done, _total: None)
    steps: list[dict[str, Any]] = []
    prompts: list[dict[str, Any]] = []
    with open_checkpoint(path) as checkpoint:
        plan = single(PlanShape.from_config(checkpoint.config), "this/cpu")
        model = Lockstep(checkpoint, plan, "int4", kv_dtype="float16")
        for slot, length in ((LONG_SLOT, LONG), *((slot, SHORT) for slot in range(16))):
            for first in range(0, length, 500):
                model.step([(slot, first, list(range(min(500, length - first))))])
        with torch.inference_mode():
            for threads in (1, 2):
                set_num_threads(threads)
                for num_tokens, context in CASES:
                    times = step_ms(model.shards[0], num_tokens, context)
                    steps.append(
                        {
                            "threads": threads,
                            "tokens": num_tokens,
                            "context": context,
                            "best_ms": times[0],
                            "median_ms": machine.median(times),
                        }
                    )
                for num_tokens in PROMPTS:
                    times = prompt_ms(model.shards[0], num_tokens)
                    figures = {"best_ms": times[0], "median_ms": machine.median(times)}
                    prompts.append({"threads": threads, "tokens": num_tokens, **figures})
    lines = [
        f"SmolLM2 Q4_1 in one process; kernels: {kernels_in_use()}; {STEPS} steps each.",
        "",
        "| threads | tokens in the step | positions before | best ms | median ms |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {s['threads']} | {s['tokens']} | {s['context']} | {s['best_ms']:.2f} "
        f"| {s['median_ms']:.2f} |"
        for s in steps
    ]
    lines += ["", "| threads | tokens of a prompt | best ms | median ms |", "|---|---|---|---|"]
    lines += [
        f"| {s['threads']} | {s['tokens']} | {s['best_ms']:.1f} | {s['median_ms']:.1f} |"
        for s in prompts
    ]
    machine.write("native-steps", about, {"steps": steps, "prompts": prompts}, lines)


if __name__ == "__main__":
    main()
