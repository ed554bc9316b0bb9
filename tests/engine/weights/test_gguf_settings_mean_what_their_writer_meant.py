"""Metadata of GGUF files, by the reference writer, gives the configuration of the same model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from engine.errors import CheckpointError
from engine.model.config import NO_ROPE, ModelConfig
from engine.weights.checkpoint import open_checkpoint
from engine.weights.models import resolve_model
from tests.tiny_families import FAMILIES, GGUF_CHANGES, save_tiny, save_tiny_gguf
from tests.tiny_files import gguf_arrays, rope_divisors

# What is the same model, written another way: pairs of q and k, Gemma's norms, epsilon in float32.
_MAY_DIFFER = {"rope_layout", "norm_adds_one", "norm_epsilon", "vision", "family"}


def both(tmp_path: Path, family: str, **changes: Any) -> tuple[ModelConfig, ModelConfig]:
    """The configuration from the folder, and from the GGUF file."""
    oracle = save_tiny(family, tmp_path, **changes)
    path = save_tiny_gguf(oracle, tmp_path / "tiny.gguf")
    with open_checkpoint(tmp_path) as folder, open_checkpoint(path) as file:
        return folder.config, file.config


@pytest.mark.parametrize("family", FAMILIES)
def test_the_file_says_what_the_folder_says(tmp_path: Path, family: str) -> None:
    folder, file = both(tmp_path, family, **GGUF_CHANGES.get(family, {}))
    for field in folder.__struct_fields__:
        left, right = getattr(folder, field), getattr(file, field)
        if field == "attention_scale":  # 0 is head_width ** -0.5
            left, right = left or 20**-0.5, right or 20**-0.5
        if field not in _MAY_DIFFER:
            assert left == right, field
    assert np.float32(folder.norm_epsilon) == np.float32(file.norm_epsilon)
    assert file.norm_adds_one is False
    is_reordered = family in ("llama", "smollm", "mistral", "mixtral") or "llama4" in family
    assert file.rope_layout == ("adjacent" if is_reordered else "half")


ROPE = {"rope_theta": 10000.0}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
    **ROPE,
}


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 4.0, **ROPE},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, **ROPE},
        {
            "rope_type": "yarn",
            "factor": 8.0,
            "original_max_position_embeddings": 32,
            "beta_fast": 16.0,
            "beta_slow": 2.0,
            **ROPE,
        },
    ],
)
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_scaled_rope_is_that_of_the_folder(
    tmp_path: Path, family: str, rope: dict[str, Any]
) -> None:
    folder, file = both(tmp_path, family, rope_parameters=rope)
    assert file.ropes == folder.ropes
    assert file.ropes[0].kind == rope["rope_type"]


@pytest.mark.parametrize("high", [4.0, 1.0])
def test_divisors_of_frequencies_are_those_in_the_file(tmp_path: Path, high: float) -> None:
    rope = LLAMA3 | {"high_freq_factor": high}
    _, file = both(tmp_path, "llama", rope_parameters=rope)
    assert file.ropes[0].kind == "factors"
    assert file.ropes[0].factors == tuple(float(value) for value in rope_divisors(rope, 20))
    assert 1.0 in file.ropes[0].factors
    assert 8.0 in file.ropes[0].factors


def written(
    tmp_path: Path, family: str, change: Callable[[gguf.GGUFWriter], None], **changes: Any
) -> ModelConfig:
    """The configuration of a file with more keys."""
    oracle = save_tiny(family, tmp_path, **GGUF_CHANGES.get(family, {}), **changes)
    path = save_tiny_gguf(oracle, tmp_path / "tiny.gguf", change=change)
    with open_checkpoint(path) as file:
        return file.config


def test_an_old_factor_without_a_kind_is_linear(tmp_path: Path) -> None:
    config = written(tmp_path, "llama", lambda w: w.add_float32("llama.rope.scale_linear", 2.0))
    assert (config.ropes[0].kind, config.ropes[0].factor) == ("linear", 2.0)


def test_a_factor_of_kind_none_changes_nothing(tmp_path: Path) -> None:
    def change(writer: gguf.GGUFWriter) -> None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.NONE)
        writer.add_rope_scaling_factor(2.0)

    assert written(tmp_path, "llama", change).ropes[0].kind == "default"


def test_the_magnitude_of_yarn_follows_its_keys(tmp_path: Path) -> None:
    """0.1 · ln(4) + 1, times the file's own factor; a multiplier of 1 cancels it."""

    def scale(writer: gguf.GGUFWriter) -> None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(4.0)
        writer.add_rope_scaling_attn_factors(0.5)

    def cancel(writer: gguf.GGUFWriter) -> None:
        scale(writer)
        writer.add_rope_scaling_yarn_log_mul(1.0)

    magnitude = 0.1 * np.log(4.0) + 1
    rope = written(tmp_path / "a", "llama", scale).ropes[0]
    assert rope.attention_factor == pytest.approx(0.5 * magnitude, rel=1e-12)
    assert rope.original_positions == 256  # the context, where the file has no older one
    rope = written(tmp_path / "b", "llama", cancel).ropes[0]
    assert rope.attention_factor == pytest.approx(0.5, rel=1e-12)


