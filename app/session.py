"""What the window knows of the engine: stage, model, nodes, the plan in force.

In: batches of event structs from the bridge. Out: Qt signals for the presenters, and typed calls
to the bridge. Events of a call go to whoever made it. No widgets, no waiting, no file access.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Sequence
from typing import Protocol, TypeGuard

from PySide6.QtCore import QObject, Signal

from app.node_list import HOME_DEVICE, NodeList
from app.plan_facts import without_idle_devices
from app.plan_in_force import PlanInForce
from app.stages import Stage, StartOptions, Trouble
from engine.cluster.messages import Message
from engine.host.messages import (
    AddNode,
    AddSimulatedNodes,
    ApplyPlan,
    CallFailed,
    Cancel,
    Done,
    Finished,
    LinksChanged,
    ModelOpened,
    NodesChanged,
    OpenModel,
    PlanApplied,
    PlanInterrupted,
    PlanLost,
    Progress,
    Throughput,
)
from engine.plan.plan import Plan, PlanShape
from engine.plan.presets import single

logger = logging.getLogger(__name__)

EventHandler = Callable[[Message], None]


class Poster(Protocol):
    """The part of the bridge that the session uses."""

    def post(self, call: Message) -> None:
        """Send a call."""
        ...

    def start(self) -> None:
        """Start an engine host."""
        ...


class Session(NodeList):
    """The engine as the window sees it.

    Attributes:
        stage, trouble: whether a question can be answered now, and what is in the way.
        open_path: what was asked to be opened last; None is the default model.
        model: of the last `ModelOpened`; None before.
        in_force: the plan that runs, and what became of it.
        progress: of the running open or apply: weights by device, anything else under "".
    """

    stage_changed = Signal()
    model_changed = Signal()
    plan_changed = Signal()
    nodes_changed = Signal()
    progress_changed = Signal()
    throughput_measured = Signal(object)
    call_failed = Signal(str)
    node_call_failed = Signal(str)
    links_changed = Signal()
    plan_interrupted = Signal()
    plan_recovered = Signal(list)

    def __init__(
        self,
        bridge: Poster,
        options: StartOptions,
        parent: QObject | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Nothing is started yet.

        Args:
            clock: seconds, never going back.
        """
        super().__init__(parent)
        self._bridge = bridge
        self.clock = clock
        self._ids = itertools.count(1)
        self._handlers: dict[int, EventHandler] = {}
        self.options = options
        self.stage = Stage.STARTING
        self.trouble: Trouble | None = None
        self.model: ModelOpened | None = None
        self.in_force = PlanInForce()
        self.progress: dict[str, Progress] = {}
        self.open_path: str | None = options.model
        self._open_request = 0
        self._apply_request = 0
        self._wants_plan = False
        self._wanted_simulated = options.demo_workers

    # ---- calls -------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the engine host, and ask for the model and nodes of the start options."""
        self._handlers.clear()
        self._set_stage(Stage.STARTING)
        self._bridge.start()
        self.open_model(self.open_path)
        if self._wanted_simulated:
            self.add_simulated_nodes(self._wanted_simulated)
        for token in self.options.join_tokens:
            self.add_node(token)

    def call(self, make: Callable[[int], Message], on_event: EventHandler | None = None) -> int:
        """Post a call and route its events.

        Args:
            make: builds the call from its request id.
            on_event: hears every event of this call, the last one included.
        Returns: the request id.
        """
        request_id = next(self._ids)
        if on_event is not None:
            self._handlers[request_id] = on_event
        self._bridge.post(make(request_id))
        return request_id

    def cancel(self, request_id: int) -> None:
        """End a call early; its last event still comes."""
        self._bridge.post(Cancel(request_id=request_id))

    def open_model(self, path: str | None) -> None:
        """Open a file or folder; None opens the default model."""
        self.open_path = path
        self.progress = {}
        self._wants_plan = False
        if self.stage is not Stage.STARTING:
            self._set_stage(Stage.OPENING)
        self._open_request = self.call(self._make_open, self._on_open_event)
        self.progress_changed.emit()

    def apply_plan(self, plan: Plan) -> None:
        """Put a plan in force; devices without a share are left out of it."""
        used = without_idle_devices(plan)
        self.progress = {}
        self._set_stage(Stage.LOADING)

        def make(request_id: int) -> Message:
            return ApplyPlan(request_id=request_id, plan=used)

        self._apply_request = self.call(make, self._on_apply_event)
        self.progress_changed.emit()

    def load_again(self) -> None:
        """Put the last plan in force once more."""
        if self.last_plan is not None:
            self.apply_plan(self.last_plan)
        elif self.model is not None:
            self._wants_plan = True
            self._apply_first_plan()

    def mend(self) -> None:
        """Do what the trouble's button says."""
        if self.trouble is None:
            return
        match self.trouble.remedy:
            case "load_again":
                self.load_again()
            case "open_default":
                self.open_model(None)
            case "restart":
                self.start()

    def dismiss_trouble(self) -> None:
        """Forget a trouble that keeps nobody from going on."""
        if self.is_ready and self.trouble is not None:
            self._set_stage(self.stage)

    def add_simulated_nodes(self, count: int) -> None:
        """Have `count` simulated nodes in all."""
        self._wanted_simulated = max(self._wanted_simulated, count)

        def make(request_id: int) -> Message:
            return AddSimulatedNodes(request_id=request_id, count=count)

        self.call(make, self._on_node_call_event)

    def add_node(self, token: str) -> None:
        """Connect to another computer's worker by its join token."""

        def make(request_id: int) -> Message:
            return AddNode(request_id=request_id, token=token)

        self.call(make, self._on_node_call_event)

    # ---- facts -------------------------------------------------------------------------------

    @property
    def plan(self) -> Plan | None:
        """The plan in force; None while there is none."""
        return self.in_force.plan

    @property
    def last_plan(self) -> Plan | None:
        """The last plan that was in force for this model."""
        return self.in_force.last_plan

    @property
    def is_interrupted(self) -> bool:
        """Whether a lost device of the plan is being worked around."""
        return self.in_force.interruption is not None

    @property
    def is_ready(self) -> bool:
        """Whether a question can be asked now."""
        return self.plan is not None and self.stage in (Stage.READY, Stage.LOADING)

    @property
    def is_applying(self) -> bool:
        """Whether a plan is on its way into force."""
        return self.stage in (Stage.LOADING, Stage.RECOVERING)

    # ---- events ------------------------------------------------------------------------------

    def hear(self, events: Sequence[Message]) -> None:
        """Take a batch of events, in order."""
        for event in events:
            request_id: int | None = getattr(event, "request_id", None)
            if request_id is None:
                self._hear_news(event)
                continue
            if self._is_of_recovery(event):
                self._take_progress(event)
                continue
            handler = self._handlers.get(request_id)
            if isinstance(event, Done | Finished | CallFailed):
                self._handlers.pop(request_id, None)
            if handler is not None:
                handler(event)

    def engine_started(self) -> None:
        """The engine host runs."""
        if self.stage is Stage.STARTING:
            self._set_stage(Stage.OPENING)

    def engine_lost(self, reason: str) -> None:
        """The engine host ended; every call that was under way has failed."""
        handlers = list(self._handlers.items())
        self._handlers.clear()
        self._open_request = self._apply_request = 0
        for request_id, handler in handlers:
            handler(CallFailed(request_id=request_id, error="WorkerLost", message=reason))
        self._drop_plan()
        self.nodes = ()
        self.nodes_changed.emit()
        self._stop(Trouble(title="The engine ended", message=reason, remedy="restart"))

    def _hear_news(self, event: Message) -> None:
        match event:
            case NodesChanged():
                self.take_nodes(event.nodes)
                self.nodes_changed.emit()
                self._apply_first_plan()
            case PlanApplied():
                self._take_plan(event)
            case PlanInterrupted():
                self._interrupt(event.message)
            case LinksChanged():
                self.in_force.measure(event.links)
                self.links_changed.emit()
            case PlanLost():
                self._drop_plan()
                self._stop(
                    Trouble(
                        title="The split stopped running",
                        message=event.message,
                        remedy="load_again",
                    )
                )
            case Throughput():
                self.throughput_measured.emit(event)
            case _:
                logger.debug("nobody hears %s", type(event).__name__)

    def _make_open(self, request_id: int) -> Message:
        return OpenModel(
            request_id=request_id,
            path=self.open_path,
            dtype=self.options.dtype,
            kv_window=self.options.kv_window,
            num_threads=self.options.num_threads,
        )

    def _on_open_event(self, event: Message) -> None:
        if getattr(event, "request_id", None) != self._open_request:
            return
        match event:
            case Progress():
                self._take_progress(event)
            case ModelOpened():
                self._take_model(event)
            case CallFailed():
                self._take_open_failure(event.message)
            case _:
                pass

    def _take_open_failure(self, message: str) -> None:
        title = "The model could not be opened"
        if self.plan is not None:
            message = f"{message}. The earlier model stays open"
        self._stop(Trouble(title=title, message=message, remedy="open_default"))
        if self.plan is not None:
            self.stage = Stage.READY
            self.stage_changed.emit()

    def _on_apply_event(self, event: Message) -> None:
        if getattr(event, "request_id", None) != self._apply_request:
            return
        match event:
            case Progress():
                self._take_progress(event)
            case CallFailed() if self.is_interrupted:
                # The host works around a lost device: what follows decides about the stage.
                self.call_failed.emit(event.message)
            case CallFailed():
                self.progress = {}
                self.progress_changed.emit()
                if self.plan is not None:
                    # The earlier plan still runs, so this is news and not trouble.
                    self._set_stage(Stage.READY)
                    self.call_failed.emit(event.message)
                else:
                    self._stop(
                        Trouble(
                            title="The split could not be applied",
                            message=event.message,
                            remedy="load_again",
                        )
                    )
            case _ if self.is_interrupted:
                pass
            case _:
                self.progress = {}
                if self.plan is not None:
                    self._set_stage(Stage.READY)
                self.progress_changed.emit()

    def _on_node_call_event(self, event: Message) -> None:
        if isinstance(event, CallFailed):
            self.node_call_failed.emit(event.message)

    def _is_of_recovery(self, event: Message) -> TypeGuard[Progress]:
        """Whether this is progress of putting another plan in the place of a broken one.

        Nobody asked for that plan, so its progress belongs to no call of the window's own.
        """
        return (
            self.is_interrupted
            and isinstance(event, Progress)
            and event.phase in ("start", "weights", "connect")
        )

    def _take_progress(self, progress: Progress) -> None:
        if progress.phase == "weights":
            self.progress.pop("", None)
            self.progress[progress.subject] = progress
        else:
            if progress.phase == "connect":
                self.progress.clear()
            # Its subject changes with its amount, so that it cannot be the key.
            self.progress[""] = progress
        self.progress_changed.emit()

    def _take_model(self, model: ModelOpened) -> None:
        same_shape = self.last_plan is not None and self.last_plan.shape == PlanShape.from_config(
            model.config
        )
        if not same_shape:
            self.in_force.last_plan = None
        self.model = model
        self.progress = {}
        self._drop_plan()
        self._wants_plan = True
        self.model_changed.emit()
        self._apply_first_plan()

    def _apply_first_plan(self) -> None:
        """After a model was opened: the last plan if it fits, else this computer alone."""
        if not self._wants_plan or self.model is None:
            return
        available = self.available_devices()
        if self.last_plan is not None and set(self.last_plan.devices) <= set(available):
            self._wants_plan = False
            self.apply_plan(self.last_plan)
            return
        own = [device for device in available if device.startswith("this/")]
        if not own:
            return
        device = HOME_DEVICE if HOME_DEVICE in own else own[0]
        self._wants_plan = False
        self.apply_plan(single(PlanShape.from_config(self.model.config), device))

    def _interrupt(self, message: str) -> None:
        self.in_force.interrupt(message, self.clock())
        self.progress = {}
        self._set_stage(Stage.RECOVERING)
        self.progress_changed.emit()
        self.plan_interrupted.emit()

    def _take_plan(self, applied: PlanApplied) -> None:
        was_interrupted = self.is_interrupted
        lost = self.in_force.take(applied, self.device_label)
        if was_interrupted:
            self.progress = {}
        self._set_stage(Stage.READY)
        self.plan_changed.emit()
        if was_interrupted:
            self.progress_changed.emit()
            self.plan_recovered.emit(lost)

    def _drop_plan(self) -> None:
        self.in_force.drop()
        self.plan_changed.emit()

    def _set_stage(self, stage: Stage) -> None:
        self.stage = stage
        self.trouble = None
        self.stage_changed.emit()

    def _stop(self, trouble: Trouble) -> None:
        self.stage = Stage.STOPPED
        self.trouble = trouble
        self.progress = {}
        self.stage_changed.emit()
        self.progress_changed.emit()
