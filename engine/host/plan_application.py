"""Brings a plan into force, and another one when devices of it are lost.

In: a plan and an open model, or the loss of a device. Out: a load request for the scheduler, once
every runner listens; or one error. Belongs to the host's main thread and waits for nothing: it goes
on when something happened to the nodes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import zmq

from engine.cluster.coordinator import LoadRequest
from engine.cluster.local_copies import describe_files
from engine.cluster.messages import Message
from engine.cluster.runner_links import RunnerAddress
from engine.cluster.transport import Channel, address_that_reaches
from engine.decode.draft_model import DraftPlan
from engine.decode.scheduler import Scheduler
from engine.errors import EngineError, PlanError, WorkerLost
from engine.host import messages as api
from engine.host.draft_runner import DraftRunner
from engine.host.nodes import MAX_SIMULATED, SIMULATED_PREFIX, THIS_NODE, Nodes
from engine.host.opened_model import OpenedModel
from engine.host.recovery import nearest_plan, num_quanta, what_changed
from engine.host.trusted_network import NodeTrust, check_trusted_network
from engine.measuring.bandwidth import usable_cores
from engine.model.memory import ShareMemory, check_memory, has_room_for_more, plan_memory
from engine.plan.plan import Plan, PlanShape, Transport
from engine.weights.models import cache_folder

# A device that was lost again so soon after its runner was restarted is not restarted once more.
RESTART_SECONDS = 60.0
# A worker gives its runner 60 s to start, and says so; this is for one that says nothing.
START_SECONDS = 90.0


@dataclass(slots=True)
class _Job:
    """A plan on its way into force.

    Attributes:
        request_id: of the call that asked for it; 0 for one that follows a loss.
        note: why it is another plan than was asked for.
        epoch: once it is loading.
        started_nodes: workers of this computer that were started for it, once each.
        start_by: when its runners must listen.
    """

    request_id: int
    plan: Plan
    model: OpenedModel
    num_threads: int | None
    note: str = ""
    epoch: int = 0
    started_nodes: set[str] = field(default_factory=set[str])
    start_by: float = field(default_factory=lambda: time.monotonic() + START_SECONDS)

    @property
    def is_loading(self) -> bool:
        """Whether the scheduler has it."""
        return self.epoch > 0

    @property
    def devices(self) -> list[str]:
        """Devices with a share."""
        return [self.plan.devices[i] for i in self.plan.used_devices()]


class PlanApplication:
    """At most one plan at a time is on its way.

    Attributes:
        draft: the draft model of the open model, if there is one; set by the host.
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
        self.draft: DraftRunner | None = None
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
        if self._job is not None and (self._job.request_id or self._job.is_loading):
            raise PlanError("another plan is being applied; wait for it, or cancel it")
        plan = call.plan.validate()
        if plan.shape != PlanShape.from_config(model.config):
            raise PlanError(
                f"the plan is for another model ({_sizes(plan.shape)}), the open one has "
                f"{_sizes(PlanShape.from_config(model.config))}. Make a plan for it"
            )
        job = _Job(call.request_id, plan, model, num_threads)
        for device in job.devices:
            self._require_node(device, job)
        self._restarted_at.clear()
        self._job = job
        self.advance()

    def advance(self) -> None:
        """Go on, as far as nodes and runners are there."""
        job = self._job
        if job is None or job.is_loading:
            return
        used = job.devices
        try:
            for device in used:
                self._require_node(device, job)
            runners = self._runners_for(used, job.plan.transport)
        except EngineError as error:
            gone = {d for d in used if self._is_lost(d)}
            has_none = self._in_force is None or self._interruption is not None
            if has_none and gone:  # There is no plan to stay with.
                self._go_on_without(WorkerLost(str(error)))
            else:
                self._end_job(error)
            return
        there = {runner.device for runner in runners}
        waiting_for = ", ".join(device for device in used if device not in there)
        is_draft_settled = self.draft is None or self.draft.is_settled
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
        if len(runners) == len(used) and is_draft_settled:
            self._load(job, runners)

    def cancel(self, request_id: int) -> bool:
        """Give a plan up that is not loading yet; True if that was it."""
        job = self._job
        if job is None or job.request_id != request_id or job.is_loading:
            return False
        self._job = None
        if self._interruption is not None:
            self._go_on_without(self._interruption)  # The plan before it is what goes on.
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
        self._lost_at_start(lost)

    def tick(self) -> None:
        """Now and then: give up waiting for a runner that does not come."""
        job = self._job
        if job is None or job.is_loading or time.monotonic() < job.start_by:
            return
        device = next((d for d in job.devices if self._nodes.runner(d) is None), None)
        if device is None:
            if self.draft is not None:
                self.draft.lose(f"it said nothing for {START_SECONDS:.0f} s")
            return
        lost = WorkerLost(f"{device} said nothing of its runner for {START_SECONDS:.0f} s")
        lost.device = device
        self._lost_at_start(lost)

    def is_stale(self, epoch: int) -> bool:
        """Whether a word of the scheduler is about a plan that another one has followed."""
        job = self._job if self._job is not None and self._job.is_loading else self._in_force
        return job is None or job.epoch != epoch

    def is_replacing(self, error: WorkerLost) -> bool:
        """Whether a lost runner had to go: the plan on its way starts it anew, for other peers."""
        job = self._job
        if job is None or job.is_loading or error.device not in job.devices:
            return False
        node = self._nodes.node_of(error.device)
        runner = self._nodes.runner(error.device)
        if runner is not None:
            return runner.public_key != error.public_key
        return node is not None and error.device in node.starting

    def recover(self, error: WorkerLost) -> None:
        """A device of the plan in force, or of the one being loaded, was lost: put another in force.

        Ends in a plan for the scheduler, or in an error for everyone who waits for one.
        """
        if self.is_replacing(error):
            self._interruption = error
        else:
            self._go_on_without(error)

    def in_force(self, epoch: int) -> None:
        """The scheduler has put a plan in force."""
        if self._job is not None and self._job.epoch == epoch:
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

    def _lost_at_start(self, lost: WorkerLost) -> None:
        """A device of the plan on its way has no runner and gets none."""
        if self._in_force is not None and self._interruption is None:
            self._end_job(PlanError(f"{lost}. Try again"))
        else:
            self._go_on_without(lost)

    def _go_on_without(self, error: WorkerLost) -> None:
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
            if all(map(self._is_here, error.link)):
                lost.add(error.link[1])  # No network is between them: it is frozen.
            elif self._may_restart(pair):
                self._restarted_at[pair] = time.monotonic()
            else:  # Connecting again did not help: who has less gives way.
                lost.add(min(error.link, key=lambda device: num_quanta(plan, device)))
        return frozenset(lost.union(d for d in plan.devices if self._is_lost(d)))

    def _is_here(self, device: str) -> bool:
        node = self._nodes.node_of(device)
        return node is not None and node.kind != "remote"

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
            if error.link is None:
                if not self._may_restart(""):
                    raise PlanError("it was lost again after all devices had connected anew")
                self._restarted_at[""] = time.monotonic()
            return plan, f"{error}. Connected again"
        there = [d for d in plan.devices if d not in lost and self._is_there(d)]
        try:
            new = nearest_plan(job.model, plan, self._pools_beside_draft(there))
        except PlanError:
            if all(map(self._can_start_again, lost)):
                for device in lost:
                    self._restarted_at[device] = time.monotonic()
                return plan, f"{error}. It was started again"
            spares = [d for d in self._nodes.ready_devices() if d not in plan.devices]
            pools = self._pools_beside_draft([*there, *spares])
            try:
                new = nearest_plan(job.model, plan, pools, spares)
            except PlanError:
                draft = self._living_draft
                if draft is None:
                    raise
                # An answer is worth more than guesses at it.
                new = nearest_plan(job.model, plan, self._memory_pools([*there, *spares]), spares)
                draft.lose("the plan that goes on needs its memory")
        return new, f"{error}: {what_changed(plan, new, lost)}"

    def _is_there(self, device: str) -> bool:
        """Whether a device can take a share now, or as soon as its node has started."""
        node = self._nodes.node_of(device)
        return node is not None and node.is_usable and self._nodes.info(device) is not None

    def _can_start_again(self, device: str) -> bool:
        """Whether a lost device may come back with a new runner, or a new worker of ours."""
        node = self._nodes.node_of(device)
        if node is None or not self._may_restart(device):
            return False
        return node.state != "lost" or node.kind != "remote"

    def _require_node(self, device: str, job: _Job) -> None:
        """Make sure that a device's node is there or on its way."""
        name = device.rpartition("/")[0]
        node = self._nodes.get(name)
        if node is not None and node.state != "lost":
            return
        if node is not None and node.kind == "remote":
            raise PlanError(f"{device} cannot take part: {node.reason}")
        simulated = {f"{SIMULATED_PREFIX}{n}" for n in range(1, MAX_SIMULATED + 1)}
        if name != THIS_NODE and name not in simulated:
            raise PlanError(f"{device} cannot take part: {self._nodes.why_not(name)}")
        if name in job.started_nodes:
            assert node is not None
            raise PlanError(f"{device} cannot take part: {node.reason}")
        job.started_nodes.add(name)
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
            if not node.is_usable:
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
            self._check_draft(needs)
            self.memory = tuple(
                api.DeviceMemory(device=name, weight_bytes=need.weights, cache_bytes=need.cache)
                for name, need in needs.items()
            )
        except EngineError as error:
            self._end_job(error)
            return
        has_room = has_room_for_more(needs, self._pools_beside_draft(job.devices))
        self._epoch += 1
        job.epoch = self._epoch
        load = LoadRequest(
            epoch=self._epoch,
            config=model.config,
            plan=job.plan,
            dtype=model.dtype,
            kv_window=model.kv_window,
            kv_dtype=model.kv_dtype,
            kept_positions=model.kv_window if has_room else 0,
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
        draft = self._draft_plan(job, has_room)
        self._scheduler.put_plan(job.request_id, load, tuple(runners), model.checkpoint, draft)

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

    @property
    def _living_draft(self) -> DraftRunner | None:
        """The draft model, unless it is lost and takes nothing any more."""
        return None if self.draft is None or self.draft.is_lost else self.draft

    def _pools_beside_draft(self, devices: Sequence[str]) -> dict[str, tuple[str, int]]:
        """The same, less what the draft model takes of this computer's."""
        pools = self._memory_pools(devices)
        draft = self._living_draft
        if draft is not None:
            for device, (pool, size) in pools.items():
                if self._is_beside_draft(device):
                    pools[device] = pool, max(0, size - draft.model.memory.total)
        return pools

    def _is_beside_draft(self, device: str) -> bool:
        return self._is_this_computer(device) and device.endswith("/cpu")

    def _check_draft(self, needs: Mapping[str, ShareMemory]) -> None:
        """Raises: PlanError: the draft model does not fit beside the plan."""
        info = self._nodes.info(f"{THIS_NODE}/cpu")
        draft = self._living_draft
        if draft is not None and info is not None:
            taken = sum(n.total for device, n in needs.items() if self._is_beside_draft(device))
            draft.model.check_memory(info.memory_bytes, taken)

    def _draft_plan(self, job: _Job, has_room: bool) -> DraftPlan | None:
        """What the scheduler needs of the draft model, which computes while the others wait."""
        draft = self._living_draft
        if draft is None:
            return None
        info = self._nodes.info(f"{THIS_NODE}/cpu")
        num_cores = info.num_cores if info is not None else usable_cores()
        window = draft.model.kv_window
        return draft.plan(job.num_threads or num_cores, window if has_room else 0)

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
