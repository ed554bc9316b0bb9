"""The short form of a vocabulary shard's logits: enough for most choices, small on the wire.

In: raw logits. Out: the five tensors of a StepAnswer in form "top".
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from engine.cluster.messages import TOP_LOGITS, Array, LogitsWanted
from engine.errors import ProtocolError
from engine.kernels.native_logits import largest, log_sum_exp


def check_wanted(wanted: LogitsWanted, count: int) -> None:
    """Check what a step asks against the number of positions that need logits.

    Raises: ProtocolError: lists of another length, or a temperature that is not one.
    """
    if wanted.form == "full":
        return
    lengths = (len(wanted.ids), len(wanted.temperatures), len(wanted.raw_sums))
    if lengths != (count, count, count):
        raise ProtocolError(
            f"{count} positions need logits, the step names {lengths[0]} id lists, {lengths[1]} "
            f"temperatures and {lengths[2]} wishes for raw sums"
        )
    if not all(math.isfinite(t) and t >= 0 for t in wanted.temperatures):
        raise ProtocolError("a temperature is not a number >= 0")


def short_form(logits_NV: Tensor, wanted: LogitsWanted, first_id: int) -> list[Array]:
    """The largest logits, two kinds of log-sum-exp, and the ids asked for.

    Args:
        logits_NV: raw logits of the shard's vocabulary rows, from `first_id` on.
        wanted: checked by `check_wanted`.
    Returns: int64 [N, K], float32 [N, K], float64 [N] at the request's temperature without the
        ids asked for, float64 [N] at temperature 1 with them, float32 [M].
    """
    count, rows = logits_NV.shape
    values, ids = largest(logits_NV, min(TOP_LOGITS, rows))
    log_sums, raw_sums = np.zeros(count), np.zeros(count)
    own = [[i - first_id for i in a if first_id <= i < first_id + rows] for a in wanted.ids]
    for n, temperature in enumerate(wanted.temperatures):
        if temperature:  # A greedy choice needs no sum.
            row = logits_NV[n]
            if own[n]:
                # The sampler adds these itself, changed: taking them out again would cancel digits.
                row = row.clone()
                row[own[n]] = -torch.inf
            log_sums[n] = log_sum_exp(row, temperature)
        if wanted.raw_sums[n]:
            raw_sums[n] = log_sum_exp(logits_NV[n], 1.0)
    asked = [
        logits_NV[n, own_ids].float().cpu().numpy() for n, own_ids in enumerate(own) if own_ids
    ]
    return [
        ids.numpy() + first_id,
        values.numpy(),
        log_sums,
        raw_sums,
        np.concatenate(asked) if asked else np.zeros(0, dtype=np.float32),
    ]
