"""Image files that a person named.

In: paths. Out: the files' bytes, or one line. It decodes nothing. What a request may bring is
stated here: so many images, and so many bytes of different files.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence

from engine.errors import PromptError
from engine.weights.mapped import one_line

MAX_IMAGES = 32
MAX_FILE_BYTES = 32 << 20
MAX_REQUEST_BYTES = 128 << 20

# A pipe or a device must not block the open; a file is read without translation of line ends.
_FLAGS = os.O_RDONLY | sum(getattr(os, name, 0) for name in ("O_NONBLOCK", "O_NOCTTY", "O_BINARY"))


def read_image_files(paths: Sequence[str]) -> list[bytes]:
    """The contents of the image files of a request; a path given twice is read once.

    Raises: PromptError: there are too many images or bytes, or one cannot be read.
    """
    check_number(len(paths))
    found: dict[str, bytes] = {}
    num_bytes = 0
    for number, path in enumerate(paths, start=1):
        if path not in found:
            found[path] = read_image_file(path, number, MAX_REQUEST_BYTES - num_bytes)
            num_bytes += len(found[path])
    return [found[path] for path in paths]


def check_number(num_images: int) -> None:
    """Raises: PromptError: a request has more images than are read."""
    if num_images > MAX_IMAGES:
        raise PromptError(
            f"{num_images} images in one request, at most {MAX_IMAGES} are read. Send fewer."
        )


def read_image_file(path: str, number: int, room_bytes: int = MAX_REQUEST_BYTES) -> bytes:
    """The contents of an image file.

    Args:
        number: of the image in its request, from 1.
        room_bytes: that the images before it left of MAX_REQUEST_BYTES.
    Raises: PromptError: it cannot be read, is no regular file, or is too large.
    """
    try:
        descriptor = os.open(path, _FLAGS)
    except (OSError, ValueError) as error:
        raise _unreadable(path, number, error) from error
    try:
        _check_status(path, number, os.fstat(descriptor), room_bytes)
        with os.fdopen(descriptor, "rb", closefd=False) as stream:
            # One byte more tells a file that grew meanwhile.
            data = stream.read(min(MAX_FILE_BYTES, room_bytes) + 1)
    except OSError as error:
        raise _unreadable(path, number, error) from error
    finally:
        os.close(descriptor)
    _check_size(number, len(data), room_bytes)
    return data


def _check_status(path: str, number: int, status: os.stat_result, room_bytes: int) -> None:
    if not stat.S_ISREG(status.st_mode):
        kind = "a folder" if stat.S_ISDIR(status.st_mode) else "a pipe or a device"
        raise PromptError(
            f"image {number} cannot be read from {one_line(path, 200)}: it is {kind}, only files "
            "are read. Give the path of an image file"
        )
    _check_size(number, status.st_size, room_bytes)


def _check_size(number: int, num_bytes: int, room_bytes: int) -> None:
    if num_bytes > MAX_FILE_BYTES:
        raise PromptError(
            f"image {number} is larger than {MAX_FILE_BYTES >> 20} MiB. Give a smaller file"
        )
    if num_bytes > room_bytes:
        raise PromptError(
            f"with image {number} the images of the request have more than "
            f"{MAX_REQUEST_BYTES >> 20} MiB, the most that is read. Give fewer or smaller files"
        )


def _unreadable(path: str, number: int, error: Exception) -> PromptError:
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return PromptError(
        f"image {number} cannot be read from {one_line(path, 200)}: {reason}. "
        "Give the path of an image file"
    )
