"""GGUF and Meta files of every family have the logits of transformers, as its own folders do.

They differ in more than names: the order of rotated pairs, norms that already have their one,
stacked and transposed experts, settings that are constants of a reader.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from engine.plan.plan import PlanShape
from engine.plan.presets import even, single
from engine.weights.checkpoint import open_checkpoint
from tests.engine.model.conftest import assert_close, oracle_logits
from tests.one_process import OneProcess
from tests.tiny_families import (
    FAMILIES,
    GGUF_CHANGES,
    META_FAMILIES,
    save_tiny,
)
from tests.tiny_files import save_tiny_gguf, save_tiny_meta

IDS = np.random.default_rng(5).integers(3, 89, 41).tolist()
WITH_GGUF = [family for family in FAMILIES if not family.endswith("_vision")]


def check(path: Path, expected: np.ndarray[tuple[int, int], np.dtype[np.float32]]) -> None:
    """One device in two pieces, and two devices."""
    with open_checkpoint(path) as checkpoint:
        shape = PlanShape.from_config(checkpoint.config)
        alone = OneProcess(checkpoint, single(shape, "a/cpu"))
        found = np.concatenate([alone.logits(IDS[:19]), alone.logits(IDS[19:], 19)])
        assert_close(found, expected)
        assert_close(OneProcess(checkpoint, even(shape, ["a", "b"])).logits(IDS), expected)


@pytest.mark.parametrize("family", WITH_GGUF)
def test_gguf(family: str, tmp_path: Path) -> None:
    oracle = save_tiny(family, tmp_path / "folder", **GGUF_CHANGES.get(family, {}))
    path = tmp_path / "model.gguf"
    save_tiny_gguf(oracle, path)
    check(path, oracle_logits(oracle, IDS))


@pytest.mark.parametrize("family", META_FAMILIES)
def test_meta(family: str, tmp_path: Path) -> None:
    oracle = save_tiny(family, tmp_path / "folder")
    save_tiny_meta(oracle, tmp_path / "meta")
    check(tmp_path / "meta", oracle_logits(oracle, IDS))
