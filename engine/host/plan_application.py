"""Brings a plan into force: nodes it needs, a runner for each device, then the weights.

In: a plan and an open model. Out: a load request for the scheduler, once every runner listens; or
one error. Belongs to the host's main thread and waits for nothing: it goes on when something
happened to the nodes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import zmq

from engine.cluster.coordinator import LoadRequest, RunnerAddress
from engine.cluster.local_copies import describe_files
from engine.cluster.messages import Message
from engine.cluster.transport import Channel, address_that_reaches
from engine.decode.scheduler import Scheduler
from engine.errors import EngineError, PlanError
from engine.host import messages as api
from engine.host.nodes import MAX_SIMULATED, SIMULATED_PREFIX, THIS_NODE, Nodes
from engine.host.opened_model import OpenedModel
from engine.model.memory import check_memory, has_room_for_more, plan_memory
from engine.plan.plan import Plan, PlanShape
from engine.weights.models import cache_folder


@dataclass(slots=True)
class _Job:
    """A plan on its way into force."""

    request_id: int
    plan: Plan
    model: OpenedModel
    num_threads: int | None
    is_loading: bool = False

    @property
    def devices(self) -> list[str]:
        """Devices with a share."""
        return [self.plan.devices[i] for i in self.plan.used_devices()]


class PlanApplication:
    """At most one plan at a time is on its way.

    Attributes:
        memory: what the devices of the last plan that could be loaded need.
    """

    def __init__(
        self,
        nodes: Nodes,
        scheduler: Scheduler,
        send: Callable[[int, Message], None],
        fail: Callable[[int, EngineError], None],
    ) -> None:
        """Args: send, fail: tell a call's owner of progress, or of its end with an error."""
        self._nodes = nodes
        self._scheduler = scheduler
        self._send = send
        self._fail = fail
        self._job: _Job | None = None
        self._epoch = 0
        self.memory: tuple[api.DeviceMemory, ...] = ()

    @property
    def loading_devices(self) -> set[str]:
        """Devices that take weights right now."""
        job = self._job
        return set(job.devices) if job is not None and job.is_loading else set[str]()

    def begin(self, call: api.ApplyPlan, model: OpenedModel, num_threads: int | None) -> None:
        """Start with a plan.

        Raises: PlanError: another one is on its way, or this one does not fit model and nodes.
        """
        if self._job is not None:
            raise PlanError("another plan is being applied; wait for it, or cancel it")
        plan = call.plan.validate()
        if plan.shape != PlanShape.from_config(model.config):
            raise PlanError(
                f"the plan is for another model ({_sizes(plan.shape)}), the open one has "
                f"{_sizes(PlanShape.from_config(model.config))}. Make a plan for it"
            )
        for index in plan.used_devices():
            self._require_node(plan.devices[index])
        self._job = _Job(call.request_id, plan, model, num_threads)
        self.advance()

    def advance(self) -> None:
        """Go on, as far as nodes and runners are there."""
        job = self._job
        if job is None or job.is_loading:
            return
        used = job.devices
        try:
            runners = self._runners_for(used)
        except EngineError as error:
            self._job = None
            self._fail(job.request_id, error)
            return
        there = {runner.device for runner in runners}
        waiting_for = ", ".join(device for device in used if device not in there)
        self._send(
            job.request_id,
            api.Progress(
                request_id=job.request_id,
                phase="start",
                subject=waiting_for,
                done=len(runners),
                total=len(used),
            ),
        )
        if len(runners) == len(used):
            self._load(job, runners)

    def cancel(self, request_id: int) -> bool:
        """Give a plan up that is not loading yet; True if that was it."""
        job = self._job
        if job is None or job.request_id != request_id or job.is_loading:
            return False
        self._job = None
        return True

    def abandon(self, error: EngineError) -> None:
        """Give up a plan that is not loading yet: its model is about to be closed."""
        job = self._job
        if job is not None and not job.is_loading:
            self._job = None
            self._fail(job.request_id, error)

    def runner_lost(self, device: str, cause: str) -> None:
        """A runner ended before it could load."""
        job = self._job
        if job is not None and not job.is_loading and device in job.devices:
            self._job = None
            self._fail(
                job.request_id, PlanError(f"{device} could not be started: {cause}. Try again")
            )

    def end(self, request_id: int) -> bool:
        """The scheduler is done with a plan, well or not; True if it was ours."""
        if self._job is None or self._job.request_id != request_id:
            return False
        self._job = None
        return True

    # ---- inside ------------------------------------------------------------------------------

    def _require_node(self, device: str) -> None:
        """Make sure that a device's node is there or on its way."""
        name = device.rpartition("/")[0]
        node = self._nodes.get(name)
        if node is not None and node.state != "lost":
            return
        if node is not None and node.kind == "remote":
            raise PlanError(f"{device} cannot take part: {node.reason}")
        simulated = {f"{SIMULATED_PREFIX}{n}" for n in range(1, MAX_SIMULATED + 1)}
        if name != THIS_NODE and name not in simulated:
            known = ", ".join(self._nodes.names())
            raise PlanError(
                f"the plan uses {device}, but there is no node {name!r}; known are {known}. Add "
                "the node, or change the plan"
            )
        self._nodes.start_local(name)

    def _runners_for(self, used: list[str]) -> list[RunnerAddress]:
        """Runners that are there; starts the others where their node is ready."""
        listen_address = self._listen_address(used)
        runners: list[RunnerAddress] = []
        for device in used:
            node = self._nodes.node_of(device)
            if node is None or node.state == "lost":
                reason = node.reason if node is not None else "it is not known"
                raise PlanError(f"{device} cannot take part: {reason}")
            if node.state == "starting":
                continue
            if self._nodes.info(device) is None:
                known = ", ".join(name.rpartition("/")[2] for name in node.devices())
                raise PlanError(f"{device}: node {node.name} has no such device; it has {known}")
            self._nodes.start_runner(device, "" if node.kind == "remote" else listen_address)
            runner = self._nodes.runner(device)
            if runner is not None:
                runners.append(runner)
        return runners

    def _listen_address(self, used: list[str]) -> str:
        """Where runners of this computer listen: loopback, unless another computer takes part."""
        for device in used:
            node = self._nodes.node_of(device)
            if node is not None and node.kind == "remote" and node.channel is not None:
                return _address_towards(node.channel)
        return "127.0.0.1"

    def _load(self, job: _Job, runners: list[RunnerAddress]) -> None:
        model = job.model
        try:
            needs = plan_memory(
                model.config,
                job.plan,
                model.checkpoint.tensors,
                model.dtype,
                model.kv_window,
                model.kv_dtype,
            )
            pools = self._memory_pools(job)
            check_memory(needs, pools, model.kv_window)
            self.memory = tuple(
                api.DeviceMemory(device=name, weight_bytes=need.weights, cache_bytes=need.cache)
                for name, need in needs.items()
            )
        except EngineError as error:
            self._job = None
            self._fail(job.request_id, error)
            return
        job.is_loading = True
        self._epoch += 1
        load = LoadRequest(
            epoch=self._epoch,
            config=model.config,
            plan=job.plan,
            dtype=model.dtype,
            kv_window=model.kv_window,
            kv_dtype=model.kv_dtype,
            kept_positions=model.kv_window if has_room_for_more(needs, pools) else 0,
            threads=self._threads_for(job),
            checkpoint_id=model.identity,
            tensors=model.tensors,
            source=model.checkpoint,
            files={
                device: describe_files(model.checkpoint.files, self._is_this_computer(device))
                for device in job.devices
            },
            hashes_path=cache_folder() / "hashes.sqlite",
        )
        self._scheduler.put_plan(job.request_id, load, tuple(runners), model.checkpoint)

    def _memory_pools(self, job: _Job) -> dict[str, tuple[str, int]]:
        """The memory each device draws on: its own on a GPU, its computer's on a CPU."""
        pools: dict[str, tuple[str, int]] = {}
        for device in job.devices:
            info = self._nodes.info(device)
            assert info is not None
            computer, is_cpu = self._computer(device)
            pools[device] = (computer if is_cpu else device, info.memory_bytes)
        return pools

    def _threads_for(self, job: _Job) -> dict[str, int]:
        """Threads of each runner: as asked, else the cores of its computer shared out."""
        computers = [self._computer(device) for device in job.devices]
        threads: dict[str, int] = {}
        for device, computer in zip(job.devices, computers, strict=True):
            info = self._nodes.info(device)
            assert info is not None
            sharing = computers.count(computer)
            threads[device] = job.num_threads or max(1, info.num_cores // sharing)
        return threads

    def _is_this_computer(self, device: str) -> bool:
        """Whether a device's runner can open the files that this process can."""
        node = self._nodes.node_of(device)
        return node is not None and node.kind != "remote"

    def _computer(self, device: str) -> tuple[str, bool]:
        """What shares its cores with others: a computer's CPU runners, simulated nodes included."""
        node = self._nodes.node_of(device)
        assert node is not None
        assert node.description is not None
        return node.description.machine, device.endswith("/cpu")


def _address_towards(channel: Channel[Any]) -> str:
    """This computer's address on the way to a remote worker."""
    endpoint = channel.socket.getsockopt_string(zmq.LAST_ENDPOINT).rstrip("\0")
    return address_that_reaches(endpoint.removeprefix("tcp://").rpartition(":")[0])


def _sizes(shape: PlanShape) -> str:
    """What a plan must share with its model."""
    return (
        f"{shape.num_layers} layers, {shape.num_heads} heads on {shape.num_kv_heads}, MLP "
        f"{shape.mlp_width} in quanta of {shape.mlp_quantum}, vocabulary {shape.vocab_size} in "
        f"quanta of {shape.head_quantum}"
    )
