"""The engine host's side of a plan: serves weights to its runners, sends steps, gathers answers.

In: a plan, the runners' addresses, steps. Out: the answers of all devices, or one error that names
the device, its layers and the cause. It owns the sockets to the runners and belongs to one thread;
only `report_lost` may be called from another.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import zmq
import zmq.utils.monitor

from engine.cluster import messages as m
from engine.cluster.content_hashes import WeightSource
from engine.cluster.security import KeyPair
from engine.cluster.transport import Channel, connect
from engine.cluster.weight_transfer import WeightServer
from engine.errors import (
    Cancelled,
    EngineError,
    PromptError,
    ProtocolError,
    WorkerLost,
    error_by_name,
)
from engine.model.config import CacheDtype, ModelConfig
from engine.plan.plan import Plan

logger = logging.getLogger(__name__)

# Runs out only where neither the worker nor the heartbeat noticed anything.
STEP_SECONDS = 120.0
LOAD_SILENCE_SECONDS = 60.0
# From a closed connection to the worker's word on why: a dying process takes its time.
CAUSE_SECONDS = 1.5


class RunnerAddress(msgspec.Struct, frozen=True):
    """Where a runner listens, its key, and the key pair it expects the engine host to have."""

    device: str
    control_endpoint: str
    exchange_endpoint: str
    public_key: bytes
    host_keys: KeyPair


class StepAborted(Exception):  # noqa: N818 - not an error: somebody asked for it
    """A step was given up because nobody wants its answer."""


class StepFailed(Exception):  # noqa: N818 - carries the error that its requests end with
    """A step could not be computed; the plan goes on without it."""

    def __init__(self, error: EngineError) -> None:
        super().__init__(str(error))
        self.error = error


class LoadRequest(NamedTuple):
    """What a plan needs to be put in force.

    Attributes:
        checkpoint_id: another one for every change of the checkpoint's files or tensors.
        files: of the checkpoint, as each device is told of them.
        hashes_path: where the checkpoint's content hashes are kept; None to keep none.
    """

    epoch: int
    config: ModelConfig
    plan: Plan
    dtype: m.ComputeDtype
    kv_window: int
    kv_dtype: CacheDtype
    kept_positions: int
    threads: Mapping[str, int]
    checkpoint_id: str
    tensors: tuple[m.TensorInfo, ...]
    source: WeightSource
    files: Mapping[str, tuple[m.LocalFile, ...]] = {}
    hashes_path: Path | None = None


class DeviceAnswer(NamedTuple):
    """One device's answer to a step."""

    device_index: int
    answer: m.StepAnswer
    tensors: list[m.Array]


