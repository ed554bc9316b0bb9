"""What a step computes on, in plain numbers: shared by messages, scheduler and kernels."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

ComputeDtype = Literal["float32", "bfloat16", "int8", "int4"]
# All tokens of a step are prompt tokens, or all are generated ones: a token's arithmetic depends
# on its kind and not on its company.
StepKind = Literal["prompt", "generated"]

# What a peer may say where a number counts things, or names one of them. Sums of many of them still
# fit into 64 bits.
Count = Annotated[int, msgspec.Meta(ge=0, le=1 << 53)]
Index = Annotated[int, msgspec.Meta(ge=0, le=(1 << 31) - 1)]


# Columns that share one scale in int8, and one scale and minimum in int4.
GROUP_COLUMNS = 32


class Segment(
    msgspec.Struct, frozen=True, kw_only=True, array_like=True, forbid_unknown_fields=True
):
    """A run of new tokens of one slot.

    Attributes:
        first_position: absolute position of the first token.
        logit_offsets: offsets in [0, token_count) whose logits are wanted.
    """

    slot: Index
    first_position: Index
    token_count: Index
    logit_offsets: tuple[Index, ...]
