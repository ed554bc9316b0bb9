"""A model on a plan, for programs without an event loop: the command line, tests, benchmarks.

In: which model, which plan. Out: answers and logits. It starts an engine host and ends it.
"""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self, TypedDict, Unpack

import msgspec
import numpy as np
from numpy.typing import NDArray

from engine.client import EngineClient, Event
from engine.cluster.join_token import decode_token
from engine.cluster.messages import Message
from engine.decode.request_rules import check_request
from engine.errors import CacheFull, ConfigError, EngineError, error_by_name
from engine.host import messages as api
from engine.plan.plan import Plan, PlanShape
from engine.plan.plan_file import read_plan_file
from engine.plan.presets import even, single

# A cancel is heard within milliseconds; a host that does not answer is not waited for.
CANCEL_SECONDS = 3.0

Prompt = str | tuple[api.ChatTurn, ...]


class GenerateOptions(TypedDict, total=False):
    """What a program may ask of an answer besides its sampling; see `api.Generate`."""

    max_tokens: int
    stop: tuple[str, ...]
    ignore_eos: bool
    stop_ids: tuple[int, ...]
    stop_sequences: tuple[tuple[int, ...], ...]
    min_tokens: int
    logprobs: int | None
    speculation: api.Speculation


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionOptions:
    """What a session runs on.

    Attributes:
        model: file or folder; None is the default model.
        num_workers: simulated nodes to start; without a plan they share the model evenly.
        plan: a plan, or the path of a plan file; None follows `num_workers`.
        num_threads: threads of each runner; None shares the cores out.
        nodes: join tokens of workers on other computers.
        draft_model: file or folder of a smaller model that guesses; None for none.
    """

    model: str | None = None
    dtype: api.DtypeChoice = "auto"
    num_workers: int = 0
    plan: Plan | Path | None = None
    num_threads: int | None = None
    kv_window: int | None = None
    kv_dtype: api.CacheDtypeChoice = "auto"
    nodes: tuple[str, ...] = ()
    draft_model: str | None = None