def describe_rows(plan: Plan, device_index: int) -> str:
    """The rows of a device for a person, such as "layers 0-9 and the output head"."""
    layers = sorted({r // 2 for r in plan.rows_of(device_index) if r != plan.shape.head_row})
    runs: list[list[int]] = []
    for layer in layers:
        if runs and runs[-1][1] == layer - 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    parts = [f"{a}" if a == b else f"{a}-{b}" for a, b in runs]
    text = ""
    if parts:
        text = ("layer " if len(layers) == 1 else "layers ") + ", ".join(parts)
    if plan.cells[plan.shape.head_row][device_index]:
        text += " and the output head" if text else "the output head"
    return text or "nothing"


class _Link:
    """The sockets to one runner."""

    def __init__(self, context: zmq.Context[Any], address: RunnerAddress) -> None:
        self.address = address
        socket = connect(
            context,
            zmq.DEALER,
            address.host_keys,
            address.public_key,
            address.control_endpoint,
        )
        self.channel: Channel[Any] = Channel(socket, m.RUNNER_SENDS)
        self.monitor = socket.get_monitor_socket(
            zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED
        )

    def is_disconnected(self) -> bool:
        """Read the monitor's events; True when the connection was lost."""
        is_lost = False
        while self.monitor.poll(0):
            event = zmq.utils.monitor.recv_monitor_message(self.monitor)
            is_lost = event["event"] == zmq.EVENT_DISCONNECTED
        return is_lost

    def close(self) -> None:
        self.channel.socket.disable_monitor()
        self.monitor.close(linger=0)
        self.channel.close()


class Coordinator:
    """The runners of one engine host."""

    def __init__(self, context: zmq.Context[Any]) -> None:
        """Know no runner yet."""
        self._context = context
        self._links: dict[str, _Link] = {}
        self._lost: deque[tuple[bytes, str]] = deque()
        self._wake_receiver = context.socket(zmq.PULL)
        endpoint = f"inproc://coordinator-{id(self)}"
        self._wake_receiver.bind(endpoint)
        self._wake_sender = context.socket(zmq.PUSH)
        self._wake_sender.connect(endpoint)
        self._request: LoadRequest | None = None
        self._poller = zmq.Poller()
        self._poller.register(self._wake_receiver, zmq.POLLIN)

    @property
    def plan(self) -> Plan | None:
        """The plan in force."""
        return self._request.plan if self._request is not None else None

    def report_lost(self, public_key: bytes, cause: str) -> None:
        """A worker says that the runner with a key ended. Any one thread besides the owner."""
        self._lost.append((public_key, cause))
        self.wake()

    def wake(self) -> None:
        """Make a waiting `step` ask whether to go on. The same thread as `report_lost`."""
        with contextlib.suppress(zmq.Again):  # Enough unread wakes do as well as one more.
            self._wake_sender.send(b"", zmq.DONTWAIT)

    def load(
        self,
        request: LoadRequest,
        runners: Sequence[RunnerAddress],
        on_progress: Callable[[str, int, int], None],
        should_stop: Callable[[], bool],
    ) -> dict[str, m.Loaded]:
        """Put a plan in force.

        Args:
            runners: one for every device with a share.
            on_progress: called with (device, bytes done, bytes in all).
        Returns: what each device loaded and where from.
        Raises: WorkerLost, EngineError: a device could not take its share.
        """
        self._connect(runners)
        self._request = request
        plan = request.plan
        used = [plan.devices[i] for i in plan.used_devices()]
        addresses = {runner.device: runner for runner in runners}
        indexes = {device: i for i, device in enumerate(plan.devices)}
        for device in used:
            peers = tuple(
                m.Peer(
                    device_index=indexes[other],
                    exchange_endpoint=addresses[other].exchange_endpoint,
                    public_key=addresses[other].public_key,
                )
                for other in used
                if other != device
            )
            load = m.Load(
                epoch=request.epoch,
                config=request.config,
                plan=plan,
                device_index=indexes[device],
                dtype=request.dtype,
                kv_window=request.kv_window,
                kv_dtype=request.kv_dtype,
                num_threads=request.threads[device],
                checkpoint_id=request.checkpoint_id,
                tensors=request.tensors,
                peers=peers,
                files=request.files.get(device, ()),
            )
            self._send(device, load)
        loaded: dict[str, m.Loaded] = {}
        server = WeightServer(
            request.config,
            plan.shape,
            request.tensors,
            request.source,
            request.checkpoint_id,
            request.hashes_path,
        )
        try:
            last_word = time.monotonic()
            while len(loaded) < len(used):
                if should_stop():
                    raise Cancelled("loading was cancelled; no plan is in force now")
                for device, received in self._receive(0.25):
                    last_word = time.monotonic()
                    self._take_load_message(device, received, server, loaded, on_progress)
                if time.monotonic() - last_word > LOAD_SILENCE_SECONDS:
                    silent = next(d for d in used if d not in loaded)
                    cause = f"it said nothing for {LOAD_SILENCE_SECONDS:.0f} s while loading"
                    raise self._lost_error(silent, cause)
        except EngineError:
            self.abort()
            raise
        finally:
            server.close()
        return loaded

    def step(
        self, step: m.Step, embeddings: m.Array | None, should_abort: Callable[[], bool]
    ) -> list[DeviceAnswer]:
        """Send a step to all devices of the plan and wait for all answers.

        Args:
            embeddings: float32 [T, width]; goes to the devices of the first row.
            should_abort: asked now and then while waiting.
        Returns: one answer per device, in device order.
        Raises:
            WorkerLost, EngineError: names the device and its layers; the epoch is aborted.
            StepAborted: `should_abort` said so; the next step may follow at once.
            StepFailed: it cannot be sent, or a device could not compute it; so may it here.
        """
        assert self._request is not None
        plan = self._request.plan
        first_group = plan.group(0)
        used = plan.used_devices()
        for index in used:
            tensors = [embeddings] if embeddings is not None and index in first_group else []
            try:
                self._send(plan.devices[index], step, tensors)
            except PromptError as error:  # Too large for a message; nothing was sent.
                raise StepFailed(error) from error
        return self._gather([plan.devices[i] for i in used], step.step_id, should_abort)

    def fetch_logits(self, step_id: int) -> list[DeviceAnswer]:
        """The full logits of the last step, one answer per device of the output head."""
        assert self._request is not None
        plan = self._request.plan
        devices = [plan.devices[i] for i in plan.group(plan.shape.head_row)]
        for device in devices:
            self._send(device, m.FetchLogits(epoch=self._request.epoch, step_id=step_id))
        return self._gather(devices, step_id, lambda: False)

    def check(self) -> None:
        """While idle: raise if a runner of the plan was lost."""
        if self._request is not None:
            for _device, received in self._receive(0):
                logger.debug("late %s", type(received).__name__)

    def abort(self) -> None:
        """Give the plan up; runners that wait for a lost one wake."""
        if self._request is None:
            return
        for link in self._links.values():
            try:
                link.channel.send(m.Abort(epoch=self._request.epoch))
            except WorkerLost as error:
                logger.info("%s: %s", link.address.device, error)
        self._request = None

    def close(self) -> None:
        """Close all sockets."""
        for link in self._links.values():
            link.close()
        self._links.clear()
        self._wake_sender.close(linger=0)
        self._wake_receiver.close(linger=0)

    # ---- inside ------------------------------------------------------------------------------

    def _connect(self, runners: Sequence[RunnerAddress]) -> None:
        wanted = {runner.device: runner for runner in runners}
        for device, link in list(self._links.items()):
            if wanted.get(device) != link.address:
                self._poller.unregister(link.channel.socket)
                self._poller.unregister(link.monitor)
                link.close()
                del self._links[device]
        for device, address in wanted.items():
            if device not in self._links:
                link = _Link(self._context, address)
                self._links[device] = link
                self._poller.register(link.channel.socket, zmq.POLLIN)
                self._poller.register(link.monitor, zmq.POLLIN)

    def _receive(self, timeout_seconds: float) -> list[tuple[str, Any]]:
        """Messages that are there, after waiting for the first.

        Raises: WorkerLost: a runner of the plan ended or fell silent.
        """
        ready = dict(self._poller.poll(int(timeout_seconds * 1000)))
        if self._wake_receiver in ready:
            while self._wake_receiver.poll(0):
                self._wake_receiver.recv()
        while self._lost:
            public_key, cause = self._lost.popleft()
            for device, link in self._links.items():
                if link.address.public_key == public_key:
                    raise self._lost_error(device, cause)
        messages: list[tuple[str, Any]] = []
        for device, link in self._links.items():
            if link.channel.socket in ready:
                try:
                    received = link.channel.receive(0)
                except ProtocolError as error:
                    raise ProtocolError(f"{device}: {error}") from error
                if received is not None:
                    messages.append((device, received))
            if link.monitor in ready and link.is_disconnected():
                # The worker knows the cause, a moment later.
                cause = self._wait_for_cause(device)
                raise self._lost_error(device, cause)
        return messages

    def _wait_for_cause(self, device: str) -> str:
        deadline = time.monotonic() + CAUSE_SECONDS
        while time.monotonic() < deadline:
            for public_key, cause in list(self._lost):
                if public_key == self._links[device].address.public_key:
                    return cause
            self._wake_receiver.poll(50)
        return "it no longer answers (frozen, or its connection is cut)"

    def _lost_error(self, device: str, cause: str) -> WorkerLost:
        rows = "nothing"
        if self._request is not None and device in self._request.plan.devices:
            plan = self._request.plan
            rows = describe_rows(plan, plan.devices.index(device))
        error = WorkerLost(
            f"{device}, which computes {rows}, was lost: {cause}. Apply the plan again, or choose "
            "one without it"
        )
        error.device = device
        return error

    def _gather(
        self, devices: list[str], step_id: int, should_abort: Callable[[], bool]
    ) -> list[DeviceAnswer]:
        assert self._request is not None
        plan, epoch = self._request.plan, self._request.epoch
        answers: dict[str, DeviceAnswer] = {}
        deadline = time.monotonic() + STEP_SECONDS
        try:
            while len(answers) < len(devices):
                if should_abort():
                    self._abort_step(devices, step_id)
                    raise StepAborted
                remaining = deadline - time.monotonic()
                if remaining <= 0:
                    silent = next(d for d in devices if d not in answers)
                    raise self._lost_error(silent, f"no answer in {STEP_SECONDS:.0f} s")
                for device, received in self._receive(min(remaining, 1.0)):
                    message = received.message
                    if (
                        isinstance(message, m.Failed)
                        and message.epoch == epoch
                        and message.step_id in (0, step_id)
                    ):
                        error = error_by_name(message.error, f"{device}: {message.message}")
                        if message.step_id == step_id and not isinstance(
                            error, ProtocolError | WorkerLost
                        ):
                            # The others wait for its part: they give the step up, too.
                            self._abort_step(devices, step_id)
                            raise StepFailed(error)
                        raise error
                    if isinstance(message, m.StepAnswer) and (message.epoch, message.step_id) == (
                        epoch,
                        step_id,
                    ):
                        answers[device] = DeviceAnswer(
                            plan.devices.index(device), message, received.tensors
                        )
        except EngineError:
            self.abort()
            raise
        return [answers[device] for device in devices]

    def _send(self, device: str, message: m.Message, tensors: Sequence[m.Array] = ()) -> None:
        """Send to a runner; one that takes nothing ends the plan."""
        try:
            self._links[device].channel.send(message, tensors)
        except WorkerLost as error:
            self.abort()
            raise self._lost_error(device, str(error)) from error

    def _abort_step(self, devices: list[str], step_id: int) -> None:
        assert self._request is not None
        for device in devices:
            message = m.AbortStep(epoch=self._request.epoch, step_id=step_id)
            self._links[device].channel.send(message)

    def _take_load_message(
        self,
        device: str,
        received: Any,
        server: WeightServer,
        loaded: dict[str, m.Loaded],
        on_progress: Callable[[str, int, int], None],
    ) -> None:
        assert self._request is not None
        message = received.message
        if message.epoch != self._request.epoch:
            return
        if isinstance(message, m.HashesRequest | m.WeightRequest):
            answer, data = server.answer(message)
            self._send(device, answer, [data])
        elif isinstance(message, m.LoadProgress):
            on_progress(device, message.done_bytes, message.total_bytes)
        elif isinstance(message, m.Loaded):
            loaded[device] = message
        elif isinstance(message, m.Failed):
            raise error_by_name(message.error, f"{device}: {message.message}")
