"""What a window or command line asks of the engine host, and the events it hears back.

Calls carry a `request_id` chosen by the client; every call ends in exactly one `Done`, `Finished`
or `CallFailed` with that id. Same binary form as between nodes (`engine.cluster.messages`).
"""

from __future__ import annotations

from typing import Literal

from engine.cluster.messages import DeviceSpeed, GpuUsage, Message, ProcessUsage
from engine.model.config import ModelConfig
from engine.plan.plan import Plan

DtypeChoice = Literal["auto", "float32", "bfloat16", "int8", "int4"]
CacheDtypeChoice = Literal["auto", "float32", "bfloat16", "float16"]
FinishReason = Literal["stop", "length", "cancelled"]
Speculation = Literal["auto", "on", "off"]
NodeStateName = Literal[
    "discovered", "pairing", "starting", "ready", "loading", "busy", "stale", "lost"
]


# ---- calls -----------------------------------------------------------------------------------


class OpenModel(Message, frozen=True):
    """Open a model file or folder (None: the default model, fetched if need be).

    Progress arrives as `Progress`; success as `ModelOpened`, then `Done`. The plan in force is
    dropped: apply one next.

    Attributes:
        draft_path: file or folder of a smaller model with the same vocabulary, whose guesses at the
            next tokens are verified too; it is computed on this computer's CPU.
    """

    request_id: int
    path: str | None
    dtype: DtypeChoice = "auto"
    kv_window: int | None = None
    kv_dtype: CacheDtypeChoice = "auto"
    num_threads: int | None = None
    draft_path: str | None = None


class AddSimulatedNodes(Message, frozen=True):
    """Start worker processes local-1 … local-N on this computer, up to `count` in all."""

    request_id: int
    count: int


class AddNode(Message, frozen=True):
    """Connect to a worker on another computer by the join token it printed, and remember it."""

    request_id: int
    token: str


class AddAddress(Message, frozen=True):
    """List a worker that discovery does not show, as discovered; pair with it next."""

    request_id: int
    endpoint: str


class PairNode(Message, frozen=True):
    """Begin pairing with a discovered node, whose worker must be waiting (`shardmix-worker pair`).

    `PairingCode` follows; the call ends when both sides have said that they see the same code, or
    with PeerRefused.
    """

    request_id: int
    name: str


class ConfirmPairing(Message, frozen=True):
    """What the person at this computer says of the code of a node in state "pairing"."""

    request_id: int
    name: str
    is_same: bool


class ForgetNode(Message, frozen=True):
    """Remove a node for good, its key included. Refused while it has a share in the plan."""

    request_id: int
    name: str


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

    Applied in this order, which is that of transformers: bias, repetition, presence and frequency
    penalty, forbidden ids, temperature, top-k, top-p, min-p. Each filter works on what the one
    before left, and the likeliest token always stays.

    Attributes:
        top_k: 0 means all tokens.
        top_p: the likeliest tokens, as few as have this much of what top-k left; 1 means all.
        repetition_penalty: divides positive and multiplies negative logits of every token in
            prompt and answer; 1 changes nothing.
        seed: None draws one, which `Finished` reports.
        min_p: tokens at least this many times as likely as the likeliest; 0 means all.
        presence_penalty: subtracted once from the logit of a token that the answer has.
        frequency_penalty: subtracted for every time that the answer has it.
        logit_bias: pairs of token id and what is added to its logit; no id twice.
    """

    temperature: float = 0.3
    top_k: int = 0
    top_p: float = 0.9
    repetition_penalty: float = 1.0
    seed: int | None = None
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()


class ChatTurn(Message, frozen=True):
    """One message of a conversation.

    Attributes:
        images: paths of image files on this computer, which come before the text.
    """

    role: Literal["system", "user", "assistant"]
    content: str
    images: tuple[str, ...] = ()


class Generate(Message, frozen=True):
    """Continue a conversation, or a raw prompt when `raw_prompt` is given.

    Attributes:
        max_tokens: 0 means up to the KV window.
        stop: texts that end the answer; they are not part of it.
        stop_ids: token ids that end the answer as EOS does: part of `token_ids`, not of the text.
        stop_sequences: runs of token ids that end the answer in the same way.
        min_tokens: until the answer has as many, EOS and `stop_ids` are not chosen, and neither
            stop texts nor stop sequences end it. Text of earlier tokens is never part of a stop
            text.
        logprobs: how many of the likeliest tokens to report with each token (0: the chosen one
            alone); None reports nothing.
        batch_index: the request's number in a batch with one seed. Noise is a function of seed,
            this number and position, so the members differ, and each can be had again alone.
        speculation: whether guesses at the next tokens, from text that prompt and answer already
            have or of a draft model, are verified several in a step: "auto" where that measured faster, "on" wherever
            there is a guess. With float32 weights it changes no choice of a token.
    """

    request_id: int
    turns: tuple[ChatTurn, ...] = ()
    raw_prompt: str | None = None
    max_tokens: int = 0
    sampling: SamplingSettings = SamplingSettings()
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    stop_ids: tuple[int, ...] = ()
    stop_sequences: tuple[tuple[int, ...], ...] = ()
    min_tokens: int = 0
    logprobs: int | None = None
    batch_index: int = 0
    speculation: Speculation = "auto"


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
    | AddAddress
    | PairNode
    | ConfirmPairing
    | ForgetNode
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
        phase: "fetch" model bytes; "start" runners; "weights" bytes of one device (`subject`);
            "connect" devices to each other; "prefill" prompt tokens.
    """

    request_id: int
    phase: Literal["fetch", "start", "weights", "connect", "prefill"]
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
    kv_dtype: str
    file_bytes: int
    warning: str | None = None
    draft_name: str | None = None


