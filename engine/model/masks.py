"""Which key each query may see, as a function of absolute positions alone."""

from __future__ import annotations

from torch import Tensor


def causal_mask(query_positions_T: Tensor, key_positions_S: Tensor) -> Tensor:
    """True where the key is not later than the query.

    Args:
        query_positions_T: int64 [T].
        key_positions_S: int64 [S].
    Returns: bool [T, S].
    """
    return key_positions_S[None, :] <= query_positions_T[:, None]
