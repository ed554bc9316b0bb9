"""Bytes of an image file, from anywhere, to upright red, green and blue.

In: a whole file. Out: uint8 pixels, or one line. Sizes are checked before anything is decoded, so
memory is at most some 16 bytes for each of MAX_PIXELS. It resizes and cuts nothing.
"""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from engine.errors import PromptError
from engine.vision.files import MAX_FILE_BYTES
from engine.vision.image_headers import (
    ImageKind,
    count_blocks,
    count_jpeg_scans,
    exif_orientation,
    image_kind,
    webp_canvas,
)
from engine.weights.mapped import one_line

MAX_PIXELS = 50_000_000
MIN_EDGE = 4
MAX_JPEG_SCANS = 40  # Real progressive files have about ten.
MAX_BLOCKS = 10_000  # PNG writers cut 32 MiB of data into some 4,000 chunks.

_KINDS = "Give a PNG, JPEG, WebP, GIF or BMP file."
# Each kind's reader is called by itself: `Image.open` asks all of Pillow's, some of which start
# programs, and its limit of pixels is one for the whole process.
_READERS: dict[ImageKind, type[ImageFile]] = {
    "PNG": PngImageFile,
    "JPEG": JpegImageFile,
    "WebP": WebPImageFile,
    "GIF": GifImageFile,
    "BMP": BmpImageFile,
}
# What Pillow's readers raise for damaged files.
_DAMAGE = (
    OSError,
    SyntaxError,
    ValueError,
    LookupError,
    EOFError,
    OverflowError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def read_image(data: bytes, number: int) -> NDArray[np.uint8]:
    """Decode one image file: the first frame, turned as its EXIF block says, on white.

    Args:
        data: the file.
        number: of the image in the request, from 1, for messages.
    Returns: uint8 [height, width, 3].
    Raises: PromptError: the file is empty, of another kind, damaged, too large or too small.
    """
    name = f"image {number}"
    if not data:
        raise PromptError(f"{name} is empty (0 bytes). {_KINDS}")
    if len(data) > MAX_FILE_BYTES:
        raise PromptError(
            f"{name} has {len(data):,} bytes, at most {MAX_FILE_BYTES:,} are read. "
            "Save it smaller, or as JPEG."
        )
    kind = image_kind(data)
    if kind is None:
        start = one_line(data[:8].decode("latin-1"))
        raise PromptError(f"{name} begins with '{start}', as no known image does. {_KINDS}")
    _check_work(name, data, kind)
    try:
        with _READERS[kind](io.BytesIO(data)) as image:
            _check_size(name, image.size)
            image.load()
            return np.asarray(_upright(_to_rgb(image), image.info.get("exif")))
    except _DAMAGE as error:
        raise PromptError(
            f"{name} cannot be read as {kind}: {one_line(str(error), 120)}. Save it again."
        ) from error


def _check_work(name: str, data: bytes, kind: ImageKind) -> None:
    """Refuse files that cost their reader much more than their pixels do."""
    if kind == "WebP":
        # The only reader that allocates the canvas when it opens the file.
        _check_size(name, webp_canvas(data) or (MIN_EDGE, MIN_EDGE))
    if kind == "JPEG" and count_jpeg_scans(data, MAX_JPEG_SCANS) > MAX_JPEG_SCANS:
        raise PromptError(
            f"{name} has more than {MAX_JPEG_SCANS} scans, as no honest JPEG file has. "
            "Save it again."
        )
    if count_blocks(data, kind, MAX_BLOCKS) > MAX_BLOCKS:
        raise PromptError(
            f"{name} has more than {MAX_BLOCKS:,} blocks, as no honest {kind} file has. "
            "Save it again."
        )


def _check_size(name: str, size: tuple[int, int]) -> None:
    width, height = size
    if min(size) < MIN_EDGE:
        raise PromptError(
            f"{name} is {width} x {height}, at least {MIN_EDGE} x {MIN_EDGE} pixels are needed. "
            "Give a larger one."
        )
    if width * height > MAX_PIXELS:
        raise PromptError(
            f"{name} is {width} x {height}, {width * height:,} pixels, at most {MAX_PIXELS:,} are "
            "read. Make it smaller."
        )


def _upright(image: Image.Image, exif: object) -> Image.Image:
    turn = _UPRIGHT.get(exif_orientation(exif)) if isinstance(exif, bytes) else None
    return image if turn is None else image.transpose(turn)


def _to_rgb(image: Image.Image) -> Image.Image:
    """8 bits of red, green and blue; what is transparent shows white."""
    if image.mode.startswith("I;16"):
        image = _eight_bit_grey(image)
    if "A" in image.getbands() or "transparency" in image.info:
        if image.mode != "RGBA":
            image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def _eight_bit_grey(image: Image.Image) -> Image.Image:
    """The high byte of 16-bit grey; Pillow's own conversion makes all above 255 white."""
    values = np.asarray(image)
    grey = Image.fromarray((values >> 8).astype(np.uint8))
    transparent: object = image.info.get("transparency")
    if not isinstance(transparent, int):
        return grey
    alpha = np.where(values == transparent, 0, 255).astype(np.uint8)
    return Image.merge("LA", (grey, Image.fromarray(alpha)))
