"""Every family, cut unevenly between three processes, has the logits of transformers.

What lies between two rows differs by family: norms of the sum, experts, layers of other widths.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from engine.errors import EngineError
from engine.host import messages as api
from engine.plan.plan import Plan, PlanShape
from engine.plan.presets import from_percentages, set_layers
from engine.session import Session, SessionOptions, simulated_devices
from engine.weights.checkpoint import open_checkpoint
from tests.one_process import OneProcess
from tests.tiny_families import FAMILIES, save_tiny
from tests.tiny_models import save_tiny_llama

pytestmark = pytest.mark.network

IDS = np.random.default_rng(5).integers(3, 89, 41).tolist()
# Float32, logits of order one: only the order of additions differs.
TOLERANCE = 1e-5
DEVICES = simulated_devices(3)


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Session]:
    """Three simulated nodes; the models come later."""
    folder = tmp_path_factory.mktemp("first")
    save_tiny_llama(folder)
    with Session(SessionOptions(model=str(folder), dtype="float32", num_workers=3)) as session:
        yield session


def open_model(session: Session, folder: Path) -> PlanShape:
    """Replace the open model."""
    call = api.OpenModel(
        request_id=session.client.next_request_id(), path=str(folder), dtype="float32"
    )
    session.client.run(call)
    with open_checkpoint(folder) as checkpoint:
        return PlanShape.from_config(checkpoint.config)


def uneven(shape: PlanShape) -> Plan:
    """Every row cut in another way; layer 1 leaves one device out."""
    plan = from_percentages(shape, DEVICES, [50, 17, 33], snap_to_kv_heads=False)
    return set_layers(plan, 1, 2, [0, 30, 70], snap_to_kv_heads=False)


@pytest.mark.parametrize("family", FAMILIES)
def test_uneven_plan(family: str, session: Session, tmp_path: Path) -> None:
    oracle = save_tiny(family, tmp_path)
    shape = open_model(session, tmp_path)
    session.apply(uneven(shape))
    with torch.no_grad():
        expected = oracle(torch.tensor([IDS])).logits[0].numpy()
    difference = np.abs(session.logits(IDS) - expected)
    where = np.unravel_index(difference.argmax(), difference.shape)
    assert difference.max() <= TOLERANCE, f"{difference.max():.3g} at {where}"


def test_norms_of_sums_see_what_the_wire_left_of_them(session: Session, tmp_path: Path) -> None:
    """With a bfloat16 wire every device adds the same rounded parts, then norms their sum."""
    save_tiny("gemma3", tmp_path)
    plan = uneven(open_model(session, tmp_path))
    plan = Plan(plan.shape, plan.devices, plan.cells, "bfloat16").validate()
    session.apply(plan)
    with open_checkpoint(tmp_path) as checkpoint:
        model = OneProcess(checkpoint, plan)
        # As the session reads it: in pieces of 16.
        pieces = [model.logits(IDS[n : n + 16], n) for n in range(0, len(IDS), 16)]
    found = session.logits(IDS)
    assert np.array_equal(found.argmax(1), np.concatenate(pieces).argmax(1))
    assert np.abs(found - np.concatenate(pieces)).max() <= 1e-3


def test_a_step_that_cannot_be_computed_ends_its_requests_and_not_the_plan(
    session: Session, tmp_path: Path
) -> None:
    """A number past what the wire holds once took the plan from everyone."""
    oracle = save_tiny_llama(tmp_path)
    with torch.no_grad():
        oracle.model.layers[1].mlp.down_proj.weight.mul_(1e7)
    oracle.save_pretrained(tmp_path)
    plan = uneven(open_model(session, tmp_path))
    session.apply(Plan(plan.shape, plan.devices, plan.cells, "float16").validate())
    for _ in range(2):
        with pytest.raises(EngineError, match="65,504") as caught:
            session.generate("abc", raw=True, max_tokens=3)
        assert "\n" not in str(caught.value)
    session.apply(plan)
    assert len(session.generate("abc", raw=True, max_tokens=3, ignore_eos=True).token_ids) == 3
