"""What the engine host and its image process say to each other, and how it is framed.

A frame is eight bytes of length (little-endian) and a body. This module computes nothing.
"""

from __future__ import annotations

from typing import IO

import msgspec

MAX_FRAME_BYTES = 1 << 32


class EncodeRequest(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Images to encode: whole files."""

    files: tuple[bytes, ...]


class EncodeAnswer(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What came of it; `error` is a class name of engine.errors, or "".

    Attributes:
        grids: rows and columns of tiles of every image.
        shape: of the features that follow.
    """

    error: str
    message: str
    grids: tuple[tuple[int, int], ...] = ()
    shape: tuple[int, int] = (0, 0)


def read_frame(stream: IO[bytes]) -> bytes | None:
    """One frame; None where the stream ends, or announces too much."""
    head = stream.read(8)
    size = int.from_bytes(head, "little")
    if len(head) < 8 or size > MAX_FRAME_BYTES:
        return None
    body = stream.read(size)
    return body if len(body) == size else None


def write_frame(stream: IO[bytes], body: bytes | memoryview) -> None:
    """One frame."""
    stream.write(len(body).to_bytes(8, "little"))
    stream.write(body)
    stream.flush()
