"""The one binary form that messages and their tensors travel in.

In: a message and numpy arrays. Out: a msgpack header frame, then one raw frame per tensor, or one
for all where they are small; and back. The header states each tensor's dtype and shape, and the
receiver checks them against what it expects (`messages.expect_tensor`) before it uses a byte. It
opens no socket, and what a message means is not known here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any, Generic, TypeVar, cast, get_args

import msgspec
import numpy as np

from engine.cluster.messages import (
    DTYPES,
    NUMPY_TYPES,
    PROTOCOL_VERSION,
    Array,
    Message,
    WireDtype,
)
from engine.errors import PeerRefused, PromptError, ProtocolError, one_line

MAX_HEADER_BYTES = 4 << 20
MAX_TENSORS = 16
MAX_RANK = 8
MAX_DIMENSION = 1 << 40
# Tensors that are smaller together share a frame: one costs both ends as much as some kilobytes.
MAX_JOINED_BYTES = 16 << 10
# What each of them begins at a multiple of.
ALIGNMENT = 8
# By the dtype itself: numpy takes longer to name one than to send a small tensor.
_WIRE_NAMES: dict[np.dtype[Any], WireDtype] = {
    np.dtype(kind): cast(WireDtype, name) for name, kind in NUMPY_TYPES.items()
}


class TensorSpec(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Dtype and shape of a raw tensor."""

    dtype: WireDtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Size by unbounded integers; a shape that is none gives a number no frame can match."""
        if len(self.shape) > MAX_RANK:
            return -1
        for n in self.shape:
            if not 0 <= n <= MAX_DIMENSION:
                return -1
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


M = TypeVar("M")

# Reads the version of a message that is otherwise unknown.
VERSION_DECODER = msgspec.msgpack.Decoder(tuple[int, msgspec.Raw, msgspec.Raw])
# And its name.
TAG_DECODER = msgspec.msgpack.Decoder(tuple[int, tuple[msgspec.Raw, ...], msgspec.Raw])


class Codec(Generic[M]):
    """Encodes any message; decodes only the union it was made for."""

    def __init__(self, accepted: Any) -> None:
        """Args: accepted: a struct type or a union of them."""
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(tuple[int, accepted, tuple[TensorSpec, ...]])
        self._fields: dict[str, tuple[str, ...]] = {
            kind.__name__: kind.__struct_fields__ for kind in get_args(accepted) or (accepted,)
        }

    def encode(self, message: Message, tensors: Sequence[Array] = ()) -> list[Any]:
        """Header frame, then one buffer per tensor, or one for all of several small ones.

        Args:
            tensors: C-contiguous arrays of a dtype in NUMPY_TYPES; uint16 means bfloat16.
        Raises: PromptError: the header is too large, or has text that is not Unicode.
        """
        specs = tuple([TensorSpec(_WIRE_NAMES[a.dtype], a.shape) for a in tensors])
        try:
            header = self._encoder.encode((PROTOCOL_VERSION, message, specs))
        except UnicodeEncodeError:
            raise PromptError(
                "the text has characters that are not Unicode (bytes that are not UTF-8?); remove them"
            ) from None
        except OverflowError:
            raise PromptError(
                "a number of the request does not fit into 64 bits. Choose a smaller one"
            ) from None
        if len(header) > MAX_HEADER_BYTES:
            raise PromptError(
                f"the request is {len(header):,} bytes, at most {MAX_HEADER_BYTES:,} are taken. "
                "Shorten it"
            )
        if len(tensors) > 1 and sum([a.nbytes for a in tensors]) <= MAX_JOINED_BYTES:
            return [header, _join(tensors)]
        return [header, *tensors]

    def decode(self, frames: Sequence[Any]) -> tuple[M, list[Array]]:
        """The message and its tensors as read-only views of the frames.

        Raises:
            ProtocolError: the frames are not a message this end accepts.
            PeerRefused: the peer speaks another protocol version.
        """
        if not frames:
            raise ProtocolError("a message without frames")
        header = memoryview(frames[0])
        if header.nbytes > MAX_HEADER_BYTES:
            raise ProtocolError(
                f"header of {header.nbytes:,} bytes exceeds the limit of {MAX_HEADER_BYTES:,}"
            )
        try:
            version, message, specs = self._decoder.decode(header)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            self._refuse_other_version(header)
            first = header[:2].hex(" ")
            raise ProtocolError(
                f"part 0 is not a known message (first bytes {first}): "
                f"{self._named(one_line(str(error)), header)}"
            ) from error
        if version != PROTOCOL_VERSION:
            self._refuse_other_version(header)
        if len(frames) == 2 and 1 < len(specs) <= MAX_TENSORS:
            return message, _read_joined(specs, frames[1])
        if len(specs) != len(frames) - 1 or len(specs) > MAX_TENSORS:
            raise ProtocolError(
                f"{type(message).__name__} announces {len(specs)} tensors and brings "
                f"{len(frames) - 1} (at most {MAX_TENSORS})"
            )
        tensors = [read_tensor(s, f) for s, f in zip(specs, frames[1:], strict=True)]
        return message, tensors

    def _named(self, reason: str, header: memoryview) -> str:
        """A decoder's reason, with the name of the message and field besides its place."""
        spec = re.search(r"`\$\[2\]\[(\d+)\]\[([01])\]", reason)
        if spec is not None:
            field = TensorSpec.__struct_fields__[int(spec[2])]
            return f"{reason}, which is the {field} of tensor {spec[1]}"
        place = re.search(r"`\$\[1\]\[(\d+)\]", reason)
        if place is None:
            return reason
        try:
            _version, [tag, *_], _specs = TAG_DECODER.decode(header)
            fields = self._fields.get(msgspec.msgpack.decode(tag, type=str), ())
        except (msgspec.DecodeError, ValueError, RecursionError):
            return reason
        number = int(place[1]) - 1
        if not 0 <= number < len(fields):
            return reason
        return f"{reason}, which is {fields[number]}"

    @staticmethod
    def _refuse_other_version(header: memoryview) -> None:
        try:
            version, *_ = VERSION_DECODER.decode(header)
        except (msgspec.DecodeError, RecursionError):
            return
        if version != PROTOCOL_VERSION:
            raise PeerRefused(
                f"the peer speaks protocol version {version}, this end {PROTOCOL_VERSION}: "
                "install the same version of shardmix on both"
            )


