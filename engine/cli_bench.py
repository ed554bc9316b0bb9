"""The command `shardmix bench`: how fast a model is here, and how near that is to what is possible.

In: arguments. Out: a table for a person, or one JSON object. `benchmarks/speed.py` compares with
other programs, in rounds; this command measures once.
"""

from __future__ import annotations

import json
import platform
import time
from dataclasses import asdict
from typing import Annotated, Any

import typer

from engine.cli_options import (
    CacheDtype,
    CacheDtypeOption,
    DraftModelOption,
    Dtype,
    DtypeOption,
    JsonOption,
    ModelOption,
    NodeOption,
    PlanOption,
    ThreadsOption,
    WindowOption,
    WorkersOption,
)
from engine.cli_output import ProgressDisplay, plan_dict, report
from engine.cli_running import run_session
from engine.host import messages as api
from engine.measuring.bandwidth import ceiling_share, read_bandwidth, usable_cores
from engine.measuring.conversations import ConversationSpeeds, measure_conversations
from engine.measuring.draft_gain import measure_draft_gain
from engine.measuring.private_memory import MemoryWatch
from engine.session import Session, SessionOptions

WARM_UP_TOKENS = (64, 8)
CONVERSATIONS = (4, 16)
TOKENS_EACH = 16
# The command is to take a minute: more conversations are left out where they would take longer.
LONGEST_SECONDS = 20.0


