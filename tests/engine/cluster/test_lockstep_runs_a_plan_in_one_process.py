"""All devices of a plan in one process: whole passes, single layers, wires."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.cluster.lockstep import Lockstep
from engine.errors import ConfigError, PlanError, PromptError, ProtocolError
from engine.plan.plan import Plan, PlanShape
from engine.plan.presets import from_percentages, pipeline, single
from engine.weights.checkpoint import Checkpoint, open_checkpoint
from tests.tiny_families import save_tiny

# Float32 with values of order one: only the order of additions differs.
TOLERANCE = 1e-5
IDS = np.random.default_rng(3).integers(3, 89, 41).tolist()
DEVICES = ["a/cpu", "b/cpu", "c/cpu"]


class Tiny:
    """A tiny model with post norms, windows and a scaled embedding, and the oracle's states."""

    def __init__(self, checkpoint: Checkpoint, oracle: Any) -> None:
        self.checkpoint = checkpoint
        self.shape = PlanShape.from_config(checkpoint.config)
        with torch.no_grad():
            output = oracle(torch.tensor([IDS]), output_hidden_states=True)
        self.states: list[Tensor] = [state[0] for state in output.hidden_states]
        self.logits: NDArray[np.float32] = output.logits[0].numpy()

    def plan(self, name: str, wire: Any = "float32") -> Plan:
        if name == "single":
            return single(self.shape, DEVICES[0])
        if name == "pipeline":
            return pipeline(self.shape, DEVICES, [2, 1, 1], wire=wire)
        return from_percentages(self.shape, DEVICES, [45, 20, 35], wire=wire)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tiny]:
    folder: Path = tmp_path_factory.mktemp("tiny")
    oracle = save_tiny("gemma3", folder)
    with open_checkpoint(folder) as checkpoint:
        yield Tiny(checkpoint, oracle)


@pytest.mark.parametrize("name", ["single", "pipeline", "uneven"])
def test_a_layer_alone_equals_that_of_transformers(name: str, tiny: Tiny) -> None:
    lockstep = Lockstep(tiny.checkpoint, tiny.plan(name))
    # The last state of the oracle is normalised already.
    for layer in range(3):
        whole = lockstep.run_layer(layer, tiny.states[layer], 0)
        largest = tiny.states[layer + 1].abs().max()
        assert (whole - tiny.states[layer + 1]).abs().max() <= TOLERANCE * max(1, largest)
        pieces = [
            lockstep.run_layer(layer, tiny.states[layer][a:b], None if a else 0)
            for a, b in ((0, 7), (7, 8), (8, 30), (30, 41))
        ]
        assert (torch.cat(pieces) - whole).abs().max() <= TOLERANCE * max(1, largest)


def test_layers_one_after_the_other_are_the_whole_pass(tiny: Tiny) -> None:
    lockstep = Lockstep(tiny.checkpoint, tiny.plan("uneven"))
    found = np.concatenate([lockstep.logits(IDS[:20]), lockstep.logits(IDS[20:], 20)])
    assert np.abs(found - tiny.logits).max() <= TOLERANCE * max(1, np.abs(tiny.logits).max())
    # Single layers do not disturb a slot, nor does a slot them.
    x = torch.as_tensor(tiny.checkpoint.embed(IDS))
    for layer in range(4):
        x = lockstep.run_layer(layer, x)
    after = lockstep.logits([5], 41)
    alone = Lockstep(tiny.checkpoint, tiny.plan("uneven")).logits([*IDS, 5])[-1:]
    assert np.abs(after - alone).max() <= TOLERANCE * np.abs(tiny.logits).max()
    normed = x * torch.rsqrt(
        x.square().mean(-1, keepdim=True) + tiny.checkpoint.config.norm_epsilon
    )
    weight = torch.as_tensor(
        tiny.checkpoint.read_slice("final_norm", 0, 0, 48).view(np.float32).copy()
    )
    head = torch.as_tensor(tiny.checkpoint.read_rows("head", range(99)))
    logits = (normed * (1 + weight)) @ head.T
    assert np.abs(logits.numpy() - tiny.logits).max() <= TOLERANCE * np.abs(tiny.logits).max()


def test_a_wire_rounds_what_is_sent_and_nothing_else(tiny: Tiny) -> None:
    def run(name: str, wire: str) -> Tensor:
        return Lockstep(tiny.checkpoint, tiny.plan(name, wire)).run_layer(0, tiny.states[0], 0)

    exact = run("single", "float32")
    for wire, bits in (("float16", 11), ("bfloat16", 8)):
        difference = (run("uneven", wire) - exact).abs().max()
        # Three parts and two rows, each rounded to so many bits, then normalised.
        assert 1e-6 < difference < 60 * exact.abs().max() * 2.0**-bits
    # In a pipeline the first of two layers stays on its device: nothing of it is sent.
    assert torch.equal(run("pipeline", "bfloat16"), exact)
    handed_over = Lockstep(tiny.checkpoint, tiny.plan("pipeline", "bfloat16"))
    found = handed_over.run_layer(1, tiny.states[1], 0)
    assert not torch.equal(
        found, Lockstep(tiny.checkpoint, tiny.plan("single")).run_layer(1, tiny.states[1], 0)
    )