class Session:
    """See the module; a context manager."""

    def __init__(
        self,
        options: SessionOptions,
        on_event: Callable[[Message], None] | None = None,
        check_model: Callable[[api.ModelOpened], None] | None = None,
    ) -> None:
        """Start the host, open the model, put the plan in force.

        Args:
            on_event: hears progress and everything else the host says.
            check_model: may raise an EngineError when the model is open, before weights are moved.
        Raises: EngineError: told in one line; nothing is left running.
        """
        if options.num_threads is not None and not 1 <= options.num_threads <= 1024:
            raise ConfigError(f"--threads {options.num_threads} is not between 1 and 1024")
        self._listener = on_event or _ignore
        self.memory: dict[str, api.DeviceMemory] = {}
        self.kernels: dict[str, str] = {}
        # Of other computers, by key: a node whose own name is taken gets another one here.
        self._names: dict[str, str] = {}
        self.client = EngineClient()
        try:
            self.model = self._open(options)
            if check_model is not None:
                check_model(self.model)
            shape = PlanShape.from_config(self.model.config)
            if options.num_workers:
                self._run(api.AddSimulatedNodes(request_id=self._id(), count=options.num_workers))
            for token in options.nodes:
                self._run(api.AddNode(request_id=self._id(), token=token))
            self.plan = _choose_plan(options, shape)
            used = {self.plan.devices[i].rpartition("/")[0] for i in self.plan.used_devices()}
            keys = [decode_token(token).public_key.decode("ascii") for token in options.nodes]
            joined = [self._names[key] for key in keys if key in self._names]
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
        self._listener = on_event

    def apply(self, plan: Plan) -> None:
        """Put another plan in force; `plan`, `memory` and `kernels` follow it, and any that replaces it."""
        self._run(api.ApplyPlan(request_id=self._id(), plan=plan))

    def generate(
        self,
        prompt: Prompt,
        *,
        raw: bool = False,
        sampling: api.SamplingSettings | None = None,
        batch_index: int = 0,
        **options: Unpack[GenerateOptions],
    ) -> api.Finished:
        """Answer a prompt, or continue it when `raw`.

        Args:
            sampling: None is greedy.
            batch_index: gives, with its seed, what `generate_batch` gave for that prompt.
        Raises: EngineError: the request could not be served.
        """
        finished = self._run(self._generate_call(prompt, raw, sampling, batch_index, options))
        assert isinstance(finished, api.Finished)
        return finished

    def generate_batch(
        self,
        prompts: Sequence[Prompt],
        *,
        raw: bool = False,
        sampling: api.SamplingSettings | None = None,
        on_token: Callable[[int, int, str], None] | None = None,
        **options: Unpack[GenerateOptions],
    ) -> list[api.Finished]:
        """Answer several prompts of any lengths, all at once.

        Args:
            sampling: None is greedy. All share its seed, one that is drawn if it has none; the
                noise of prompt i depends on (seed, i, position), not on its company.
            on_token: hears batch index, token id and the text that became certain with it.
        Returns: the answers in the order of `prompts`.
        Raises: EngineError: one could not be served; the others are cancelled.
        """
        sampling = sampling or api.SamplingSettings(temperature=0.0)
        if sampling.seed is None:
            sampling = msgspec.structs.replace(sampling, seed=secrets.randbits(63))
        calls = [
            self._generate_call(prompt, raw, sampling, index, options)
            for index, prompt in enumerate(prompts)
        ]
        index_of = {call.request_id: index for index, call in enumerate(calls)}
        ended: dict[int, api.Finished] = {}
        for call in calls:
            self.client.post(call)
        try:
            while len(ended) < len(calls):
                event = self.client.receive(0.5)
                if event is None:
                    continue
                message = event.message
                self._on_event(message)
                if isinstance(message, api.TokensGenerated) and message.request_id in index_of:
                    if on_token is not None:
                        _tell_tokens(on_token, index_of[message.request_id], message)
                elif isinstance(message, api.Finished) and message.request_id in index_of:
                    ended[message.request_id] = message
                elif isinstance(message, api.CallFailed) and message.request_id in index_of:
                    where = f"prompt {index_of.pop(message.request_id)} of the batch"
                    raise error_by_name(message.error, f"{where}: {message.message}")
        except BaseException:
            self.cancel(index_of.keys() - ended.keys())
            raise
        return [ended[call.request_id] for call in calls]

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
        if len(ids) > self.model.kv_window:
            raise CacheFull(
                f"{len(ids):,} ids need as many positions, the KV window has "
                f"{self.model.kv_window:,}. Give fewer, or raise --kv-window"
            )
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

    def _on_event(self, message: Message) -> None:
        if isinstance(message, api.PlanApplied):
            self.plan = message.plan
            self.memory = {need.device: need for need in message.memory}
            self.kernels = {item.device: item.kernels for item in message.kernels}
        elif isinstance(message, api.NodesChanged):
            self._names = {node.key: node.name for node in message.nodes if node.key}
        self._listener(message)

    def _id(self) -> int:
        return self.client.next_request_id()

    def _run(self, call: Message, on_event: Callable[[Event], None] | None = None) -> Message:
        try:
            return self.client.run(call, on_event or (lambda event: self._on_event(event.message)))
        except KeyboardInterrupt:
            self.cancel([call.request_id])  # type: ignore[attr-defined]
            raise

    def _generate_call(
        self,
        prompt: Prompt,
        raw: bool,
        sampling: api.SamplingSettings | None,
        batch_index: int,
        options: GenerateOptions,
    ) -> api.Generate:
        """The call, checked here too: not every wrong number can be sent."""
        turns: tuple[api.ChatTurn, ...] = ()
        if isinstance(prompt, tuple):
            turns = prompt
        elif not raw:
            turns = (api.ChatTurn(role="user", content=prompt),)
        call = api.Generate(
            request_id=self._id(),
            turns=turns,
            raw_prompt=prompt if raw and isinstance(prompt, str) else None,
            sampling=sampling or api.SamplingSettings(temperature=0.0),
            batch_index=batch_index,
            **options,
        )
        check_request(call, self.model.config.vocab_size)
        return call

    def cancel(self, request_ids: Collection[int]) -> None:
        """Cancel calls and wait for their ends, so that nothing of them comes later."""
        for request_id in request_ids:
            self.client.post(api.Cancel(request_id=request_id))
        waiting = set(request_ids)
        deadline = time.monotonic() + CANCEL_SECONDS
        while waiting and time.monotonic() < deadline:
            event = self.client.receive(0.1)
            if event is None:
                continue
            message = event.message
            if isinstance(message, api.Done | api.Finished | api.CallFailed):
                waiting.discard(message.request_id)

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
            kv_dtype=options.kv_dtype,
            num_threads=options.num_threads,
            draft_path=options.draft_model,
        )
        self.client.run(call, on_event)
        if not opened:
            raise EngineError("the engine host opened no model; please report this")
        return opened[0]


def _tell_tokens(
    on_token: Callable[[int, int, str], None], index: int, message: api.TokensGenerated
) -> None:
    """The text goes with the last token: it became certain with that one."""
    last = len(message.token_ids) - 1
    for n, token_id in enumerate(message.token_ids):
        on_token(index, token_id, message.text if n == last else "")


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
