"""Whatever happens to the bytes of a real file: a model, or one line."""

from __future__ import annotations

import json
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import CheckpointError, ConfigError
from engine.weights.checkpoint import open_checkpoint
from engine.weights.gguf import GgufFile
from tests.tiny_families import (
    FAMILIES,
    GGUF_CHANGES,
    META_FAMILIES,
    save_tiny,
    save_tiny_gguf,
    save_tiny_meta,
)

# Beyond the file's own size: the tables of names and the parsed metadata.
OVERHEAD_BYTES = 4_000_000

EDITS = st.lists(
    st.tuples(
        st.sampled_from(["set", "flip", "insert", "delete", "cut", "huge"]),
        st.floats(0, 1),
        st.integers(0, 255),
    ),
    min_size=1,
    max_size=6,
)


def damage(data: bytes, edits: list[tuple[str, float, int]], span: int) -> bytes:
    """Apply edits within the first `span` bytes, where the header is."""
    changed = bytearray(data)
    for kind, place, value in edits:
        if not changed:
            break
        at = int(place * (min(span, len(changed)) - 1))
        if kind == "set":
            changed[at] = value
        elif kind == "flip":
            changed[at] ^= 1 << (value % 8)
        elif kind == "insert":
            changed[at:at] = bytes([value]) * (1 + value % 9)
        elif kind == "delete":
            del changed[at : at + 1 + value % 9]
        elif kind == "cut":
            del changed[at + 1 :]
        else:
            changed[at : at + 8] = b"\xff" * 8
    return bytes(changed)


def opens_or_says_why(path: Path, file_bytes: int) -> None:
    tracemalloc.start()
    try:
        open_checkpoint(path).close()
    except (CheckpointError, ConfigError) as error:
        assert "\n" not in str(error)
        assert len(str(error)) < 2000
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < 8 * file_bytes + OVERHEAD_BYTES


@pytest.fixture(scope="module")
def whole_gguf(tmp_path_factory: pytest.TempPathFactory, make: SimpleNamespace) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"

    def add_tokens(writer: object) -> None:
        writer.add_token_list([f"t{i}" for i in range(99)])  # type: ignore[attr-defined]
        writer.add_token_scores([0.5] * 99)  # type: ignore[attr-defined]

    return make.gguf(path, change=add_tokens)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, make: SimpleNamespace) -> Path:
    return make.folder(tmp_path_factory.mktemp("hf") / "model")


@settings(max_examples=250)
@given(edits=EDITS)
def test_a_damaged_gguf_file(
    tmp_path_factory: pytest.TempPathFactory,
    whole_gguf: Path,
    edits: list[tuple[str, float, int]],
) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged.gguf"
    data = damage(whole_gguf.read_bytes(), edits, span=4400)
    path.write_bytes(data)
    opens_or_says_why(path, len(data))


