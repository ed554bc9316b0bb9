"""What the command line shows: progress on standard error, results as text or JSON.

In: events of the engine host. Out: lines for a person, dictionaries for a program.
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from engine.cluster.messages import Message
from engine.host import messages as api
from engine.plan.plan_file import plan_to_toml


class ProgressDisplay:
    """Shows what takes time, on standard error, where that is a terminal."""

    def __init__(self) -> None:
        self._console = Console(stderr=True, highlight=False)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%"),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
        )
        self._tasks: dict[tuple[str, str], TaskID] = {}
        self._is_started = False
        self._told: set[str] = set()

    def show(self, message: Message) -> None:
        """Follow one event."""
        if isinstance(message, api.ModelOpened) and message.warning:
            self._console.print(f"warning: {message.warning}", style="yellow")
        if isinstance(message, api.PlanInterrupted):
            self._note(f"{message.message}. Going on without it")
        if isinstance(message, api.PlanApplied) and message.note:
            self._note(message.note)
        if isinstance(message, api.DraftModelLost):
            self._note(message.message)
        if not isinstance(message, api.Progress):
            return
        if not self._console.is_terminal:
            self._tell(message)
            return
        if not self._is_started:
            self._progress.start()
            self._is_started = True
        key = (message.phase, "" if message.phase == "start" else message.subject)
        text = _phase_text(message)
        if key not in self._tasks:
            self._tasks[key] = self._progress.add_task(text, total=message.total or None)
        self._progress.update(self._tasks[key], completed=message.done, total=message.total or None)
        if message.total and message.done >= message.total:
            self._progress.remove_task(self._tasks.pop(key))

    def _note(self, text: str) -> None:
        self.stop()
        self._console.print(f"\nnote: {text}", style="yellow", soft_wrap=True, markup=False)

    def stop(self) -> None:
        """Leave the terminal clean."""
        if self._is_started:
            self._progress.stop()
            self._is_started = False
            self._tasks.clear()

    def _tell(self, message: api.Progress) -> None:
        """One line per phase where nobody watches a bar."""
        if message.phase == "fetch" and message.phase not in self._told:
            self._told.add(message.phase)
            self._console.print(_phase_text(message), soft_wrap=True)


def _phase_text(message: api.Progress) -> str:
    if message.phase == "fetch":
        return f"fetching the model ({message.total / 1e6:.0f} MB)"
    if message.phase == "start":
        return "starting runners"
    if message.phase == "weights":
        return f"weights to {message.subject}"
    return "reading the prompt"


def plan_dict(finished: api.Finished) -> dict[str, Any]:
    """The plan of an answer, in the form of the plan file."""
    return tomllib.loads(plan_to_toml(finished.plan))


def report(finished: api.Finished, memory: Mapping[str, api.DeviceMemory]) -> dict[str, Any]:
    """The JSON object of DESIGN § 11; with `logprobs` where they were asked for.

    Args:
        memory: what was said of each device's memory when the plan was applied; a device that was
            lost during the answer has none.
    """
    result: dict[str, Any] = {
        "text": finished.text,
        "token_ids": list(finished.token_ids),
        "finish_reason": finished.finish_reason,
        "prompt_tokens": finished.prompt_tokens,
        "reused_tokens": finished.reused_tokens,
        "decode_steps": finished.decode_steps,
        "drafted_tokens": finished.drafted_tokens,
        "accepted_tokens": finished.accepted_tokens,
        "model_drafted_tokens": finished.model_drafted_tokens,
        "model_accepted_tokens": finished.model_accepted_tokens,
        "seed": finished.seed,
        "timings": {
            "ttft_s": finished.ttft_s,
            "prefill_tps": finished.prefill_tps,
            "decode_tps": finished.decode_tps,
        },
        "plan": plan_dict(finished),
        "devices": [
            {
                "name": d.device,
                "compute_s": d.compute_s,
                "wait_s": d.wait_s,
                "network_s": d.network_s,
                "network_bytes": d.network_bytes,
                "weight_bytes": _figure(memory, d.device, "weight_bytes"),
                "cache_bytes": d.cache_bytes,
                "cache_limit_bytes": _figure(memory, d.device, "cache_bytes"),
            }
            for d in finished.devices
        ],
    }
    if finished.logprobs is not None:
        result["logprobs"] = [
            {
                "token_id": token_id,
                "logprob": token.logprob,
                "top": [{"token_id": i, "logprob": figure} for i, figure in token.top],
            }
            for token_id, token in zip(finished.token_ids, finished.logprobs, strict=True)
        ]
    return result


def printer(display: ProgressDisplay) -> Callable[[Message], None]:
    """Print text as it comes; the progress bar ends with the first word."""

    def show(message: Message) -> None:
        if isinstance(message, api.TokensGenerated):
            display.stop()
            print(message.text, end="", flush=True)
        else:
            display.show(message)

    return show


def _figure(memory: Mapping[str, api.DeviceMemory], device: str, name: str) -> int | None:
    return getattr(memory[device], name) if device in memory else None
