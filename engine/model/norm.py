"""Root mean square normalisation."""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Scale each row to root mean square 1, then by the weight.

    Args:
        x: float32 [..., width].
        weight: float32 [width].
    Returns: float32 [..., width].
    Source: arXiv 1910.07467.
    """
    return torch.nn.functional.rms_norm(x, (x.shape[-1],), weight, epsilon)