@settings(max_examples=150)
@given(edits=EDITS)
def test_a_damaged_safetensors_file(
    folder: Path, edits: list[tuple[str, float, int]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    broken = tmp_path_factory.getbasetemp() / "broken"
    broken.mkdir(exist_ok=True)
    (broken / "config.json").write_bytes((folder / "config.json").read_bytes())
    whole = (folder / "model.safetensors").read_bytes()
    data = damage(whole, edits, span=2200)
    (broken / "model.safetensors").write_bytes(data)
    opens_or_says_why(broken, len(data))


# What damaged or hostile files hold in place of a number, a name or a list.
JUNK: list[Any] = [
    *(None, True, False, -1, 0, 1, 3, 4096, 1 << 62, 10**30, 0.5, -0.0, 5e-324, 1e308),
    *(float("nan"), float("inf"), "", "yarn", "silu", [], {}, [0], [1] * 4, [[1]], [None] * 4),
    *(["full_attention"] * 4, ["sliding_attention"] * 4, ["chunked_attention"] * 4, {"a": 1}),
    *({"rope_type": kind} for kind in ("linear", "dynamic", "llama3", "yarn", "longrope")),
    {"rope_type": "yarn", "factor": 5e-324, "mscale": -10.0, "mscale_all_dim": -7.213475},
]
CHANGES = st.lists(
    st.tuples(st.floats(0, 1), st.sampled_from(["set", "delete"]), st.sampled_from(JUNK)),
    min_size=1,
    max_size=4,
)


def places(values: dict[str, Any]) -> list[tuple[dict[str, Any], str]]:
    """Every key of nested objects, with the object that has it."""
    found = [(values, key) for key in values]
    for value in values.values():
        if isinstance(value, dict):
            found += places(value)
    return found


def change_json(path: Path, changes: list[tuple[float, str, Any]]) -> None:
    values = json.loads(path.read_text())
    for where, kind, junk in changes:
        known = places(values)
        if not known:
            break
        owner, key = known[int(where * (len(known) - 1))]
        if kind == "delete":
            del owner[key]
        else:
            owner[key] = json.loads(json.dumps(junk))
    path.write_text(json.dumps(values))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a family, written once: huggingface/, meta/, whole.gguf, parts/."""
    found: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in found:
            folder = tmp_path_factory.mktemp(family)
            oracle = save_tiny(family, folder / "huggingface", **GGUF_CHANGES.get(family, {}))
            save_tiny_gguf(oracle, folder / "whole.gguf")
            (folder / "parts").mkdir()
            save_tiny_gguf(oracle, folder / "parts" / "tiny.gguf", max_tensors_per_part=12)
            if family in META_FAMILIES:
                save_tiny_meta(oracle, folder / "meta")
            found[family] = folder
        return found[family]

    return make


def copy_of(source: Path, target: Path) -> Path:
    """A copy that may be damaged; files that stay whole are links."""
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    for path in source.iterdir():
        if path.suffix == ".json":
            shutil.copy(path, target)
        else:
            (target / path.name).hardlink_to(path)
    return target


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=60)
@given(changes=CHANGES)
def test_a_config_with_other_values(
    models: Callable[[str], Path],
    family: str,
    changes: list[tuple[float, str, Any]],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    target = tmp_path_factory.getbasetemp() / "values"
    folder = copy_of(models(family) / "huggingface", target)
    change_json(folder / "config.json", changes)
    opens_or_says_why(folder, (folder / "model.safetensors").stat().st_size)


@pytest.mark.parametrize("family", META_FAMILIES)
@settings(max_examples=60)
@given(changes=CHANGES)
def test_params_with_other_values(
    models: Callable[[str], Path],
    family: str,
    changes: list[tuple[float, str, Any]],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = copy_of(models(family) / "meta", tmp_path_factory.getbasetemp() / "params")
    change_json(folder / "params.json", changes)
    opens_or_says_why(folder, (folder / "consolidated.safetensors").stat().st_size)


@pytest.mark.parametrize("name", ["config.json", "params.json"])
@settings(max_examples=100)
@given(edits=EDITS)
def test_damaged_json(
    models: Callable[[str], Path],
    name: str,
    edits: list[tuple[str, float, int]],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    source = "huggingface" if name == "config.json" else "meta"
    folder = copy_of(models("llama4") / source, tmp_path_factory.getbasetemp() / "json")
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(damage(whole, edits, span=len(whole)))
    opens_or_says_why(folder, 1 << 18)


def header_bytes(path: Path) -> int:
    """Where the data of a whole GGUF file begins."""
    file = GgufFile(path)
    start = min(tensor.offset for tensor in file.tensors.values())
    file.close()
    return start


@pytest.mark.parametrize("family", ["mixtral", "qwen2", "qwen3_moe", "llama4", "gemma3"])
@settings(max_examples=80)
@given(edits=EDITS)
def test_a_damaged_gguf_file_of_a_family(
    models: Callable[[str], Path],
    family: str,
    edits: list[tuple[str, float, int]],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    source = models(family) / "whole.gguf"
    path = tmp_path_factory.getbasetemp() / "family.gguf"
    data = damage(source.read_bytes(), edits, span=header_bytes(source))
    path.write_bytes(data)
    opens_or_says_why(path, len(data))


@settings(max_examples=100)
@given(edits=EDITS, which=st.floats(0, 1))
def test_a_damaged_part_of_a_gguf_model(
    models: Callable[[str], Path],
    edits: list[tuple[str, float, int]],
    which: float,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = copy_of(models("llama") / "parts", tmp_path_factory.getbasetemp() / "parts")
    parts = sorted(folder.iterdir())
    part = parts[int(which * (len(parts) - 1))]
    whole = part.read_bytes()
    data = damage(whole, edits, span=header_bytes(part))
    part.unlink()  # a link to the whole file
    part.write_bytes(data)
    opens_or_says_why(parts[0], sum(path.stat().st_size for path in parts))
