"""A hand-over as one record of fixed fields, for streams between computing threads.

In: a `HandOver` and its tensors. Out: bytes, and back. The general form of messages would do, but
naming every tensor takes longer than sealing it. Whether a plan asks for the hand-over is not known
here.
"""

from __future__ import annotations

import math
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
    epoch: int,
    step_id: int,
    row: int,
    device_index: int,
    dtype: np.dtype[Any],
    shape: tuple[int, ...],
) -> bytes:
    """How the record of a lone partial sum of a step's only piece begins; `times` follow.

    Whoever knows what must come compares instead of reading.
    """
    bits = _IS_PART | _HAS_PARTIAL
    fields = _FIELDS.pack(m.PROTOCOL_VERSION, epoch, step_id, row, 0, device_index, bits, 1)
    return fields + _TENSOR.pack(_CODES[dtype], *shape)


def times(sent_ns: int, heard_ns: int | None) -> bytes:
    """The end of a record's head."""
    return _TIMES.pack(sent_ns, _UNHEARD if heard_ns is None else heard_ns)


def read_times(record: bytes, place: int) -> tuple[int, int | None]:
    """What `times` wrote.

    Raises: ProtocolError: a number that is no time.
    """
    sent_ns, heard_ns = _TIMES.unpack_from(record, place)
    if abs(sent_ns) > _LARGEST_NS or (heard_ns != _UNHEARD and abs(heard_ns) > _LARGEST_NS):
        raise ProtocolError(f"a hand-over was sent at {sent_ns} ns, which no clock shows")
    return sent_ns, None if heard_ns == _UNHEARD else heard_ns


def part_of(
    record: bytes, head: bytes, dtype: np.dtype[Any], shape: tuple[int, ...]
) -> m.Array | None:
    """The tensor of a record that begins with `head`, a read-only view; None where it does not.

    Args: dtype, shape: that `head` was made with.
    """
    place = len(head) + _TIMES.size
    count = math.prod(shape)
    if len(record) != place + count * dtype.itemsize or not record.startswith(head):
        return None
    return np.frombuffer(record, dtype, count, place).reshape(shape)


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
