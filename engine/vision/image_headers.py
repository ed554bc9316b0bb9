"""What an image file says before anything is decoded: kind, size, how much there is to go through.

In: bytes of unknown origin. Out: small numbers. It allocates nothing that the bytes ask for.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from itertools import islice
from typing import Literal

ImageKind = Literal["PNG", "JPEG", "WebP", "GIF", "BMP"]

_BEGINNINGS: tuple[tuple[bytes, ImageKind], ...] = (
    (rb"\x89PNG\r\n\x1a\n", "PNG"),
    (rb"\xff\xd8\xff", "JPEG"),
    (rb"RIFF.{4}WEBP", "WebP"),
    (rb"GIF8[79]a", "GIF"),
    (rb"BM", "BMP"),
)
# A marker that has a length; in the data of a scan FF is followed by 00 or a restart (D0 to D7).
_JPEG_MARKER = re.compile(rb"\xff([^\x00\x01\xd0-\xd8\xff])")
_START_OF_SCAN, _END_OF_IMAGE = 0xDA, 0xD9
_GIF_EXTENSION, _GIF_PICTURE = 0x21, 0x2C
_TAG_ORIENTATION = 0x0112
_TYPE_SHORT = 3


def image_kind(data: bytes) -> ImageKind | None:
    """The kind of file that begins like this, or None."""
    for beginning, kind in _BEGINNINGS:
        if re.match(beginning, data, re.DOTALL):
            return kind
    return None


def webp_canvas(data: bytes) -> tuple[int, int] | None:
    """Width and height that a WebP file says; None where its header is cut off or unknown.

    Source: RFC 9649, sections 2.5 to 2.7.
    """
    chunk, body = data[12:16], data[20:30]
    if chunk == b"VP8X" and len(body) == 10:
        return 1 + int.from_bytes(body[4:7], "little"), 1 + int.from_bytes(body[7:10], "little")
    if chunk == b"VP8 " and len(body) == 10:
        width, height = struct.unpack_from("<HH", body, 6)
        return width & 0x3FFF, height & 0x3FFF
    if chunk == b"VP8L" and len(body) >= 5:
        bits = int.from_bytes(body[1:5], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    return None


def count_jpeg_scans(data: bytes, limit: int) -> int:
    """How often a JPEG file goes over its picture; counting stops above `limit`.

    A progressive file may say it a million times in few bytes, and each costs a whole pass.
    """
    return _count((m for m in _jpeg_segments(data) if m == _START_OF_SCAN), limit)


def count_blocks(data: bytes, kind: ImageKind, limit: int) -> int:
    """Blocks of a file that its reader holds as objects; counting stops above `limit`.

    Millions of empty ones fit a file that is not long, and each costs some hundred bytes.

    Returns: PNG chunks, JPEG segments, parts of GIF comments and extensions before the first
        picture; 0 for other kinds, which are read as a whole.
    """
    if kind == "PNG":
        return _count(_png_chunks(data), limit)
    if kind == "JPEG":
        return _count(_jpeg_segments(data), limit)
    if kind == "GIF":
        return _count(_gif_blocks(data), limit)
    return 0


def exif_orientation(exif: bytes) -> int:
    """How the camera was held, 1 (upright) to 8; 1 where the block does not say or is damaged.

    Args:
        exif: with or without "Exif" and two zero bytes before it.
    Source: Exif 3.0, section 4.6.5; TIFF 6.0, section 2.
    """
    tiff = exif.removeprefix(b"Exif\0\0")
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    if order is None:
        return 1
    try:
        (directory,) = struct.unpack_from(order + "I", tiff, 4)
        (count,) = struct.unpack_from(order + "H", tiff, directory)
        for entry in range(count):
            at = directory + 2 + 12 * entry
            tag, kind, _, value = struct.unpack_from(order + "HHIH", tiff, at)
            if tag == _TAG_ORIENTATION and kind == _TYPE_SHORT:
                return value if 1 <= value <= 8 else 1
    except struct.error:
        pass  # Shorter than it says: a picture the wrong way up is better than none.
    return 1


def _count(things: Iterator[int], limit: int) -> int:
    return sum(1 for _ in islice(things, limit + 1))


def _png_chunks(data: bytes) -> Iterator[int]:
    """Where each chunk begins."""
    at = 8
    while at < len(data):
        yield at
        at += 12 + int.from_bytes(data[at : at + 4], "big")


def _jpeg_segments(data: bytes) -> Iterator[int]:
    """The marker of each segment up to the end of the picture."""
    found = _JPEG_MARKER.search(data, 2)
    while found is not None and found[1][0] != _END_OF_IMAGE:
        yield found[1][0]
        at = found.end() + int.from_bytes(data[found.end() : found.end() + 2], "big")
        # What follows the head of a scan is skipped as its data.
        found = _JPEG_MARKER.search(data, at)


def _gif_blocks(data: bytes) -> Iterator[int]:
    """Where each part of what comes before the first picture begins."""
    flags = data[10] if len(data) > 10 else 0
    at = 13 + (6 << (flags & 7) if flags & 0x80 else 0)  # after the palette
    while at < len(data) and data[at] != _GIF_PICTURE:
        yield at
        is_extension = data[at] == _GIF_EXTENSION
        at += 1
        if is_extension:
            at += 1
            while at < len(data) and data[at]:
                yield at
                at += 1 + data[at]
            at += 1
