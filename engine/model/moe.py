"""Which experts a token visits, and with what weight.

T tokens, E experts, K experts a token visits, M model width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.model.config import Experts


@dataclass(frozen=True, slots=True)
class Routing:
    """Where the tokens of a step go.

    Attributes:
        experts: int64 [T, K], distinct within a row.
        weights: float32 [T, K].
    """

    experts: Tensor
    weights: Tensor

    def visits(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Each expert that has tokens, in ascending order.

        Yields: the expert, int64 [n] rows of its tokens ascending, float32 [n, 1] their weights.
        """
        flat = self.experts.flatten()
        # Stable: a token's place among an expert's does not depend on its company's order.
        order = torch.argsort(flat, stable=True)
        used = self.experts.shape[1]
        counts: list[int] = torch.bincount(flat).tolist()  # pyright: ignore
        weights_N = self.weights.flatten()
        start = 0
        for expert, count in enumerate(counts):
            if count:
                chosen = order[start : start + count]
                yield expert, chosen // used, weights_N[chosen, None]
                start += count


def route(
    x_TM: Tensor, norm_weight_M: Tensor, epsilon: float, router_EM: Tensor, experts: Experts
) -> Routing:
    """Choose experts from the residual stream.

    In float64 from the norm on, so that devices of different kinds, which round differently,
    cannot disagree about a near-tie. Gradients flow into router and stream.

    Args:
        x_TM: float32 residual stream, before the norm.
        norm_weight_M: the weight that the norm multiplies by.
        epsilon: of the norm.
        router_EM: float32.
    Source: Mixtral: arXiv 2401.04088; Llama 4: transformers models/llama4.
    """
    x = x_TM.double()
    scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon)
    logits_TE = (x * scale * norm_weight_M.double()) @ router_EM.double().T
    if experts.router == "sigmoid":
        chosen, ids = torch.topk(logits_TE, experts.used, dim=-1)
        weights = torch.sigmoid(chosen)
    else:
        weights, ids = torch.topk(torch.softmax(logits_TE, dim=-1), experts.used, dim=-1)
    if experts.is_normalized:
        weights = weights / weights.sum(-1, keepdim=True)
    return Routing(ids, weights.float())