def bench(
    model: ModelOption = None,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Tokens of the prompt.")] = 512,
    generated_tokens: Annotated[int, typer.Option(min=2, help="Tokens of the answer.")] = 64,
    workers: WorkersOption = 0,
    plan: PlanOption = None,
    threads: ThreadsOption = None,
    dtype: DtypeOption = Dtype.AUTO,
    kv_window: WindowOption = None,
    kv_dtype: CacheDtypeOption = CacheDtype.AUTO,
    node: NodeOption = None,
    draft_model: DraftModelOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure how fast a model is here, and how near to what this computer's memory allows."""
    options = SessionOptions(
        model=model,
        dtype=dtype.value,
        num_workers=workers,
        plan=plan,
        num_threads=threads,
        kv_window=kv_window,
        kv_dtype=kv_dtype.value,
        nodes=tuple(node or ()),
        draft_model=draft_model,
    )
    started = time.perf_counter()
    with MemoryWatch() as watch:

        def work(session: Session, display: ProgressDisplay) -> None:
            ready_seconds = time.perf_counter() - started
            watch.settle()
            warm_prompt, warm_answer = WARM_UP_TOKENS
            session.benchmark(min(prompt_tokens, warm_prompt), warm_answer)
            finished = session.benchmark(prompt_tokens, generated_tokens)
            figures = _figures(session, finished, ready_seconds)
            if draft_model is not None:
                figures["draft_model"] = asdict(measure_draft_gain(session, generated_tokens))
            if as_json:
                display.stop()
                print(json.dumps(figures))
                return
            together = _together(session, finished)
            display.stop()
            figures["runner_peak_bytes"] = watch.peak("runner")
            figures["host_peak_bytes"] = watch.peak("host")
            print("\n".join(table_lines(figures, together)))

        run_session(options, work)


def _figures(session: Session, finished: api.Finished, ready_seconds: float) -> dict[str, Any]:
    """What `--json` prints."""
    weight_bytes = sum(need.weight_bytes for need in session.memory.values())
    bandwidth = share = None
    devices = [session.plan.devices[i] for i in session.plan.used_devices()]
    # Of other computers' memory, and of GPUs', this process knows nothing.
    if all(name == "this/cpu" or name.startswith("local-") for name in devices):
        bandwidth = read_bandwidth()
        if session.model.config.experts is None:  # else a token reads but some of the weights
            share = ceiling_share(weight_bytes, finished.decode_tps, bandwidth)
    return {
        "model": session.model.name,
        "dtype": session.model.dtype,
        "kernels": {name: session.kernels.get(name, "") for name in devices},
        "prompt_tokens": finished.prompt_tokens,
        "generated_tokens": len(finished.token_ids),
        "prefill_tps": finished.prefill_tps,
        "decode_tps": finished.decode_tps,
        "ttft_s": finished.ttft_s,
        "ready_s": ready_seconds,
        "weight_bytes": weight_bytes,
        "memory_bytes_per_second": bandwidth,
        "ceiling_share": share,
        "plan": plan_dict(finished),
        "devices": report(finished, session.memory)["devices"],
        "machine": platform.processor() or platform.machine(),
        "cores": usable_cores(),
    }


def _together(session: Session, alone: api.Finished) -> dict[int, ConversationSpeeds]:
    """Speeds of several conversations at once, as far as they are measured in bearable time."""
    prompt_tokens = min(alone.prompt_tokens, WARM_UP_TOKENS[0])
    return {
        count: measure_conversations(
            session, count, prompt_tokens=prompt_tokens, tokens_each=TOKENS_EACH
        )
        for count in CONVERSATIONS
        if count * TOKENS_EACH <= alone.decode_tps * LONGEST_SECONDS
    }


def table_lines(figures: dict[str, Any], together: dict[int, ConversationSpeeds]) -> list[str]:
    """The table for a person.

    Args:
        figures: of `--json`, with the peaks of runner and host in bytes.
        together: speeds by number of conversations.
    """
    prompt, answer = figures["prompt_tokens"], figures["generated_tokens"]
    rows = [
        (f"reading a prompt of {prompt:,} tokens", f"{figures['prefill_tps']:,.1f} tok/s", ""),
        (
            f"writing {answer:,} tokens after it",
            f"{figures['decode_tps']:,.1f} tok/s",
            _share(figures),
        ),
    ]
    if "draft_model" in figures:
        rows.append(_draft_row(figures["draft_model"]))
    for count, found in together.items():
        each = f"{found.total / count:,.1f} each, the slowest {found.slowest_share:.0%} of that"
        rows.append((f"{count} conversations at once", f"{found.total:,.1f} tok/s", each))
    rows += [
        ("first token of that prompt", f"{figures['ttft_s']:.2f} s", ""),
        ("ready for the first prompt", f"{figures['ready_s']:.2f} s", "from the command's start"),
        (
            "memory of a runner, at most",
            _megabytes(figures["runner_peak_bytes"]),
            f"weights alone: {_megabytes(figures['weight_bytes'])} in all",
        ),
        ("memory of the engine host", _megabytes(figures["host_peak_bytes"]), ""),
    ]
    if figures["memory_bytes_per_second"] is not None:
        speed = f"{figures['memory_bytes_per_second'] / 1e9:,.1f} GB/s"
        rows.append(("this computer's memory gives", speed, f"to {figures['cores']} cores"))
    names, values = (max(len(row[i]) for row in rows) for i in (0, 1))
    head = f"{figures['model']}, computed in {figures['dtype']}"
    lines = [f"{head} by {computers(figures['kernels'])}", ""]
    lines += [f"{name:{names}}  {value:>{values}}  {note}".rstrip() for name, value, note in rows]
    return lines


def computers(kernels: dict[str, str]) -> str:
    """What computes on which devices, such as "torch kernels on laptop/cuda0".

    Args:
        kernels: by device, as each says it.
    """
    devices: dict[str, list[str]] = {}
    for device, name in kernels.items():
        devices.setdefault(f"{name} kernels".lstrip(), []).append(device)
    return " and ".join(f"{name} on {', '.join(found)}" for name, found in devices.items())


def _draft_row(gain: dict[str, Any]) -> tuple[str, str, str]:
    note = (
        f"{gain['plain_tps']:,.1f} tok/s without; {gain['accepted_tokens']:,} of "
        f"{gain['drafted_tokens']:,} guesses came true"
    )
    return f"a story, with draft model {gain['name']}", f"{gain['tps']:,.1f} tok/s", note


def _share(figures: dict[str, Any]) -> str:
    if figures["ceiling_share"] is None:
        return ""
    return f"{figures['ceiling_share']:.0%} of what the memory allows"


def _megabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:,.0f} MB"
