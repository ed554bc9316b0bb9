"""Which key each query may see, as a function of absolute positions alone."""

from __future__ import annotations

from torch import Tensor

from engine.model.view import View


def visible_mask(view: View, query_positions_T: Tensor, key_positions_S: Tensor) -> Tensor:
    """True where the key may be seen.

    Args:
        query_positions_T: int64 [T].
        key_positions_S: int64 [S].
    Returns: bool [T, S].
    """
    queries, keys = query_positions_T[:, None], key_positions_S[None, :]
    visible = (keys <= queries) & (keys > queries - view.reach)
    if view.chunk:
        # By absolute position: the first token of a chunk sees only itself.
        visible &= keys // view.chunk == queries // view.chunk
    return visible
