"""Runner processes get a quantised file's blocks over the wire and compute with those values."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest

from engine.model.batch import ComputeDtype
from engine.model.memory import plan_memory
from engine.plan.plan import PlanShape
from engine.plan.presets import even, single
from engine.weights.checkpoint import open_checkpoint
from tests.one_process import OneProcess
from tests.tiny_files import save_tiny_gguf
from tests.tiny_models import save_tiny_llama
from tests.weight_loading import RunnerProcesses

pytestmark = pytest.mark.network

DEVICES = ["left/cpu", "right/cpu"]
IDS = np.random.default_rng(8).integers(3, 99, 20).tolist()
# Of the largest logit, against float32 of the same file. The weights are the same to the last bit;
# activations are rounded to bfloat16 or int8 where that is fast. A second rounding of the weights
# to four bits changes a third of the largest logit.
TOLERANCE = 4e-2


@pytest.mark.parametrize(("kind", "dtype"), [("Q4_1", "int4"), ("Q8_0", "int8")])
def test_two_runners_have_the_logits_of_the_files_values(
    tmp_path: Path, kind: str, dtype: ComputeDtype
) -> None:
    sizes = {"hidden_size": 96, "intermediate_size": 160, "head_dim": 32}
    oracle = save_tiny_llama(tmp_path / "oracle", **sizes)
    path = tmp_path / "tiny.gguf"
    save_tiny_gguf(oracle, path, kind=gguf.GGMLQuantizationType[kind])
    with open_checkpoint(path) as checkpoint, RunnerProcesses(tmp_path, DEVICES) as runners:
        shape = PlanShape.from_config(checkpoint.config)
        plan = even(shape, DEVICES)
        loaded = runners.load(checkpoint, plan, dtype=dtype)
        said = plan_memory(checkpoint.config, plan, checkpoint.tensors, dtype, 64, "float32")
        for device in DEVICES:
            assert loaded[device].weight_bytes == said[device].weights
        found = runners.logits(checkpoint, IDS)
        exact = OneProcess(checkpoint, single(shape, "a/cpu")).logits(IDS)
    largest = np.abs(exact).max()
    worst = np.abs(found - exact).max() / largest
    assert worst <= TOLERANCE, f"largest difference {worst:.3g} of the largest logit"
