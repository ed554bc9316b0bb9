"""What a share takes is said before it is loaded, and it takes exactly that."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import gguf
import pytest
import torch
from torch import Tensor

from engine.model.batch import ComputeDtype
from engine.model.memory import plan_memory
from engine.model.shard import ModelShard
from engine.model.weight_store import WeightStore, fetch_weights
from engine.plan.plan import PlanShape
from engine.plan.presets import even
from engine.weights.checkpoint import open_checkpoint
from tests.tiny_families import save_tiny
from tests.tiny_files import save_tiny_gguf
from tests.tiny_models import save_tiny_llama

WHOLE_BLOCKS = {"hidden_size": 96, "intermediate_size": 160, "head_dim": 32}
FILES = ["Q4_0", "Q4_1", "Q8_0", "F16", "folder", "qwen3_moe"]


def save(folder: Path, file: str) -> Path:
    if file == "qwen3_moe":
        save_tiny(file, folder)
        return folder
    if file == "folder":
        save_tiny_llama(folder)
        return folder
    oracle = save_tiny_llama(folder / "oracle", **WHOLE_BLOCKS)
    return save_tiny_gguf(oracle, folder / "tiny.gguf", kind=gguf.GGMLQuantizationType[file])


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("dtype", get_args(ComputeDtype))
def test_every_device_holds_what_was_said(tmp_path: Path, file: str, dtype: ComputeDtype) -> None:
    with open_checkpoint(save(tmp_path, file)) as checkpoint:
        config = checkpoint.config
        plan = even(PlanShape.from_config(config), ["a/cpu", "b/cpu", "c/cpu"])
        said = plan_memory(config, plan, checkpoint.tensors, dtype, 64, "float32")
        for index in plan.used_devices():
            device = torch.device("cpu")
            shard = ModelShard(config, plan, index, dtype, 64, "float32", device)
            store = WeightStore(checkpoint.tensors, dtype, device, {})
            keys = list(dict.fromkeys(shard.weight_keys()))
            fetch_weights(
                store, keys, lambda s: checkpoint.read_slice(s.name, s.axis, s.start, s.end)
            )
            held = sum(
                weight.nbytes if isinstance(weight, Tensor) else weight.num_bytes
                for weight in store.packed.values()
            )
            assert held == said[plan.devices[index]].weights
