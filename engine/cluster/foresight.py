"""Which token an engine host will choose, as far as the device that computes its logits can tell.

In: the short form of one position's logits, and how tokens are drawn. Out: a token id. The host
chooses every token itself, by the same rules: what is foreseen here only saves it a wait.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from engine.cluster.messages import Array, Step
from engine.errors import ProtocolError
from engine.sampling.choice import ShardLogits, choose, merge_shards
from engine.sampling.logit_changes import NO_CHANGES


def check_draw(step: Step) -> None:
    """Check what a step says of its draws.

    Raises: ProtocolError: a number that means nothing, or another temperature than the sums have.
    """
    draw = step.draw
    if draw is None:
        return
    temperature = draw.temperature
    # What is no number is neither above nor below anything.
    rules = {
        "temperature above 0": (temperature, 0 < temperature < math.inf),
        "temperature as of its sums": (temperature, step.logits.temperatures == (temperature,)),
        "top_p above 0 and at most 1": (draw.top_p, 0 < draw.top_p <= 1),
        "min_p from 0 to 1": (draw.min_p, 0 <= draw.min_p <= 1),
        "noises from 0 to below 1": (draw.noises, all(0 <= n < 1 for n in draw.noises)),
    }
    for rule, (found, is_kept) in rules.items():
        if not is_kept:
            raise ProtocolError(f"a draw must have {rule}, the step says {found}")


def foresee(short: Sequence[Array], step: Step, n: int, num_rows: int) -> int | None:
    """The token that follows a position.

    Args:
        short: of this position alone, as `short_form` gives it, of the whole vocabulary.
        step: checked; the n-th of its noises counts, where it has a draw.
        num_rows: of the vocabulary.
    Returns: None where that cannot be told.
    """
    draw = step.draw
    ids, values, log_sums = (short[i][0] for i in range(3))
    if draw is None:
        return int(ids[0])
    if n >= len(draw.noises):
        return None
    shard = ShardLogits(ids.tolist(), values.tolist(), {}, float(log_sums), len(ids) == num_rows)
    return choose(merge_shards([shard]), draw, NO_CHANGES, draw.noises[n])
