"""What nodes say to each other: one frozen struct per message, and who accepts which.

`array_like` structs leave no room for unknown or repeated fields, and each field states what its
values may be. How messages and their tensors become frames is `codec`'s business. This module
opens no socket and decides nothing.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
import numpy as np
import numpy.typing as npt

from engine.errors import ProtocolError
from engine.model.batch import ComputeDtype, Count, Index, Segment, StepKind
from engine.model.config import CacheDtype, ModelConfig
from engine.plan.plan import Plan, Transport
from engine.weights.formats import TensorInfo

PROTOCOL_VERSION = 10
# Full logits of one step; the short form has a step compute as many.
MAX_LOGITS_BYTES = 128 << 20
# Raw logits in the short form of an answer, per position and vocabulary shard.
TOP_LOGITS = 256

# Nanoseconds of a clock that started whenever, or the difference of two such clocks.
ClockNs = Annotated[int, msgspec.Meta(ge=-(1 << 62), le=1 << 62)]

StreamKey = Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]

Array = npt.NDArray[Any]
WireDtype = Literal["float32", "bfloat16", "float16", "float64", "uint8", "int64"]

# numpy has no bfloat16; its bits travel as uint16.
NUMPY_TYPES: dict[str, npt.DTypeLike] = {
    "float32": np.float32,
    "bfloat16": np.uint16,
    "float16": np.float16,
    "float64": np.float64,
    "uint8": np.uint8,
    "int64": np.int64,
}
DTYPES: dict[str, np.dtype[Any]] = {name: np.dtype(kind) for name, kind in NUMPY_TYPES.items()}


class Message(
    msgspec.Struct, frozen=True, kw_only=True, array_like=True, forbid_unknown_fields=True, tag=True
):
    """Base of everything that crosses a process border."""


# ---- engine host <-> worker ------------------------------------------------------------------


class DeviceInfo(Message, frozen=True):
    """One CPU or GPU of a node."""

    device: str
    kind: Literal["cpu", "cuda"]
    label: str
    num_cores: Index
    memory_bytes: Count


class Hello(Message, frozen=True):
    """First word of the engine host, then a sign of life that keeps its lease.

    The worker answers the first with NodeDescription, or with Busy.

    Attributes:
        host_name: what a second engine host is told about who has the worker.
        telemetry_hz: how often this host wants to hear Telemetry.
    """

    host_name: str
    telemetry_hz: float = 1.0


class NodeDescription(Message, frozen=True):
    """Who a worker is and what it can compute on.

    Attributes:
        machine: the same for all workers of one computer, which share its cores and memory.
        trusted_network: whether its owner allows exchanges that are not encrypted.
    """

    name: str
    host_name: str
    machine: str
    system: str
    version: str
    pid: Index
    devices: tuple[DeviceInfo, ...]
    trusted_network: bool = False


class Busy(Message, frozen=True):
    """Another engine host has this worker; `holder` is what it calls itself."""

    holder: str


class Enroll(Message, frozen=True):
    """Said with the key of a join token: let `public_key` in from now on. The token is used up."""

    public_key: bytes
    host_name: str


class Enrolled(Message, frozen=True):
    """The key of Enroll is on the allow list."""


class Probe(Message, frozen=True):
    """The engine host times the way to a worker and back; `number` is returned in ProbeAnswer."""

    number: Count


class ProbeAnswer(Message, frozen=True):
    """Answer to Probe, at once."""

    number: Count


class DeviceSpeed(Message, frozen=True):
    """What a device reached when it measured itself.

    Attributes:
        flops: float32 operations per second in a large matrix product.
        memory_bytes_per_second: read bandwidth of its memory.
    """

    device: str
    flops: float
    memory_bytes_per_second: float


class SpeedReport(Message, frozen=True):
    """Sent once a worker has measured itself; `disk_bytes_per_second` of its cache folder."""

    devices: tuple[DeviceSpeed, ...]
    disk_bytes_per_second: float | None = None


class StartRunner(Message, frozen=True):
    """Start the runner of one device; answered by RunnerStarted or RunnerExited.

    Attributes:
        listen_address: where the runner's exchange socket listens; "" leaves it to the worker.
        transport: of the plan; "torch" is refused where the network is not trusted.
    """

    device: str
    listen_address: str
    transport: Transport = "zmq"


class RunnerStarted(Message, frozen=True):
    """Where a new runner listens, and the key it made for this start.

    Attributes:
        rendezvous: "ADDRESS:PORT" of a runner for transport "torch", else "".
    """

    device: str
    pid: Index
    control_endpoint: str
    exchange_endpoint: str
    public_key: bytes
    rendezvous: str = ""


class StopRunner(Message, frozen=True):
    """End the runner of one device."""

    device: str


class RunnerExited(Message, frozen=True):
    """A runner ended; `cause` is one line: exit code or signal, and its last words."""

    device: str
    pid: Index
    cause: str


class ProcessUsage(Message, frozen=True):
    """CPU (100 = one core) and resident memory of one process."""

    role: str
    pid: Index
    cpu_percent: float
    memory_bytes: Count


class GpuUsage(Message, frozen=True):
    """What a GPU is doing; None where its driver does not say."""

    device: str
    percent: float | None
    memory_used_bytes: Count
    memory_total_bytes: Count
    temperature_c: float | None
    power_w: float | None


class Telemetry(Message, frozen=True):
    """What a node is doing right now; rates are over the time since the last one."""

    cpu_percent: float
    memory_used_bytes: Count
    memory_total_bytes: Count
    network_in_bytes_per_second: float
    network_out_bytes_per_second: float
    processes: tuple[ProcessUsage, ...]
    cpu_temperature_c: float | None = None
    cpu_power_w: float | None = None
    gpus: tuple[GpuUsage, ...] = ()


class Shutdown(Message, frozen=True):
    """End yourself and everything you started."""


# ---- engine host <-> runner ------------------------------------------------------------------


class Peer(Message, frozen=True):
    """A runner of this epoch, as the others need to know it."""

    device_index: Index
    exchange_endpoint: str
    public_key: bytes


class LocalFile(Message, frozen=True):
    """A file of the engine host's checkpoint, in case the runner's computer has the same one.

    Attributes:
        is_same_computer: whether path and stamp prove it; else only content hashes do.
    """

    path: str
    num_bytes: Count
    modified_ns: int
    is_same_computer: bool


class Load(Message, frozen=True):
    """Take a share of a plan: fetch its weights, answer Loaded.

    Attributes:
        files: of the checkpoint, in its order.
        rendezvous: where the devices of a plan with transport "torch" meet, "ADDRESS:PORT".
        may_go_ahead: whether a device that computes everything may begin the likeliest next step
            before it is asked for.
    """

    epoch: Count
    config: ModelConfig
    plan: Plan
    device_index: Index
    dtype: ComputeDtype
    kv_window: int
    kv_dtype: CacheDtype
    num_threads: Index
    checkpoint_id: str
    tensors: tuple[TensorInfo, ...]
    peers: tuple[Peer, ...]
    files: tuple[LocalFile, ...] = ()
    rendezvous: str = ""
    may_go_ahead: bool = True


class HashesRequest(Message, frozen=True):
    """A runner asks for the content hashes of a tensor, one per `unit` elements along `axis`.

    Attributes:
        start, end: half-open range of units.
    """

    epoch: Count
    name: str
    axis: Index
    unit: Count
    start: Count
    end: Count


class SliceHashes(Message, frozen=True):
    """Answer to HashesRequest; one uint8 [units, 32] frame of SHA-256 sums of file bytes."""

    epoch: Count
    name: str
    axis: Index
    unit: Count
    start: Count
    end: Count


class WeightRequest(Message, frozen=True):
    """A runner asks for a slice in file format; bounds in elements along `axis`."""

    epoch: Count
    name: str
    axis: Index
    start: Count
    end: Count


class WeightSlice(Message, frozen=True):
    """Answer to WeightRequest; one uint8 frame with the slice in file format."""

    epoch: Count
    name: str
    axis: Index
    start: Count
    end: Count


class LoadProgress(Message, frozen=True):
    """Bytes of weights at hand so far, in file format, wherever they came from."""

    epoch: Count
    done_bytes: Count
    total_bytes: Count


class Loaded(Message, frozen=True):
    """The share is ready to compute.

    Attributes:
        weight_bytes: memory of the packed weights.
        received_bytes: of weights that came from the engine host in this load, in file format.
        cached_bytes, local_bytes: that came from the node's cache, or from its copy of the model.
        kernels: what computes generated tokens here, for people, such as "native avx2".
    """

    epoch: Count
    weight_bytes: Count
    received_bytes: Count = 0
    cached_bytes: Count = 0
    local_bytes: Count = 0
    kernels: str = ""


class Connect(Message, frozen=True):
    """Everyone has loaded: connect to your peers, measure the links, answer Connected."""

    epoch: Count


class LinkFigures(Message, frozen=True):
    """A link to another device of the plan, as this one measured it.

    Attributes:
        bytes_per_second: from that device to this one.
    """

    device_index: Index
    round_trip_seconds: float
    bytes_per_second: float


class Connected(Message, frozen=True):
    """All peers answer; `links` has one entry for each."""

    epoch: Count
    links: tuple[LinkFigures, ...]


class SlotOperation(Message, frozen=True):
    """Change to a slot's KV, before the step computes.

    Attributes:
        action: "free" drops the slot; "truncate" keeps positions below `length`; "copy" makes the
            slot begin with the first `length` positions of `source`, whatever it held before.
        source: for "copy", another slot.
    """

    action: Literal["free", "truncate", "copy"]
    slot: Index
    length: Index = 0
    source: Index = 0


class LogitsWanted(Message, frozen=True):
    """How much of the logits an answer carries, for each position that needs them.

    Attributes:
        form: "top" sends the largest raw logits, log-sum-exp figures and `ids`; "full" all.
        ids: per logits position, ascending token ids that the request changes (penalties, biases,
            forbidden ids): their raw logits are sent besides.
        temperatures: per logits position, the temperature of the log-sum-exp; 0 needs none.
        raw_sums: per logits position, whether the log-sum-exp of the model's own distribution
            (temperature 1, every id) is wanted too.
    """

    form: Literal["top", "full"]
    ids: tuple[tuple[Index, ...], ...] = ()
    temperatures: tuple[float, ...] = ()
    raw_sums: tuple[bool, ...] = ()


class Draw(Message, frozen=True):
    """How the tokens of a conversation are drawn whose logits the request does not change.

    Attributes:
        temperature: above 0; the filters mean what they do in `SamplingSettings`.
        noises: in [0, 1), for the token after a step's last one, and for each after it.
    """

    temperature: float
    top_k: Count
    top_p: float
    min_p: float
    noises: tuple[float, ...]


class Step(Message, frozen=True):
    """One forward pass of a ragged batch.

    Tensors: float32 [T, width] input embeddings for devices of the first row, else none.

    Attributes:
        continued: of a single conversation, tokens after the last one that a device which computes
            everything may go on with, as it foresees them; their inputs are its head's rows. As many
            positions more are answered, all as the last one was wanted.
        draw: of a single conversation, how its next tokens are drawn; None where each is the
            likeliest, or where the device cannot know.
    """

    epoch: Count
    step_id: Count
    kind: StepKind
    segments: tuple[Segment, ...]
    operations: tuple[SlotOperation, ...]
    logits: LogitsWanted
    continued: Count = 0
    draw: Draw | None = None


class StepProgress(Message, frozen=True):
    """A long step goes on: its device has come to plan row `row`."""

    epoch: Count
    step_id: Count
    row: Index


class LinkTraffic(Message, frozen=True):
    """What went over one link in a step, and how long this device waited for the other end."""

    device_index: Index
    sent_bytes: Count
    received_bytes: Count
    wait_ns: Count


class StepAnswer(Message, frozen=True):
    """What one device did in a step.

    Tensors, for a device with a share of the head and N positions that need logits, those of tokens
    that it went on with among them:
        "top": int64 [N, K] ids, float32 [N, K] raw logits, float64 [N] log-sum-exp at the
        request's temperature without the asked ids (0 for greedy requests), float64 [N]
        log-sum-exp at temperature 1 with all ids of the shard (0 where it is not wanted), then
        float32 [M] the asked ids of this shard in order.
        "full": float32 [N, shard rows].

    Attributes:
        links: one entry per peer that something was sent to or received from.
        figures: of links whose figures the traffic has changed, at most once a second.
        continued: tokens that the device went on with.
    """

    epoch: Count
    step_id: Count
    compute_ns: Count
    wait_ns: Count
    serialise_ns: Count
    sent_bytes: Count
    received_bytes: Count
    cache_bytes: Count
    links: tuple[LinkTraffic, ...] = ()
    figures: tuple[LinkFigures, ...] = ()
    continued: tuple[Index, ...] = ()


class FetchLogits(Message, frozen=True):
    """Ask for the full logits of the last step; answered by a StepAnswer in form "full"."""

    epoch: Count
    step_id: Count


class Abort(Message, frozen=True):
    """Give up every step of epochs up to this one; wakes whoever waits in an exchange."""

    epoch: Count


class AbortStep(Message, frozen=True):
    """Give up one step, whose answer nobody wants any more; there will be none."""

    epoch: Count
    step_id: Count


class Failed(Message, frozen=True):
    """A request could not be served; `error` is a class name of engine.errors.

    Attributes:
        step_id: of the step that failed; 0 where it was no step.
        peer_index: the device that cannot be reached any more, where that is the reason.
    """

    epoch: Count
    error: str
    message: str
    step_id: Count = 0
    peer_index: Index | None = None


# ---- runner -> runner ------------------------------------------------------------------------


class HandOver(Message, frozen=True):
    """Sent after plan row `row` to a device of the next row.

    Tensors, phase "part": the partial sum [N, width] in the wire format if `has_partial`, then the
    residual stream float32 [N, width] if `has_residual`; N tokens of the piece, or those that the
    receiver finishes for all. Phase "finished": the residual stream float32 [N, width] of the
    tokens that the sender finished.

    Attributes:
        piece: of the step's tokens; 0 where the step is worked in one.
        sent_ns: by the sender's monotonic clock.
        heard_ns: the least age that small hand-overs of the receiver had when they came to the
            sender, by both clocks; None while unknown.
    """

    epoch: Count
    step_id: Count
    row: Index
    piece: Index
    device_index: Index
    phase: Literal["part", "finished"]
    has_partial: bool
    has_residual: bool
    sent_ns: ClockNs
    heard_ns: ClockNs | None = None


class Ping(Message, frozen=True):
    """Asks a peer for a Pong with the same number and a uint8 frame of so many bytes (0: none)."""

    epoch: Count
    device_index: Index
    number: Count
    reply_bytes: Count


class Pong(Message, frozen=True):
    """Answer to Ping."""

    epoch: Count
    device_index: Index
    number: Count


class DirectOffer(Message, frozen=True):
    """Asks a peer of a higher index to connect to this one's computer, for small hand-overs.

    Attributes:
        local_name: of a local socket, too, where a peer on the same computer finds this one; "" for
            none.
        key_there, key_back: seal what the peer sends, and what it receives.
    """

    epoch: Count
    device_index: Index
    port: Annotated[int, msgspec.Meta(ge=1, le=65535)]
    cipher: Literal["chacha20-poly1305", "aes-256-gcm"]
    key_there: StreamKey
    key_back: StreamKey
    local_name: Annotated[str, msgspec.Meta(pattern=r"\A([0-9a-f]{32})?\Z")] = ""


WORKER_ACCEPTS = Hello | Probe | Enroll | StartRunner | StopRunner | Shutdown
WORKER_SENDS = (
    NodeDescription
    | Busy
    | ProbeAnswer
    | Enrolled
    | SpeedReport
    | RunnerStarted
    | RunnerExited
    | Telemetry
    | Failed
)
RUNNER_ACCEPTS = (
    Load
    | SliceHashes
    | WeightSlice
    | Connect
    | Step
    | FetchLogits
    | Abort
    | AbortStep
    | Failed
    | Shutdown
)
RUNNER_SENDS = (
    HashesRequest
    | WeightRequest
    | LoadProgress
    | Loaded
    | Connected
    | StepProgress
    | StepAnswer
    | Failed
)
EXCHANGE_ACCEPTS = HandOver | Ping | Pong | DirectOffer


def expect_tensor(array: Array, dtype: str, shape: tuple[int, ...], what: str) -> Array:
    """Return `array` if it is what this end expects.

    Raises: ProtocolError: names `what`, the dtype and shape found, and those expected.
    """
    if array.shape != shape or array.dtype != DTYPES[dtype]:
        raise ProtocolError(
            f"{what} is {array.dtype.name} {list(array.shape)}, expected {dtype} {list(shape)}"
        )
    return array
