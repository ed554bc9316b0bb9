"""Whatever happens to the bytes of a real image: tiles, or one line, in bounded memory and time."""

from __future__ import annotations

import io
import sys
import time
import zlib
from collections.abc import Iterator

import numpy as np
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from engine.errors import PromptError
from engine.model.config import VisionConfig
from engine.vision.image_headers import count_blocks, count_jpeg_scans, exif_orientation
from engine.vision.images import MAX_PIXELS
from engine.vision.tiles import prepare_images

# The picture, its RGBA form, white, and both together, 4 bytes each; the rest is for the decoder.
MEMORY_BYTES = 20 * MAX_PIXELS
CPU_SECONDS = 20.0  # 50 million pixels take about two on one core
CONFIG = VisionConfig(
    image_size=20,
    patch_size=5,
    num_channels=3,
    width=12,
    mlp_width=48,
    num_layers=1,
    num_heads=3,
    norm_epsilon=1e-5,
    rope_theta=10000.0,
    shuffle_ratio=0.5,
    adapter_width=7,
    output_width=7,
    image_token_id=97,
)
KINDS = ["png", "png16", "apng", "jpeg", "progressive", "cmyk", "webp", "lossless", "gif", "bmp"]
EDITS = st.lists(
    st.tuples(
        st.sampled_from(["set", "flip", "insert", "delete", "cut", "huge", "copy"]),
        st.floats(0, 1),
        st.integers(0, 255),
    ),
    min_size=1,
    max_size=6,
)


@pytest.fixture(scope="module")
def whole_files() -> dict[str, bytes]:
    generator = np.random.default_rng(1)
    rgb = Image.fromarray(generator.integers(0, 256, (13, 22, 3), dtype=np.uint8))
    frames = [Image.new("RGB", rgb.size, color) for color in ("red", "blue")]
    exif = Image.Exif()
    exif[0x0112] = 6
    grey16 = Image.fromarray(generator.integers(0, 65536, (13, 22), dtype=np.uint16))
    rgba = rgb.copy()
    rgba.putalpha(99)

    def saved(image: Image.Image, kind: str, **options: object) -> bytes:
        file = io.BytesIO()
        image.save(file, kind, **options)
        return file.getvalue()

    return {
        "png": saved(rgb.quantize(), "PNG", transparency=3, exif=exif),
        "png16": saved(grey16, "PNG", transparency=9),
        "apng": saved(rgb, "PNG", save_all=True, append_images=frames),
        "jpeg": saved(rgb, "JPEG", exif=exif),
        "progressive": saved(rgb, "JPEG", progressive=True),
        "cmyk": saved(rgb.convert("CMYK"), "JPEG"),
        "webp": saved(rgba, "WebP", exif=exif),
        "lossless": saved(rgb, "WebP", lossless=True),
        "gif": saved(rgb, "GIF", save_all=True, append_images=frames, disposal=2),
        "bmp": saved(rgb, "BMP"),
    }


@pytest.fixture
def bounded_memory() -> Iterator[None]:
    """Let the process take MEMORY_BYTES more than it has, where the system can say so."""
    if sys.platform != "linux":
        yield
        return
    import resource

    before = resource.getrlimit(resource.RLIMIT_AS)
    limit = psutil.Process().memory_info().vms + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def damage(data: bytes, edits: list[tuple[str, float, int]]) -> bytes:
    """Most edits hit the first half of the file, where sizes are."""
    changed = bytearray(data)
    for kind, place, value in edits:
        if not changed:
            break
        at = int(place**2 * (len(changed) - 1))
        if kind == "set":
            changed[at] = value
        elif kind == "flip":
            changed[at] ^= 1 << (value % 8)
        elif kind == "insert":
            changed[at:at] = bytes([value]) * (1 + value % 9)
        elif kind == "delete":
            del changed[at : at + 1 + value % 9]
        elif kind == "cut":
            del changed[at + 1 :]
        elif kind == "huge":
            changed[at : at + 4] = b"\xff" * 4
        else:
            changed[at:at] = changed[at // 2 : at // 2 + value]
    return bytes(changed)


def with_right_checksums(data: bytes) -> bytes:
    """A PNG file whose damage its reader cannot see by the checksums of the chunks."""
    fixed = bytearray(data)
    at = 8
    while at + 12 <= len(fixed):
        end = at + 8 + int.from_bytes(fixed[at : at + 4], "big")
        if end + 4 > len(fixed):
            break
        fixed[end : end + 4] = zlib.crc32(fixed[at + 4 : end]).to_bytes(4, "big")
        at = end + 4
    return bytes(fixed)


def gives_tiles_or_says_why(data: bytes) -> None:
    start = time.process_time()
    try:
        prepared = prepare_images([data], CONFIG)
    except PromptError as error:
        assert str(error).startswith("image 1 ")
        assert "\n" not in str(error)
        assert len(str(error)) < 300
    else:
        assert len(prepared.tiles) == prepared.grids[0].num_tiles
        assert float(np.abs(prepared.tiles).max()) <= 1
    assert time.process_time() - start < CPU_SECONDS


# Pillow warns of what it repairs, such as an EXIF block that is cut off.
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.usefixtures("bounded_memory")
@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_image_gives_tiles_or_one_line(whole_files: dict[str, bytes], kind: str) -> None:
    gives_tiles_or_says_why(whole_files[kind])

    @settings(max_examples=150)
    @given(EDITS)
    def check(edits: list[tuple[str, float, int]]) -> None:
        damaged = damage(whole_files[kind], edits)
        gives_tiles_or_says_why(damaged)
        if kind in ("png", "png16", "apng"):
            gives_tiles_or_says_why(with_right_checksums(damaged))

    check()


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.usefixtures("bounded_memory")
@pytest.mark.parametrize("kind", ["png", "jpeg", "progressive", "webp", "lossless", "gif", "bmp"])
def test_an_image_cut_off_anywhere_gives_tiles_or_one_line(
    whole_files: dict[str, bytes], kind: str
) -> None:
    data = whole_files[kind]
    for length in range(0, len(data), 1 + len(data) // 300):
        gives_tiles_or_says_why(data[:length])


@given(st.binary(max_size=300), st.integers(0, 20))
def test_counting_ends_on_any_bytes(data: bytes, limit: int) -> None:
    assert 0 <= count_jpeg_scans(data, limit) <= limit + 1
    for kind in ("PNG", "JPEG", "GIF", "WebP", "BMP"):
        assert 0 <= count_blocks(data, kind, limit) <= limit + 1


@given(st.binary(max_size=60))
def test_orientation_is_one_to_eight_on_any_bytes(block: bytes) -> None:
    for begin in (b"", b"II*\0\x08\0\0\0", b"MM\0*\0\0\0\x08"):
        assert 1 <= exif_orientation(begin + block) <= 8
