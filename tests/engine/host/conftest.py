"""A tiny model on real processes, and ways to look at those processes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from engine.plan.plan import PlanShape
from engine.plan.presets import even
from engine.session import Session, SessionOptions, simulated_devices
from tests.processes import processes_below
from tests.tiny_models import save_tiny_llama


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random model with a tokenizer of single letters."""
    folder = tmp_path_factory.mktemp("tiny")
    save_tiny_llama(folder)
    return folder


@pytest.fixture(scope="module")
def opened_session(tiny_folder: Path) -> Iterator[Session]:
    """The tiny model and two simulated nodes; starting processes takes seconds."""
    options = SessionOptions(
        model=str(tiny_folder), dtype="float32", num_workers=2, kv_window=100_000
    )
    with Session(options) as opened:
        yield opened


def runner_of(session: Session, device: str) -> psutil.Process:
    """The runner process of a device, recognised as a person would recognise it."""
    host = psutil.Process(session.client.host_pid)
    return processes_below(host, "shardmix-runner", device)[0]


@pytest.fixture
def session(opened_session: Session) -> Session:
    """The tiny model, evenly on two simulated nodes, whatever the last test did to them."""
    shape = PlanShape.from_config(opened_session.model.config)
    opened_session.apply(even(shape, simulated_devices(2)))
    return opened_session
