"""Root mean square normalisation, with and without a weight."""

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


def l2_norm(x: Tensor, epsilon: float) -> Tensor:
    """Scale each row to root mean square 1; Llama 4 calls it so, though it takes the mean.

    Args:
        x: float32 [..., width].
    Returns: float32 [..., width].
    """
    return torch.nn.functional.rms_norm(x, (x.shape[-1],), None, epsilon)
