"""Whatever way a hand-over takes, every receiver has the bits that the rule says.

The rule: partial sums are rounded to the wire, the sender's own too, added in device order, and
the sum is added to the stream. One line of numpy is the oracle.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from engine.cluster.collectives import hand_over_table, is_scattered
from engine.cluster.wire_format import from_wire, to_wire
from engine.errors import EngineError
from engine.plan.plan import Plan
from tests.engine.cluster.exchange_members import (
    WIDTH,
    Member,
    Members,
    add_doubled,
    plan_of_groups,
)

pytestmark = pytest.mark.network

FEW, MANY = 3, 700
WIRES = ("float32", "bfloat16", "float16")
Floats = NDArray[np.float32]


def draw_values(seed: int, num_tokens: int, plan: Plan) -> tuple[Floats, dict[int, Floats]]:
    """A stream, and the partial sum of every contributor of row 0."""
    draw = np.random.default_rng(seed)
    values = draw.standard_normal((1 + len(plan.devices), num_tokens, WIDTH)).astype(np.float32)
    return values[0], {index: values[1 + index] for index in plan.group(0)}


def expected_stream(x: Floats, parts: dict[int, Floats], wire: str) -> Floats:
    """What every receiver must hold."""
    rounded = [from_wire(to_wire(parts[index], wire)) for index in sorted(parts)]
    total = rounded[0]
    for part in rounded[1:]:
        total = total + part
    return add_doubled(0, x, total)


def exchange_once(members: Members, plan: Plan, num_tokens: int, kind: Any = "prompt") -> bool:
    """One hand-over after row 0; returns whether it was scattered."""
    x, parts = draw_values(num_tokens, num_tokens, plan)
    expected = expected_stream(x, parts, plan.wire_of(kind))

    def work(member: Member) -> Floats | None:
        member.exchange.begin_step(1, kind)
        part = parts.get(member.index)
        stream = None if part is None else x
        if part is None and member.index not in plan.group(1):
            return None
        return member.exchange.hand_over(0, stream, part, num_tokens)

    for index, found in enumerate(members.all_do(work)):
        if index not in plan.group(1):
            assert found is None
            continue
        assert found is not None
        np.testing.assert_array_equal(found, expected, err_msg=f"device {index}")
    table = hand_over_table(plan, 0)[0]
    return is_scattered(table, num_tokens, WIDTH, plan.wire_of(kind))


# Contributors and receivers, and from which wire width on many tokens are scattered.
CASES: dict[str, tuple[list[int], list[int], dict[str, bool]]] = {
    "two": ([0, 1], [0, 1], {"float32": False, "bfloat16": False}),
    "three": ([0, 1, 2], [0, 1, 2], {"float32": True, "bfloat16": False}),
    "five": ([0, 1, 2, 3, 4], [0, 1, 2, 3, 4], {"float32": True, "float16": True}),
    "a newcomer": ([0, 1, 2], [1, 2, 3], {"float32": True}),
    "only newcomers": ([1, 3], [0, 2, 4], {"float32": True, "bfloat16": True}),
    "one to many": ([2], [0, 1, 2, 3, 4], {"float32": True}),
    "many to one": ([0, 2, 4], [3], {"float32": False}),
}


@pytest.mark.parametrize("name", CASES)
def test_both_ways_give_the_bits_of_the_rule(name: str) -> None:
    contributors, receivers, wires = CASES[name]
    for wire, expects_parts in wires.items():
        plan = plan_of_groups([contributors, receivers, receivers], 5, wire)
        with Members(plan) as members:
            assert exchange_once(members, plan, MANY) is expects_parts
            assert exchange_once(members, plan, FEW) is False


@settings(max_examples=12, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_any_groups_and_wires(data: st.DataObject) -> None:
    num_devices = data.draw(st.integers(2, 5))
    group = st.sets(st.integers(0, num_devices - 1), min_size=1).map(sorted)
    contributors, receivers = data.draw(group), data.draw(group)
    wire, prompt_wire = data.draw(st.sampled_from(WIRES)), data.draw(st.sampled_from(WIRES))
    kind = data.draw(st.sampled_from(["prompt", "generated"]))
    num_tokens = data.draw(st.sampled_from([1, FEW, MANY, 2 * MANY + 1]))
    plan = plan_of_groups(
        [contributors, receivers, receivers], num_devices, wire, prompt_wire=prompt_wire
    )
    with Members(plan) as members:
        exchange_once(members, plan, num_tokens, kind)


def test_pieces_under_way_together_do_not_mix() -> None:
    """Begun in order, they may be finished in another one."""
    plan = plan_of_groups([[0, 1, 2], [0, 1, 2], [0, 1, 2]], 3)
    drawn = [draw_values(seed, MANY, plan) for seed in range(3)]

    def work(member: Member) -> list[Floats | None]:
        exchange = member.exchange
        exchange.begin_step(1, "prompt")
        for piece, (x, parts) in enumerate(drawn):
            exchange.start(0, piece, x, parts[member.index], MANY)
        order = [(member.index + n) % 3 for n in range(3)]
        found = {piece: exchange.finish(0, piece) for piece in order}
        return [found[piece] for piece in range(3)]

    with Members(plan) as members:
        results = members.all_do(work)
    for streams in results:
        for (x, parts), stream in zip(drawn, streams, strict=True):
            np.testing.assert_array_equal(stream, expected_stream(x, parts, "float32"))


def test_scattering_sends_fewer_bytes() -> None:
    plan = plan_of_groups([[0, 1, 2, 3, 4]] * 3, 5)
    with Members(plan) as members:
        assert exchange_once(members, plan, MANY)
        counters = [member.exchange.counters for member in members.members]
    stream_bytes = MANY * WIDTH * 4
    for index, counted in enumerate(counters):
        assert counted.sent_bytes == pytest.approx(2 * 4 / 5 * stream_bytes, rel=0.02)
        assert counted.sent_bytes < 4 * stream_bytes / 2
        links = {link.device_index: link for link in counted.links()}
        assert links.keys() == {0, 1, 2, 3, 4} - {index}
        assert sum(link.sent_bytes for link in links.values()) == counted.sent_bytes
        assert sum(link.received_bytes for link in links.values()) == counted.received_bytes
        assert sum(link.wait_ns for link in links.values()) == counted.wait_ns


def test_a_number_past_float16_is_an_error_and_not_infinity() -> None:
    plan = plan_of_groups([[0, 1], [0, 1], [0, 1]], 2, "float16")
    values = np.full((1, WIDTH), 70_000, np.float32)
    with Members(plan) as members:
        exchange = members.members[0].exchange
        exchange.begin_step(1, "generated")
        with pytest.raises(EngineError, match="65,504"):
            exchange.hand_over(0, values, values, 1)
