"""Puts the vocabulary shards' answers to a step together, after checking every shape.

In: the answers of all devices and the plan. Out: candidates for the sampler, or the full logits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from operator import lt

import numpy as np

from engine.cluster import messages as m
from engine.cluster.coordinator import DeviceAnswer
from engine.errors import ProtocolError
from engine.plan.plan import Plan
from engine.sampling.choice import Candidates, ShardLogits, merge_shards


def gather_candidates(
    plan: Plan, answers: Sequence[DeviceAnswer], asked: Sequence[Sequence[int]]
) -> list[Candidates]:
    """The short form of every position.

    Args:
        answers: to a step that wanted form "top".
        asked: per position, the ids that were asked for, ascending.
    Returns: candidates per position.
    Raises: ProtocolError: a device answered with something else than it was asked for.
    """
    head = plan.shape.head_row
    shards: list[list[ShardLogits]] = [[] for _ in asked]
    for index in plan.group(head):
        first, end = plan.unit_range(head, index)
        for position, shard in enumerate(_shards(plan, index, first, end, answers, asked)):
            shards[position].append(shard)
    return [merge_shards(s) for s in shards]


def continued_ids(plan: Plan, answers: Sequence[DeviceAnswer], most: int) -> tuple[int, ...]:
    """Tokens that the only device of a plan went on with.

    Raises: ProtocolError: more than it was allowed to, or such as there are not.
    """
    index = plan.group(plan.shape.head_row)[0]
    ids = next((a.answer.continued for a in answers if a.device_index == index), ())
    _, vocab_size = plan.unit_range(plan.shape.head_row, index)
    if len(ids) > most or any(i >= vocab_size for i in ids):
        raise ProtocolError(
            f"{plan.devices[index]} went on with {len(ids)} tokens, at most {most} were asked for "
            f"with ids below {vocab_size:,}"
        )
    return ids


def join_full_logits(plan: Plan, answers: Sequence[DeviceAnswer], count: int) -> m.Array:
    """All logits, float32 [count, vocab_size].

    Raises: ProtocolError: a device answered with something else than it was asked for.
    """
    head = plan.shape.head_row
    parts: list[m.Array] = []
    for index in plan.group(head):
        tensors = _tensors_of(plan, index, answers, 1)
        first, end = plan.unit_range(head, index)
        what = f"logits of {plan.devices[index]}"
        parts.append(m.expect_tensor(tensors[0], "float32", (count, end - first), what))
    return np.concatenate(parts, axis=1)


def _tensors_of(
    plan: Plan, index: int, answers: Sequence[DeviceAnswer], count: int
) -> list[m.Array]:
    tensors = next((a.tensors for a in answers if a.device_index == index), list[m.Array]())
    if len(tensors) != count:
        raise ProtocolError(
            f"{plan.devices[index]} answered with {len(tensors)} tensors, expected {count}"
        )
    return tensors


def _shards(
    plan: Plan,
    index: int,
    first: int,
    end: int,
    answers: Sequence[DeviceAnswer],
    asked: Sequence[Sequence[int]],
) -> list[ShardLogits]:
    """One device's shard, per position."""
    ids, values, log_sums, raw_sums, asked_values = _tensors_of(plan, index, answers, 5)
    num_positions = len(asked)
    width = min(m.TOP_LOGITS, end - first)
    own = [[i for i in a if first <= i < end] for a in asked]
    what = f"logits of {plan.devices[index]}"
    m.expect_tensor(ids, "int64", (num_positions, width), what)
    m.expect_tensor(values, "float32", (num_positions, width), what)
    m.expect_tensor(log_sums, "float64", (num_positions,), what)
    m.expect_tensor(raw_sums, "float64", (num_positions,), what)
    m.expect_tensor(asked_values, "float32", (sum(len(o) for o in own),), what)
    asked_logits = asked_values.tolist()
    shards: list[ShardLogits] = []
    at = 0
    # Lists: for so few numbers an operation of numpy takes longer than a look at each.
    positions = zip(
        ids.tolist(), values.tolist(), log_sums.tolist(), raw_sums.tolist(), strict=True
    )
    for own_ids, (top_ids, logits, *sums) in zip(own, positions, strict=True):
        _check_position(what, top_ids, logits, sums, first, end)
        stop = at + len(own_ids)
        shards.append(
            ShardLogits(
                top_ids,
                logits,
                dict(zip(own_ids, asked_logits[at:stop], strict=True)),
                sums[0],
                width == end - first,
                sums[1],
            )
        )
        at = stop
    return shards


def _check_position(
    what: str, ids: list[int], logits: list[float], sums: list[float], first: int, end: int
) -> None:
    """Check what a device says of one position of its vocabulary rows [first, end).

    Raises: ProtocolError: it contradicts itself, or the rows.
    """
    if ids and not (first <= min(ids) and max(ids) < end):
        raise ProtocolError(f"{what}: an id lies outside {first} to {end - 1}")
    if len(set(ids)) < len(ids):
        raise ProtocolError(f"{what}: an id comes twice")
    if any(map(lt, logits, logits[1:])):  # False of what is no number.
        raise ProtocolError(f"{what}: the largest do not come first")
    # A sum may be no number only where a logit is none, as damaged weights make them.
    if any(map(math.isnan, sums)) and all(map(math.isfinite, logits)):
        raise ProtocolError(f"{what}: a log-sum-exp is not a number, though the logits are")
