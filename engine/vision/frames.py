"""What the engine host and its image process say to each other, and how it is framed.

A frame is eight bytes of length (little-endian) and a body. A request goes in two steps, so that
the host can refuse a prompt that is too long before minutes of encoding: `PrepareRequest` and its
`Answer` with the grids; then, unless that was an error, `Proceed`, and where it says so a second
`Answer` and one frame of features for each image. This module computes nothing.
"""

from __future__ import annotations

from typing import IO

import msgspec

MAX_FRAME_BYTES = 1 << 32


class PrepareRequest(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Images to decode and cut: whole files, and what messages call each."""

    files: tuple[bytes, ...]
    numbers: tuple[int, ...]


class Proceed(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Whether the prepared images are to be encoded, or forgotten."""

    is_wanted: bool


class Answer(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What came of a step; `error` is a class name of engine.errors, or "".

    Attributes:
        grids: rows and columns of tiles of every image.
        width: of the features that follow, float32 [N, width] of every image.
    """

    error: str = ""
    message: str = ""
    grids: tuple[tuple[int, int], ...] = ()
    width: int = 0


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