class DeviceMemory(Message, frozen=True):
    """What a device needs under a plan, computed before anything was loaded.

    Attributes:
        weight_bytes: in compute format.
        cache_bytes: keys and values of one conversation that fills the KV window.
    """

    device: str
    weight_bytes: int
    cache_bytes: int


class DeviceKernels(Message, frozen=True):
    """What computes generated tokens on a device.

    Attributes:
        kernels: as the device says it, such as "native avx2", "torch", or "native avx2 and torch".
    """

    device: str
    kernels: str


class LoadedBytes(Message, frozen=True):
    """Where the weights of one device came from in the last load, in file format.

    Attributes:
        received: sent by the engine host.
        cached: from the node's cache on disk.
        local: from the node's own copy of the model.
    """

    device: str
    received: int
    cached: int
    local: int


class Link(Message, frozen=True):
    """Between two devices of the plan, as measured when it was put in force or used since."""

    from_device: str
    to_device: str
    round_trip_seconds: float
    bytes_per_second: float


class PlanApplied(Message, frozen=True):
    """A plan is in force.

    Attributes:
        note: why it is another than was asked for; "" where it is not.
    """

    epoch: int
    plan: Plan
    memory: tuple[DeviceMemory, ...] = ()
    loaded: tuple[LoadedBytes, ...] = ()
    links: tuple[Link, ...] = ()
    note: str = ""
    kernels: tuple[DeviceKernels, ...] = ()


class PlanInterrupted(Message, frozen=True):
    """A device of the plan was lost; answers wait while another plan is put in force.

    `PlanApplied` or `PlanLost` follows. `message` names the device, its layers and the cause.
    """

    message: str


class LinksChanged(Message, frozen=True):
    """Links of the plan in force, refreshed from what went over them."""

    links: tuple[Link, ...]


class PairingCode(Message, frozen=True):
    """The six digits that both computers must show."""

    request_id: int
    name: str
    code: str


class TokensGenerated(Message, frozen=True):
    """New text of an answer: one or more tokens; `text` never ends inside a character."""

    request_id: int
    token_ids: tuple[int, ...]
    text: str


class DeviceUsage(Message, frozen=True):
    """What one device did for a request, or in a stretch of time.

    Attributes:
        cache_bytes: memory of keys and values after the last step, of all conversations.
    """

    device: str
    compute_s: float
    wait_s: float
    network_s: float
    network_bytes: int
    cache_bytes: int


class TokenLogprobs(Message, frozen=True):
    """How likely one token of an answer was.

    Natural logarithms of the model's own distribution: raw logits at temperature 1, before any
    penalty, bias or filter.

    Attributes:
        logprob: of the token that was chosen.
        top: ids and figures of the likeliest tokens, descending, equal ones by id; the chosen
            token need not be among them.
    """

    logprob: float
    top: tuple[tuple[int, float], ...]


class Finished(Message, frozen=True):
    """A generation ended.

    Attributes:
        reused_tokens: of the prompt, whose keys and values another conversation had computed.
        decode_steps: steps that chose the tokens after the first; fewer than those where guesses
            came true, or a device went on by itself.
        drafted_tokens, accepted_tokens: guesses that were verified, and that came true.
        model_drafted_tokens, model_accepted_tokens: of them, those of a draft model.
        logprobs: one for each of `token_ids` where the request asked for them, else None.
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
    reused_tokens: int = 0
    decode_steps: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    model_drafted_tokens: int = 0
    model_accepted_tokens: int = 0
    logprobs: tuple[TokenLogprobs, ...] | None = None


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
    """A node as the window lists it; figures are None until the worker has measured them.

    Attributes:
        name: what its devices are called by in plans; unique here.
        state: "discovered": seen on the network or added by address, not trusted. "pairing": codes
            are being compared. "starting": on its way. "ready", "loading", "busy": in use by this
            host. "stale": no word for a few seconds. "lost": gone, refused, or another's.
        since_s: when it came into this state, seconds since the epoch.
        reason: of the state, for a person; "" where there is nothing to say.
        key: its permanent public key, which is its identity; "" for workers of this computer.
        code: the six digits to compare, while pairing.
        round_trip_seconds, bytes_per_second: of the link between this host and its worker.
        system: its operating system, and the versions that decide how it computes.
        disk_bytes_per_second: of the folder where it keeps weights.
    """

    name: str
    kind: Literal["this", "simulated", "remote"]
    state: NodeStateName
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
    since_s: float = 0.0
    key: str = ""
    endpoint: str = ""
    code: str = ""
    round_trip_seconds: float | None = None
    bytes_per_second: float | None = None
    cpu_temperature_c: float | None = None
    cpu_power_w: float | None = None
    gpus: tuple[GpuUsage, ...] = ()
    speeds: tuple[DeviceSpeed, ...] = ()
    system: str = ""
    disk_bytes_per_second: float | None = None


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


class DraftModelLost(Message, frozen=True):
    """The draft model guesses no more; answers go on without it. `message` tells why."""

    message: str


class PlanLost(Message, frozen=True):
    """The plan in force can no longer run; `message` names the device, its layers and the cause."""

    message: str


EVENTS = (
    Done
    | CallFailed
    | Progress
    | ModelOpened
    | PlanApplied
    | PlanInterrupted
    | DraftModelLost
    | LinksChanged
    | PairingCode
    | TokensGenerated
    | Finished
    | LogitsRows
    | NodesChanged
    | Throughput
    | PlanLost
)
