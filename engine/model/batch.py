"""What a step computes on, in plain numbers: shared by messages, scheduler and kernels."""

from __future__ import annotations

from typing import Literal

import msgspec

ComputeDtype = Literal["float32", "bfloat16", "int8"]
# All tokens of a step are prompt tokens, or all are generated ones: a token's arithmetic depends
# on its kind and not on its company.
StepKind = Literal["prompt", "generated"]


# Columns that share one scale in int8.
INT8_GROUP = 32


class Segment(
    msgspec.Struct, frozen=True, kw_only=True, array_like=True, forbid_unknown_fields=True
):
    """A run of new tokens of one slot.

    Attributes:
        first_position: absolute position of the first token.
        logit_offsets: offsets in [0, token_count) whose logits are wanted.
    """

    slot: int
    first_position: int
    token_count: int
    logit_offsets: tuple[int, ...]
