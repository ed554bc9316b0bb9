"""Image files that a person named.

In: a path. Out: the file's bytes, or one line. It decodes nothing.
"""

from __future__ import annotations

from pathlib import Path

from engine.errors import PromptError
from engine.weights.mapped import one_line

MAX_FILE_BYTES = 32 << 20


def read_image_file(path: str, number: int) -> bytes:
    """The contents of an image file.

    Args:
        number: of the image in its request, from 1.
    Raises: PromptError: it cannot be read, or is too large.
    """
    try:
        with Path(path).open("rb") as stream:
            data = stream.read(MAX_FILE_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise PromptError(
            f"image {number} cannot be read from {one_line(path, 200)}: {reason}. "
            "Give the path of an image file"
        ) from error
    if len(data) > MAX_FILE_BYTES:
        raise PromptError(
            f"image {number} is larger than {MAX_FILE_BYTES >> 20} MiB. Give a smaller file"
        )
    return data
