"""Any format loads to the same weights from a local copy, the cache, or the engine host."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import gguf
import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from engine.cluster.local_copies import describe_files
from engine.cluster.messages import HashesRequest
from engine.cluster.weight_transfer import WeightServer
from engine.errors import ProtocolError
from engine.model.content_units import units_of
from engine.model.share_keys import row_keys
from engine.model.weight_store import WeightStore
from engine.plan.plan import Plan, PlanShape
from engine.plan.presets import even, single
from engine.weights.checkpoint import Checkpoint, open_checkpoint
from tests.tiny_families import save_tiny, save_tiny_gguf
from tests.weight_loading import OneLoad, server_of

DEVICES = ["a/cpu", "b/cpu", "c/cpu"]
# Head width 20: no block of 32 is a head's. 8 heads on 4, so that KV heads can be cut.
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 20,
    "vocab_size": 130,
}
KINDS = ["folder", "F32", "Q4_1", "Q8_0"]


@dataclass(frozen=True, slots=True)
class Models:
    """One model in several files."""

    paths: dict[str, Path]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """A safetensors folder, and GGUF files of several formats."""
    folder = tmp_path_factory.mktemp("models")
    oracle = save_tiny("llama", folder / "folder", **SIZES)
    paths = {"folder": folder / "folder"}
    for kind in KINDS[1:]:
        paths[kind] = folder / f"{kind}.gguf"
        format_number = None if kind == "F32" else gguf.GGMLQuantizationType[kind]
        save_tiny_gguf(oracle, paths[kind], kind=format_number)
    paths["experts"] = folder / "experts"
    save_tiny("mixtral", paths["experts"])
    return Models(paths)


@pytest.fixture(params=[*KINDS, "experts"])
def checkpoint(request: pytest.FixtureRequest, models: Models) -> Iterator[Checkpoint]:
    """Each of the files."""
    with open_checkpoint(models.paths[request.param]) as opened:
        yield opened


@pytest.fixture(autouse=True)
def models_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """This node's own models: none yet."""
    monkeypatch.setenv("SHARDMIX_CACHE", str(tmp_path / "node"))
    monkeypatch.delenv("SHARDMIX_LOCAL_FILES", raising=False)
    return tmp_path / "node" / "models"


def cut_plan(checkpoint: Checkpoint) -> Plan:
    """Three devices, small quanta of the head, and a cut KV head."""
    shape = PlanShape.from_config(checkpoint.config)
    return even(msgspec.structs.replace(shape, head_quantum=7), DEVICES)


def sources(load: OneLoad) -> tuple[int, int, int]:
    """Bytes received, from the cache, and from a copy."""
    loader = load.loader
    return loader.received_bytes, loader.cached_bytes, loader.local_bytes


def test_weights_from_every_place_are_the_same(checkpoint: Checkpoint, tmp_path: Path) -> None:
    plan = cut_plan(checkpoint)
    files = describe_files(checkpoint.files, is_same_computer=True)
    for device in range(3):
        cache = tmp_path / f"cache {device}"
        received = OneLoad(checkpoint, plan, device, cache)
        total = received.loader.total_bytes
        assert total > 0
        cached = OneLoad(checkpoint, plan, device, cache)
        local = OneLoad(checkpoint, plan, device, tmp_path / "unused", files=files)
        assert sources(received)[0] + sources(received)[1] == total
        assert sources(received)[0] > 0.8 * total  # Equal units, such as norms, come once.
        assert sources(cached) == (0, total, 0)
        assert sources(local) == (0, 0, total)
        for load in (received, cached, local):
            load.assert_equals(checkpoint)
    assert not (tmp_path / "unused").exists()


