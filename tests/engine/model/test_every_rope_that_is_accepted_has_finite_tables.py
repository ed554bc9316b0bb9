"""Whatever `ModelConfig.validate` accepts of RoPE gives finite cosines and sines."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from engine.errors import ConfigError
from engine.model.config import Layer, ModelConfig, Rope
from engine.model.rope import RopeTable

KINDS = ("default", "linear", "llama3", "dynamic", "yarn", "factors")
HEAD_WIDTHS = (2, 4, 6, 20, 128)
POSITIONS = 1500
# Powers of ten around the bounds, ordinary numbers, and everything that is a float.
REAL = (
    st.integers(-14, 34).map(lambda power: 10.0**power)
    | st.floats(0.5, 100)
    | st.floats()
    | st.sampled_from([1.0, math.nextafter(1.0, 2.0), 0.0, -1.0, math.inf, math.nan, 1e308, 5e-324])
)
USUAL = REAL | st.floats(1, 100)


def config_of(rope: Rope, head_width: int) -> ModelConfig:
    return ModelConfig(
        family="llama",
        width=48,
        layers=(Layer(mlp_width=75),),
        num_heads=6,
        num_kv_heads=2,
        head_width=head_width,
        vocab_size=99,
        norm_epsilon=1e-5,
        ropes=(rope,),
        rope_layout="half",
        max_positions=1 << 17,
        is_head_tied=True,
    )


def check_finite(rope: Rope, head_width: int) -> None:
    table = RopeTable(rope, head_width, torch.device("cpu"))
    cos, sin = table.rows(torch.arange(POSITIONS), POSITIONS)
    assert cos.shape == sin.shape == (POSITIONS, head_width // 2)
    assert cos.isfinite().all()
    assert sin.isfinite().all()


def is_accepted(rope: Rope, head_width: int) -> bool:
    try:
        config_of(rope, head_width).validate()
    except ConfigError as error:
        assert "\n" not in str(error)
        return False
    return True


# What is refused is drawn on purpose: now and then it is most of what is drawn.
@settings(suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])
@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_what_is_accepted_is_finite(kind: Any, data: st.DataObject) -> None:
    """YARN with beta_fast 1e308 ended in a ValueError; theta 1e-300 overflowed float32."""
    head_width = data.draw(st.sampled_from(HEAD_WIDTHS))
    changed = data.draw(st.sets(st.sampled_from(FIELDS), max_size=3))
    fields: dict[str, Any] = {"theta": data.draw(st.floats(1.001, 1e7))}
    fields |= {name: data.draw(REAL) for name in sorted(changed)}
    original = st.integers(1, 1 << 30) | st.sampled_from([1, 1024, 8192])
    rope = Rope(
        kind=kind,
        **fields,
        original_positions=data.draw(original),
        is_truncated=data.draw(st.booleans()),
        factors=tuple(data.draw(USUAL) for _ in range(head_width // 2 if kind == "factors" else 0)),
    )
    assume(is_accepted(rope, head_width))
    check_finite(rope, head_width)


FIELDS = (
    "theta",
    "factor",
    "attention_factor",
    "beta_fast",
    "beta_slow",
    "low_factor",
    "high_factor",
)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("field", FIELDS)
def test_the_least_and_the_largest_that_are_accepted_are_finite(kind: Any, field: str) -> None:
    """With each other field at a usual value, for the shortest and the longest context."""
    seen = 0
    for power in range(-40, 41):
        for original in (1, 8192, 1 << 30):
            values: dict[str, Any] = {
                "theta": 10000.0,
                "factor": 8.0,
                "high_factor": 1e6,
                "low_factor": 1e-3,
            }
            values[field] = 10.0**power
            rope = Rope(
                kind=kind,
                **values,
                original_positions=original,
                factors=(2.0,) * 10 if kind == "factors" else (),
            )
            if is_accepted(rope, 20):
                check_finite(rope, 20)
                seen += 1
    assert seen >= 10


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("theta", [1e4, 5e5, 1e6, 1e9])
def test_the_numbers_of_real_models_are_accepted(kind: Any, theta: float) -> None:
    for factor in (1.0, 4.0, 32.0, 128.0):
        factors = (1.0, 1e30) * 5 if kind == "factors" else ()
        rope = Rope(kind=kind, theta=theta, factor=factor, factors=factors, original_positions=4096)
        assert is_accepted(rope, 20)
        check_finite(rope, 20)


REFUSED: list[tuple[Callable[[], Rope], str]] = [
    (lambda: Rope(theta=1e-300), "RoPE theta 1e-300 is not between 0.001 and 1e\\+12"),
    (lambda: Rope(theta=1e13), "RoPE theta"),
    (lambda: Rope(theta=math.nan), "RoPE theta nan is not between"),
    (lambda: Rope(theta=1e4, factor=math.inf), "RoPE factor inf is not between"),
    (lambda: Rope(theta=1e4, attention_factor=1e38), "RoPE attention_factor 1e\\+38 is not"),
    (
        lambda: Rope(theta=1e4, kind="yarn", original_positions=64, beta_fast=1e308),
        "RoPE beta_fast 1e\\+308 is not between 0.001 and 1e\\+06",
    ),
    (lambda: Rope(theta=1e4, kind="factors", factors=(1.0,) * 9 + (1e-300,)), "a RoPE factor 1e-3"),
]


@pytest.mark.parametrize(("make", "message"), REFUSED, ids=[case[1] for case in REFUSED])
def test_what_no_model_has_is_refused(make: Callable[[], Rope], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config_of(make(), 20).validate()
