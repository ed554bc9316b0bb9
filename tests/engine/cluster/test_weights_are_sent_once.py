"""What is on a node's disk is not sent again: unchanged plans, moved dividers, cut transfers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from engine.errors import ProtocolError, WorkerLost
from engine.model.content_units import units_of
from engine.model.share_keys import SliceKey, row_keys
from engine.plan.plan import Plan, PlanShape
from engine.plan.presets import even, single
from engine.weights.checkpoint import Checkpoint, open_checkpoint
from tests.tiny_families import save_tiny
from tests.weight_loading import RunnerProcesses, Source

pytestmark = pytest.mark.network

DEVICES = ["left/cpu", "right/cpu"]
IDS = np.random.default_rng(8).integers(0, 1024, 20).tolist()
# DESIGN § 9: of the largest logit.
TOLERANCE = 1e-5
VOCAB_SIZE = 1024
NUM_LAYERS = 4

Model = tuple[Checkpoint, Any]


class Bench:
    """A model, its oracle, and runners."""

    def __init__(self, model: Model, runners: RunnerProcesses) -> None:
        self.checkpoint, self.oracle = model
        self.shape = PlanShape.from_config(self.checkpoint.config)
        self.runners = runners
        self._num_loads = 0

    def load(self, plan: Plan, **options: Any) -> dict[str, Any]:
        """Load into runners that keep nothing in memory from the load before."""
        self._num_loads += 1
        return dict(self.runners.load(self.checkpoint, plan, f"load {self._num_loads}", **options))

    def sending(self, change: Callable[[NDArray[np.uint8], str], NDArray[np.uint8]]) -> Source:
        """Serve slices through a function of their bytes and name, but hash the real ones."""
        hashed: set[tuple[str, int]] = set()

        def read(name: str, axis: int, start: int, end: int) -> NDArray[np.uint8]:
            data = self.checkpoint.read_slice(name, axis, start, end)
            elements = {(name, element) for element in range(start, end)}
            if elements <= hashed:  # What is sent was hashed before.
                return change(data, name)
            hashed.update(elements)
            return data

        return read

    def assert_computes_right(self) -> None:
        """Compare the plan in force with transformers."""
        found = self.runners.logits(self.checkpoint, IDS)
        with torch.no_grad():
            expected: NDArray[np.float32] = self.oracle(torch.tensor([IDS])).logits[0].numpy()
        worst = np.abs(found - expected).max() / np.abs(expected).max()
        assert worst <= TOLERANCE, f"largest difference {worst:.3g} of the largest logit"
        assert (found.argmax(axis=1) == expected.argmax(axis=1)).all()

    def share_bytes(self, plan: Plan, device_index: int) -> dict[SliceKey, int]:
        """Bytes in file format of every slice of a share, cut into elements of one unit."""
        found: dict[SliceKey, int] = {}
        for row in range(plan.shape.num_rows):
            for key in row_keys(self.checkpoint.config, plan, row, device_index).values():
                for part in key.slices:
                    info = self.checkpoint.tensors[part.name]
                    units = units_of(info, self.checkpoint.config.head_width, plan.shape)
                    each = int(np.prod(info.shape)) * 4 // info.shape[part.axis]
                    for start in range(part.start, part.end, units.size):
                        end = min(start + units.size, part.end)
                        found[part._replace(start=start, end=end)] = (end - start) * each
        return found


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    """23 MB."""
    folder = tmp_path_factory.mktemp("model")
    oracle = save_tiny(
        "llama",
        folder,
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=1536,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        initializer_range=0.05,
    )
    with open_checkpoint(folder) as checkpoint:
        yield checkpoint, oracle


@pytest.fixture(scope="module")
def bench(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """Two runners that no test ends."""
    with RunnerProcesses(tmp_path_factory.mktemp("nodes"), DEVICES) as runners:
        yield Bench(model, runners)


def test_a_second_load_by_new_runners_receives_nothing(model: Model, tmp_path: Path) -> None:
    with RunnerProcesses(tmp_path, DEVICES) as runners:
        bench = Bench(model, runners)
        plan = even(bench.shape, DEVICES)
        first = bench.load(plan)
        total = sum(sum(bench.share_bytes(plan, index).values()) for index in range(2))
        assert sum(loaded.received_bytes for loaded in first.values()) == total
        bench.assert_computes_right()
        runners.restart()
        second = bench.load(plan)
        assert [loaded.received_bytes for loaded in second.values()] == [0, 0]
        assert sum(loaded.cached_bytes for loaded in second.values()) == total
        bench.assert_computes_right()


def test_a_runner_that_has_the_file_reads_it_itself(model: Model, tmp_path: Path) -> None:
    with RunnerProcesses(tmp_path, DEVICES[:1], uses_local_files=True) as runners:
        bench = Bench(model, runners)
        plan = single(bench.shape, DEVICES[0])
        loaded = bench.load(plan)[DEVICES[0]]
        assert (loaded.received_bytes, loaded.cached_bytes) == (0, 0)
        assert loaded.local_bytes == sum(bench.share_bytes(plan, 0).values())
        bench.assert_computes_right()
        assert not runners.cache_folder(DEVICES[0]).exists()


def test_a_runner_of_another_computer_looks_at_no_path_of_the_host(
    model: Model, tmp_path: Path
) -> None:
    """Whatever the host says: where its computer is, the runner's worker knows."""
    with RunnerProcesses(
        tmp_path, DEVICES[:1], uses_local_files=True, is_host_here=False
    ) as runners:
        bench = Bench(model, runners)
        plan = single(bench.shape, DEVICES[0])
        loaded = bench.load(plan)[DEVICES[0]]
        assert loaded.local_bytes == 0
        assert loaded.received_bytes == sum(bench.share_bytes(plan, 0).values())


