"""The Split page's state: draft, selection, locks, undo, and what differs from the running plan.

In: what a person does, and the session's model, nodes and plan. Out: signals for the views, and
`ApplyPlan` calls through the session. No widgets.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
from PySide6.QtCore import QObject, Signal
from PySide6.QtGui import QUndoStack

from app.plan_facts import row_weights, weight_share, without_idle_devices
from app.session import Session
from app.split.draft import (
    Change,
    Part,
    Selection,
    ShareFact,
    changed_rows,
    changes,
    move_divider,
    parse_layers,
    same_columns,
    set_share_keeping,
    share_fact,
    talks_otherwise,
    tenths_of_percent,
    with_fair_shares,
)
from app.split.undo import DraftCommand, DraftState
from engine.errors import PlanError
from engine.plan.plan import Plan, PlanShape
from engine.plan.plan_file import plan_from_toml, plan_to_toml
from engine.plan.presets import even, move_quanta, pipeline, single, with_devices


class SplitPresenter(QObject):
    """Edits a draft; the running plan changes only by `apply`.

    Attributes:
        draft: None until a model is open and a plan was in force.
        running: the plan in force; None while there is none.
        locked: devices whose shares edits leave alone.
        asked: the device and fraction of the last fader edit, until something else is done.
    """

    draft_changed = Signal()
    selection_changed = Signal()
    devices_changed = Signal()

    def __init__(self, session: Session, parent: QObject | None = None) -> None:
        """Follows the session."""
        super().__init__(parent)
        self._session = session
        self.undo_stack = QUndoStack(self)
        self.shape: PlanShape | None = None
        self.draft: Plan | None = None
        self.running: Plan | None = None
        self.selection = Selection(frozenset(), False)
        self.locked: set[str] = set()
        self.asked: tuple[str, float] | None = None
        self._left_out: frozenset[str] = frozenset()
        self._seen_devices: set[str] = set()
        self._weights: list[int] = []
        # Faders that were set by hand since the selection changed, oldest first.
        self._touched: list[str] = []
        self._gesture = 0
        self._origin: Plan | None = None
        session.model_changed.connect(self._on_model_changed)
        session.plan_changed.connect(self._on_plan_changed)
        session.nodes_changed.connect(self._on_nodes_changed)

    # ---- facts -------------------------------------------------------------------------------

    @property
    def rows(self) -> list[int]:
        """The selected plan rows."""
        return [] if self.shape is None else self.selection.rows(self.shape)

    @property
    def changed_rows(self) -> list[int]:
        """Rows that Apply would change."""
        return [] if self.draft is None else changed_rows(self.running, self.draft)

    @property
    def has_changes(self) -> bool:
        """Whether Apply would do anything."""
        if self.draft is None:
            return False
        return bool(self.changed_rows) or talks_otherwise(self.running, self.draft)

    @property
    def can_apply(self) -> bool:
        """Whether the draft can be put in force now."""
        return self.has_changes and not self._session.is_applying

    def changes(self) -> list[Change]:
        """What Apply would change, in words."""
        if self.draft is None:
            return []
        return changes(self.running, self.draft, self._session.device_label)

    def known_devices(self) -> list[str]:
        """All devices that can take part or do, in order of joining."""
        known = set(self._session.available_devices())
        if self.draft is not None:
            known.update(self.draft.devices)
        return sorted(known, key=self._session.device_index)

    def is_available(self, device: str) -> bool:
        """Whether the device's node is there."""
        return device in self._session.available_devices()

    def facts(self) -> list[tuple[str, ShareFact, int]]:
        """Per device: its share of the selection, and tenths of a percent that sum to 1000."""
        if self.draft is None:
            return []
        rows = self.rows
        facts = [
            share_fact(self.draft, rows, column, self._weights)
            for column in range(len(self.draft.devices))
        ]
        if not rows:
            return [(d, f, 0) for d, f in zip(self.draft.devices, facts, strict=True)]
        tenths = tenths_of_percent([fact.fraction for fact in facts])
        return list(zip(self.draft.devices, facts, tenths, strict=True))

    def row_fractions(self, plan: Plan, rows: list[int]) -> list[tuple[str, float]]:
        """Every device's share of the weights of some rows."""
        return [
            (device, weight_share(plan, column, self._weights, rows))
            for column, device in enumerate(plan.devices)
        ]

    def as_text(self) -> str:
        """The draft as a plan file."""
        return "" if self.draft is None else plan_to_toml(without_idle_devices(self.draft))

    # ---- selection ---------------------------------------------------------------------------

    def select(self, layers: frozenset[int], has_head: bool) -> None:
        """Edits are about these rows from now on."""
        selection = Selection(layers, has_head, self.selection.part)
        if selection != self.selection:
            self.selection = selection
            self._forget_hand()
            self.selection_changed.emit()

    def select_everything(self) -> None:
        """All layers and the output head."""
        if self.shape is not None:
            self.select(frozenset(range(self.shape.num_layers)), True)

    def select_text(self, text: str) -> bool:
        """Select layers by their numbers, such as "0-9".

        Returns: False where the text is not a list of layers of this model.
        """
        layers = None if self.shape is None else parse_layers(text, self.shape.num_layers)
        if layers is None:
            return False
        self.select(layers, False)
        return True

    def choose_part(self, part: Part) -> None:
        """Edit attention, MLP, or both."""
        if part is not self.selection.part:
            selected = self.selection
            self.selection = Selection(selected.layers, selected.has_head, part)
            self._forget_hand()
            self.selection_changed.emit()

    # ---- edits -------------------------------------------------------------------------------

    def begin_gesture(self) -> None:
        """What follows until `end_gesture` is one step of undo, and starts from here each time."""
        self._gesture += 1
        self._origin = self.draft

    def end_gesture(self) -> None:
        """The mouse was released."""
        self._origin = None

    def set_share(self, device: str, fraction: float) -> None:
        """Move one device's fader over the selection; the others give or take."""
        plan = self._origin or self.draft
        if plan is None or device in self.locked or device not in plan.devices:
            return
        locked = [plan.devices.index(name) for name in self.locked if name in plan.devices]
        self._touched = [name for name in self._touched if name != device]
        touched = [
            plan.devices.index(name)
            for name in self._touched
            if name in plan.devices and name not in self.locked
        ]
        column = plan.devices.index(device)
        new = set_share_keeping(plan, self.rows, column, fraction, locked, touched)
        self._touched.append(device)
        label = self._session.device_label(device)
        self._change(new, f"set {label} to {100 * fraction:.0f} %", (device, fraction))

    def set_divider(self, left: str, right: str, border: float) -> None:
        """Put the border between two neighbours at a fraction of the selected rows."""
        plan = self._origin or self.draft
        if plan is None or self.locked & {left, right}:
            return
        columns = plan.devices.index(left), plan.devices.index(right)
        self._change(move_divider(plan, self.rows, *columns, border), "move the divider")

    def step_divider(self, left: str, right: str, quanta: int) -> None:
        """Move the border between two neighbours by some quanta of each selected row."""
        plan = self.draft
        if plan is None or self.locked & {left, right}:
            return
        source, target = plan.devices.index(right), plan.devices.index(left)
        self._change(move_quanta(plan, self.rows, source, target, quanta), "move the divider")

    def set_locked(self, device: str, is_locked: bool) -> None:
        """Keep a device's shares as they are, or let them change again."""
        if is_locked:
            self.locked.add(device)
        else:
            self.locked.discard(device)
        self.selection_changed.emit()

    def set_taking_part(self, device: str, takes_part: bool) -> None:
        """Add a device to the draft, or leave it out and give its share to the others."""
        if self.draft is None or takes_part == (device in self.draft.devices):
            return
        names = set(self.draft.devices) ^ {device}
        if not names:
            return
        columns = sorted(names, key=self._session.device_index)
        label = self._session.device_label(device)
        left_out = self._left_out - {device} if takes_part else self._left_out | {device}
        text = f"{'add' if takes_part else 'leave out'} {label}"
        self.locked.discard(device)
        self._push(DraftState(with_devices(self.draft, columns), left_out), text)

    def add_devices(self, devices: Sequence[str]) -> None:
        """Give devices that compute nothing in the draft an equal part of it."""
        new = [device for device in devices if self._has_no_share(device)]
        if self.draft is None or not new:
            return
        columns = sorted({*self.draft.devices, *new}, key=self._session.device_index)
        names = ", ".join(self._session.device_label(device) for device in new)
        plan = with_fair_shares(self.draft, new, columns)
        self._forget_hand()
        self._push(DraftState(plan, self._left_out - set(new)), f"add {names}")

    def use_even(self) -> None:
        """Cut every row evenly."""
        if self.draft is not None:
            self._use(even(self.draft.shape, self._present()), "split evenly")

    def use_pipeline(self) -> None:
        """Whole layers on each device, in runs."""
        if self.draft is not None:
            self._use(pipeline(self.draft.shape, self._present()), "whole layers per device")

    def use_home(self) -> None:
        """Everything on this computer."""
        if self.draft is None:
            return
        home = [device for device in self.draft.devices if device.startswith("this/")]
        if home:
            plan = single(self.draft.shape, home[0], self.draft.devices)
            self._use(plan, "only this computer")

    def use_text(self, text: str) -> None:
        """Take a plan file as the draft.

        Raises: PlanError: the text is not a plan for this model.
        """
        if self.shape is None:
            raise PlanError("no model is open. Open one first.")
        plan = plan_from_toml(text, self.shape, name="text")
        names = sorted({*plan.devices, *self._present()}, key=self._session.device_index)
        self._push(DraftState(with_devices(plan, names), self._left_out), "take the text")

    def revert(self) -> None:
        """Make the draft equal to the running plan again; can be undone."""
        if self.running is not None and self.has_changes:
            self._change(self.running, "revert")

    def apply(self) -> None:
        """Put the draft in force."""
        if self.draft is not None and self.can_apply:
            self._session.apply_plan(self.draft)

    def take_state(self, state: DraftState, asked: tuple[str, float] | None = None) -> None:
        """Show a state; called by the undo stack."""
        self._left_out = state.left_out
        self.draft = state.plan
        self.asked = asked
        self._take_columns()
        self.draft_changed.emit()

    # ---- inside ------------------------------------------------------------------------------

    def _forget_hand(self) -> None:
        self.asked = None
        self._touched = []

    def _change(self, plan: Plan, text: str, asked: tuple[str, float] | None = None) -> None:
        assert self.draft is not None, "there is a draft to change"
        if asked is None:
            self._touched = []
        names = {*self.draft.devices, *(plan.devices[column] for column in plan.used_devices())}
        columns = sorted(names, key=self._session.device_index)
        plan = same_columns(without_idle_devices(plan), columns)
        self._push(DraftState(plan, self._left_out), text, asked)

    def _use(self, shares: Plan, text: str) -> None:
        """Take the shares of a fresh plan; how devices talk stays as it was."""
        assert self.draft is not None, "there is a draft to change"
        plan = msgspec.structs.replace(
            shares,
            wire=self.draft.wire,
            prompt_wire=self.draft.prompt_wire,
            transport=self.draft.transport,
        )
        self._change(plan, text)

    def _push(self, state: DraftState, text: str, asked: tuple[str, float] | None = None) -> None:
        assert self.draft is not None, "there is a draft to change"
        if state.plan == self.draft and state.left_out == self._left_out:
            if asked != self.asked:
                self.asked = asked
                self.draft_changed.emit()
            return
        before = DraftState(self.draft, self._left_out)
        gesture = self._gesture if self._origin is not None else 0
        self.undo_stack.push(DraftCommand(self, before, state, text, gesture, asked))

    def _present(self) -> list[str]:
        """Devices of the draft that are there; all of them where none is."""
        if self.draft is None:
            return []
        there = [device for device in self.draft.devices if self.is_available(device)]
        return there or list(self.draft.devices)

    def _take_columns(self) -> bool:
        """Give the draft a column for every device that may take part.

        Returns: whether the columns changed.
        """
        if self.draft is None:
            return False
        names = set(self.draft.devices) | set(self._session.available_devices())
        unused = {name for name in names if self._has_no_share(name)}
        gone = {name for name in unused if not self.is_available(name)}
        columns = sorted(names - (self._left_out & unused) - gone, key=self._session.device_index)
        if tuple(columns) == self.draft.devices:
            return False
        self.draft = with_devices(self.draft, columns)
        return True

    def _has_no_share(self, device: str) -> bool:
        if self.draft is None or device not in self.draft.devices:
            return True
        return self.draft.devices.index(device) not in self.draft.used_devices()

    def _on_model_changed(self) -> None:
        model = self._session.model
        shape = None if model is None else PlanShape.from_config(model.config)
        if model is not None:
            self._weights = row_weights(model.config)
        if shape != self.shape:
            self.shape = shape
            self.draft = None
            self.undo_stack.clear()
            self.select_everything()
        self.draft_changed.emit()

    def _on_plan_changed(self) -> None:
        had_changes = self.has_changes and self.running is not None
        self.running = self._session.plan
        if self.running is not None and (self.draft is None or not had_changes):
            self.draft = self.running
            self.asked = None
        if self._take_columns():
            self.devices_changed.emit()
        self.draft_changed.emit()

    def _on_nodes_changed(self) -> None:
        if self._take_columns():
            self.draft_changed.emit()
        available = set(self._session.available_devices())
        if available != self._seen_devices:
            self._seen_devices = available
            self.devices_changed.emit()
