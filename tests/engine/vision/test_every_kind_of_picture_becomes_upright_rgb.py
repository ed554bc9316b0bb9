"""Whatever mode, frame count or orientation a file has, the pixels are those that people see."""

from __future__ import annotations

import io
import struct
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageOps
from transformers.image_transforms import convert_to_rgb

from engine.vision.image_headers import count_jpeg_scans, exif_orientation
from engine.vision.images import read_image

HEIGHT, WIDTH = 9, 14
ORIENTATION = 0x0112


def noise(*shape: int, dtype: Any = np.uint8) -> NDArray[Any]:
    generator = np.random.default_rng(sum(shape))
    return generator.integers(0, np.iinfo(dtype).max, shape, dtype=dtype, endpoint=True)


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def picture(mode: str) -> Image.Image:
    """Random pixels in every channel, alpha included."""
    if mode in ("1", "P"):
        return picture("RGB").convert(mode)
    channels = len(Image.new(mode, (1, 1)).getbands())
    parts = [Image.fromarray(p) for p in np.moveaxis(noise(HEIGHT, WIDTH, channels), 2, 0)]
    return Image.merge(mode, parts)


def seen_by_transformers(data: bytes) -> NDArray[np.uint8]:
    with Image.open(io.BytesIO(data)) as image:
        image.load()
        return np.asarray(convert_to_rgb(ImageOps.exif_transpose(image), return_numpy=True))


KINDS = [
    ("PNG", "RGB", {}),
    ("PNG", "L", {}),
    ("PNG", "1", {}),
    ("PNG", "LA", {}),
    ("PNG", "RGBA", {}),
    ("PNG", "P", {}),
    ("PNG", "P", {"transparency": 5}),
    ("PNG", "P", {"transparency": bytes(range(0, 250, 5))}),
    ("PNG", "RGB", {"transparency": tuple(noise(HEIGHT, WIDTH, 3)[4, 4].tolist())}),
    ("PNG", "L", {"transparency": int(noise(HEIGHT, WIDTH, 1)[4, 4, 0])}),
    ("JPEG", "RGB", {"quality": 90}),
    ("JPEG", "RGB", {"progressive": True}),
    ("JPEG", "L", {}),
    ("JPEG", "CMYK", {}),
    ("WebP", "RGB", {}),
    ("WebP", "RGB", {"lossless": True}),
    ("WebP", "RGBA", {"lossless": True, "exact": True}),
    ("WebP", "RGBA", {"quality": 60}),
    ("GIF", "P", {}),
    ("GIF", "P", {"transparency": 7}),
    ("GIF", "L", {}),
    ("BMP", "RGB", {}),
    ("BMP", "RGBA", {}),
    ("BMP", "L", {}),
    ("BMP", "P", {}),
]


@pytest.mark.parametrize(
    ("kind", "mode", "options"), KINDS, ids=[f"{k}-{m}-{'-'.join(o)}" for k, m, o in KINDS]
)
def test_pixels_equal_those_that_transformers_sees(
    kind: str, mode: str, options: dict[str, Any]
) -> None:
    data = saved(picture(mode), kind, **options)
    found = read_image(data, 1)
    assert found.shape == (HEIGHT, WIDTH, 3)
    assert found.dtype == np.uint8
    assert np.array_equal(found, seen_by_transformers(data))


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_what_is_transparent_shows_white(mode: str) -> None:
    image = picture(mode)
    color, alpha = np.split(np.asarray(image.convert("RGBA")).astype(float), [3], axis=2)
    expected = color * alpha / 255 + 255 - alpha
    found = read_image(saved(image, "PNG"), 1)
    assert np.abs(found - expected).max() <= 1
    clear = np.broadcast_to(alpha == 0, found.shape)
    image.putalpha(0)
    assert (read_image(saved(image, "PNG"), 1) == 255).all()
    assert (found[clear] == 255).all()


