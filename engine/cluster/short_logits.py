"""The short form of a vocabulary shard's logits: enough for most choices, small on the wire.

In: raw logits. Out: the four tensors of a StepAnswer in form "top".
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from engine.cluster.messages import TOP_LOGITS, Array, LogitsWanted
from engine.errors import ProtocolError


def check_wanted(wanted: LogitsWanted, count: int) -> None:
    """Check what a step asks against the number of positions that need logits.

    Raises: ProtocolError: lists of another length, or a temperature that is not one.
    """
    if wanted.form == "full":
        return
    if len(wanted.ids) != count or len(wanted.temperatures) != count:
        raise ProtocolError(
            f"{count} positions need logits, the step names {len(wanted.ids)} id lists and "
            f"{len(wanted.temperatures)} temperatures"
        )
    if not all(math.isfinite(t) and t >= 0 for t in wanted.temperatures):
        raise ProtocolError("a temperature is not a number >= 0")


def short_form(logits_NV: Tensor, wanted: LogitsWanted, first_id: int) -> list[Array]:
    """The largest logits, the log-sum-exp of what was not asked for, and the ids asked for.

    Args:
        logits_NV: raw logits of the shard's vocabulary rows, from `first_id` on.
        wanted: checked by `check_wanted`.
    Returns: int64 [N, K], float32 [N, K], float64 [N], float32 [M].
    """
    count, rows = logits_NV.shape
    values, ids = torch.topk(logits_NV, min(TOP_LOGITS, rows), dim=-1)
    log_sums = torch.zeros(count, dtype=torch.float64)
    own = [[i - first_id for i in a if first_id <= i < first_id + rows] for a in wanted.ids]
    for n, temperature in enumerate(wanted.temperatures):
        if temperature:  # A greedy choice needs no sum.
            scaled = logits_NV[n].double() / temperature
            # The sampler adds these itself, changed: taking them out again would cancel digits.
            scaled[own[n]] = -torch.inf
            log_sums[n] = torch.logsumexp(scaled, 0)
    asked = [logits_NV[n, i] for n, ids_of_n in enumerate(own) for i in ids_of_n]
    asked_values = torch.stack(asked) if asked else logits_NV.new_empty(0)
    return [
        (ids + first_id).cpu().numpy(),
        values.float().cpu().numpy(),
        log_sums.numpy(),
        asked_values.float().cpu().numpy(),
    ]
