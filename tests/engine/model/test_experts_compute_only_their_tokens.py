"""Routing equals a loop over all experts, and costs only what was routed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import silu

from engine.kernels.matrices import Float32Matrix
from engine.kernels.torch_kernels import Mlp, MlpShare, mlp_part
from engine.model.batch import StepKind
from engine.model.config import Experts, Layer, ModelConfig
from engine.model.moe import route
from engine.model.norm import rms_norm

WIDTH, COLUMNS = 18, 7


class CountingMatrix(Float32Matrix):
    """A real matrix that also counts the rows it was given."""

    def __init__(self, values_NK: Tensor) -> None:
        super().__init__(values_NK)
        self.num_rows = 0

    def multiply(self, x_TK: Tensor, kind: StepKind) -> Tensor:
        self.num_rows += x_TK.shape[0]
        return super().multiply(x_TK, kind)


@dataclass(frozen=True)
class Layer0:
    """One layer with experts, and the tensors it is made of."""

    config: ModelConfig
    share: MlpShare
    tensors: dict[str, Tensor]


def make_layer(experts: Experts, seed: int) -> Layer0:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) * 0.3

    config = ModelConfig(
        family="mixtral",
        width=WIDTH,
        layers=(Layer(mlp_width=COLUMNS, rope=-1, has_experts=True),),
        num_heads=1,
        num_kv_heads=1,
        head_width=4,
        vocab_size=9,
        norm_epsilon=1e-5,
        ropes=(),
        rope_layout="half",
        max_positions=9,
        is_head_tied=True,
        experts=experts,
    ).validate()
    tensors = {"norm": 1 + random(WIDTH), "router": random(experts.count, WIDTH)}
    for name in [*range(experts.count), *(["shared"] if experts.has_shared else [])]:
        tensors[f"{name} gate_up"] = random(2 * COLUMNS, WIDTH)
        tensors[f"{name} down"] = random(WIDTH, COLUMNS)

    def mlp(name: object) -> Mlp:
        return Mlp(
            gate_up=CountingMatrix(tensors[f"{name} gate_up"]),
            down=CountingMatrix(tensors[f"{name} down"]),
        )

    share = MlpShare(
        norm=tensors["norm"],
        dense=mlp("shared") if experts.has_shared else None,
        router=tensors["router"],
        experts=tuple(mlp(n) for n in range(experts.count)),
    )
    return Layer0(config, share, tensors)


def every_expert_sees_every_token(layer: Layer0, x: Tensor) -> Tensor:
    """The definition, in float64: all tokens through all experts, weights 0 for the rest."""
    experts = layer.config.experts
    assert experts is not None
    t = {name: tensor.double() for name, tensor in layer.tensors.items()}
    x = rms_norm(x.double(), t["norm"], layer.config.norm_epsilon)

    def mlp(name: object, value: Tensor) -> Tensor:
        gate, up = (value @ t[f"{name} gate_up"].T).chunk(2, dim=-1)
        return (silu(gate) * up) @ t[f"{name} down"].T

    logits = x @ t["router"].T
    scores = torch.sigmoid(logits) if experts.router == "sigmoid" else logits.softmax(-1)
    chosen = logits.topk(experts.used, dim=-1).indices
    weights = torch.zeros_like(scores).scatter(-1, chosen, scores.gather(-1, chosen))
    if experts.is_normalized:
        weights = weights / weights.sum(-1, keepdim=True)
    total = mlp("shared", x) if experts.has_shared else torch.zeros_like(x)
    for n in range(experts.count):
        weight = weights[:, n, None]
        if experts.weighs == "input":
            # A score of 0 gives an input of 0, and so an output of 0.
            total = total + mlp(n, x * weight)
        else:
            total = total + weight * mlp(n, x)
    return total


ANY_EXPERTS: Any = st.integers(1, 9).flatmap(
    lambda count: st.builds(
        Experts,
        count=st.just(count),
        used=st.integers(1, count),
        router=st.sampled_from(["softmax", "sigmoid"]),
        is_normalized=st.booleans(),
        weighs=st.sampled_from(["input", "output"]),
        has_shared=st.booleans(),
    )
)


@settings(deadline=None, max_examples=40)
@given(experts=ANY_EXPERTS, num_tokens=st.integers(1, 23), seed=st.integers(0, 99))
def test_equal_to_the_definition(experts: Experts, num_tokens: int, seed: int) -> None:
    layer = make_layer(experts, seed)
    x = torch.randn(num_tokens, WIDTH, generator=torch.Generator().manual_seed(seed + 1))
    found = mlp_part(x, layer.share, "prompt", layer.config)
    expected = every_expert_sees_every_token(layer, x).float()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("num_tokens", [1, 17])
def test_rows_computed_are_rows_routed(num_tokens: int) -> None:
    """The original sent every token through every expert: E rows a token instead of K."""
    experts = Experts(
        count=8, used=2, router="softmax", is_normalized=True, weighs="output", has_shared=True
    )
    layer = make_layer(experts, 5)
    mlp_part(torch.randn(num_tokens, WIDTH), layer.share, "prompt", layer.config)
    rows = [m.num_rows for e in layer.share.experts for m in (e.gate_up, e.down)]  # type: ignore[attr-defined]
    assert sum(rows) == 2 * num_tokens * experts.used
    assert layer.share.dense is not None
    assert layer.share.dense.down.num_rows == num_tokens  # type: ignore[attr-defined]


def test_company_does_not_change_a_tokens_experts() -> None:
    experts = Experts(
        count=8, used=2, router="softmax", is_normalized=True, weighs="output", has_shared=False
    )
    layer = make_layer(experts, 7)
    x = torch.randn(40, WIDTH)
    norm, router = layer.tensors["norm"], layer.tensors["router"]
    together = route(x, norm, 1e-5, router, experts)
    for n in range(40):
        alone = route(x[n : n + 1], norm, 1e-5, router, experts)
        assert torch.equal(alone.experts[0], together.experts[n])
        torch.testing.assert_close(alone.weights[0], together.weights[n], rtol=1e-6, atol=0)


def test_gradients_reach_router_and_stream() -> None:
    """The original detached the routed input: nothing below it, nor the router, could learn."""
    for weighs in ("input", "output"):
        experts = Experts(
            count=5, used=2, router="softmax", is_normalized=True, weighs=weighs, has_shared=False
        )
        layer = make_layer(experts, 3)
        router = layer.tensors["router"].requires_grad_()
        x = torch.randn(11, WIDTH, requires_grad=True)
        mlp_part(x, layer.share, "prompt", layer.config).square().sum().backward()
        assert x.grad is not None
        assert router.grad is not None
        assert (x.grad.abs().sum(dim=1) > 0).all()
        assert router.grad.abs().sum() > 0
