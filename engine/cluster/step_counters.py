"""What a device did in one step: times and bytes, in all and by link."""

from __future__ import annotations

from dataclasses import dataclass, field

from engine.cluster.messages import LinkTraffic


@dataclass(slots=True)
class LinkCounters:
    """What went over one link in a step."""

    sent_bytes: int = 0
    received_bytes: int = 0
    wait_ns: int = 0


@dataclass(slots=True)
class Counters:
    """What a device did in a step; the names are those of StepAnswer."""

    compute_ns: int = 0
    wait_ns: int = 0
    serialise_ns: int = 0
    sent_bytes: int = 0
    received_bytes: int = 0
    by_link: dict[int, LinkCounters] = field(default_factory=dict[int, LinkCounters])

    def link(self, index: int) -> LinkCounters:
        """The counters of the link to a device."""
        found = self.by_link.get(index)
        if found is None:
            found = self.by_link[index] = LinkCounters()
        return found

    def links(self) -> tuple[LinkTraffic, ...]:
        """As a StepAnswer carries them."""
        return tuple(
            LinkTraffic(
                device_index=index,
                sent_bytes=link.sent_bytes,
                received_bytes=link.received_bytes,
                wait_ns=link.wait_ns,
            )
            for index, link in sorted(self.by_link.items())
        )
