"""A file's 4-bit and 8-bit blocks compute as they are, however a plan cuts them."""

from __future__ import annotations

from pathlib import Path

import gguf
import msgspec
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.kernels.matrices import Int4Matrix, Int8Matrix
from engine.kernels.native_library import INT4, INT8, SYMMETRIC_INT4
from engine.kernels.native_matrices import NativeMatrix
from engine.model.batch import ComputeDtype
from engine.model.share_keys import SliceKey, WeightKey, row_keys
from engine.model.weight_store import WeightStore, fetch_weights
from engine.plan.plan import Plan, PlanShape
from engine.plan.presets import even, single
from engine.weights.checkpoint import Checkpoint, open_checkpoint
from tests.tiny_files import save_tiny_gguf
from tests.tiny_models import save_tiny_llama

# Every row is whole blocks of 32, as every row of a quantised file is.
WHOLE_BLOCKS = {"hidden_size": 96, "intermediate_size": 160, "head_dim": 32}
KINDS = ["Q4_0", "Q4_1", "Q8_0"]


def save(folder: Path, kind: str, **changes: int) -> Path:
    oracle = save_tiny_llama(folder / "oracle", **{**WHOLE_BLOCKS, **changes})
    return save_tiny_gguf(oracle, folder / "tiny.gguf", kind=gguf.GGMLQuantizationType[kind])


def grouped_values(matrix: object, is_int4: bool) -> Tensor:
    """All values of a matrix in int4 or int8 groups, as packed for torch or for native kernels."""
    if isinstance(matrix, NativeMatrix):
        assert matrix.format_code in ((INT4, SYMMETRIC_INT4) if is_int4 else (INT8,))
        return matrix.dequantize(0, matrix.shape[0])
    assert isinstance(matrix, Int4Matrix if is_int4 else Int8Matrix)
    return matrix.dequantize(0, len(matrix.scales))


def pack(checkpoint: Checkpoint, plan: Plan, dtype: ComputeDtype) -> list[dict[WeightKey, Tensor]]:
    """Values of every matrix of every device."""
    found: list[dict[WeightKey, Tensor]] = []
    for index in plan.used_devices():
        keys = [
            key
            for row in range(plan.shape.num_rows)
            for key in row_keys(checkpoint.config, plan, row, index).values()
            if not key.is_plain
        ]
        store = WeightStore(checkpoint.tensors, dtype, torch.device("cpu"), {})
        fetch_weights(store, keys, lambda s: checkpoint.read_slice(s.name, s.axis, s.start, s.end))
        values: dict[WeightKey, Tensor] = {}
        for key, matrix in store.packed.items():
            is_int4 = dtype == "int4" and checkpoint.tensors[key.slices[0].name].format != "Q8_0"
            values[key] = grouped_values(matrix, is_int4)
        found.append(values)
    return found


def by_gguf(checkpoint: Checkpoint, part: SliceKey) -> NDArray[np.float32]:
    """What the gguf package makes of a slice of the file."""
    info = checkpoint.tensors[part.name]
    raw = checkpoint.read_slice(part.name, 0, 0, info.shape[0]).reshape(info.shape[0], -1)
    values = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[info.format])
    if part.axis == 0:
        return values[part.start : part.end]
    return values[:, part.start : part.end]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_devices", [1, 2, 3])
def test_every_share_has_exactly_the_values_of_the_file(
    tmp_path: Path, kind: str, num_devices: int
) -> None:
    with open_checkpoint(save(tmp_path, kind)) as checkpoint:
        shape = PlanShape.from_config(checkpoint.config)
        plan = even(shape, [f"{n}/cpu" for n in range(num_devices)])
        for values in pack(checkpoint, plan, "int4"):
            for key, found in values.items():
                expected = np.concatenate([by_gguf(checkpoint, part) for part in key.slices])
                np.testing.assert_array_equal(found.numpy(), expected, err_msg=str(key))


@pytest.mark.parametrize("dtype", ["int8", "int4"])
@pytest.mark.parametrize("kind", ["Q4_1", "Q8_0", "F16"])
def test_heads_narrower_than_a_group_have_the_same_values_in_any_share(
    tmp_path: Path, dtype: ComputeDtype, kind: str
) -> None:
    """Head width 16: half a block of the file, so its numbers must be rounded again, once."""
    with open_checkpoint(save(tmp_path, kind, head_dim=16)) as checkpoint:
        shape = PlanShape.from_config(checkpoint.config)
        (whole,) = pack_outputs(checkpoint, single(shape, "a/cpu"), dtype)
        shares = pack_outputs(checkpoint, even(shape, ["a", "b", "c"]), dtype)
        torch.testing.assert_close(torch.cat(shares, dim=1), whole, rtol=0, atol=0)