def test_slots_are_apart_and_clear_frees_their_memory(tiny: Tiny) -> None:
    lockstep = Lockstep(tiny.checkpoint, tiny.plan("uneven"))
    one, two = lockstep.step([(0, 0, IDS[:9]), (4, 0, IDS)])
    assert np.abs(one - tiny.logits[:9]).max() <= TOLERANCE * np.abs(tiny.logits).max()
    assert np.abs(two - tiny.logits).max() <= TOLERANCE * np.abs(tiny.logits).max()
    lockstep.run_layer(1, tiny.states[1])
    assert all(shard.cache.num_bytes > 0 for shard in lockstep.shards.values())
    lockstep.clear()
    assert all(shard.cache.num_bytes == 0 for shard in lockstep.shards.values())
    again = lockstep.logits(IDS[:9])
    assert np.abs(again - one).max() <= TOLERANCE * np.abs(tiny.logits).max()


def test_position_0_begins_anew(tiny: Tiny) -> None:
    lockstep = Lockstep(tiny.checkpoint, tiny.plan("uneven"))
    first = lockstep.logits(IDS)
    assert np.array_equal(lockstep.logits(IDS), first)


def test_a_window_nobody_chose_hides_nothing_of_the_trained_context(tiny: Tiny) -> None:
    """It was 256 positions, past which logits were silently those of a shorter text."""
    ids = np.random.default_rng(1).integers(3, 89, tiny.checkpoint.config.max_positions).tolist()
    lockstep = Lockstep(tiny.checkpoint, tiny.plan("single"))
    wide = Lockstep(tiny.checkpoint, tiny.plan("single"), window=4096)
    assert np.array_equal(lockstep.logits(ids), wide.logits(ids))
    assert lockstep.shards[0].cache.window == len(ids)


def test_settings_that_mean_nothing_are_refused(tiny: Tiny) -> None:
    plan = tiny.plan("single")
    for settings in ({"dtype": "float8"}, {"kv_dtype": "fp16"}, {"window": 0}):
        with pytest.raises(ConfigError) as caught:
            Lockstep(tiny.checkpoint, plan, **settings)
        assert "\n" not in str(caught.value)
    lockstep = Lockstep(tiny.checkpoint, plan)
    for slot, ids in ((-1, [5]), (0, [])):
        with pytest.raises(PromptError):
            lockstep.logits(ids, slot=slot)


def test_what_cannot_be_run_is_refused_in_one_line(tiny: Tiny) -> None:
    lockstep = Lockstep(tiny.checkpoint, tiny.plan("uneven"))
    other = PlanShape(num_layers=2, num_heads=6, num_kv_heads=2, mlp_width=75, vocab_size=99)
    x = tiny.states[0]
    for call, error, text in (
        (lambda: Lockstep(tiny.checkpoint, single(other, "a/cpu")), PlanError, "does not fit"),
        (
            lambda: Lockstep(
                tiny.checkpoint, tiny.plan("uneven"), devices=[torch.device("cpu")]
            ),
            ConfigError,
            "1 devices for a plan of 3",
        ),
        (lambda: lockstep.run_layer(4, x), PlanError, "layers 0 to 3"),
        (lambda: lockstep.run_layer(0, x.double()), PromptError, "torch.float64"),
        (lambda: lockstep.run_layer(0, x, 3), ProtocolError, "expected position 0"),
        (lambda: lockstep.logits([5], 2), ProtocolError, "expected position 0"),
        (lambda: lockstep.logits([99]), PromptError, "token id 99"),
    ):  # fmt: skip
        with pytest.raises(error, match=text) as found:
            call()
        assert "\n" not in str(found.value)


@pytest.mark.gpu
def test_columns_of_a_plan_may_lie_on_a_gpu(tiny: Tiny) -> None:
    devices = [torch.device("cpu"), torch.device("cuda", 0), torch.device("cpu")]
    lockstep = Lockstep(tiny.checkpoint, tiny.plan("uneven"), devices=devices)
    found = lockstep.logits(IDS)
    # TF32 is off by default; another order of additions on the GPU.
    assert np.abs(found - tiny.logits).max() <= 10 * TOLERANCE * np.abs(tiny.logits).max()