@pytest.mark.parametrize(
    ("family", "pattern", "expected"),
    [
        ("gemma3", None, [True] * 5 + [False] + [True] * 2),
        ("gemma3", 3, [True, True, False] * 2 + [True, True]),
        ("gemma3", 1, [False] * 8),
        ("mistral", None, [True] * 8),
        ("mistral", [True, False] * 4, [True, False] * 4),
    ],
)
def test_a_window_holds_for_the_layers_of_its_pattern(
    tmp_path: Path, family: str, pattern: Any, expected: list[bool]
) -> None:
    kinds = ["sliding_attention"] * 8
    changes = {"layer_types": kinds} if family == "gemma3" else {}
    config = written(
        tmp_path,
        family,
        lambda w: w.add_sliding_window_pattern(pattern) if pattern is not None else None,
        num_hidden_layers=8,
        **changes,
    )
    assert [layer.reach == "sliding" for layer in config.layers] == expected
    assert {layer.span for layer in config.layers if layer.reach == "sliding"} <= {12}
    if family == "gemma3":
        assert [layer.rope == 1 for layer in config.layers] == expected


def test_the_largest_gemma_3_scales_attention_by_its_width(tmp_path: Path) -> None:
    """No key says it; llama.cpp knows the model by its 62 layers."""
    _, config = both(tmp_path, "gemma3", num_hidden_layers=62, layer_types=None)
    assert config.attention_scale == (48 / 6) ** -0.5


def test_llama_4_without_a_window_has_rope_everywhere(tmp_path: Path) -> None:
    config = written(tmp_path, "llama4", lambda w: w.add_sliding_window(0))
    assert all(layer.rope != NO_ROPE and layer.reach == "full" for layer in config.layers)
    assert config.tuning_floor == 0


def test_the_large_llama_4_has_no_norm_of_q_and_k(tmp_path: Path) -> None:
    """The file does not say it; the number of experts does."""
    small, large = (
        both(tmp_path / str(n), "llama4", num_local_experts=n, **GGUF_CHANGES["llama4"])[1]
        for n in (5, 128)
    )
    assert (small.qk_norm, large.qk_norm) == ("l2", "none")


def test_weights_of_experts_need_not_sum_to_one(tmp_path: Path) -> None:
    for value in (True, False):
        config = written(
            tmp_path / str(value), "qwen3_moe", lambda w, v=value: w.add_expert_weights_norm(v)
        )
        assert config.experts is not None
        assert config.experts.is_normalized is value


# --- parts --------------------------------------------------------------------------------------


@pytest.fixture
def parts(tmp_path: Path) -> list[Path]:
    """A model in four files."""
    oracle = save_tiny("llama", tmp_path / "hf")
    save_tiny_gguf(oracle, tmp_path / "tiny.gguf", max_tensors_per_part=9)
    found = sorted(tmp_path.glob("*.gguf"))
    assert len(found) == len(gguf_arrays(oracle)) // 9 + 1 == 4
    return found


def test_a_folder_of_parts_is_one_model(parts: list[Path]) -> None:
    folder = parts[0].parent
    for path in (folder, resolve_model(str(folder), lambda done, total: None)):
        with open_checkpoint(path) as model:
            assert len(model.tensors) == 30
    assert resolve_model(str(folder), lambda done, total: None) == parts[0]
    # Beside another model, or a configuration, the folder is not looked into.
    (folder / "other.gguf").write_bytes(b"GGUF")
    assert resolve_model(str(folder), lambda done, total: None) == folder


def _other_model(parts: list[Path]) -> None:
    oracle = save_tiny("llama", parts[0].parent / "other", num_hidden_layers=4)
    folder = parts[0].parent / "other"
    save_tiny_gguf(oracle, folder / "tiny.gguf", max_tensors_per_part=11)
    others = sorted(folder.glob("*.gguf"))
    assert [path.name for path in others] == [path.name for path in parts]
    parts[1].write_bytes(others[1].read_bytes())


def _other_key(parts: list[Path]) -> None:
    data = parts[2].read_bytes()
    count = b"split.tensors.count"
    at = data.index(count) + len(count) + 4
    parts[2].write_bytes(data[:at] + bytes([99]) + data[at + 1 :])


BROKEN: list[tuple[str, Callable[[list[Path]], object], str]] = [
    ("missing", lambda p: p[1].unlink(), r"part 2 of 4 is missing; fetch the model again"),
    ("last missing", lambda p: p[3].unlink(), r"part 4 of 4 is missing; fetch the model again"),
    (
        "repeated",
        lambda p: p[2].write_bytes(p[1].read_bytes()),
        r"calls itself part 2 of 4, part 3 of 4 is expected",
    ),
    (
        "not the first",
        lambda p: p[0].write_bytes(p[1].read_bytes()),
        r"part 2 of 4; give the first part, tiny-00001-of-00004.gguf",
    ),
    (
        "whole model among parts",
        lambda p: save_tiny_gguf(save_tiny("llama", p[0].parent / "x"), p[1]),
        r"is no part of a model, part 2 of 4 is expected",
    ),
    ("cut", lambda p: p[2].write_bytes(p[2].read_bytes()[:-999]), r"fetch it again"),
    ("empty", lambda p: p[2].write_bytes(b""), r"the file is empty"),
    ("other model", _other_model, r"are of different models"),
    ("other key", _other_key, r"split.tensors.count differs from that of part 1"),
]


@pytest.mark.parametrize(("change", "message"), [c[1:] for c in BROKEN], ids=[c[0] for c in BROKEN])
def test_parts_that_do_not_belong_together_are_refused(
    parts: list[Path], change: Callable[[list[Path]], object], message: str
) -> None:
    change(parts)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(parts[0])
    assert "\n" not in str(caught.value)


def test_the_name_says_which_part_it_is(parts: list[Path]) -> None:
    with pytest.raises(CheckpointError, match=r"part 3 of 4; give the first part, tiny-00001-of"):
        open_checkpoint(parts[2])
    renamed = parts[0].rename(parts[0].with_name("model.gguf"))
    with pytest.raises(CheckpointError, match=r"name must end in -00001-of-00004.gguf"):
        open_checkpoint(renamed)
