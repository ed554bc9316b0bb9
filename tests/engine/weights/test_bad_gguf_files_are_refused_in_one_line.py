"""Every broken or hostile GGUF header is told in one line; nothing is allocated for it."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest

from engine.errors import CheckpointError, ConfigError
from engine.weights.checkpoint import open_checkpoint
from engine.weights.gguf import GgufFile

HUGE = (1 << 64) - 1
U32 = struct.Struct("<I").pack
U64 = struct.Struct("<Q").pack


def _magic(raw: Any) -> None:
    raw.magic = b"FUGG"


def _set(**fields: int) -> Callable[[Any], None]:
    def change(raw: Any) -> None:
        for name, value in fields.items():
            setattr(raw, name, value)

    return change


def _deep(raw: Any) -> None:
    raw.key("deep", 9, (U32(9) + U64(1)) * 100_000 + U32(0) + U64(1) + b"\0")


def _overlap(raw: Any) -> None:
    raw.tensor("a", [16], offset=0).tensor("b", [16], offset=32)
    raw.data = bytes(96)


def _aligned(raw: Any) -> None:
    raw.tensor("a", [8], offset=16)
    raw.data = bytes(64)


def _twice(raw: Any) -> None:
    raw.tensor("blk.0.attn_k.weight", [8]).tensor("blk.0.attn_k.weight", [8], offset=32)
    raw.data = bytes(64)


CASES: list[tuple[str, Callable[[Any], None], str]] = [
    ("magic", _magic, r"not a GGUF file \(starts with 46 55 47 47"),
    ("version 0", _set(version=0), "GGUF version 0 is not supported"),
    ("version 1", _set(version=1), "GGUF version 1 is not supported"),
    ("version 4", _set(version=4), r"GGUF version 4 is not supported \(2, 3\)"),
    ("swapped", _set(version=3 << 24), "big-endian"),
    ("tensors", _set(num_tensors=HUGE), f"announces {HUGE} tensors, file has room for at most"),
    ("keys", _set(num_keys=HUGE), f"announces {HUGE} metadata keys"),
    ("key length", lambda raw: raw.keys.append(U64(HUGE) + b"x"), "passes the end of the file"),
    ("key UTF-8", lambda raw: raw.key(b"\xff\xfe", 0, b"\0"), "not UTF-8"),
    ("empty key", lambda raw: raw.key("", 0, b"\0"), "is empty or contains NUL"),
    ("NUL key", lambda raw: raw.key("a\0b", 0, b"\0"), "is empty or contains NUL"),
    ("value length", lambda raw: raw.key("k", 8, U64(HUGE)), "passes the end of the file"),
    ("NUL value", lambda raw: raw.key("k", 8, raw.string("a\0b")), "contains NUL"),
    ("value type", lambda raw: raw.key("x", 99, b"\0"), "value type 99 of key 'x' is unknown"),
    ("bool 2", lambda raw: raw.key("x", 7, b"\2"), "bool with value 2"),
    ("bools", lambda raw: raw.key("x", 9, U32(7) + U64(2) + b"\1\2"), "other than 0 and 1"),
    ("nesting", _deep, "nesting deeper than 1"),
    ("count", lambda raw: raw.key("x", 9, U32(0) + U64(1 << 60)), "passes the end of the file"),
    ("strings", lambda raw: raw.key("x", 9, U32(8) + U64(1 << 60)), "passes the end of the file"),
    ("elements", lambda raw: raw.key("x", 9, U32(13) + U64(1) + b"\0"), "element type 13"),
    ("same key", lambda raw: raw.key("x", 0, b"\0").key("x", 0, b"\1"), "'x' appears twice"),
    ("same name", _twice, r"'blk.0.attn_k.weight' appears twice"),
    *(
        (f"alignment {n}", lambda raw, n=n: raw.key("general.alignment", 4, U32(n)), "not a power")
        for n in (0, 13, 4, 1 << 31)
    ),
    (
        "alignment int32",
        lambda raw: raw.key("general.alignment", 5, U32(32)),
        "stored as int32, uint32 is required",
    ),
    ("long name", lambda raw: raw.tensor("n" * 65, [8]), "65 bytes long, at most 64"),
    ("no dimensions", lambda raw: raw.tensor("x", []), r"'x' has 0 dimensions \(1 to 4\)"),
    ("5 dimensions", lambda raw: raw.tensor("x", [1] * 5), "'x' has 5 dimensions"),
    ("zero", lambda raw: raw.tensor("x", [4, 0]), "'x' has dimension 0"),
    ("negative", lambda raw: raw.tensor("x", [-1]), f"'x' has dimension {HUGE}"),
    ("2^63", lambda raw: raw.tensor("x", [1 << 63]), "'x' has dimension"),
    (
        "product wraps",
        lambda raw: raw.tensor("x", [(1 << 42) + 1, 1 << 22], kind=27),
        "would need 147,573,952,589,709,967,360 bytes, file has",
    ),
    ("bytes wrap", lambda raw: raw.tensor("x", [1 << 62]), "would need 18,446,744,073,709,551,616"),
    ("removed type", lambda raw: raw.tensor("x", [32], kind=4), "type 4, which is not supported"),
    ("row", lambda raw: raw.tensor("x", [255], kind=12), "not a multiple of 256"),
    ("aligned", _aligned, "offset 16 is not aligned to 32"),
    ("offset", lambda raw: raw.tensor("x", [1], offset=HUGE - 31), "file ends at"),
    ("overlap", _overlap, "'a' and 'b' overlap"),
]


@pytest.mark.parametrize(
    ("change", "message"), [case[1:] for case in CASES], ids=[c[0] for c in CASES]
)
def test_a_broken_header_is_refused(
    tmp_path: Path, make: SimpleNamespace, change: Callable[[Any], None], message: str
) -> None:
    raw = make.RawGguf()
    change(raw)
    with pytest.raises(CheckpointError, match=message) as caught:
        GgufFile(raw.write(tmp_path / "bad.gguf"))
    assert "\n" not in str(caught.value)


def test_a_file_without_one_byte_is_refused(tmp_path: Path, make: SimpleNamespace) -> None:
    path = make.gguf(tmp_path / "tiny.gguf")
    data = path.read_bytes()
    # The writer pads the end; the last tensor is 96 rows of 160 columns, whole.
    for cut in (1 + len(data) - len(data.rstrip(b"\0")), len(data) // 2, len(data) - 30, 3):
        path.write_bytes(data[:cut])
        with pytest.raises(CheckpointError):
            open_checkpoint(path)
    path.write_bytes(b"")
    with pytest.raises(CheckpointError, match="is empty"):
        open_checkpoint(path)


METADATA: list[tuple[str, dict[str, Any], str]] = [
    ("layers", {"block_count": 2**31}, r"block_count 2147483648, but the file has layers 0-1"),
    ("heads", {"head_count": 0}, "num_heads 0 is below 1"),
    ("kv heads", {"head_count_kv": 2}, "num_kv_heads 2 does not divide num_heads 3"),
    ("no kv heads", {"head_count_kv": 0}, "num_kv_heads 0 is not between"),
    ("vocabulary", {"vocab_size": 98}, r"has shape \[99, 96\], its configuration says \[98, 96\]"),
    ("architecture", {"architecture": "mamba"}, "'mamba' is not supported .supported: llama"),
    ("odd", {"head_count": 32, "head_count_kv": 32}, "head_width 3 is odd"),
    ("width", {"head_count": 7, "head_count_kv": 7}, "num_heads 7 does not divide width 96"),
]


@pytest.mark.parametrize(
    ("numbers", "message"), [c[1:] for c in METADATA], ids=[c[0] for c in METADATA]
)
def test_metadata_that_does_not_fit_the_tensors_is_refused(
    tmp_path: Path, make: SimpleNamespace, numbers: dict[str, Any], message: str
) -> None:
    with pytest.raises((CheckpointError, ConfigError), match=message) as caught:
        open_checkpoint(make.gguf(tmp_path / "bad.gguf", **numbers))
    assert "\n" not in str(caught.value)


UNSUPPORTED: list[tuple[Callable[[gguf.GGUFWriter], None], str]] = [
    (
        lambda writer: writer.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE),
        r"rope.scaling.type = 'longrope' is not supported \(none, linear, yarn\)",
    ),
    (lambda writer: writer.add_rope_scaling_factor(-8.0), "RoPE factor -8.0 is not between"),
    (
        lambda writer: writer.add_float32("llama.rope.scaling.yarn_attn_factor", 2.0),
        "rope.scaling.yarn_attn_factor = 2.0 is not supported",
    ),
    (lambda writer: writer.add_logit_scale(0.5), "logit_scale = 0.5 is not supported"),
    (lambda writer: writer.add_attn_logit_softcapping(5.0), "attn_logit_softcapping = 5.0"),
    (lambda writer: writer.add_clamp_kqv(5.0), "attention.clamp_kqv = 5.0 is not supported"),
    (lambda writer: writer.add_sliding_window(2**31), "sliding_window 2147483648 is not between"),
    (lambda writer: writer.add_rope_dimension_count(16), "rope.dimension_count 16 differs"),
    (lambda writer: writer.add_expert_count(5000), "expert_count 5000 is not between 1 and 4,096"),
    (lambda writer: writer.add_expert_count(8), "expert_used_count is missing"),
    (
        lambda writer: (writer.add_expert_count(8), writer.add_expert_used_count(9))[0],
        "expert_used_count 9 is not between 1 and expert_count 8",
    ),
    (
        lambda writer: (
            writer.add_expert_count(8),
            writer.add_expert_used_count(2),
            writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID),
        )[0],
        r"expert_gating_func = 2 is not supported \(1\)",
    ),
    (
        lambda writer: writer.add_array("llama.attention.head_count_kv", [1, 1]),
        r"head_count_kv must be one integer, found int32\[\]",
    ),
    (
        lambda writer: writer.add_bool("llama.rope.freq_base", True),
        "rope.freq_base must be one number, found bool",
    ),
    (
        lambda writer: writer.add_tensor("rope_freqs.weight", np.ones(15, np.float32)),
        r"rope_freqs.weight is F32 \[15\], its heads need \[16\] numbers",
    ),
    (
        lambda writer: writer.add_tensor("rope_freqs.weight", np.zeros(16, np.float32)),
        "a RoPE factor 0.0 is not between",
    ),
    (
        lambda writer: writer.add_tensor("direction.536870912", np.ones(96, np.float32)),
        r"layer 536870912 in 'direction.536870912' is out of range \(0 to 1\): a control vector",
    ),
    (
        lambda writer: writer.add_tensor("blk.536870912.x.weight", np.ones(96, np.float32)),
        "block_count 2, but the file has layers 0-536870912",
    ),
    (
        lambda writer: writer.add_tensor("foo", np.ones(16, np.float32)),
        r"unknown: foo \(1\)",
    ),
    (
        lambda writer: writer.add_tensor("blk.7.attn_norm.weight", np.ones(96, np.float32)),
        "block_count 2, but the file has layers 0-7",
    ),
    (
        lambda writer: writer.add_token_list([f"t{i}" for i in range(100)]),
        "100 tokens, but the embedding has 99 rows",
    ),
    (
        lambda writer: writer.add_array("tokenizer.ggml.tokens", [1, 2, 3]),
        r"tokenizer.ggml.tokens must be string\[\], found int32\[3\]",
    ),
]


@pytest.mark.parametrize(("change", "message"), UNSUPPORTED, ids=[c[1][:20] for c in UNSUPPORTED])
def test_what_would_compute_something_else_is_refused_by_name(
    tmp_path: Path,
    make: SimpleNamespace,
    change: Callable[[gguf.GGUFWriter], None],
    message: str,
) -> None:
    with pytest.raises((CheckpointError, ConfigError), match=message):
        open_checkpoint(make.gguf(tmp_path / "bad.gguf", change=change))


def test_missing_tensors_are_listed_with_their_number(
    tmp_path: Path, make: SimpleNamespace
) -> None:
    arrays = {name: v for name, v in make.arrays().items() if ".ffn_" not in name}
    message = (
        r"missing: blk.0.ffn_norm.weight, blk.0.ffn_gate.weight, blk.0.ffn_up.weight, "
        r"blk.0.ffn_down.weight and 4 more \(8 of 20\)"
    )
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(make.gguf(tmp_path / "bad.gguf", arrays=arrays))


def test_a_control_vector_is_no_model(tmp_path: Path, make: SimpleNamespace) -> None:
    raw = make.RawGguf().key("general.architecture", 8, make.RawGguf.string("controlvector"))
    raw.tensor("direction.536870912", [8])
    raw.data = bytes(32)
    with pytest.raises(CheckpointError, match="'controlvector' is not supported"):
        open_checkpoint(raw.write(tmp_path / "bad.gguf"))
