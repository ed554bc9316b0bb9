"""The engine host: hears a window or command line, runs the scheduler, knows the nodes.

In: calls (`engine.host.messages`). Out: events. It never computes layers. Its main thread owns the
sockets to clients and workers; the scheduler's thread owns those to the runners; opening models
and preparing prompts happens in a third, reading images in a fourth. Functions cross into the main
thread by `_call_soon`.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import zmq

from engine.cluster.coordinator import Coordinator, LoadRequest, PlanLoaded
from engine.cluster.identity import TrustedPeers, config_dir, load_identity
from engine.cluster.messages import Array, LinkFigures, Message
from engine.cluster.security import Gatekeeper
from engine.cluster.transport import Channel, listen, new_local_endpoint
from engine.decode.listener import Measured
from engine.decode.scheduler import Scheduler
from engine.decode.sequence import Sequence
from engine.errors import Cancelled, EngineError, PlanError, PromptError, WorkerLost
from engine.host import figures
from engine.host import messages as api
from engine.host.draft_runner import DraftRunner
from engine.host.node_calls import NodeCalls
from engine.host.nodes import THIS_NODE, Nodes
from engine.host.opened_draft import OpenedDraft
from engine.host.opened_model import OpenedModel, image_paths
from engine.host.plan_application import PlanApplication
from engine.host.preparation import Preparation
from engine.plan.plan import Plan
from engine.weights.models import resolve_model

logger = logging.getLogger(__name__)

NODES_SECONDS = 1.0
# While tokens alone wake the main thread, nodes are heard so often.
TURN_SECONDS = 0.05
# Telemetry of many nodes goes to the clients together, as often as charts are drawn anew.
NODES_TOGETHER_SECONDS = 0.2
BUSY_SECONDS = 0.5
TRUSTED_NODES_FILE = "nodes.json"


@dataclass(slots=True)
class _Calls:
    """Who asked for what; requests that have not ended."""

    routes: dict[int, bytes] = field(default_factory=dict[int, bytes])
    cancelled: set[int] = field(default_factory=set[int])


class EngineHost:
    """See the module."""

    def __init__(self, client_key: bytes) -> None:
        """Listen for one client, and start this computer's worker.

        Raises: ConfigError: this installation's key or its list of nodes is damaged.
        """
        folder = config_dir()
        self.keys = load_identity(folder)
        trusted = TrustedPeers(folder / TRUSTED_NODES_FILE)
        self._context: zmq.Context[Any] = zmq.Context()
        self._gatekeeper = Gatekeeper(self._context)
        self._gatekeeper.allow("client", client_key)
        socket, self.endpoint = listen(
            self._context, zmq.ROUTER, self.keys, "client", new_local_endpoint(), is_watched=False
        )
        self._client: Channel[Any] = Channel(socket, api.CALLS)
        self._routes: set[bytes] = set()
        self._soon: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._wake_lock = threading.Lock()
        self._wake_receiver = self._context.socket(zmq.PULL)
        self._wake_receiver.bind("inproc://host-wake")
        self._wake_sender = self._context.socket(zmq.PUSH)
        self._wake_sender.connect("inproc://host-wake")
        self._should_end = False
        self._calls = _Calls()
        self._model: OpenedModel | None = None
        self._num_threads: int | None = None
        self._enders: list[threading.Thread] = []
        self._plan: Plan | None = None
        self._busy_until = 0.0
        self._nodes_at = 0.0
        self._turn_at = 0.0
        self._have_nodes_changed = False
        self._preparation = Preparation(
            lambda request_id, error: self._call_soon(lambda: self._fail(request_id, error))
        )
        self.scheduler = Scheduler(lambda: Coordinator(self._context), self)
        self._nodes = Nodes(
            self._context,
            self.keys,
            trusted,
            self._call_soon,
            self._on_nodes,
            self._on_runner_lost,
        )
        self._node_calls = NodeCalls(
            self._context, self.keys, self._nodes, self._send, self._end, self._fail
        )
        self._application = PlanApplication(
            self._nodes, self.scheduler, self._report, self._fail, self._forget_plan
        )
        self._nodes.neighbours.start(self._call_soon)
        self._nodes.start_local(THIS_NODE)

    def end_soon(self) -> None:
        """Ask the main loop to end; any thread."""
        self._should_end = True
        self._call_soon(lambda: None)

    def run(self) -> None:
        """Serve until asked to end."""
        sockets: tuple[zmq.Socket[Any], ...] = ()
        poller = zmq.Poller()
        while not self._should_end:
            own = (self._client.socket, self._wake_receiver)
            wanted = (*own, *self._nodes.sockets(), *self._node_calls.sockets())
            if wanted != sockets:
                sockets, poller = wanted, zmq.Poller()
                for socket in sockets:
                    poller.register(socket, zmq.POLLIN)
            ready = dict(poller.poll(50 if self._have_nodes_changed else 250))
            if self._wake_receiver in ready:
                while self._wake_receiver.poll(0):
                    self._wake_receiver.recv()
            while not self._soon.empty():
                self._soon.get()()
            if self._client.socket in ready:
                self._hear_clients()
            # Not for every token of an answer: what waits in there has seconds.
            if ready.keys() <= {self._wake_receiver} and time.monotonic() < self._turn_at:
                continue
            self._turn_at = time.monotonic() + TURN_SECONDS
            self._have_nodes_changed |= self._node_calls.hear()
            self._application.tick()
            self._have_nodes_changed |= self._nodes.hear()
            since = time.monotonic() - self._nodes_at
            limit = NODES_TOGETHER_SECONDS if self._have_nodes_changed else NODES_SECONDS
            if since > limit:
                self._send_nodes()

    def close(self) -> None:
        """End everything this host started."""
        if self._application.draft is not None:  # It may be frozen; time is short.
            self._enders.append(self._application.draft.end_process())
        self.scheduler.close()
        self._end_draft()
        self._node_calls.close()
        self._nodes.close()
        self._preparation.close()
        for thread in self._enders:
            thread.join(2.0)
        if self._model is not None:
            self._model.close()
        self._client.close()
        with self._wake_lock:
            self._wake_sender.close(linger=0)
        self._wake_receiver.close(linger=0)
        self._gatekeeper.close()

    # ---- main thread: clients ----------------------------------------------------------------

    def _call_soon(self, function: Callable[[], None]) -> None:
        self._soon.put(function)
        self._wake()

    def _wake(self) -> None:
        with self._wake_lock:
            if not self._wake_sender.closed:
                with contextlib.suppress(zmq.Again):  # Enough unread wakes do as well as one more.
                    self._wake_sender.send(b"", zmq.DONTWAIT)

    def _hear_clients(self) -> None:
        while True:
            try:
                received = self._client.receive(0)
            except EngineError as error:
                logger.warning("a client: %s", error)
                continue
            if received is None:
                return
            call, route = received.message, received.route
            if route not in self._routes:
                self._routes.add(route)
                self._send_nodes()
            if isinstance(call, api.Cancel):
                self._cancel(call.request_id)
                continue
            self._calls.routes[call.request_id] = route
            try:
                self._serve(call)
            except EngineError as error:
                self._fail(call.request_id, error)

    def _serve(self, call: Any) -> None:
        if isinstance(call, api.OpenModel):
            self._prepare(call, lambda: self._open_model(call))
        elif isinstance(call, api.AddSimulatedNodes):
            self._nodes.start_simulated(call.count)
            self._end(call.request_id, api.Done(request_id=call.request_id))
        elif self._node_calls.serve(call, self._devices_in_use()):
            self._send_nodes()
        elif isinstance(call, api.ApplyPlan):
            if self._model is None:
                raise PlanError("no model is open; open one before applying a plan")
            self._application.begin(call, self._model, self._num_threads)
        else:
            if self._model is None:
                raise PlanError("no model is open; open one first")
            # While weights are on their way, the scheduler puts requests behind the plan.
            if self._plan is None and not self._application.loading_devices:
                raise PlanError("no plan is in force; apply one first")
            self._prepare(call, lambda: self._submit(call))

    def _prepare(self, call: Any, work: Callable[[], None]) -> None:
        self._preparation.begin(call.request_id, "text", type(call).__name__, work)

    def _prepare_images(self, call: api.Generate, work: Callable[[], None]) -> None:
        if call.request_id in self._calls.cancelled:
            self._fail(call.request_id, _cancelled_early())
        else:
            self._preparation.begin(call.request_id, "images", type(call).__name__, work)

    def _cancel(self, request_id: int) -> None:
        if request_id in self._calls.routes:
            self._calls.cancelled.add(request_id)
            self._node_calls.cancel(request_id)
            self.scheduler.cancel(request_id)
            if self._preparation.cancel(request_id):
                self._fail(request_id, _cancelled_early())
            if self._application.cancel(request_id):
                self._fail(request_id, Cancelled("applying the plan was cancelled"))

    def _send(self, request_id: int, event: Message, tensors: list[Array] | None = None) -> None:
        route = self._calls.routes.get(request_id)
        if route is not None:
            self._tell(route, event, tensors or [])

    def _end(self, request_id: int, event: Message) -> None:
        self._send(request_id, event)
        self._calls.routes.pop(request_id, None)
        self._calls.cancelled.discard(request_id)
        self._preparation.forget(request_id)

    def _fail(self, request_id: int, error: EngineError) -> None:
        event = api.CallFailed(
            request_id=request_id, error=type(error).__name__, message=str(error)
        )
        self._end(request_id, event)

    def _broadcast(self, event: Message) -> None:
        for route in list(self._routes):
            self._tell(route, event, [])

    def _tell(self, route: bytes, event: Message, tensors: list[Array]) -> None:
        try:
            self._client.send(event, tensors, route)
        except WorkerLost:
            self._routes.discard(route)
        except PromptError as error:
            # Longer than a message may be, such as an answer of a million tokens.
            request_id = getattr(event, "request_id", None)
            if isinstance(request_id, int):
                failed = api.CallFailed(
                    request_id=request_id,
                    error=type(error).__name__,
                    message="the answer is too long for one message; its text came as it was made",
                )
                with contextlib.suppress(WorkerLost):  # It closed just now.
                    self._client.send(failed, [], route)

    # ---- threads of text and images ----------------------------------------------------------

    def _open_model(self, call: api.OpenModel) -> None:
        request_id = call.request_id
        last = 0.0

        def on_progress(done: int, total: int) -> None:
            nonlocal last
            now = time.monotonic()
            if now - last > 0.1 or done == total:
                last = now
                event = api.Progress(
                    request_id=request_id, phase="fetch", subject="model", done=done, total=total
                )
                self._call_soon(lambda: self._send(request_id, event))

        path = resolve_model(
            call.path, on_progress, cancelled=lambda: request_id in self._calls.cancelled
        )
        model = OpenedModel(path, call.dtype, call.kv_window, call.kv_dtype)
        try:
            draft = OpenedDraft(call.draft_path, model) if call.draft_path is not None else None
        except Exception:
            model.close()
            raise
        # Nothing goes on with the old model from here.
        self._call_soon(lambda: self._application.forget(PlanError("another model was opened")))
        # Nothing of the old model may be read by the scheduler when its files close.
        dropped = self.scheduler.drop_plan(PlanError("another model was opened"))
        while not dropped.wait(0.25):
            if self._should_end:
                model.close()
                if draft is not None:
                    draft.close()
                return
        self._call_soon(lambda: self._take_model(model, draft, call))

    def _submit(self, call: Any) -> None:
        model = self._model
        assert model is not None
        request_id = call.request_id

        def on_text(token_id: int, text: str) -> None:
            event = api.TokensGenerated(request_id=request_id, token_ids=(token_id,), text=text)
            # `on_step_sent` wakes the main thread, or what ends the answer does.
            self._soon.put(lambda: self._send(request_id, event))

        def on_prefill(done: int, total: int) -> None:
            event = api.Progress(
                request_id=request_id, phase="prefill", subject="prompt", done=done, total=total
            )
            self._call_soon(lambda: self._send(request_id, event))

        def generate(ids: list[int]) -> None:
            self._schedule(
                model.generation(
                    call, ids, on_text, on_prefill, lambda: request_id in self._calls.cancelled
                )
            )

        if isinstance(call, api.Generate):
            ids = model.prompt_ids(call)
            if image_paths(call):
                self._call_soon(lambda: self._prepare_images(call, lambda: generate(ids)))
            else:
                generate(ids)
        elif isinstance(call, api.Benchmark):
            self._schedule(model.benchmark(call, on_text, on_prefill))
        else:
            assert isinstance(call, api.ComputeLogits)
            self._schedule(model.logits(call, on_prefill))

    def _schedule(self, sequence: Sequence) -> None:
        request_id = sequence.request_id
        self.scheduler.submit(sequence)
        if request_id in self._calls.cancelled:
            self._call_soon(lambda: self.scheduler.cancel(request_id))

    # ---- main thread: model and plan ---------------------------------------------------------

    def _take_model(
        self, model: OpenedModel, draft: OpenedDraft | None, call: api.OpenModel
    ) -> None:
        self._application.forget(PlanError("another model was opened"))
        if self._model is not None:
            self._model.close()
        self._end_draft()
        if draft is not None:
            self._application.draft = DraftRunner(
                draft,
                self.keys,
                self._call_soon,
                self._application.advance,
                self.scheduler.runner_lost,
                self._draft_lost,
            )
        self._model = model
        self._num_threads = call.num_threads
        self._plan = None
        event = api.ModelOpened(
            request_id=call.request_id,
            name=model.path.stem if model.path.is_file() else model.path.name,
            path=str(model.path),
            config=model.config,
            dtype=model.dtype,
            kv_window=model.kv_window,
            kv_dtype=model.kv_dtype,
            file_bytes=model.file_bytes,
            warning=model.warning,
            draft_name=draft.name if draft is not None else None,
        )
        self._send(call.request_id, event)
        self._end(call.request_id, api.Done(request_id=call.request_id))

    def _end_draft(self) -> None:
        """The scheduler has given its model up."""
        draft, self._application.draft = self._application.draft, None
        if draft is not None:
            self._enders = [t for t in self._enders if t.is_alive()] + [draft.end()]

    def _draft_lost(self, reason: str) -> None:
        message = f"the draft model is lost, answers go on without its guesses: {reason}"
        self._broadcast(api.DraftModelLost(message=message))

    def _on_nodes(self) -> None:
        self._call_soon(self._application.advance)
        self._nodes_at = 0.0

    def _on_runner_lost(self, device: str, public_key: bytes, cause: str) -> None:
        self._application.runner_lost(device, cause)
        self.scheduler.runner_lost(public_key, cause)

    def _devices_in_use(self) -> set[str]:
        """Devices with a share in the plan in force."""
        plan = self._plan
        return {plan.devices[i] for i in plan.used_devices()} if plan is not None else set[str]()

    def _send_nodes(self) -> None:
        self._nodes_at = time.monotonic()
        self._have_nodes_changed = False
        in_use = self._devices_in_use()
        loading = self._application.loading_devices
        busy = in_use if time.monotonic() < self._busy_until else set[str]()
        self._broadcast(api.NodesChanged(nodes=self._nodes.states(busy, loading, in_use)))

    # ---- scheduler thread: what it says ------------------------------------------------------

    def on_finished(self, sequence: Sequence, plan: Plan) -> None:
        """A request ended well."""
        request_id = sequence.request_id
        if sequence.logits_only and sequence.finish_reason != "cancelled":
            self._call_soon(lambda: self._end(request_id, api.Done(request_id=request_id)))
            return
        assert sequence.finish_reason is not None
        event = api.Finished(
            request_id=request_id,
            finish_reason=sequence.finish_reason,
            text="".join(sequence.text),
            token_ids=tuple(sequence.ids[sequence.num_prompt :]),
            prompt_tokens=sequence.num_prompt,
            seed=sequence.seed,
            ttft_s=max(0.0, sequence.first_token_at - sequence.arrived),
            prefill_tps=sequence.prefill_tps(),
            decode_tps=sequence.decode_tps(),
            devices=figures.device_usage(sequence.totals),
            plan=plan,
            reused_tokens=sequence.num_reused,
            decode_steps=sequence.num_decode_steps,
            drafted_tokens=sequence.num_drafted,
            accepted_tokens=sequence.num_accepted,
            model_drafted_tokens=sequence.num_model_drafted,
            model_accepted_tokens=sequence.num_model_accepted,
            logprobs=None if sequence.num_logprobs is None else tuple(sequence.logprobs),
        )
        self._call_soon(lambda: self._end(request_id, event))

    def on_failed(self, request_id: int, error: EngineError) -> None:
        """A request, or putting a plan in force, ended with an error."""

        def tell() -> None:
            # The plan before this one gave way when loading began.
            if self._application.failed(request_id):
                self._forget_plan(error)
            self._fail(request_id, error)

        self._call_soon(tell)

    def on_logits(self, request_id: int, first_position: int, rows: Array) -> None:
        """Logits of some positions."""
        event = api.LogitsRows(request_id=request_id, first_position=first_position)
        self._call_soon(lambda: self._send(request_id, event, [rows]))

    def on_plan(self, request_id: int, load: LoadRequest, loaded: PlanLoaded) -> None:
        """A plan is in force."""
        plan = load.plan

        def tell() -> None:
            self._application.in_force(load.epoch)
            self._plan = plan
            self._nodes.stop_runners_except({plan.devices[i] for i in plan.used_devices()})
            self._broadcast(
                api.PlanApplied(
                    epoch=load.epoch,
                    plan=plan,
                    memory=self._application.memory,
                    loaded=figures.loaded_bytes(loaded),
                    links=figures.links(loaded.links),
                    note=self._application.note,
                    kernels=figures.kernels(loaded),
                )
            )
            self._end(request_id, api.Done(request_id=request_id))
            self._send_nodes()

        self._call_soon(tell)

    def on_plan_interrupted(self, error: WorkerLost, epoch: int) -> None:
        """A device was lost; requests wait for another plan."""

        def tell() -> None:
            if self._application.is_stale(epoch):
                return
            if not self._application.is_replacing(error):
                self._nodes.drop_runner(error)
                self._broadcast(api.PlanInterrupted(message=str(error)))
            self._application.recover(error)
            self._send_nodes()

        self._call_soon(tell)

    def on_step_sent(self) -> None:
        """The devices compute: time to pass on what the step before gave."""
        if not self._soon.empty():
            self._wake()

    def on_draft_lost(self, error: EngineError) -> None:
        """The draft model cannot guess any more."""

        def tell() -> None:
            if self._application.draft is not None:
                self._application.draft.lose(str(error))

        self._call_soon(tell)

    def on_links(self, links: Mapping[tuple[str, str], LinkFigures]) -> None:
        """Figures of links in use."""
        event = api.LinksChanged(links=figures.links(links))
        self._call_soon(lambda: self._broadcast(event))

    def on_plan_lost(self, error: EngineError) -> None:
        """The plan in force can no longer run."""

        def tell() -> None:
            self._application.forget(error)
            self._forget_plan(error)

        self._call_soon(tell)

    def _forget_plan(self, error: EngineError) -> None:
        self._nodes.drop_runner(error)
        if self._plan is not None:
            self._plan = None
            self._broadcast(api.PlanLost(message=str(error)))
        self._send_nodes()

    def _report(self, request_id: int, event: Message) -> None:
        """Progress of a plan; everyone hears of one that nobody asked for."""
        if request_id:
            self._send(request_id, event)
        else:
            self._broadcast(event)

    def on_load_progress(self, request_id: int, device: str, done: int, total: int) -> None:
        """Weights on their way."""
        event = api.Progress(
            request_id=request_id, phase="weights", subject=device, done=done, total=total
        )
        self._call_soon(lambda: self._report(request_id, event))

    def on_measured(self, measured: Measured) -> None:
        """What the steps since the last call did."""
        event = api.Throughput(
            time_s=time.time(),
            seconds=measured.seconds,
            prompt_tokens=measured.prompt_tokens,
            generated_tokens=measured.generated_tokens,
            devices=figures.device_usage(measured.devices),
        )

        def tell() -> None:
            self._busy_until = time.monotonic() + BUSY_SECONDS
            self._broadcast(event)

        self._call_soon(tell)


def _cancelled_early() -> Cancelled:
    return Cancelled("the request was cancelled before it began")
