"""A model on a plan, for programs without an event loop: the command line, tests, benchmarks.

In: which model, which plan. Out: answers and logits. It starts an engine host and ends it.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from engine.client import EngineClient, Event
from engine.cluster.join_token import decode_token
from engine.cluster.messages import Message
from engine.errors import ConfigError, EngineError
from engine.host import messages as api
from engine.plan.plan import Plan, PlanShape
from engine.plan.plan_file import read_plan_file
from engine.plan.presets import even, single

# A cancel is heard within milliseconds; a host that does not answer is not waited for.
CANCEL_SECONDS = 3.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionOptions:
    """What a session runs on.

    Attributes:
        model: file or folder; None is the default model.
        num_workers: simulated nodes to start; without a plan they share the model evenly.
        plan: a plan, or the path of a plan file; None follows `num_workers`.
        num_threads: threads of each runner; None shares the cores out.
        nodes: join tokens of workers on other computers.
    """

    model: str | None = None
    dtype: api.DtypeChoice = "auto"
    num_workers: int = 0
    plan: Plan | Path | None = None
    num_threads: int | None = None
    kv_window: int | None = None
    nodes: tuple[str, ...] = ()


class Session:
    """See the module; a context manager."""

    def __init__(
        self, options: SessionOptions, on_event: Callable[[Message], None] | None = None
    ) -> None:
        """Start the host, open the model, put the plan in force.

        Args:
            on_event: hears progress and everything else the host says.
        Raises: EngineError: told in one line; nothing is left running.
        """
        if options.num_threads is not None and not 1 <= options.num_threads <= 1024:
            raise ConfigError(f"--threads {options.num_threads} is not between 1 and 1024")
        self._on_event = on_event or _ignore
        self.client = EngineClient()
        try:
            self.model = self._open(options)
            shape = PlanShape.from_config(self.model.config)
            if options.num_workers:
                self._run(api.AddSimulatedNodes(request_id=self._id(), count=options.num_workers))
            for token in options.nodes:
                self._run(api.AddNode(request_id=self._id(), token=token))
            self.plan = _choose_plan(options, shape)
            used = {self.plan.devices[i].rpartition("/")[0] for i in self.plan.used_devices()}
            joined = [decode_token(token).name for token in options.nodes]
            # For a person to be told: nodes that joined in vain.
            self.unused_nodes = [name for name in joined if name not in used]
            self.apply(self.plan)
        except BaseException:
            self.client.close()
            raise

    def __enter__(self) -> Self:
        """The session itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close."""
        self.close()

    def listen(self, on_event: Callable[[Message], None]) -> None:
        """Replace the listener."""
        self._on_event = on_event

    def apply(self, plan: Plan) -> None:
        """Put another plan in force."""
        self._run(api.ApplyPlan(request_id=self._id(), plan=plan))
        self.plan = plan

    def generate(
        self,
        prompt: str | tuple[api.ChatTurn, ...],
        *,
        raw: bool = False,
        max_tokens: int = 0,
        sampling: api.SamplingSettings | None = None,
        stop: tuple[str, ...] = (),
    ) -> api.Finished:
        """Answer a prompt, or continue it when `raw`.

        Raises: EngineError: the request could not be served.
        """
        turns: tuple[api.ChatTurn, ...] = ()
        if isinstance(prompt, tuple):
            turns = prompt
        elif not raw:
            turns = (api.ChatTurn(role="user", content=prompt),)
        call = api.Generate(
            request_id=self._id(),
            turns=turns,
            raw_prompt=prompt if raw and isinstance(prompt, str) else None,
            max_tokens=max_tokens,
            sampling=sampling or api.SamplingSettings(temperature=0.0),
            stop=stop,
        )
        finished = self._run(call)
        assert isinstance(finished, api.Finished)
        return finished

    def benchmark(self, prompt_tokens: int, generated_tokens: int) -> api.Finished:
        """Time a prompt and an answer of given lengths."""
        finished = self._run(
            api.Benchmark(
                request_id=self._id(),
                prompt_tokens=prompt_tokens,
                generated_tokens=generated_tokens,
            )
        )
        assert isinstance(finished, api.Finished)
        return finished

    def logits(self, ids: list[int]) -> NDArray[np.float32]:
        """Raw logits of every position, float32 [len(ids), vocab_size]."""
        rows: NDArray[np.float32] = np.empty(
            (len(ids), self.model.config.vocab_size), dtype=np.float32
        )

        def on_event(event: Event) -> None:
            if isinstance(event.message, api.LogitsRows):
                first = event.message.first_position
                rows[first : first + event.tensors[0].shape[0]] = event.tensors[0]
            self._on_event(event.message)

        self.client.run(api.ComputeLogits(request_id=self._id(), ids=tuple(ids)), on_event)
        return rows

    def close(self) -> None:
        """End the host and everything it started."""
        self.client.close()

    def _id(self) -> int:
        return self.client.next_request_id()

    def _run(self, call: Message) -> Message:
        try:
            return self.client.run(call, lambda event: self._on_event(event.message))
        except KeyboardInterrupt:
            self._cancel(call.request_id)  # type: ignore[attr-defined]
            raise

    def _cancel(self, request_id: int) -> None:
        """Cancel a call and wait for its end, so that nothing of it comes later."""
        self.client.post(api.Cancel(request_id=request_id))
        deadline = time.monotonic() + CANCEL_SECONDS
        while time.monotonic() < deadline:
            event = self.client.receive(0.1)
            if event is None:
                continue
            message = event.message
            if (
                isinstance(message, api.Done | api.Finished | api.CallFailed)
                and message.request_id == request_id
            ):
                return

    def _open(self, options: SessionOptions) -> api.ModelOpened:
        opened: list[api.ModelOpened] = []

        def on_event(event: Event) -> None:
            if isinstance(event.message, api.ModelOpened):
                opened.append(event.message)
            self._on_event(event.message)

        call = api.OpenModel(
            request_id=self._id(),
            path=options.model,
            dtype=options.dtype,
            kv_window=options.kv_window,
            num_threads=options.num_threads,
        )
        self.client.run(call, on_event)
        if not opened:
            raise EngineError("the engine host opened no model; please report this")
        return opened[0]


def simulated_devices(count: int) -> list[str]:
    """Devices of the simulated nodes local-1 … local-`count`."""
    return [f"local-{n}/cpu" for n in range(1, count + 1)]


def _choose_plan(options: SessionOptions, shape: PlanShape) -> Plan:
    if isinstance(options.plan, Plan):
        return options.plan
    if options.plan is not None:
        return read_plan_file(options.plan, shape)
    if options.num_workers:
        return even(shape, simulated_devices(options.num_workers))
    return single(shape, "this/cpu")


def _ignore(_message: Message) -> None:
    """Nobody listens."""


def parse_ids(text: str) -> list[int]:
    """Token ids from text such as "1,2,3" or one per line.

    Raises: ConfigError: something in it is no id.
    """
    words = [word for word in re.split(r"[,\s]+", text) if word]
    bad = next((w for w in words if not re.fullmatch(r"[0-9]{1,10}", w)), None)
    if bad is not None or not words:
        raise ConfigError(f"{bad or ''!r} is not a token id; write ids such as 1,2,3")
    return [int(word) for word in words]
