"""The plan in force, and what became of it: interruptions, detours, links, where weights came from.

In: the engine host's events about the plan. Out: plain values, and words for a person. No Qt.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from app.figures import figure_seconds
from engine.host.messages import Link, LoadedBytes, PlanApplied
from engine.plan.plan import Plan


@dataclass(frozen=True, slots=True)
class Interruption:
    """The split in force cannot run as it is, and another one is being put in its place.

    Attributes:
        message: names the device, its layers and the cause.
        started_s: when it was heard of, on the clock of the session.
    """

    message: str
    started_s: float


@dataclass(frozen=True, slots=True)
class Detour:
    """The split in force is another than the person chose.

    Attributes:
        words: of the split, such as "went on without laptop".
        note: why, as the engine host told it.
    """

    words: str
    note: str


@dataclass(slots=True)
class PlanInForce:
    """What runs now.

    Attributes:
        plan: None while there is none; while it is interrupted, still the one that broke.
        last_plan: the last one that was in force for this model.
        interruption: while a lost device is being worked around; None otherwise.
        detour: why it is another than was chosen; None where it is not.
        links: by the two devices.
        loaded: by device, where its weights came from in the last load.
    """

    plan: Plan | None = None
    last_plan: Plan | None = None
    interruption: Interruption | None = None
    detour: Detour | None = None
    links: dict[tuple[str, str], Link] = field(default_factory=dict)
    loaded: dict[str, LoadedBytes] = field(default_factory=dict)

    def computing_devices(self) -> list[str]:
        """Devices with a share."""
        plan = self.plan
        return [] if plan is None else [plan.devices[column] for column in plan.used_devices()]

    def interrupt(self, message: str, now: float) -> None:
        """A device was lost; a second one on the way belongs to the same pause."""
        earlier = self.interruption
        started_s = now if earlier is None else earlier.started_s
        self.interruption = Interruption(message, started_s)

    def take(self, applied: PlanApplied, label: Callable[[str], str]) -> list[str]:
        """A plan came into force.

        Returns: devices that were lost on the way to it.
        """
        interruption, lost = self.interruption, lost_devices(self.plan, applied.plan)
        self.interruption = self.detour = None
        if interruption is not None:
            self.detour = Detour(went_on_text(lost, label), applied.note or interruption.message)
        elif applied.note:
            self.detour = Detour("not as it was asked for", applied.note)
        self.plan = self.last_plan = applied.plan
        self.links = {}
        self.measure(applied.links)
        self.loaded = {item.device: item for item in applied.loaded}
        return lost if interruption is not None else []

    def measure(self, links: tuple[Link, ...]) -> None:
        """Take newer figures of some links."""
        self.links |= {(link.from_device, link.to_device): link for link in links}

    def drop(self) -> None:
        """Nothing runs any more; what ran last stays known."""
        self.plan = self.interruption = self.detour = None
        self.links, self.loaded = {}, {}


def lost_devices(before: Plan | None, after: Plan) -> list[str]:
    """Devices that had a share before and have none now."""
    if before is None:
        return []
    remaining = {after.devices[column] for column in after.used_devices()}
    devices = [before.devices[column] for column in before.used_devices()]
    return [device for device in devices if device not in remaining]


def went_on_text(lost: list[str], label: Callable[[str], str], seconds: float | None = None) -> str:
    """Such as "went on without laptop after 3.20 s".

    Args:
        lost: devices that no longer compute; may be empty.
        label: of a device, for a person.
        seconds: how long it stood still; None is not told.
    """
    names = [label(device) for device in lost]
    without = f" without {' and '.join(names)}" if names else ""
    after = "" if seconds is None else f" after {figure_seconds(round(seconds, 1))}"
    return f"went on{without}{after}"