def pack_outputs(checkpoint: Checkpoint, plan: Plan, dtype: ComputeDtype) -> list[Tensor]:
    """Values of the first attention output of every device."""
    found: list[Tensor] = []
    for index in plan.used_devices():
        key = row_keys(checkpoint.config, plan, 0, index)["output"]
        store = WeightStore(checkpoint.tensors, dtype, torch.device("cpu"), {})
        fetch_weights(store, [key], lambda s: checkpoint.read_slice(s.name, s.axis, s.start, s.end))
        matrix = store.packed[key]
        is_int4 = dtype == "int4" and checkpoint.tensors[key.slices[0].name].format != "Q8_0"
        found.append(grouped_values(matrix, is_int4))
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_a_cut_through_blocks_is_rounded_again_by_at_most_half_a_step(
    tmp_path: Path, kind: str
) -> None:
    """With a quantum of 48 columns, a share of `down` begins in the middle of a block."""
    with open_checkpoint(save(tmp_path, kind)) as checkpoint:
        shape = PlanShape.from_config(checkpoint.config)
        plan = even(msgspec.structs.replace(shape, mlp_quantum=48), ["a/cpu", "b/cpu"])
        for values in pack(checkpoint, plan, "int4"):
            for key, found in values.items():
                expected = np.concatenate([by_gguf(checkpoint, part) for part in key.slices])
                # A group's range, over its numbers; float16 rounds scale and minimum, too.
                step = np.ptp(expected, axis=1, keepdims=True) / 15
                worst = (np.abs(found.numpy() - expected) / step).max()
                assert worst <= 0.51, f"{key}: {worst:.3f} steps"


def pack_of_two(checkpoint: Checkpoint, other: Checkpoint) -> tuple[WeightKey, object]:
    """The first qkv matrix in int4, its last part as another file has it."""
    plan = single(PlanShape.from_config(checkpoint.config), "a/cpu")
    key = row_keys(checkpoint.config, plan, 0, 0)["qkv"]
    value = key.slices[2]
    tensors = {**checkpoint.tensors, value.name: other.tensors[value.name]}
    store = WeightStore(tensors, "int4", torch.device("cpu"), {})

    def read(part: SliceKey) -> NDArray[np.uint8]:
        source = other if part.name == value.name else checkpoint
        return source.read_slice(part.name, part.axis, part.start, part.end)

    fetch_weights(store, [key], read)
    return key, store.packed[key]


def test_a_matrix_of_two_formats_keeps_the_wider_one(tmp_path: Path) -> None:
    """q and k in four bits, v in eight, as quantisers make them: v is not rounded again."""
    path = save(tmp_path, "Q4_0")
    wide = save(tmp_path / "wide", "Q8_0")
    with open_checkpoint(path) as narrow_file, open_checkpoint(wide) as wide_file:
        key, matrix = pack_of_two(narrow_file, wide_file)
        value = key.slices[2]
        values = grouped_values(matrix, is_int4=False).numpy()
        found = values[-(value.end - value.start) :]
        np.testing.assert_array_equal(found, by_gguf(wide_file, value))
        queries = by_gguf(narrow_file, key.slices[0])
        largest = np.abs(queries).max()
        assert np.abs(values[: len(queries)] - queries).max() <= largest / 250


@pytest.mark.parametrize("other", ["Q4_1", "F16"])
def test_a_matrix_of_q4_0_and_another_format_keeps_the_values_of_q4_0(
    tmp_path: Path, other: str
) -> None:
    """Its numbers have no minimums, those of the rows below have."""
    path, path_other = save(tmp_path, "Q4_0"), save(tmp_path / "other", other)
    with open_checkpoint(path) as symmetric, open_checkpoint(path_other) as with_minimums:
        key, matrix = pack_of_two(symmetric, with_minimums)
        value = key.slices[2]
        assert isinstance(matrix, NativeMatrix | Int4Matrix)
        num_rows = sum(part.end - part.start for part in key.slices)
        assert matrix.num_bytes == num_rows * 96 // 32 * 20
        values = grouped_values(matrix, is_int4=True).numpy()
        narrow = np.concatenate([by_gguf(symmetric, part) for part in key.slices[:2]])
        np.testing.assert_array_equal(values[: len(narrow)], narrow)
        expected = by_gguf(with_minimums, value)
        # A group's range over its numbers is at most that of its row.
        step = np.ptp(expected, axis=1, keepdims=True) / 15 if other == "F16" else 0.0
        assert (np.abs(values[len(narrow) :] - expected) <= 0.51 * step).all()


@pytest.mark.parametrize(("kind", "group_bytes"), [("Q4_0", 18), ("Q4_1", 20)])
def test_only_q4_0_is_held_without_minimums(tmp_path: Path, kind: str, group_bytes: int) -> None:
    with open_checkpoint(save(tmp_path, kind)) as checkpoint:
        plan = single(PlanShape.from_config(checkpoint.config), "a/cpu")
        for key in row_keys(checkpoint.config, plan, 0, 0).values():
            if key.is_plain:
                continue
            store = WeightStore(checkpoint.tensors, "int4", torch.device("cpu"), {})
            fetch_weights(
                store, [key], lambda s: checkpoint.read_slice(s.name, s.axis, s.start, s.end)
            )
            matrix = store.packed[key]
            assert isinstance(matrix, NativeMatrix | Int4Matrix)
            values = grouped_values(matrix, is_int4=True)
            assert matrix.num_bytes == values.numel() // 32 * group_bytes
