"""Which token an engine host will choose, as far as the device that computes its logits can tell.

In: the short form of one position's logits, and how tokens are drawn. Out: a token id. The host
chooses every token itself, by the same rules: what is foreseen here only saves it a wait.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from engine.cluster.messages import Array, Draw
from engine.errors import ProtocolError
from engine.sampling.choice import ShardLogits, choose, merge_shards
from engine.sampling.logit_changes import NO_CHANGES


def check_draw(draw: Draw) -> None:
    """Check what a step says of its draws.

    Raises: ProtocolError: a number that means nothing.
    """
    # What is no number is not above anything.
    is_valid = 0 < draw.temperature < math.inf and 0 < draw.top_p <= 1 and 0 <= draw.min_p <= 1
    if not is_valid or not all(0 <= noise < 1 for noise in draw.noises):
        raise ProtocolError("a step says of its draws what means nothing")


def foresee(short: Sequence[Array], draw: Draw | None, n: int, num_rows: int) -> int | None:
    """The token that follows a position.

    Args:
        short: of this position alone, as `short_form` gives it, of the whole vocabulary.
        draw: checked; None where the likeliest token follows.
        n: which of its noises counts.
        num_rows: of the vocabulary.
    Returns: None where that cannot be told.
    """
    ids, values, log_sums = (short[i][0] for i in range(3))
    if draw is None:
        return int(ids[0])
    if n >= len(draw.noises):
        return None
    shard = ShardLogits(ids.tolist(), values.tolist(), {}, float(log_sums), len(ids) == num_rows)
    return choose(merge_shards([shard]), draw, NO_CHANGES, draw.noises[n])
