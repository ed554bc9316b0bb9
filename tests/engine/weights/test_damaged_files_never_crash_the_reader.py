"""Whatever happens to the bytes of a real file: a model, or one line."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import CheckpointError, ConfigError
from engine.weights.checkpoint import open_checkpoint

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


@settings(max_examples=100)
@given(edits=EDITS)
def test_a_damaged_config(
    folder: Path, edits: list[tuple[str, float, int]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    broken = tmp_path_factory.getbasetemp() / "config"
    broken.mkdir(exist_ok=True)
    whole = (folder / "config.json").read_bytes()
    (broken / "config.json").write_bytes(damage(whole, edits, span=len(whole)))
    (broken / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    opens_or_says_why(broken, (broken / "model.safetensors").stat().st_size)
