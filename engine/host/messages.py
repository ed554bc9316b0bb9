"""What a window or command line asks of the engine host, and the events it hears back.

Calls carry a `request_id` chosen by the client; every call ends in exactly one `Done`, `Finished`
or `CallFailed` with that id. Same binary form as between nodes (`engine.cluster.messages`).
"""

from __future__ import annotations

from typing import Literal

from engine.cluster.messages import Message, ProcessUsage
from engine.model.config import ModelConfig
from engine.plan.plan import Plan

DtypeChoice = Literal["auto", "float32", "bfloat16", "int8"]
FinishReason = Literal["stop", "length", "cancelled"]


# ---- calls -----------------------------------------------------------------------------------


class OpenModel(Message, frozen=True):
    """Open a model file or folder (None: the default model, fetched if need be).

    Progress arrives as `Progress`; success as `ModelOpened`, then `Done`. The plan in force is
    dropped: apply one next.
    """

    request_id: int
    path: str | None
    dtype: DtypeChoice = "auto"
    kv_window: int | None = None
    num_threads: int | None = None


class AddSimulatedNodes(Message, frozen=True):
    """Start worker processes local-1 … local-N on this computer, up to `count` in all."""

    request_id: int
    count: int


class AddNode(Message, frozen=True):
    """Connect to a worker on another computer by the join token it printed."""

    request_id: int
    token: str


class ApplyPlan(Message, frozen=True):
    """Put a plan in force: start runners, move weights, then answer requests with it.

    Running answers pause and go on under the new plan. Ends in `PlanApplied`, then `Done`. Once
    weights are on their way the plan before is given up: if loading fails or is cancelled then,
    `PlanLost` comes before `CallFailed`.
    """

    request_id: int
    plan: Plan


class SamplingSettings(Message, frozen=True):
    """How the next token is chosen; temperature 0 is greedy.

    Attributes:
        top_k: 0 means all tokens.
        seed: None draws one, which `Finished` reports.
    """

    temperature: float = 0.3
    top_k: int = 0
    top_p: float = 0.9
    repetition_penalty: float = 1.0
    seed: int | None = None


class ChatTurn(Message, frozen=True):
    """One message of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str


class Generate(Message, frozen=True):
    """Continue a conversation, or a raw prompt when `raw_prompt` is given.

    Attributes:
        max_tokens: 0 means up to the KV window.
        stop: texts that end the answer; they are not part of it.
    """

    request_id: int
    turns: tuple[ChatTurn, ...] = ()
    raw_prompt: str | None = None
    max_tokens: int = 0
    sampling: SamplingSettings = SamplingSettings()
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False


class ComputeLogits(Message, frozen=True):
    """Raw logits for every position of `ids`; arrive as `LogitsRows`, in order."""

    request_id: int
    ids: tuple[int, ...]


class Benchmark(Message, frozen=True):
    """Measure prefill and decode speed on the plan in force; ends in `Finished`."""

    request_id: int
    prompt_tokens: int = 512
    generated_tokens: int = 64


class Cancel(Message, frozen=True):
    """End the call `request_id`; it ends with finish reason "cancelled"."""

    request_id: int


CALLS = (
    OpenModel
    | AddSimulatedNodes
    | AddNode
    | ApplyPlan
    | Generate
    | ComputeLogits
    | Benchmark
    | Cancel
)


# ---- events ----------------------------------------------------------------------------------


class Done(Message, frozen=True):
    """A call ended well."""

    request_id: int


class CallFailed(Message, frozen=True):
    """A call ended with an error told in one line; `error` is a class name of engine.errors."""

    request_id: int
    error: str
    message: str


class Progress(Message, frozen=True):
    """Something that takes its time. `total` 0 means unknown.

    Attributes:
        phase: "fetch" model bytes; "start" runners; "weights" bytes to one device (`subject`);
            "prefill" prompt tokens.
    """

    request_id: int
    phase: Literal["fetch", "start", "weights", "prefill"]
    subject: str
    done: int
    total: int


class ModelOpened(Message, frozen=True):
    """A model's metadata is read."""

    request_id: int
    name: str
    path: str
    config: ModelConfig
    dtype: str
    kv_window: int
    file_bytes: int
    warning: str | None = None


class PlanApplied(Message, frozen=True):
    """A plan is in force."""

    epoch: int
    plan: Plan


class TokensGenerated(Message, frozen=True):
    """New text of an answer: one or more tokens; `text` never ends inside a character."""

    request_id: int
    token_ids: tuple[int, ...]
    text: str


class DeviceUsage(Message, frozen=True):
    """What one device did for a request, or in a stretch of time."""

    device: str
    compute_s: float
    wait_s: float
    network_s: float
    network_bytes: int


class Finished(Message, frozen=True):
    """A generation ended.

    Attributes:
        ttft_s: from the call's arrival to the first token.
        prefill_tps, decode_tps: tokens per second; 0 where there was nothing to measure.
    """

    request_id: int
    finish_reason: FinishReason
    text: str
    token_ids: tuple[int, ...]
    prompt_tokens: int
    seed: int
    ttft_s: float
    prefill_tps: float
    decode_tps: float
    devices: tuple[DeviceUsage, ...]
    plan: Plan


class LogitsRows(Message, frozen=True):
    """Tensors: float32 [rows, vocab_size] for positions from `first_position` on."""

    request_id: int
    first_position: int


class NodeDevice(Message, frozen=True):
    """A device as the window lists it. `in_use`: it has a share in the plan in force."""

    device: str
    kind: Literal["cpu", "cuda"]
    label: str
    memory_bytes: int
    in_use: bool


class NodeState(Message, frozen=True):
    """A node as the window lists it; figures are None until the worker has measured them."""

    name: str
    kind: Literal["this", "simulated", "remote"]
    state: Literal["starting", "ready", "loading", "busy", "lost"]
    reason: str
    host_name: str
    version: str
    devices: tuple[NodeDevice, ...]
    processes: tuple[ProcessUsage, ...]
    cpu_percent: float | None = None
    memory_used_bytes: int | None = None
    memory_total_bytes: int | None = None
    network_in_bytes_per_second: float | None = None
    network_out_bytes_per_second: float | None = None


class NodesChanged(Message, frozen=True):
    """All nodes; sent when one changes and at least once a second."""

    nodes: tuple[NodeState, ...]


class Throughput(Message, frozen=True):
    """What the steps of the last stretch of time did; sent about 8 times a second while busy.

    Attributes:
        time_s: end of the stretch, seconds since the epoch.
        seconds: its length.
    """

    time_s: float
    seconds: float
    prompt_tokens: int
    generated_tokens: int
    devices: tuple[DeviceUsage, ...]


class PlanLost(Message, frozen=True):
    """The plan in force can no longer run; `message` names the device, its layers and the cause."""

    message: str


EVENTS = (
    Done
    | CallFailed
    | Progress
    | ModelOpened
    | PlanApplied
    | TokensGenerated
    | Finished
    | LogitsRows
    | NodesChanged
    | Throughput
    | PlanLost
)