def moved(shape: PlanShape, row: int, plan: Plan) -> Plan:
    """A plan with one quantum of a row moved from the first device to the second."""
    cells = list(plan.cells)
    left, right = cells[row]
    cells[row] = (left - 1, right + 1)
    return Plan(shape, tuple(DEVICES), tuple(cells)).validate()


@pytest.mark.parametrize("row", [2, 5, 2 * NUM_LAYERS])
def test_a_divider_moved_by_one_quantum_moves_that_quantum(bench: Bench, row: int) -> None:
    """Attention, mlp, output head; a KV head counts where its new owner lacks it."""
    before = even(bench.shape, DEVICES)
    bench.load(before)
    after = moved(bench.shape, row, before)
    had, needs = bench.share_bytes(before, 1), bench.share_bytes(after, 1)
    lacking = sum(size for key, size in needs.items() if key not in had)
    assert lacking > 0
    loaded = bench.load(after)
    assert loaded[DEVICES[0]].received_bytes == 0
    assert 0 < loaded[DEVICES[1]].received_bytes <= 1.2 * lacking
    bench.assert_computes_right()


def test_a_transfer_cut_at_half_goes_on_there(model: Model, tmp_path: Path) -> None:
    """The runner is killed in the middle; what it had is used by the next one."""
    device = DEVICES[0]
    with RunnerProcesses(tmp_path, [device]) as runners:
        bench = Bench(model, runners)
        plan = single(bench.shape, device)
        total = sum(bench.share_bytes(plan, 0).values())
        sent = 0

        def count_and_kill(data: NDArray[np.uint8], _name: str) -> NDArray[np.uint8]:
            nonlocal sent
            sent += data.nbytes
            if sent >= 0.6 * total:  # Some of it is still under way.
                runners.kill(device)
            return data

        with pytest.raises(WorkerLost):
            bench.load(plan, read=bench.sending(count_and_kill))
        assert sent < 0.9 * total
        runners.restart(device)
        again = bench.load(plan)[device]
        assert again.received_bytes <= 0.6 * total
        assert again.received_bytes + again.cached_bytes == total
        bench.assert_computes_right()


def test_wrong_bytes_of_the_engine_host_are_refused_and_not_kept(bench: Bench) -> None:
    """The file changes between hashing and sending; the next load finds nothing of it."""
    device = DEVICES[0]
    plan = single(bench.shape, device)
    clear(bench.runners.cache_folder(device))

    def change(data: NDArray[np.uint8], name: str) -> NDArray[np.uint8]:
        if name == "layers.1.down":
            data[len(data) // 2] ^= 1
        return data

    with pytest.raises(ProtocolError, match=r"along axis 1 of layers\.1\.down arrived with other"):
        bench.load(plan, read=bench.sending(change))
    loaded = bench.load(plan)[device]
    down = 256 * 1536 * 4
    assert loaded.received_bytes >= down / 2
    bench.assert_computes_right()


def test_a_damaged_pack_is_fetched_again_where_it_is_damaged(bench: Bench) -> None:
    device = DEVICES[0]
    plan = single(bench.shape, device)
    bench.load(plan)
    packs = sorted(bench.runners.cache_folder(device).glob("*.pack"))
    largest = max(packs, key=lambda path: path.stat().st_size)
    with largest.open("r+b") as file:
        file.seek(largest.stat().st_size // 2)
        byte = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte[0] ^ 0xFF]))
    loaded = bench.load(plan)[device]
    largest_unit = max(bench.share_bytes(plan, 0).values())
    assert 0 < loaded.received_bytes <= largest_unit
    bench.assert_computes_right()
    assert bench.load(plan)[device].received_bytes == 0


def clear(folder: Path) -> None:
    """Empty a node's cache, between two loads."""
    for path in folder.iterdir():
        path.unlink()
