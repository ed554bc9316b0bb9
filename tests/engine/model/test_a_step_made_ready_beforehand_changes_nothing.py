"""What is made ready while nobody waits gives the bits of a step that comes unannounced."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from numpy.typing import NDArray

from engine.cluster.lockstep import Lockstep
from engine.errors import ConfigError
from engine.kernels.build_native import source_hash
from engine.kernels.native_library import PATH, NativeLibrary
from engine.kernels.torch_kernels import Batch
from engine.model.batch import StepKind
from engine.plan.plan import PlanShape
from engine.plan.presets import single
from engine.weights.checkpoint import Checkpoint, open_checkpoint
from tests.tiny_families import save_tiny

IDS = np.random.default_rng(4).integers(3, 99, 200).tolist()
Logits = NDArray[np.float32]


class EagerLockstep(Lockstep):
    """Gets ready for the next step after each one, as a runner does."""

    def step(
        self, pieces: list[tuple[int, int, list[int]]], kind: StepKind = "prompt"
    ) -> list[Logits]:
        logits = super().step(pieces, kind)
        for index, batch in self.last_batches.items():
            self.shards[index].prepare_next(batch)
        return logits

    def _batches(self, kind: StepKind, *pieces: tuple[int, int, int]) -> dict[int, Batch]:
        self.last_batches = super()._batches(kind, *pieces)
        return self.last_batches


@pytest.fixture(scope="module", params=["llama", "gemma3"])
def checkpoint(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Checkpoint]:
    try:
        NativeLibrary(PATH, source_hash())
    except (OSError, ConfigError) as error:
        pytest.skip(f"only native kernels have something to make ready: {error}")
    folder = tmp_path_factory.mktemp("tiny")
    save_tiny(request.param, folder, max_position_embeddings=8192)
    with open_checkpoint(folder) as opened:
        yield opened


def opened(kind: type[Lockstep], checkpoint: Checkpoint) -> Lockstep:
    plan = single(PlanShape.from_config(checkpoint.config), "this/cpu")
    model = kind(checkpoint, plan, "int8", window=600)
    assert model.shards[0].is_native
    return model


def everything(model: Lockstep) -> list[Logits]:
    """Logits of steps that follow each other, and of steps where something came between."""
    cache = model.shards[0].cache
    found = model.step([(0, 0, IDS[:40]), (1, 0, IDS[50:90])])
    for n in range(40, 45):
        found += model.step([(0, n, [IDS[n]])], "generated")
    for n in range(45, 48):
        found += model.step([(0, n, [IDS[n]]), (1, n - 5, [IDS[n]])], "generated")
    # Guesses that did not come true.
    found += model.step([(0, 48, IDS[48:52])], "generated")
    cache.truncate(0, 49)
    found += model.step([(0, 49, [IDS[60]])], "generated")
    # The slot and the position that were made ready, of another conversation and in other memory.
    cache.free(0)
    cache.copy(1, 0, 43)
    found += model.step([(1, 43, IDS[70:77])])
    found += model.step([(0, 43, [IDS[80]])], "generated")
    cache.free(0)
    cache.copy(1, 0, 44)
    found += model.step([(0, 44, [IDS[80]])], "generated")
    cache.free(0)
    cache.copy(1, 0, 45)
    return found + model.step([(0, 45, [IDS[81]])], "generated")


def test_logits_are_the_same_to_the_bit(checkpoint: Checkpoint) -> None:
    expected = everything(opened(Lockstep, checkpoint))
    found = everything(opened(EagerLockstep, checkpoint))
    assert len(found) == len(expected) == 19
    for n, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        np.testing.assert_array_equal(ours, theirs, err_msg=f"step {n}")
