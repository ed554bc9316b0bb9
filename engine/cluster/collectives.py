"""Who sends how much to whom after a plan row: the hand-over rule in plain numbers.

In: a plan row's groups, the number of tokens, the wire format. Out: the owners and parts of a
collective, and which of the two costs less. Pure; what is sent is `exchange`'s business.

*Direct*: every contributor sends its whole partial sum to every receiver. One hop.
*Scattered*: the tokens are cut into one contiguous part per owner. Every contributor sends each
owner its part of the partial sum; the owner adds in device order, adds the residual stream, and
sends its finished part of the stream to the other receivers. Two hops. The second carries float32:
a sum of rounded parts fits no narrower format, and the result must be that of the direct way bit
for bit.

Bytes that each of k devices sends, for a float32 stream of S bytes and wire values of w bytes each
(of 4), where all k contribute and receive: direct (k - 1) · S · w/4, scattered
(k - 1)/k · S · (w + 4)/4. With a float32 wire the second is less from 3 devices on (two are even),
with a wire of 2 bytes from 4 on (three are even).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from engine.plan.plan import Plan

WIRE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
STREAM_BYTES = 4
# What a second hop must save on the busiest device: a link of 1 Gbit/s carries this in half a
# millisecond, about what a hop costs there with its wake-ups.
EXTRA_HOP_BYTES = 64 << 10


@dataclass(frozen=True, slots=True)
class RowHandOver:
    """What one device does after a row.

    Attributes:
        contributors: device indexes with a share in this row, in order.
        receivers: those with a share in the next row.
        newcomers: receivers that did not contribute, and so lack the residual stream.
    """

    contributors: tuple[int, ...]
    receivers: tuple[int, ...]
    newcomers: frozenset[int]
    contributes: bool
    receives: bool

    @property
    def is_local(self) -> bool:
        """Whether nothing crosses a process border."""
        return self.contributors == self.receivers and len(self.receivers) == 1

    @property
    def is_alone(self) -> bool:
        """Whether one device holds the whole sum, so that it can finish the stream itself."""
        return len(self.contributors) == 1

    @property
    def owners(self) -> tuple[int, ...]:
        """Who finishes a part of the tokens when they are scattered."""
        if self.is_alone:
            return tuple(index for index in self.receivers if index not in self.contributors)
        return self.receivers


def hand_over_table(plan: Plan, device_index: int) -> list[RowHandOver]:
    """What a device does after each row but the last."""
    table: list[RowHandOver] = []
    for row in range(plan.shape.num_rows - 1):
        contributors, receivers = plan.group(row), plan.group(row + 1)
        table.append(
            RowHandOver(
                contributors,
                receivers,
                frozenset(receivers) - frozenset(contributors),
                device_index in contributors,
                device_index in receivers,
            )
        )
    return table


def token_parts(num_tokens: int, num_owners: int) -> list[tuple[int, int]]:
    """Contiguous half-open ranges, one for each owner, as even as can be; some may be empty."""
    borders = [num_tokens * n // num_owners for n in range(num_owners + 1)]
    return list(pairwise(borders))


def busiest_bytes(
    table: RowHandOver, num_tokens: int, width: int, wire: str, *, is_scattered: bool
) -> int:
    """Bytes that the busiest device sends or receives, headers aside.

    Devices send at the same time and links carry both directions, so this is what takes long.
    """
    sent: dict[int, int] = {}
    received: dict[int, int] = {}

    def send(source: int, target: int, num_bytes: int) -> None:
        if source != target:
            sent[source] = sent.get(source, 0) + num_bytes
            received[target] = received.get(target, 0) + num_bytes

    first = table.contributors[0]
    targets = table.owners if is_scattered else table.receivers
    parts = token_parts(num_tokens, len(targets)) if is_scattered else [(0, num_tokens)]
    for n, target in enumerate(targets):
        start, end = parts[n] if is_scattered else parts[0]
        values = (end - start) * width
        if table.is_alone:
            send(first, target, values * STREAM_BYTES)
        else:
            for contributor in table.contributors:
                send(contributor, target, values * WIRE_BYTES[wire])
            if target in table.newcomers:
                send(first, target, values * STREAM_BYTES)
        if is_scattered:
            for other in table.owners:
                send(target, other, values * STREAM_BYTES)
    return max([0, *sent.values(), *received.values()])


def is_scattered(table: RowHandOver, num_tokens: int, width: int, wire: str) -> bool:
    """Whether a hand-over is worth two hops. All devices come to the same answer.

    Args:
        num_tokens: that cross together.
        width: of the residual stream.
    """
    if len(table.owners) < 2:
        return False
    direct = busiest_bytes(table, num_tokens, width, wire, is_scattered=False)
    if direct <= EXTRA_HOP_BYTES:
        return False
    scattered = busiest_bytes(table, num_tokens, width, wire, is_scattered=True)
    return scattered + EXTRA_HOP_BYTES < direct


@dataclass(frozen=True, slots=True)
class Way:
    """How a number of tokens is handed over after a row, as one device sees it.

    Attributes:
        targets: the half-open range of tokens that each device adds up; those with none left out.
        needed: whose finished tokens make up the result, in the order of the tokens.
        others: contributors besides this device.
        adds: whether this device adds parts up.
        is_swap: whether everyone gives everyone its partial sum, and that is all.
    """

    table: RowHandOver
    is_alone: bool
    is_scattered: bool
    targets: dict[int, tuple[int, int]]
    needed: tuple[int, ...]
    others: tuple[int, ...]
    adds: bool
    is_swap: bool = False


def way_of(table: RowHandOver, me: int, num_tokens: int, width: int, wire: str) -> Way:
    """How a device hands over so many tokens.

    Args:
        table: of device `me`.
        width: of the residual stream.
    """
    others = tuple(index for index in table.contributors if index != me)
    if not is_scattered(table, num_tokens, width, wire):
        whole = {receiver: (0, num_tokens) for receiver in table.receivers}
        adds = table.receives and bool(others)
        is_swap = adds and table.contributes and table.contributors == table.receivers
        return Way(table, table.is_alone, False, whole, (me,), others, adds, is_swap)
    parts = zip(table.owners, token_parts(num_tokens, len(table.owners)), strict=True)
    targets = {owner: part for owner, part in parts if part[0] < part[1]}
    # Who holds the whole sum needs nobody.
    needed = (me,) if table.is_alone and table.contributes else tuple(targets)
    return Way(table, table.is_alone, True, targets, needed, others, me in targets)
