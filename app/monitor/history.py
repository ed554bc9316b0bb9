"""The last minutes of work, kept for charts. Plain numbers, no Qt.

In: `Throughput` structs. Out: numpy series of tokens per second, and per device how the time went,
in bins that fit a chart's width.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from engine.host.messages import DeviceUsage, Throughput

Floats = npt.NDArray[np.float64]

MAX_SAMPLES = 6000  # ten minutes at eight a second, and some
GAP_SECONDS = 1.0
SMOOTH_SECONDS = 1.0
# So long after the last step the speed is unknown again.
QUIET_SECONDS = 3.0
KINDS = ("compute", "wait", "network")


class Ring:
    """The last `capacity` rows of numbers, always readable as one contiguous view.

    Every row is written twice, half the buffer apart, so that no view ever wraps.
    """

    def __init__(self, capacity: int, num_columns: int) -> None:
        """An empty ring."""
        self._capacity = capacity
        self._rows: Floats = np.zeros((2 * capacity, num_columns))
        self._next = 0
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def append(self, row: tuple[float, ...]) -> None:
        """Add one row; the oldest leaves when the ring is full."""
        self._rows[self._next] = row
        self._rows[self._next + self._capacity] = row
        self._next = (self._next + 1) % self._capacity
        self._length = min(self._length + 1, self._capacity)

    def view(self) -> Floats:
        """All rows, oldest first; valid until the next append."""
        end = self._next + self._capacity
        return self._rows[end - self._length : end]


@dataclass(frozen=True, slots=True)
class DeviceTotals:
    """How a device spent a stretch of time, in fractions of it; what is missing to 1 was idle."""

    device: str
    compute: float
    wait: float
    network: float


class History:
    """What the charts draw.

    Attributes:
        devices: every device that has worked, in the order of its first work.
    """

    def __init__(self, capacity: int = MAX_SAMPLES) -> None:
        """Nothing has happened yet."""
        self._capacity = capacity
        # time, seconds, prompt tokens, generated tokens
        self._rates = Ring(capacity, 4)
        # time, seconds, compute, wait, network
        self._devices: dict[str, Ring] = {}

    @property
    def devices(self) -> list[str]:
        """Devices that have worked."""
        return list(self._devices)

    def add(self, sample: Throughput) -> None:
        """Take what the last stretch of time did."""
        seconds = max(sample.seconds, 1e-6)
        self._rates.append((sample.time_s, seconds, sample.prompt_tokens, sample.generated_tokens))
        for usage in sample.devices:
            ring = self._devices.setdefault(usage.device, Ring(self._capacity, 5))
            ring.append((sample.time_s, seconds, *_fitted(usage, seconds)))

    def rate_series(self, now: float, window: float) -> tuple[Floats, Floats]:
        """Generated tokens per second over time.

        Args:
            now: seconds since the epoch.
            window: seconds to look back.
        Returns: x in seconds before now (negative), y in tok/s; NaN marks a gap.
        """
        rows = _recent(self._rates.view(), now - window)
        if not len(rows):
            return np.zeros(0), np.zeros(0)
        x = rows[:, 0] - now
        starts = rows[1:, 0] - rows[1:, 1]
        gaps = np.flatnonzero(starts - rows[:-1, 0] > GAP_SECONDS) + 1
        tokens, seconds = _running_sums(rows, gaps)
        # While a prompt is read, or nothing runs, there is no speed of generation.
        y = np.where(rows[:, 3] > 0, tokens / seconds, np.nan)
        return np.insert(x, gaps, np.nan), np.insert(y, gaps, np.nan)

    def rate_now(self, now: float) -> float | None:
        """Generated tokens per second over the last second of work; None when nothing ran."""
        return self._rate(now, 3)

    def prompt_rate_now(self, now: float) -> float | None:
        """Prompt tokens per second over the last second of work; None when nothing was read."""
        return self._rate(now, 2)

    def device_bins(self, device: str, now: float, window: float, num_bins: int) -> Floats:
        """How a device's time went.

        Returns: [num_bins, 3] fractions of each bin's length: compute, wait, network; they sum to
            at most 1, the rest was idle. Bin 0 is the oldest.
        """
        bins: Floats = np.zeros((num_bins, len(KINDS)))
        ring = self._devices.get(device)
        if ring is None:
            return bins
        width = window / num_bins
        # Bins stand still in absolute time, so that their heights do not shimmer while they move.
        first = np.floor(now / width) - num_bins + 1
        rows = _recent(ring.view(), first * width)
        if not len(rows):
            return bins
        edges = (first + np.arange(num_bins + 1)) * width
        # Time spent up to the start and the end of every sample, read off at the bins' edges.
        knots = np.maximum.accumulate(np.stack([rows[:, 0] - rows[:, 1], rows[:, 0]], 1).ravel())
        for kind in range(len(KINDS)):
            spent = np.cumsum(rows[:, 2 + kind])
            totals = np.stack([spent - rows[:, 2 + kind], spent], 1).ravel()
            bins[:, kind] = np.diff(np.interp(edges, knots, totals)) / width
        return bins / np.maximum(bins.sum(axis=1, keepdims=True), 1.0)

    def totals(self, now: float, window: float = 2.0) -> list[DeviceTotals]:
        """How every device spent the last moment of work; empty when nothing ran."""
        totals: list[DeviceTotals] = []
        for device, ring in self._devices.items():
            rows = _recent(ring.view(), now - window)
            if len(rows):
                seconds = rows[:, 1].sum()
                compute, wait, network = (rows[:, column].sum() / seconds for column in (2, 3, 4))
                totals.append(DeviceTotals(device, float(compute), float(wait), float(network)))
        return totals

    def _rate(self, now: float, column: int) -> float | None:
        rows = _recent(self._rates.view(), now - QUIET_SECONDS)
        rows = rows[rows[:, column] > 0]
        if not len(rows):
            return None
        # From the newest back until a second is full; one slow step may take longer than that.
        spent = np.cumsum(rows[::-1, 1])
        count = int(np.searchsorted(spent, SMOOTH_SECONDS)) + 1
        return float(rows[-count:, column].sum() / rows[-count:, 1].sum())


def bottleneck_text(totals: list[DeviceTotals], names: dict[str, str]) -> str:
    """Who waits for whom, in words; empty where nobody works.

    Args:
        names: of the devices, for a person.
    """
    if not totals:
        return ""
    if len(totals) == 1:
        return "nobody waits: one device computes everything"
    slowest = max(totals, key=lambda item: item.compute)
    others = [item for item in totals if item is not slowest]
    waiting = sum(item.wait + item.network for item in others) / len(others)
    name = names.get(slowest.device, slowest.device)
    if waiting < 0.1:
        return "well balanced: nobody waits long"
    return f"the others wait {100 * waiting:.0f} % of the time, mostly for {name}"


def _running_sums(rows: Floats, gaps: npt.NDArray[np.intp]) -> tuple[Floats, Floats]:
    """Generated tokens and seconds of the last moment at each sample, not across gaps.

    A sample of 125 ms holds few tokens, so that single ones would jump between whole numbers.
    """
    works = rows[:, 3] > 0
    tokens = np.concatenate([[0.0], np.cumsum(rows[:, 3])])
    seconds = np.concatenate([[0.0], np.cumsum(np.where(works, rows[:, 1], 0.0))])
    places = np.arange(len(rows))
    firsts = np.searchsorted(rows[:, 0], rows[:, 0] - SMOOTH_SECONDS, side="right")
    starts = np.zeros(len(rows), dtype=np.intp)
    starts[gaps] = gaps
    firsts = np.maximum(firsts, np.maximum.accumulate(starts))
    spent = seconds[places + 1] - seconds[firsts]
    return tokens[places + 1] - tokens[firsts], np.maximum(spent, 1e-6)


def _recent(rows: Floats, since: float) -> Floats:
    return rows[np.searchsorted(rows[:, 0], since, side="left") :]


def _fitted(usage: DeviceUsage, seconds: float) -> tuple[float, float, float]:
    """Compute, wait and network seconds, scaled down where clocks made them exceed the stretch."""
    spent = (usage.compute_s, usage.wait_s, usage.network_s)
    scale = min(1.0, seconds / max(sum(spent), 1e-9))
    return spent[0] * scale, spent[1] * scale, spent[2] * scale