def test_a_file_that_changed_is_not_read_as_the_same(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    plan = single(PlanShape.from_config(checkpoint.config), "a/cpu")
    files = describe_files(checkpoint.files, is_same_computer=True)
    changed = tuple(msgspec.structs.replace(f, modified_ns=f.modified_ns + 1) for f in files)
    elsewhere = describe_files(checkpoint.files, is_same_computer=False)
    for said in (changed, elsewhere, ()):
        load = OneLoad(checkpoint, plan, 0, tmp_path / str(len(said)), files=said)
        assert sources(load)[2] == 0
        load.assert_equals(checkpoint)


def test_a_host_elsewhere_cannot_have_any_path_opened(
    checkpoint: Checkpoint, models_folder: Path, tmp_path: Path
) -> None:
    plan = single(PlanShape.from_config(checkpoint.config), "a/cpu")
    files = describe_files(checkpoint.files, is_same_computer=True)
    load = OneLoad(checkpoint, plan, 0, tmp_path / "cache", files=files, is_host_here=False)
    assert sources(load)[2] == 0
    load.assert_equals(checkpoint)


def test_local_copies_can_be_ignored(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHARDMIX_LOCAL_FILES", "off")
    with open_checkpoint(models.paths["Q4_1"]) as checkpoint:
        files = describe_files(checkpoint.files, is_same_computer=True)
        plan = single(PlanShape.from_config(checkpoint.config), "a/cpu")
        load = OneLoad(checkpoint, plan, 0, tmp_path / "cache", files=files)
    assert sources(load)[2] == 0


def copy_model(path: Path, models_folder: Path) -> Path:
    """Put a copy where a node keeps its models; returns its largest file."""
    models_folder.mkdir(parents=True)
    target = models_folder / path.name
    if path.is_dir():
        shutil.copytree(path, target)
        return max(target.glob("*.safetensors"), key=lambda file: file.stat().st_size)
    shutil.copyfile(path, target)
    return target


@pytest.mark.parametrize("kind", ["folder", "Q4_1"])
def test_a_copy_on_another_computer_is_used_if_its_content_is_the_same(
    kind: str, models: Models, models_folder: Path, tmp_path: Path
) -> None:
    copy_model(models.paths[kind], models_folder)
    with open_checkpoint(models.paths[kind]) as checkpoint:
        files = describe_files(checkpoint.files, is_same_computer=False)
        load = OneLoad(checkpoint, cut_plan(checkpoint), 1, tmp_path / "cache", files=files)
        assert sources(load) == (0, 0, load.loader.total_bytes)
        load.assert_equals(checkpoint)


@pytest.mark.parametrize("kind", ["folder", "Q4_1"])
def test_a_copy_with_one_changed_byte_is_not_used_from_there_on(
    kind: str, models: Models, models_folder: Path, tmp_path: Path
) -> None:
    file = copy_model(models.paths[kind], models_folder)
    with open_checkpoint(models.paths[kind]) as checkpoint:
        row = checkpoint.read_slice("layers.1.up", 0, 33, 34).tobytes()
        raw = bytearray(file.read_bytes())
        assert raw.count(row) == 1
        raw[raw.index(row) + len(row) // 2] ^= 1
        file.write_bytes(raw)
        files = describe_files(checkpoint.files, is_same_computer=False)
        plan = single(PlanShape.from_config(checkpoint.config), "a/cpu")
        load = OneLoad(checkpoint, plan, 0, tmp_path / "cache", files=files)
        received, _cached, local = sources(load)
        assert received > 0
        assert local > 0
        load.assert_equals(checkpoint)


def test_a_file_of_the_same_name_and_size_that_is_no_model_is_left_alone(
    models: Models, models_folder: Path, tmp_path: Path
) -> None:
    file = copy_model(models.paths["F32"], models_folder)
    file.write_bytes(bytes(file.stat().st_size))
    with open_checkpoint(models.paths["F32"]) as checkpoint:
        files = describe_files(checkpoint.files, is_same_computer=False)
        load = OneLoad(checkpoint, cut_plan(checkpoint), 0, tmp_path / "cache", files=files)
        assert sources(load)[2] == 0
        load.assert_equals(checkpoint)


@pytest.mark.parametrize("path", ["/x/../model.gguf", "model.gguf", "C:\\..\\..", "", "\0/\0"])
def test_a_peers_path_leads_nowhere_else(path: str, models: Models, tmp_path: Path) -> None:
    with open_checkpoint(models.paths["F32"]) as checkpoint:
        (file,) = describe_files(checkpoint.files, is_same_computer=True)
        odd = (msgspec.structs.replace(file, path=path),)
        load = OneLoad(checkpoint, cut_plan(checkpoint), 0, tmp_path / "cache", files=odd)
        assert sources(load)[2] == 0


def test_only_units_that_are_missing_are_asked_for(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Whatever the plans before and after: bytes that are in both are not sent twice."""
    shape = PlanShape.from_config(checkpoint.config)
    cache = tmp_path / "cache"
    OneLoad(checkpoint, even(shape, DEVICES[:2]), 0, cache)
    second = OneLoad(checkpoint, even(shape, DEVICES), 1, cache)
    asked = {(a.name, a.axis, n) for a in second.asked for n in range(a.start, a.end)}
    had = wide_elements(checkpoint, even(shape, DEVICES[:2]), 0)
    needed = wide_elements(checkpoint, even(shape, DEVICES), 1)
    assert asked <= needed
    # Units that end in the middle of what was there are whole all the same.
    assert not asked & had
    second.assert_equals(checkpoint)


def wide_elements(checkpoint: Checkpoint, plan: Plan, index: int) -> set[tuple[str, int, int]]:
    """Elements of a share, widened to whole blocks."""
    store = WeightStore(checkpoint.tensors, "float32", torch.device("cpu"), {})
    found: set[tuple[str, int, int]] = set()
    for row in range(plan.shape.num_rows):
        for key in row_keys(checkpoint.config, plan, row, index).values():
            for narrow in key.slices:
                name, axis, start, end = store.stored_slice(narrow)
                found.update((name, axis, n) for n in range(start, end))
    return found


@settings(max_examples=30)
@given(data=st.data())
def test_any_share_is_whole_units(models: Models, data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from([*KINDS, "experts"]))
    with open_checkpoint(models.paths[kind]) as checkpoint:
        shape = msgspec.structs.replace(
            PlanShape.from_config(checkpoint.config),
            mlp_quantum=data.draw(st.sampled_from([5, 16, 32, 48, 300])),
            head_quantum=data.draw(st.sampled_from([1, 7, 256])),
        )
        rows: list[tuple[int, int]] = []
        for row in range(shape.num_rows):
            left = data.draw(st.integers(0, shape.num_quanta(row)))
            rows.append((left, shape.num_quanta(row) - left))
        plan = Plan(shape, ("a", "b"), tuple(rows)).validate()
        store = WeightStore(checkpoint.tensors, "float32", torch.device("cpu"), {})
        for row in range(shape.num_rows):
            for index in range(2):
                for key in row_keys(checkpoint.config, plan, row, index).values():
                    for narrow in key.slices:
                        wide = store.stored_slice(narrow)
                        info = checkpoint.tensors[wide.name]
                        units = units_of(info, checkpoint.config.head_width, shape)
                        assert wide.axis == units.axis
                        assert wide.start % units.size == 0
                        assert wide.end % units.size == 0 or wide.end == units.length


def test_content_hashes_are_computed_once(models: Models, tmp_path: Path) -> None:
    hashes = tmp_path / "hashes.sqlite"
    with open_checkpoint(models.paths["Q4_1"]) as checkpoint:
        plan = single(PlanShape.from_config(checkpoint.config), "a/cpu")
        first = OneLoad(checkpoint, plan, 0, tmp_path / "cache", hashes_path=hashes)
        assert sources(first)[0] > 0

        def read(name: str, axis: int, start: int, end: int) -> NDArray[np.uint8]:
            raise AssertionError(f"{name} was read again")

        second = OneLoad(checkpoint, plan, 0, tmp_path / "cache", hashes_path=hashes, read=read)
        assert sources(second)[0] == 0
        if os.name != "nt":
            assert hashes.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("content", [b"", b"no database" * 1000])
def test_a_damaged_table_of_hashes_is_begun_anew(
    content: bytes, models: Models, tmp_path: Path
) -> None:
    hashes = tmp_path / "hashes.sqlite"
    hashes.write_bytes(content)
    with open_checkpoint(models.paths["Q4_1"]) as checkpoint:
        plan = single(PlanShape.from_config(checkpoint.config), "a/cpu")
        load = OneLoad(checkpoint, plan, 0, tmp_path / "cache", hashes_path=hashes)
        load.assert_equals(checkpoint)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "layers.9.q"}, "unknown tensor 'layers.9.q'"),
        ({"axis": 1}, "by 20 along axis 1, they are by 20 along axis 0"),
        ({"unit": 1}, "by 1 along axis 0, they are by 20"),
        ({"start": 3, "end": 3}, "hashes 3-3 of layers.0.q, which has 8"),
        ({"start": -1}, "hashes -1-2 of layers.0.q"),
        ({"end": 9}, "hashes 0-9 of layers.0.q"),
    ],
)
def test_hashes_that_cannot_be_are_refused(
    changes: dict[str, int | str], message: str, models: Models
) -> None:
    with open_checkpoint(models.paths["F32"]) as checkpoint:
        server = server_of(checkpoint, PlanShape.from_config(checkpoint.config))
        with pytest.raises(ProtocolError, match=message):
            ask(server, changes)
        server.close()


def ask(server: WeightServer, changes: dict[str, int | str]) -> None:
    """Ask for hashes of the first query matrix, with some fields changed."""
    request = HashesRequest(epoch=1, name="layers.0.q", axis=0, unit=20, start=0, end=2)
    server.answer(msgspec.structs.replace(request, **changes))
