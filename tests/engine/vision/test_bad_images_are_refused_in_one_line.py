"""Every bad image of the table gets its one line, before memory is spent on it."""

from __future__ import annotations

import io
import re
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from engine.errors import PromptError
from engine.vision.images import MAX_BLOCKS, MAX_FILE_BYTES, MAX_JPEG_SCANS, read_image

Saying = Callable[[int, int], bytes]

ROOT = Path(__file__).resolve().parents[3]
# A process with numpy and Pillow takes some 300 MB of addresses; a canvas of the bombs below
# takes more than the rest.
LIMIT_BYTES = 900 << 20


def saved(size: tuple[int, int], kind: str, **options: object) -> bytes:
    pixels = np.random.default_rng(3).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


def chunk(name: bytes, body: bytes) -> bytes:
    check = struct.pack(">I", zlib.crc32(name + body))
    return struct.pack(">I", len(body)) + name + body + check


def png_that_says(width: int, height: int) -> bytes:
    """A PNG whose checksums are right and whose data ends after some rows."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    rows = zlib.compress(bytes(1 << 16))
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    )


def gif_that_says(width: int, height: int) -> bytes:
    data = bytearray(saved((8, 8), "GIF"))
    struct.pack_into("<HH", data, 6, width, height)
    return bytes(data)


def bmp_that_says(width: int, height: int) -> bytes:
    data = bytearray(saved((8, 8), "BMP"))
    struct.pack_into("<ii", data, 18, width, height)
    return bytes(data)


def jpeg_that_says(width: int, height: int) -> bytes:
    data = bytearray(saved((8, 8), "JPEG"))
    frame = data.index(b"\xff\xc0")
    struct.pack_into(">HH", data, frame + 5, height, width)
    return bytes(data)


def webp_that_says(width: int, height: int) -> bytes:
    """The extended header, and a frame of another size behind it."""
    frame = saved((8, 8), "WebP", lossless=True)[12:]
    edges = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    body = b"WEBPVP8X" + struct.pack("<I", 10) + bytes(4) + edges + frame
    return b"RIFF" + struct.pack("<I", len(body)) + body


def lossless_webp_that_says(width: int, height: int) -> bytes:
    data = bytearray(saved((8, 8), "WebP", lossless=True))
    assert data[12:16] == b"VP8L"
    struct.pack_into("<I", data, 21, (width - 1) | (height - 1) << 14)
    return bytes(data)


def lossy_webp_that_says(width: int, height: int) -> bytes:
    data = bytearray(saved((8, 8), "WebP"))
    assert data[12:16] == b"VP8 "
    struct.pack_into("<HH", data, 26, width, height)
    return bytes(data)


SAYING = [
    png_that_says,
    gif_that_says,
    bmp_that_says,
    jpeg_that_says,
    webp_that_says,
    lossless_webp_that_says,
    lossy_webp_that_says,
]


def refusal(data: bytes, number: int = 1) -> str:
    with pytest.raises(PromptError) as caught:
        read_image(data, number)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 300
    return message


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WebP", "GIF", "BMP"])
@pytest.mark.parametrize(
    "size", [(1, 1), (3, 3), (1, 10_000), (10_000, 1), (3, 500)], ids=lambda s: f"{s[0]}x{s[1]}"
)
def test_small_and_thin_images_are_refused(kind: str, size: tuple[int, int]) -> None:
    asked = f"image 2 is {size[0]} x {size[1]}, at least 4 x 4"
    assert refusal(saved(size, kind), 2).startswith(asked)


def test_an_image_of_one_by_a_hundred_thousand_is_refused() -> None:
    assert refusal(saved((1, 100_000), "PNG")).startswith("image 1 is 1 x 100000, at least 4 x 4")
    assert refusal(saved((100_000, 1), "BMP")).startswith("image 1 is 100000 x 1, at least 4 x 4")


def test_the_smallest_allowed_image_is_read() -> None:
    for kind in ("PNG", "JPEG", "WebP", "GIF", "BMP"):
        assert read_image(saved((4, 5), kind), 1).shape == (5, 4, 3)


@pytest.mark.parametrize(
    "saying", [png_that_says, bmp_that_says, jpeg_that_says, lossy_webp_that_says]
)
@pytest.mark.parametrize("size", [(0, 8), (8, 0)])
def test_images_without_any_pixel_are_refused(saying: Saying, size: tuple[int, int]) -> None:
    assert refusal(saying(*size)).startswith("image 1 ")


@pytest.mark.parametrize("saying", SAYING)
def test_the_limit_of_pixels_holds_before_decoding(saying: Saying) -> None:
    # Just above our limit, between Pillow's warning and its error, and beyond both.
    for width, height in [(10_001, 5_000), (13_000, 13_000), (16_000, 16_000)]:
        message = refusal(saying(width, height))
        assert message.startswith(f"image 1 is {width} x {height}, {width * height:,} pixels, at m")


def test_bombs_are_refused_in_little_memory(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource", reason="limits memory as only POSIX can")
    assert resource is not None
    paths: list[str] = []
    for saying in SAYING:
        for size in [(10_001, 5_000), (13_000, 13_000), (16_000, 16_000)]:
            paths.append(str(tmp_path / f"{saying.__name__}_{size[0]}"))
            Path(paths[-1]).write_bytes(saying(*size))
    script = (
        "import resource, sys\n"
        "from pathlib import Path\n"
        "from engine.errors import PromptError\n"
        "from engine.vision.images import read_image\n"
        f"resource.setrlimit(resource.RLIMIT_AS, ({LIMIT_BYTES}, {LIMIT_BYTES}))\n"
        "for number, path in enumerate(sys.argv[1:], start=1):\n"
        "    try:\n"
        "        read_image(Path(path).read_bytes(), number)\n"
        "    except PromptError as error:\n"
        "        print(error)\n"
    )
    # One thread of numpy's library for linear algebra: each reserves addresses of its own.
    done = subprocess.run(
        [sys.executable, "-c", script, *paths],
        cwd=ROOT,
        env={"OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == len(paths)
    assert all(re.match(rf"image {n} is .* pixels, at most", s) for n, s in enumerate(lines, 1))


def test_what_is_no_image_is_refused() -> None:
    assert refusal(b"").startswith("image 1 is empty (0 bytes)")
    assert "begins with 'hello, w'" in refusal(b"hello, world")
    assert "begins with '%PDF-1.7'" in refusal(b"%PDF-1.7\n")
    # Pillow would start Ghostscript for this one.
    assert "as no known image does" in refusal(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    assert "\\x00\\x01" in refusal(b"\x00\x01\x02")
    for beginning in (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF89a", b"BM", b"RIFF\0\0\0\0WEBP"):
        for tail in (b"", b"\0" * 3, b"\xff" * 40):
            assert "cannot be read as" in refusal(beginning + tail)


def test_a_file_that_is_too_long_is_refused() -> None:
    message = refusal(saved((8, 8), "PNG").ljust(MAX_FILE_BYTES + 1, b"\0"))
    assert message.startswith("image 1 has 33,554,433 bytes, at most 33,554,432")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WebP", "GIF", "BMP"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.8])
def test_truncated_files_are_refused(kind: str, share: float) -> None:
    data = saved((37, 23), kind)
    message = refusal(data[: int(share * len(data))])
    assert message.startswith(f"image 1 cannot be read as {kind}: ")


def test_a_jpeg_file_with_endless_scans_is_refused() -> None:
    """Each scan of a few bytes costs a pass over the whole picture."""
    data = saved((40, 30), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    scan, end = data[last:-2], data[-2:]
    few = data[:last] + scan * 3 + end
    assert read_image(few, 1).shape == (30, 40, 3)
    bomb = data[:last] + scan * MAX_JPEG_SCANS + end
    assert refusal(bomb).startswith(f"image 1 has more than {MAX_JPEG_SCANS} scans")


def with_blocks(kind: str, count: int) -> bytes:
    """An image with so many small comments, each an object in its reader's memory."""
    data = saved((9, 8), kind)
    if kind == "PNG":
        texts = b"".join(chunk(b"tEXt", b"%d\0" % number) for number in range(count))
        return data.replace(data[33:], texts + data[33:])
    if kind == "JPEG":
        return data[:2] + b"\xff\xfe\x00\x02" * count + data[2:]
    picture = data.index(b",", 13 + (6 << (data[10] & 7)))
    return data[:picture] + b"!\xfe" + b"\x01x" * count + b"\0" + data[picture:]


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF"])
def test_files_of_endless_small_blocks_are_refused(kind: str) -> None:
    """15 million parts of a GIF comment took 1.4 GB."""
    assert read_image(with_blocks(kind, MAX_BLOCKS - 50), 1).shape == (8, 9, 3)
    message = refusal(with_blocks(kind, MAX_BLOCKS + 1))
    assert message.startswith(f"image 1 has more than 10,000 blocks, as no honest {kind} file")


def test_a_compressed_text_that_bursts_is_refused() -> None:
    data = saved((9, 8), "PNG")
    text = chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(50 << 20)))
    assert len(text) < 60_000
    message = refusal(data[:33] + text + data[33:])
    assert message.startswith("image 1 cannot be read as PNG: Decompressed data too large")


def test_the_number_of_the_image_is_said() -> None:
    assert refusal(b"", 7).startswith("image 7 is empty")
