"""Both transports, behind one interface and in real processes, do what the hand-over rule says."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.plan.plan import TRANSPORTS, WIRE_FORMATS, Plan, PlanShape
from tests.engine.cluster.collective_process import Devices, Job, StepJob, expected_streams

pytestmark = pytest.mark.network

NUM_DEVICES = 3
SHAPE = PlanShape(
    num_layers=2, num_heads=3, num_kv_heads=1, mlp_width=96, vocab_size=700, head_quantum=256
)
EPOCHS = count(1)


@pytest.fixture(scope="module")
def devices() -> Iterator[Devices]:
    """Three processes."""
    with Devices(NUM_DEVICES) as started:
        yield started


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    """Any groups in any rows."""
    names = tuple(f"node-{index}/cpu" for index in range(NUM_DEVICES))
    rows: list[tuple[int, ...]] = []
    for row in range(SHAPE.num_rows):
        group = sorted(draw(st.sets(st.integers(0, NUM_DEVICES - 1), min_size=1)))
        cells = [int(index in group) for index in range(NUM_DEVICES)]
        cells[group[-1]] += SHAPE.num_quanta(row) - len(group)
        rows.append(tuple(cells))
    wires: Any = st.sampled_from(WIRE_FORMATS)
    return Plan(SHAPE, names, tuple(rows), draw(wires), draw(wires)).validate()


def check(devices: Devices, plan: Plan, steps: tuple[StepJob, ...]) -> None:
    """Every device holds the rule's bits in every step that was not given up."""
    for transport in TRANSPORTS:
        cut = msgspec.structs.replace(plan, transport=transport)
        found = devices.do(Job(next(EPOCHS), cut, steps))
        for index in plan.used_devices():
            for step, streams in zip(steps, found[index], strict=True):
                expected = expected_streams(plan, step)
                rows = [r for r in range(SHAPE.num_rows) if index in plan.group(r)]
                assert list(streams) == ([] if step.is_given_up else rows)
                for row, stream in streams.items():
                    np.testing.assert_array_equal(
                        stream, expected[row], err_msg=f"{transport}, device {index}, row {row}"
                    )


@settings(max_examples=15)
@given(plan=plans(), num_tokens=st.integers(1, 9))
def test_any_groups_and_wires_give_the_bits_of_the_rule(
    devices: Devices, plan: Plan, num_tokens: int
) -> None:
    prompt = StepJob(step_id=1, kind="prompt", pieces=(num_tokens, 2))
    check(devices, plan, (prompt, StepJob(step_id=2, kind="generated", pieces=(1,))))


def test_large_messages_arrive_whole(devices: Devices) -> None:
    """Past what a socket's buffer holds, and where the sockets scatter."""
    rows = ((1, 1, 1), (1, 1, 1), (0, 1, 2), (1, 1, 1), (1, 1, 1))
    plan = Plan(SHAPE, ("a/cpu", "b/cpu", "c/cpu"), rows).validate()
    check(devices, plan, (StepJob(step_id=1, kind="prompt", pieces=(50_000, 30_000)),))


def test_a_step_that_was_given_up_leaves_nothing_behind(devices: Devices) -> None:
    rows = ((1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1))
    plan = Plan(SHAPE, ("a/cpu", "b/cpu", "c/cpu"), rows).validate()
    steps = [StepJob(step_id=1, kind="generated", pieces=(2,))]
    for step_id in (2, 4, 5):
        given_up = StepJob(step_id=step_id, kind="prompt", pieces=(4,), is_given_up=True)
        steps += [given_up]
    steps = sorted(
        [*steps, *(StepJob(step_id=n, kind="generated", pieces=(2,)) for n in (3, 6))],
        key=lambda step: step.step_id,
    )
    check(devices, plan, tuple(steps))
