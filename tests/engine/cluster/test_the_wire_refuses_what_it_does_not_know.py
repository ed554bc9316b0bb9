"""Decoding gives back what was encoded, and for anything else one of two errors."""

from __future__ import annotations

import pickle
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.cluster import messages as m
from engine.cluster.codec import Codec, TensorSpec
from engine.errors import PeerRefused, ProtocolError

CODEC: Codec[Any] = Codec(m.RUNNER_ACCEPTS)
STEP = m.Step(
    epoch=3,
    step_id=9,
    kind="prompt",
    segments=(m.Segment(slot=0, first_position=4, token_count=2, logit_offsets=(1,)),),
    operations=(m.SlotOperation(action="free", slot=1),),
    logits=m.LogitsWanted(form="top", ids=((5,),), temperatures=(0.5,)),
)
ROWS = np.arange(6, dtype=np.float32).reshape(2, 3)


def frames_of(message: m.Message, *tensors: m.Array) -> list[bytes]:
    return [bytes(frame) for frame in CODEC.encode(message, tensors)]


@pytest.mark.parametrize("dtype", ["float32", "uint16", "float16", "uint8", "int64"])
def test_what_is_encoded_comes_back(dtype: str) -> None:
    array = np.arange(24).astype(dtype).reshape(2, 3, 4)
    message, tensors = CODEC.decode(frames_of(STEP, array, ROWS))
    assert message == STEP
    np.testing.assert_array_equal(tensors[0], array)
    np.testing.assert_array_equal(tensors[1], ROWS)
    assert tensors[0].dtype == array.dtype


@given(
    sizes=st.lists(st.integers(0, 40), min_size=2, max_size=6),
    dtypes=st.lists(st.sampled_from(["float64", "float32", "uint16", "uint8"]), min_size=6),
    cut=st.integers(-9, 9),
)
def test_small_tensors_share_a_frame_that_has_their_size(
    sizes: list[int], dtypes: list[str], cut: int
) -> None:
    arrays = [np.arange(n).astype(d) for n, d in zip(sizes, dtypes, strict=False)]
    header, frame = frames_of(STEP, *arrays)
    message, tensors = CODEC.decode([header, frame])
    assert message == STEP
    for found, expected in zip(tensors, arrays, strict=True):
        np.testing.assert_array_equal(found, expected)
        assert found.dtype == expected.dtype
    damaged = frame[:cut] if cut < 0 else frame + bytes(cut)
    if len(damaged) != len(frame):
        with pytest.raises(ProtocolError, match="tensors in one part need"):
            CODEC.decode([header, damaged])


@pytest.mark.parametrize(("num_bytes", "num_frames"), [(16 << 10, 2), ((16 << 10) + 1, 3)])
def test_large_tensors_have_frames_of_their_own(num_bytes: int, num_frames: int) -> None:
    large = (np.arange(num_bytes - ROWS.nbytes) % 251).astype(np.uint8)
    frames = frames_of(STEP, large, ROWS)
    assert len(frames) == num_frames
    _message, tensors = CODEC.decode(frames)
    np.testing.assert_array_equal(tensors[0], large)
    np.testing.assert_array_equal(tensors[1], ROWS)


@pytest.mark.parametrize(
    "shape", [(-1,), (-1, -8), (1,) * 9, (1 << 41,), (0, 1 << 40, 1 << 40), (1 << 40,) * 8]
)
@pytest.mark.parametrize("content", [b"", b"12345678", bytes(16)])
def test_a_shared_frame_with_impossible_shapes_is_refused(
    shape: tuple[int, ...], content: bytes
) -> None:
    specs = (TensorSpec("float32", shape), TensorSpec("float32", (1,)))
    header = msgspec.msgpack.encode((m.PROTOCOL_VERSION, STEP, specs))
    with pytest.raises(ProtocolError, match="tensor"):
        CODEC.decode([header, content])


@pytest.mark.parametrize("frames", [[], [b"12345678"]])
def test_too_many_tensors_for_one_frame_are_refused(frames: list[bytes]) -> None:
    specs = (TensorSpec("uint8", (0,)),) * 17
    header = msgspec.msgpack.encode((m.PROTOCOL_VERSION, STEP, specs))
    with pytest.raises(ProtocolError, match="announces 17 tensors"):
        CODEC.decode([header, *frames])


@given(st.lists(st.binary(max_size=60), max_size=4))
def test_random_frames_raise_a_protocol_error(frames: list[bytes]) -> None:
    with pytest.raises((ProtocolError, PeerRefused)):
        CODEC.decode(frames)


@given(
    position=st.integers(0, 10_000),
    byte=st.integers(0, 255),
    what=st.sampled_from(["flip", "cut", "extend", "swap", "drop", "repeat"]),
)
def test_damaged_frames_raise_a_protocol_error_or_give_a_valid_message(
    position: int, byte: int, what: str
) -> None:
    frames = frames_of(STEP, ROWS)
    header = bytearray(frames[0])
    at = position % len(header)
    if what == "flip":
        header[at] = byte
    elif what == "cut":
        del header[at:]
    elif what == "extend":
        header += bytes([byte])
    elif what == "swap":
        frames.reverse()
        header = bytearray(frames[0])
    elif what == "drop":
        frames.pop()
    else:
        frames.append(frames[-1])
    frames[0] = bytes(header)
    try:
        message, tensors = CODEC.decode(frames)
    except (ProtocolError, PeerRefused):
        return
    assert isinstance(message, m.Message)
    assert sum(t.nbytes for t in tensors) == sum(len(f) for f in frames[1:])


@pytest.mark.parametrize("shape", [(2, 4), (-2, -3), (2**40, 2**40), (), (0,)])
def test_a_tensor_that_is_not_what_its_spec_says_is_refused(shape: tuple[int, ...]) -> None:
    spec = TensorSpec("float32", shape)
    header = msgspec.msgpack.encode((m.PROTOCOL_VERSION, STEP, (spec,)))
    with pytest.raises(ProtocolError, match="tensor says"):
        CODEC.decode([header, ROWS.tobytes()])


def test_an_unknown_dtype_is_refused() -> None:
    header = msgspec.msgpack.encode((m.PROTOCOL_VERSION, STEP, (("complex256", (2,)),)))
    with pytest.raises(ProtocolError, match="complex256"):
        CODEC.decode([header, b"12345678"])


def test_pickle_is_not_a_message() -> None:
    with pytest.raises(ProtocolError, match="first bytes 80 0"):
        CODEC.decode([pickle.dumps({"a": 1})])


def test_a_message_for_somebody_else_is_refused() -> None:
    with pytest.raises(ProtocolError):
        CODEC.decode(frames_of(m.Hello(host_name="desk")))


def test_another_protocol_version_is_refused_by_its_number() -> None:
    header = msgspec.msgpack.encode((m.PROTOCOL_VERSION + 1, ["Unheard", 1], ()))
    with pytest.raises(PeerRefused, match=f"version {m.PROTOCOL_VERSION + 1}"):
        CODEC.decode([header])


def test_an_unknown_field_is_refused() -> None:
    raw = msgspec.msgpack.decode(frames_of(STEP)[0])
    raw[1].append("more")
    with pytest.raises(ProtocolError):
        CODEC.decode([msgspec.msgpack.encode(raw)])


def test_deep_nesting_is_refused() -> None:
    with pytest.raises(ProtocolError):
        CODEC.decode([b"\x91" * 100_000 + b"\x01"])
