"""The engine host's side of a plan: serves weights to its runners, sends steps, gathers answers.

In: a plan, the runners' addresses, steps. Out: the answers of all devices, or one error that names
the device, its layers and the cause. It owns the sockets to the runners and belongs to one thread;
only `report_lost` may be called from another.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import zmq

from engine.cluster import messages as m
from engine.cluster.content_hashes import WeightSource
from engine.cluster.pieces import MAX_PIECES
from engine.cluster.runner_links import RunnerAddress, RunnerLinks
from engine.cluster.weight_transfer import WeightServer
from engine.errors import (
    Cancelled,
    EngineError,
    PromptError,
    ProtocolError,
    WorkerLost,
    error_by_name,
    one_line,
)
from engine.model.config import CacheDtype, ModelConfig
from engine.plan.plan import MAX_DEVICES, Plan

logger = logging.getLogger(__name__)

# Runs out only where neither the worker nor the heartbeat noticed anything.
STEP_SECONDS = 120.0
LOAD_SILENCE_SECONDS = 60.0
# Characters of a runner's reason that a person is shown.
MAX_REASON = 1000


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
        may_go_ahead: as in `messages.Load`.
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
    may_go_ahead: bool = True


class PlanLoaded(NamedTuple):
    """What putting a plan in force brought, by device.

    Attributes:
        links: between two devices, as the first one measured them.
    """

    devices: dict[str, m.Loaded]
    links: dict[tuple[str, str], m.LinkFigures]


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


def check_figures(device: str, figures: Sequence[m.LinkFigures]) -> None:
    """Check what a device says of its links.

    Raises: ProtocolError: too many of them, or a figure that is no number >= 0.
    """
    if len(figures) > MAX_DEVICES:
        raise ProtocolError(
            f"{device} tells of {len(figures):,} links, a plan has {MAX_DEVICES} devices at most"
        )
    for link in figures:
        for number in (link.round_trip_seconds, link.bytes_per_second):
            if not (math.isfinite(number) and number >= 0):
                raise ProtocolError(
                    f"{device} measured {number} on its link to device {link.device_index}"
                )


class Coordinator:
    """The runners of one engine host."""

    def __init__(self, context: zmq.Context[Any]) -> None:
        """Know no runner yet."""
        self._links = RunnerLinks(context, self._describe)
        self._request: LoadRequest | None = None

    @property
    def plan(self) -> Plan | None:
        """The plan in force."""
        return self._request.plan if self._request is not None else None

    def report_lost(self, public_key: bytes, cause: str) -> None:
        """A worker says that the runner with a key ended. Any one thread besides the owner."""
        self._links.report_lost(public_key, cause)

    def wake(self) -> None:
        """Make a waiting `step` ask whether to go on. The same thread as `report_lost`."""
        self._links.wake()

    def load(
        self,
        request: LoadRequest,
        runners: Sequence[RunnerAddress],
        on_progress: Callable[[str, int, int], None],
        should_stop: Callable[[], bool],
    ) -> PlanLoaded:
        """Put a plan in force.

        Args:
            runners: one for every device with a share.
            on_progress: called with (device, bytes done, bytes in all).
        Returns: what each device loaded and where from.
        Raises: WorkerLost, EngineError: a device could not take its share.
        """
        self._request = request
        self._links.connect(runners)
        plan = request.plan
        used = [plan.devices[i] for i in plan.used_devices()]
        addresses = {runner.device: runner for runner in runners}
        indexes = {device: i for i, device in enumerate(plan.devices)}
        loads: dict[str, m.Load] = {}
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
                rendezvous=addresses[used[0]].rendezvous,
                files=request.files.get(device, ()),
                may_go_ahead=request.may_go_ahead,
            )
            loads[device] = load
        loaded: dict[str, m.Loaded] = {}
        links: dict[str, tuple[m.LinkFigures, ...]] = {}

        server = WeightServer(
            request.config,
            plan.shape,
            request.tensors,
            request.source,
            request.checkpoint_id,
            request.hashes_path,
        )

        def take(device: str, message: Any) -> None:
            if message.epoch != request.epoch:
                return
            if isinstance(message, m.HashesRequest | m.WeightRequest):
                answer, data = server.answer(message)
                self._links.send(device, answer, [data])
            elif isinstance(message, m.LoadProgress):
                if message.done_bytes > message.total_bytes:
                    raise ProtocolError(
                        f"{device} has {message.done_bytes:,} of {message.total_bytes:,} bytes"
                    )
                on_progress(device, message.done_bytes, message.total_bytes)
            elif isinstance(message, m.Loaded):
                if device in loaded:
                    raise ProtocolError(f"{device} says twice that it has loaded")
                loaded[device] = message
            elif isinstance(message, m.Connected):
                if len(loaded) < len(used) or device in links:
                    raise ProtocolError(f"{device} says unasked that it is connected")
                check_figures(device, message.links)
                links[device] = message.links
            elif isinstance(message, m.Failed):
                raise self._error_of(device, message)

        try:
            for device, load in loads.items():
                self._links.send(device, load)
            self._wait_for_all(used, loaded, take, should_stop)
            # By now every runner has the allow list of this epoch.
            for device in used:
                self._links.send(device, m.Connect(epoch=request.epoch))
            self._wait_for_all(used, links, take, should_stop)
        except EngineError:
            self.abort()
            raise
        finally:
            server.close()
        return PlanLoaded(
            loaded,
            {
                (device, plan.devices[figures.device_index]): figures
                for device, found in links.items()
                for figures in found
                if 0 <= figures.device_index < len(plan.devices)
            },
        )

    def step(
        self,
        step: m.Step,
        embeddings: m.Array | None,
        should_abort: Callable[[], bool],
        on_sent: Callable[[], None],
        on_row: Callable[[int], None] = lambda _row: None,
    ) -> list[DeviceAnswer]:
        """Send a step to all devices of the plan and wait for all answers.

        Args:
            embeddings: float32 [T, width]; goes to the devices of the first row.
            should_abort: asked now and then while waiting.
            on_sent: called once all devices have the step to compute.
            on_row: called with a row of the plan that a device has come to, in a long step.
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
                self._links.send(plan.devices[index], step, tensors)
            except PromptError as error:  # Too large for a message; nothing was sent.
                raise StepFailed(error) from error
            except WorkerLost:
                self.abort()
                raise
        on_sent()
        return self._gather([plan.devices[i] for i in used], step.step_id, should_abort, on_row)

    def fetch_logits(self, step_id: int) -> list[DeviceAnswer]:
        """The full logits of the last step, one answer per device of the output head."""
        assert self._request is not None
        plan = self._request.plan
        devices = [plan.devices[i] for i in plan.group(plan.shape.head_row)]
        for device in devices:
            self._links.send(device, m.FetchLogits(epoch=self._request.epoch, step_id=step_id))
        return self._gather(devices, step_id, lambda: False)

    def check(self) -> None:
        """While idle: raise if a runner of the plan was lost."""
        if self._request is None:
            return
        try:
            for _device, received in self._links.receive(0):
                logger.debug("late %s", type(received.message).__name__)
        except EngineError:
            self.abort()
            raise

    @property
    def has_plan(self) -> bool:
        """Whether a plan is in force: some errors end it, others only a step."""
        return self._request is not None

    def abort(self) -> None:
        """Give the plan up; runners that wait for a lost one wake."""
        if self._request is not None:
            self._links.tell_all(m.Abort(epoch=self._request.epoch))
            self._request = None

    def disconnect(self) -> None:
        """Give the plan up, and all connections to runners."""
        self.abort()
        self._links.connect(())

    def close(self) -> None:
        """Close all sockets."""
        self._links.close()

    # ---- inside ------------------------------------------------------------------------------

    def _describe(self, device: str) -> str:
        if self._request is None or device not in self._request.plan.devices:
            return "nothing"
        plan = self._request.plan
        return describe_rows(plan, plan.devices.index(device))

    def _gather(
        self,
        devices: list[str],
        step_id: int,
        should_abort: Callable[[], bool],
        on_row: Callable[[int], None] = lambda _row: None,
    ) -> list[DeviceAnswer]:
        assert self._request is not None
        plan, epoch = self._request.plan, self._request.epoch
        answers: dict[str, DeviceAnswer] = {}
        deadline = time.monotonic() + STEP_SECONDS
        # A step has an end: each device can pass each row once with each piece.
        most_progress = MAX_PIECES * plan.shape.num_rows
        progress = dict.fromkeys(devices, 0)
        try:
            while len(answers) < len(devices):
                if should_abort():
                    self._abort_step(step_id)
                    raise StepAborted
                remaining = deadline - time.monotonic()
                if remaining <= 0:
                    silent = next(d for d in devices if d not in answers)
                    raise self._links.lost(
                        silent, f"no answer and no progress in {STEP_SECONDS:.0f} s"
                    )
                for device, received in self._links.receive(min(remaining, 1.0)):
                    message = received.message
                    if message.epoch != epoch:
                        continue
                    if isinstance(message, m.StepProgress) and message.step_id == step_id:
                        progress[device] = progress.get(device, 0) + 1
                        if progress[device] > most_progress:
                            raise ProtocolError(
                                f"{device} says more often that it goes on than a step has rows"
                            )
                        deadline = time.monotonic() + STEP_SECONDS
                        on_row(min(message.row, plan.shape.head_row))
                    elif isinstance(message, m.Failed) and message.step_id in (0, step_id):
                        self._take_failure(device, message, step_id)
                    elif isinstance(message, m.StepAnswer) and message.step_id == step_id:
                        check_figures(device, message.figures)
                        answers[device] = DeviceAnswer(
                            plan.devices.index(device), message, received.tensors
                        )
        except EngineError:
            self.abort()
            raise
        return [answers[device] for device in devices]

    def _take_failure(self, device: str, message: m.Failed, step_id: int) -> None:
        """A device could not compute a step."""
        error = self._error_of(device, message)
        if message.step_id == step_id and not isinstance(error, ProtocolError | WorkerLost):
            # The others wait for its part: they give the step up, too.
            self._abort_step(step_id)
            raise StepFailed(error)
        raise error

    def _error_of(self, device: str, message: m.Failed) -> EngineError:
        assert self._request is not None
        devices, peer = self._request.plan.devices, message.peer_index
        reason = one_line(message.message, MAX_REASON)
        if peer is not None and 0 <= peer < len(devices) and devices[peer] != device:
            return self._links.blame(device, devices[peer], reason)
        error = error_by_name(message.error, f"{device}: {reason}")
        if isinstance(error, WorkerLost):
            error.device = device  # Who cannot say whom it lost is what the next plan does without.
        return error

    def _abort_step(self, step_id: int) -> None:
        assert self._request is not None
        self._links.tell_all(m.AbortStep(epoch=self._request.epoch, step_id=step_id))

    def _wait_for_all(
        self,
        devices: list[str],
        done: Collection[str],
        take: Callable[[str, Any], None],
        should_stop: Callable[[], bool],
    ) -> None:
        """Hear the runners while a plan is loaded, until all `devices` are in `done`."""
        heard = dict.fromkeys(devices, time.monotonic())
        while len(done) < len(devices):
            if should_stop():
                raise Cancelled("loading was cancelled; no plan is in force now")
            for device, received in self._links.receive(0.25):
                heard[device] = time.monotonic()
                take(device, received.message)
            for device, at in heard.items():
                if device not in done and time.monotonic() - at > LOAD_SILENCE_SECONDS:
                    raise self._links.lost(
                        device, f"it said nothing for {LOAD_SILENCE_SECONDS:.0f} s while loading"
                    )
