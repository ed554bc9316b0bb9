"""Brings a plan into force, and another one when devices of it are lost.

In: a plan and an open model, or the loss of a device. Out: a load request for the scheduler, once
every runner listens; or one error. Belongs to the host's main thread and waits for nothing: it goes
on when something happened to the nodes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import zmq

from engine.cluster.coordinator import LoadRequest
from engine.cluster.local_copies import describe_files
from engine.cluster.messages import Message
from engine.cluster.runner_links import RunnerAddress
from engine.cluster.transport import Channel, address_that_reaches
from engine.decode.scheduler import Scheduler
from engine.errors import EngineError, PlanError, WorkerLost
from engine.host import messages as api
from engine.host.nodes import MAX_SIMULATED, SIMULATED_PREFIX, THIS_NODE, Nodes
from engine.host.opened_model import OpenedModel
from engine.host.recovery import nearest_plan, num_quanta, what_changed
from engine.host.trusted_network import NodeTrust, check_trusted_network
from engine.model.memory import check_memory, has_room_for_more, plan_memory
from engine.plan.plan import Plan, PlanShape, Transport
from engine.weights.models import cache_folder

# A device that was lost again so soon after its runner was restarted is not restarted once more.
RESTART_SECONDS = 60.0


@dataclass(slots=True)
class _Job:
    """A plan on its way into force.

    Attributes:
        request_id: of the call that asked for it; 0 for one that follows a loss.
        note: why it is another plan than was asked for.
    """

    request_id: int
    plan: Plan
    model: OpenedModel
    num_threads: int | None
    note: str = ""
    is_loading: bool = False

    @property
    def devices(self) -> list[str]:
        """Devices with a share."""
        return [self.plan.devices[i] for i in self.plan.used_devices()]


class PlanApplication:
    """At most one plan at a time is on its way.

    Attributes:
        memory: what the devices of the last plan that could be loaded need.
        note: of the last plan that could be loaded.
    """

    def __init__(
        self,
        nodes: Nodes,
        scheduler: Scheduler,
        send: Callable[[int, Message], None],
        fail: Callable[[int, EngineError], None],
        plan_lost: Callable[[EngineError], None],
    ) -> None:
        """Know no plan yet.

        Args:
            send, fail: tell a call's owner of progress, or of its end with an error.
            plan_lost: the plan in force can no longer run, and no other can.
        """
        self._nodes = nodes
        self._scheduler = scheduler
        self._send = send
        self._fail = fail
        self._plan_lost = plan_lost
        self._job: _Job | None = None
        self._in_force: _Job | None = None
        # Requests wait in the scheduler for a plan that goes on without what was lost.
        self._interruption: WorkerLost | None = None
        self._restarted_at: dict[str, float] = {}
        self._epoch = 0
        self.memory: tuple[api.DeviceMemory, ...] = ()
        self.note = ""

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
        self._restarted_at.clear()
        self._job = _Job(call.request_id, plan, model, num_threads)
        self.advance()

    def advance(self) -> None:
        """Go on, as far as nodes and runners are there."""
        job = self._job
        if job is None or job.is_loading:
            return
        used = job.devices
        try:
            for device in used:
                self._require_node(device)
            runners = self._runners_for(used, job.plan.transport)
        except EngineError as error:
            gone = {d for d in used if self._is_lost(d)}
            has_none = self._in_force is None or self._interruption is not None
            if has_none and gone:  # There is no plan to stay with.
                self.recover(WorkerLost(str(error)))
            else:
                self._end_job(error)
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
        if self._interruption is not None:
            self.recover(self._interruption)  # The plan before it is what goes on.
        return True

    def forget(self, error: EngineError) -> None:
        """The model is about to be closed: give up what is not loading yet, and all recovery."""
        job = self._job
        self._in_force = self._interruption = None
        if job is not None and not job.is_loading:
            self._job = None
            self._fail(job.request_id, error)

    def runner_lost(self, device: str, cause: str) -> None:
        """A runner ended, or could not be started; while loading the scheduler sees to it."""
        job = self._job
        if job is None or job.is_loading or device not in job.devices:
            return
        if self._may_restart(device):
            self._restarted_at[device] = time.monotonic()
            return  # `advance` starts it again.
        lost = WorkerLost(f"{device} could not be started: {cause}")
        lost.device = device
        if self._in_force is not None and self._interruption is None:
            self._end_job(PlanError(f"{lost}. Try again"))
        else:
            self.recover(lost)

    def recover(self, error: WorkerLost) -> None:
        """A device of the plan in force, or of the one being loaded, was lost: put another in force.

        Ends in a plan for the scheduler, or in an error for everyone who waits for one.
        """
        job = self._job or self._in_force
        self._interruption = error
        if job is None:
            self._give_up(error)
            return
        request_id = job.request_id if job is self._job else 0
        lost = self._lost_devices(job.plan, error)
        if job is self._job and not job.is_loading and not lost.intersection(job.devices):
            return  # The plan on its way does without it.
        try:
            plan, note = self._plan_after(job, error, lost)
        except EngineError as reason:
            self._job = job
            self._end_job(PlanError(f"{error}. No plan goes on without it: {reason}"))
            return
        self._job = _Job(request_id, plan, job.model, job.num_threads, note)
        self.advance()

    def in_force(self) -> None:
        """The scheduler has put the plan on its way in force."""
        if self._job is not None:
            self._in_force, self._job = self._job, None
            self.note = self._in_force.note
        self._interruption = None

    def failed(self, request_id: int) -> bool:
        """The scheduler could not load a plan; True if it was ours."""
        if self._job is None or self._job.request_id != request_id:
            return False
        self._job = self._in_force = self._interruption = None
        return True

    # ---- inside ------------------------------------------------------------------------------

    def _end_job(self, error: EngineError) -> None:
        """The plan on its way cannot be had; whoever waits for it hears why."""
        job, self._job = self._job, None
        if self._interruption is not None:
            self._give_up(error)
        if job is not None:
            self._fail(job.request_id, error)

    def _give_up(self, error: EngineError) -> None:
        self._in_force = self._interruption = None
        self._scheduler.drop_plan(error)
        self._plan_lost(error)

    def _lost_devices(self, plan: Plan, error: WorkerLost) -> frozenset[str]:
        """Devices of a plan that cannot take part any more."""
        lost = {error.device} if error.device is not None else set[str]()
        if error.link is not None:
            pair = " and ".join(sorted(error.link))
            if self._may_restart(pair):
                self._restarted_at[pair] = time.monotonic()
            else:  # Connecting again did not help: who has less gives way.
                lost.add(min(error.link, key=lambda device: num_quanta(plan, device)))
        return frozenset(lost.union(d for d in plan.devices if self._is_lost(d)))

    def _is_lost(self, device: str) -> bool:
        node = self._nodes.node_of(device)
        return node is not None and node.state == "lost"

    def _may_restart(self, what: str) -> bool:
        """Whether a device or a link has not been started anew in the last minute."""
        at = self._restarted_at.get(what)
        return at is None or time.monotonic() - at > RESTART_SECONDS

    def _plan_after(self, job: _Job, error: WorkerLost, lost: frozenset[str]) -> tuple[Plan, str]:
        """The plan to go on with, and the note that says why.

        Raises: PlanError: none fits.
        """
        plan = job.plan
        if not lost.intersection(job.devices):
            return plan, f"{error}. Connected again"
        there = [d for d in plan.devices if d not in lost and self._is_there(d)]
        try:
            new = nearest_plan(job.model, plan, self._memory_pools(there))
        except PlanError:
            if all(map(self._can_start_again, lost)):
                for device in lost:
                    self._restarted_at[device] = time.monotonic()
                return plan, f"{error}. It was started again"
            spares = [d for d in self._nodes.ready_devices() if d not in plan.devices]
            pools = self._memory_pools([*there, *spares])
            new = nearest_plan(job.model, plan, pools, spares)
        return new, f"{error}: {what_changed(plan, new, lost)}"

    def _is_there(self, device: str) -> bool:
        """Whether a device can take a share now, or as soon as its node has started."""
        node = self._nodes.node_of(device)
        if node is None or node.state in ("lost", "stale"):
            return False
        return self._nodes.info(device) is not None

    def _can_start_again(self, device: str) -> bool:
        """Whether a lost device may come back with a new runner, or a new worker of ours."""
        node = self._nodes.node_of(device)
        if node is None or not self._may_restart(device):
            return False
        return node.state != "lost" or node.kind != "remote"

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

    def _runners_for(self, used: list[str], transport: Transport) -> list[RunnerAddress]:
        """Runners that are there; starts the others where their node is ready."""
        check_trusted_network(transport, self._trust(used))
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
            own_address = "" if node.kind == "remote" else listen_address
            self._nodes.start_runner(device, own_address, transport)
            runner = self._nodes.runner(device)
            if runner is not None:
                runners.append(runner)
        return runners

    def _trust(self, used: list[str]) -> list[NodeTrust]:
        """What the nodes of these devices say of their networks, as far as they are there."""
        nodes = {node.name: node for node in map(self._nodes.node_of, used) if node is not None}
        return [
            NodeTrust(node.name, node.description.trusted_network, node.kind != "remote")
            for node in nodes.values()
            if node.description is not None
        ]

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
            pools = self._memory_pools(job.devices)
            check_memory(needs, pools, model.kv_window)
            self.memory = tuple(
                api.DeviceMemory(device=name, weight_bytes=need.weights, cache_bytes=need.cache)
                for name, need in needs.items()
            )
        except EngineError as error:
            self._end_job(error)
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

    def _memory_pools(self, devices: Sequence[str]) -> dict[str, tuple[str, int]]:
        """The memory each device draws on: its own on a GPU, its computer's on a CPU."""
        pools: dict[str, tuple[str, int]] = {}
        for device in devices:
            info = self._nodes.info(device)
            assert info is not None
            computer, is_cpu = self._computer(device)
            # A worker that offers less than its computer has is a pool of its own.
            shared = f"{computer} {info.memory_bytes}"
            pools[device] = (shared if is_cpu else device, info.memory_bytes)
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