def test_the_high_byte_of_16_bit_grey_is_kept() -> None:
    """Pillow's conversion to RGB makes every level above 255 white."""
    values = noise(HEIGHT, WIDTH, dtype=np.uint16)
    data = saved(Image.fromarray(values), "PNG")
    found = read_image(data, 1)
    assert np.array_equal(found, np.repeat(values[:, :, None] >> 8, 3, axis=2))
    values[2, 3] = values[5, 1] = 4321
    found = read_image(saved(Image.fromarray(values), "PNG", transparency=4321), 1)
    expected = np.where(values == 4321, 255, values >> 8)
    assert np.array_equal(found, np.repeat(expected[:, :, None], 3, axis=2))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WebP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_turned_as_the_camera_was_held(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x010F] = "maker"  # so that the orientation is not the first entry
    exif[ORIENTATION] = orientation
    data = saved(picture("RGB"), kind, exif=exif)
    found = read_image(data, 1)
    assert found.shape == ((HEIGHT, WIDTH, 3) if orientation < 5 else (WIDTH, HEIGHT, 3))
    assert np.array_equal(found, seen_by_transformers(data))


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("prefix", [b"", b"Exif\0\0"])
def test_orientation_is_read_in_both_byte_orders(order: str, prefix: bytes) -> None:
    begin = {"<": b"II", ">": b"MM"}[order]
    for orientation, expected in [(0, 1), (1, 1), (6, 6), (8, 8), (9, 1), (65535, 1)]:
        block = begin + struct.pack(order + "HIH", 42, 8, 2)
        block += struct.pack(order + "HHII", 0x0100, 4, 1, 77)
        block += struct.pack(order + "HHIHH", ORIENTATION, 3, 1, orientation, 0)
        assert exif_orientation(prefix + block) == expected
        assert exif_orientation(prefix + block[:-4]) == 1
    assert exif_orientation(b"") == exif_orientation(b"XX\0*") == exif_orientation(begin) == 1


@pytest.mark.parametrize("kind", ["GIF", "WebP", "PNG"])
def test_of_an_animation_the_first_frame_is_seen(kind: str) -> None:
    frames = [
        Image.fromarray(np.full((HEIGHT, WIDTH, 3), level, np.uint8)) for level in (40, 200, 90)
    ]
    options = {"lossless": True} if kind == "WebP" else {}
    data = saved(frames[0], kind, save_all=True, append_images=frames[1:], duration=50, **options)
    with Image.open(io.BytesIO(data)) as image:
        assert getattr(image, "n_frames", 1) == 3
    assert (read_image(data, 1) == 40).all()


def test_of_a_jpeg_with_several_pictures_the_first_is_seen() -> None:
    first, second = picture("RGB"), Image.new("RGB", (30, 20), (255, 0, 0))
    data = saved(first, "MPO", save_all=True, append_images=[second])
    with Image.open(io.BytesIO(data)) as image:
        assert image.format == "MPO"
    assert np.array_equal(read_image(data, 1), seen_by_transformers(data))


@pytest.mark.parametrize(
    ("mode", "options", "expected"),
    [("RGB", {"progressive": True}, None), ("L", {"progressive": True}, None), ("RGB", {}, 1)],
)
def test_scans_of_a_jpeg_file_are_counted(
    mode: str, options: dict[str, Any], expected: int | None
) -> None:
    data = saved(picture(mode), "JPEG", **options)
    # Without embedded pictures the two bytes stand nowhere else.
    assert count_jpeg_scans(data, 99) == data.count(b"\xff\xda")
    assert expected is None or count_jpeg_scans(data, 99) == expected
    with_thumbnail = data[:2] + b"\xff\xe1\x00\x08\xff\xda\xff\xda\xff\xda" + data[2:]
    assert count_jpeg_scans(with_thumbnail + b"\xff\xda" * 9, 99) == data.count(b"\xff\xda")