def _join(tensors: Sequence[Array]) -> bytes:
    """Tensors one after another, each at a multiple of ALIGNMENT bytes."""
    return b"".join([a.tobytes().ljust(_aligned(a.nbytes), b"\0") for a in tensors])


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


def _read_joined(specs: Sequence[TensorSpec], frame: Any) -> list[Array]:
    """View the arrays of a frame that `_join` made.

    Raises: ProtocolError: the frame's size is not what the specs say.
    """
    sizes = [spec.num_bytes for spec in specs]
    needed, found = sum([_aligned(size) for size in sizes]), memoryview(frame).nbytes
    if min(sizes) < 0 or found != needed:
        raise ProtocolError(
            f"{len(specs)} tensors in one part need {needed:,} bytes, it has {found:,}"
        )
    tensors: list[Array] = []
    start = 0
    for spec, size in zip(specs, sizes, strict=True):
        tensors.append(_array(spec, frame, start, size))
        start += _aligned(size)
    return tensors


def read_tensor(spec: TensorSpec, frame: Any) -> Array:
    """View a raw frame as the array its spec announces.

    Raises: ProtocolError: the frame's size is not what dtype and shape say.
    """
    size, found = spec.num_bytes, memoryview(frame).nbytes
    if size != found:
        raise ProtocolError(
            f"tensor says {list(spec.shape)} {spec.dtype} = {size:,} bytes, part has {found:,}"
        )
    return _array(spec, frame, 0, size)


def _array(spec: TensorSpec, frame: Any, start: int, size: int) -> Array:
    """View `size` bytes of a frame, as many as the spec says, from `start` on."""
    dtype = DTYPES[spec.dtype]
    try:
        values = np.frombuffer(frame, dtype, size // dtype.itemsize, start)
        return values.reshape(spec.shape)
    except ValueError as error:  # Nothing in it, and dimensions no array can have.
        raise ProtocolError(f"tensor says {list(spec.shape)}: {error}") from error
