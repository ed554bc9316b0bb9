"""Every kind of RoPE scaling gives the frequencies and logits of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engine.model.config import Rope
from engine.model.rope import RopeTable, apply_rope, inverse_frequencies, temperature_scale
from engine.plan.plan import PlanShape
from engine.plan.presets import single
from engine.weights.checkpoint import open_checkpoint
from tests.engine.model.conftest import assert_close, oracle_logits
from tests.one_process import OneProcess
from tests.tiny_families import save_tiny

IDS = np.random.default_rng(9).integers(3, 99, 60).tolist()
SCALINGS: dict[str, dict[str, Any]] = {
    "linear": {"factor": 3.0},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "llama3 as Scout has it": {
        "rope_type": "llama3",
        "factor": 16.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 1.0,
        "original_max_position_embeddings": 64,
    },
    "dynamic": {"factor": 2.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 64},
    "yarn with all its settings": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 64,
        "beta_fast": 20.0,
        "beta_slow": 2.0,
        "mscale": 1.2,
        "mscale_all_dim": 0.7,
    },
    "yarn with a given factor": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 64,
        "attention_factor": 1.3,
    },
}


def _parameters(name: str) -> dict[str, Any]:
    return {"rope_theta": 10000.0, "rope_type": name, **SCALINGS[name]}


@pytest.mark.parametrize("name", SCALINGS)
def test_logits(name: str, tmp_path: Path) -> None:
    oracle = save_tiny("llama", tmp_path, rope_parameters=_parameters(name))
    with open_checkpoint(tmp_path) as checkpoint:
        plan = single(PlanShape.from_config(checkpoint.config), "this/cpu")
        found = OneProcess(checkpoint, plan).logits(IDS)
    assert_close(found, oracle_logits(oracle, IDS))


def test_dynamic_scaling_past_the_trained_context_decodes_like_transformers(tmp_path: Path) -> None:
    """A key keeps the rotation it got when it came, so pieces of any size agree with decoding."""
    changes = {"rope_parameters": _parameters("dynamic"), "max_position_embeddings": 24}
    oracle = save_tiny("llama", tmp_path, **changes)
    with torch.no_grad():
        step = oracle(torch.tensor([IDS[:1]]), use_cache=True)
        rows = [step.logits[0]]
        for token in IDS[1:]:
            step = oracle(torch.tensor([[token]]), past_key_values=step.past_key_values)
            rows.append(step.logits[0])
    expected = torch.cat(rows).numpy()
    with open_checkpoint(tmp_path) as checkpoint:
        plan = single(PlanShape.from_config(checkpoint.config), "this/cpu")
        whole = OneProcess(checkpoint, plan, window=256).logits(IDS)
        pieces = OneProcess(checkpoint, plan, window=256)
        cut = np.concatenate([pieces.logits(IDS[:31]), pieces.logits(IDS[31:], 31)])
    assert_close(whole, expected)
    assert_close(cut, expected)


def test_scout_leaves_35_of_64_frequencies_and_divides_29() -> None:
    """Equal factors once divided by zero."""
    rope = Rope(
        theta=5e5, kind="llama3", factor=16, low_factor=1, high_factor=1, original_positions=8192
    )
    plain = inverse_frequencies(Rope(theta=5e5), 128)
    ratio = (plain / inverse_frequencies(rope, 128)).tolist()
    assert [round(r, 4) for r in ratio] == [1.0] * 35 + [16.0] * 29


def test_a_table_does_not_change_when_it_grows() -> None:
    for rope in (
        Rope(theta=1e4),
        Rope(theta=1e4, kind="dynamic", factor=2.0, original_positions=512),
    ):
        positions = torch.arange(900)
        small = RopeTable(rope, 20, torch.device("cpu"))
        before = small.rows(positions, 900)
        small.rows(torch.tensor([5000]), 5001)
        after = small.rows(positions, 900)
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_both_layouts_give_equal_scores_only_with_the_rows_permuted() -> None:
    generator = torch.Generator().manual_seed(3)
    query, key = torch.randn(2, 9, 1, 20, generator=generator)
    cos, sin = RopeTable(Rope(theta=1e4), 20, torch.device("cpu")).rows(torch.arange(9), 9)
    adjacent = apply_rope(query, cos, sin, "adjacent"), apply_rope(key, cos, sin, "adjacent")
    order = torch.cat([torch.arange(0, 20, 2), torch.arange(1, 20, 2)])
    half = (
        apply_rope(query[..., order], cos, sin, "half"),
        apply_rope(key[..., order], cos, sin, "half"),
    )
    unpermuted = apply_rope(query, cos, sin, "half"), apply_rope(key, cos, sin, "half")
    scores = [torch.einsum("thd,shd->ts", *pair) for pair in (adjacent, half, unpermuted)]
    torch.testing.assert_close(scores[0], scores[1], rtol=0, atol=1e-5)
    assert (scores[0] - scores[2]).abs().max() > 0.1


def test_adjacent_pairs_turn_as_complex_numbers_do() -> None:
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(7, 3, 20, generator=generator)
    cos, sin = RopeTable(Rope(theta=1e4), 20, torch.device("cpu")).rows(torch.arange(7), 7)
    turned = torch.view_as_complex(x.reshape(7, 3, 10, 2)) * torch.complex(cos, sin)[:, None]
    expected = torch.view_as_real(turned).flatten(-2)
    torch.testing.assert_close(apply_rope(x, cos, sin, "adjacent"), expected)


def test_the_temperature_first_changes_at_8191_and_then_is_1_0693() -> None:
    scale = temperature_scale(torch.tensor([0, 8190, 8191, 16382, 16383]), 8192, 0.1)
    expected = [1.0, 1.0, 1 + 0.1 * np.log(2), 1 + 0.1 * np.log(2), 1 + 0.1 * np.log(3)]
    np.testing.assert_allclose(scale.numpy(), expected, rtol=1e-6)
    assert round(float(scale[2]), 4) == 1.0693
