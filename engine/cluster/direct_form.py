"""A hand-over as one record of fixed fields, for streams between computing threads.

In: a `HandOver` and its tensors. Out: bytes, and back. The general form of messages would do, but
naming every tensor takes longer than sealing it. Whether a plan asks for the hand-over is not known
here.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

import numpy as np

from engine.cluster import messages as m
from engine.errors import ProtocolError

# Version, epoch, step, row, piece, device, bits, tensors.
_FIELDS = struct.Struct("<HQQIIIBB")
# Dtype, rows, columns.
_TENSOR = struct.Struct("<III")
# Every part of a head is whole float32s long, so that tensors lie where numpy is quick.
_TIMES = struct.Struct("<qq")
_STEP = struct.Struct("<Q")
_STEP_PLACE = struct.calcsize("<HQ")
# Of the record of one tensor: where its times are, and where its values begin.
TIMES_PLACE = _FIELDS.size + _TENSOR.size
PART_PLACE = TIMES_PLACE + _TIMES.size
_UNHEARD = -(1 << 63)
_IS_PART, _HAS_PARTIAL, _HAS_RESIDUAL = 1, 2, 4
_MAX_TENSORS = 2
_DTYPES: dict[int, np.dtype[Any]] = {
    code: np.dtype(m.NUMPY_TYPES[name])
    for code, name in enumerate(("float32", "float16", "bfloat16"))
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}
_LARGEST_COUNT = 1 << 53
_LARGEST_INDEX = (1 << 31) - 1
_LARGEST_NS = 1 << 62


def encode(message: m.HandOver, tensors: Sequence[m.Array]) -> list[bytes | m.Array]:
    """What a record is put together from.

    Args: tensors: at most two, float32, float16 or bfloat16 [N, width], C-contiguous.
    """
    bits = _IS_PART if message.phase == "part" else 0
    if message.has_partial:
        bits |= _HAS_PARTIAL
    if message.has_residual:
        bits |= _HAS_RESIDUAL
    fields = _FIELDS.pack(
        m.PROTOCOL_VERSION,
        message.epoch,
        message.step_id,
        message.row,
        message.piece,
        message.device_index,
        bits,
        len(tensors),
    )
    specs = [_TENSOR.pack(_CODES[tensor.dtype], *tensor.shape) for tensor in tensors]
    return [fields, *specs, times(message.sent_ns, message.heard_ns), *tensors]


def part_head(
    epoch: int, row: int, device_index: int, wire: str, shape: tuple[int, int]
) -> bytearray:
    """How records of a lone partial sum of a step's only piece begin; `write_step` completes it.

    Whoever knows what must come compares instead of reading.

    Args: shape: [N, width], of values in the wire format.
    """
    bits = _IS_PART | _HAS_PARTIAL
    fields = _FIELDS.pack(m.PROTOCOL_VERSION, epoch, 0, row, 0, device_index, bits, 1)
    return bytearray(fields + _TENSOR.pack(_CODES[_dtype_of(wire)], *shape))


def write_step(head: bytearray, step_id: int) -> None:
    """Put the step into a head."""
    _STEP.pack_into(head, _STEP_PLACE, step_id)


def times(sent_ns: int, heard_ns: int | None) -> bytes:
    """The end of a record's head."""
    return _TIMES.pack(sent_ns, _UNHEARD if heard_ns is None else heard_ns)


def read_times(record: bytes | bytearray, place: int) -> tuple[int, int | None]:
    """What `times` wrote.

    Raises: ProtocolError: a number that is no time.
    """
    sent_ns, heard_ns = _TIMES.unpack_from(record, place)
    is_unheard = heard_ns == _UNHEARD
    if not (
        -_LARGEST_NS <= sent_ns <= _LARGEST_NS
        and (is_unheard or -_LARGEST_NS <= heard_ns <= _LARGEST_NS)
    ):
        raise ProtocolError(f"a hand-over was sent at {sent_ns} ns, which no clock shows")
    return sent_ns, None if is_unheard else heard_ns


def part_bytes(wire: str, shape: tuple[int, int]) -> int:
    """Bytes of a partial sum [N, width] in the wire format."""
    return shape[0] * shape[1] * _dtype_of(wire).itemsize


def part_view(memory: bytearray, wire: str, shape: tuple[int, int]) -> m.Array:
    """The partial sum of whatever record of a `part_head` lies at the start of a memory."""
    count = shape[0] * shape[1]
    view = np.frombuffer(memory, _dtype_of(wire), count, PART_PLACE).reshape(shape)
    view.flags.writeable = False
    return view


def _dtype_of(wire: str) -> np.dtype[Any]:
    return np.dtype(m.NUMPY_TYPES[wire])


def decode(record: bytes) -> tuple[m.HandOver, list[m.Array]]:
    """The hand-over and its tensors as read-only views of the record.

    Raises: ProtocolError: the record is none.
    """
    if len(record) < _FIELDS.size:
        raise ProtocolError(f"a hand-over of {len(record)} bytes has no header")
    version, epoch, step_id, row, piece, device_index, bits, count = _FIELDS.unpack_from(record)
    if version != m.PROTOCOL_VERSION:
        raise ProtocolError(f"a hand-over of protocol version {version}, not {m.PROTOCOL_VERSION}")
    place = _FIELDS.size + count * _TENSOR.size + _TIMES.size
    if count > _MAX_TENSORS or len(record) < place:
        raise ProtocolError(f"a hand-over of {len(record)} bytes announces {count} tensors")
    sent_ns, heard_ns = read_times(record, place - _TIMES.size)
    if max(epoch, step_id) > _LARGEST_COUNT or max(row, piece, device_index) > _LARGEST_INDEX:
        raise ProtocolError("a hand-over has a number that is too large for what it counts")
    tensors: list[m.Array] = []
    for n in range(count):
        code, rows, columns = _TENSOR.unpack_from(record, _FIELDS.size + n * _TENSOR.size)
        if code not in _DTYPES:
            raise ProtocolError(f"a hand-over names dtype {code}, there are {len(_DTYPES)}")
        dtype, values = _DTYPES[code], rows * columns
        end = place + values * dtype.itemsize
        if end > len(record):
            raise ProtocolError(
                f"a hand-over announces a tensor [{rows}, {columns}] and has "
                f"{len(record) - place:,} bytes for it"
            )
        tensors.append(np.frombuffer(record, dtype, values, place).reshape(rows, columns))
        place = end
    if place != len(record):
        raise ProtocolError(f"a hand-over has {len(record) - place:,} bytes too many")
    message = m.HandOver(
        epoch=epoch,
        step_id=step_id,
        row=row,
        piece=piece,
        device_index=device_index,
        phase="part" if bits & _IS_PART else "finished",
        has_partial=bool(bits & _HAS_PARTIAL),
        has_residual=bool(bits & _HAS_RESIDUAL),
        sent_ns=sent_ns,
        heard_ns=heard_ns,
    )
    return message, tensors
