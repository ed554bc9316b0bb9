"""The canvas of an image, its tiles and their pixels are those of the Llama 4 processor.

Transformers' processor needs torchvision, which the project does not: where it is missing, the
canvas is compared with exact fractions, and the pixels with torch's resizing in float64.
"""

from __future__ import annotations

import importlib
import io
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from engine.errors import ConfigError, PromptError
from engine.model.config import VisionConfig
from engine.vision.files import MAX_IMAGES
from engine.vision.layout import TileGrid
from engine.vision.tiles import choose_grid, cut_tiles, fitted_size, prepare_images

# Pillow, and torch with uint8, resize one way, round to whole levels, resize the other way, and
# round again: each is up to one level from the exact value (and a little, for weights of 8 bits
# and more), so they are up to two levels from each other, on average much less.
MAX_LEVELS_OFF = 1.01
MAX_LEVELS_APART = 2
MAX_MEAN_APART = 0.25
# The processor scales in bfloat16, 8 bits of mantissa: x / 255 below 1 is rounded by up to 2⁻⁹,
# x / 255 - 1/2 by up to 2⁻¹⁰, and both errors are doubled by the division by 1/2.
BFLOAT16_ERROR = 2 * (2**-9 + 2**-10)
LEVEL = 2 / 255

SIZES = [
    (20, 20),
    (30, 50),
    (41, 13),
    (7, 160),
    (333, 29),
    (19, 21),
    (200, 300),
    (4, 999),
    (64, 60),
]
EDGES = st.integers(4, 3000)


def config_of(tile_size: int) -> VisionConfig:
    return VisionConfig(
        image_size=tile_size,
        patch_size=tile_size // 2,
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


def random_pixels(height: int, width: int) -> NDArray[np.uint8]:
    generator = np.random.default_rng(height * 10_000 + width)
    return generator.integers(0, 256, (height, width, 3), dtype=np.uint8)


def png(pixels: NDArray[np.uint8]) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def best_grids(height: int, width: int, tile_size: int, max_tiles: int) -> list[tuple[int, int]]:
    """All grids that are best by the rule, in exact arithmetic."""
    scales = {
        (rows, columns): min(
            Fraction(rows * tile_size, height), Fraction(columns * tile_size, width)
        )
        for rows in range(1, max_tiles + 1)
        for columns in range(1, max_tiles + 1)
        if rows * columns <= max_tiles
    }
    enlarging = [scale for scale in scales.values() if scale >= 1]
    best = min(enlarging) if enlarging else max(scales.values())
    equals = [grid for grid, scale in scales.items() if scale == best]
    area = min(rows * columns for rows, columns in equals)
    return [(rows, columns) for rows, columns in equals if rows * columns == area]


@given(EDGES, EDGES, st.sampled_from([20, 42, 336, 448]), st.integers(1, 17))
@example(20, 20, 20, 16)
@example(336, 672, 336, 16)
@example(6000, 6000, 336, 16)
def test_the_canvas_is_the_best_by_exact_fractions(
    height: int, width: int, tile_size: int, max_tiles: int
) -> None:
    grid = choose_grid(height, width, tile_size, max_tiles)
    assert best_grids(height, width, tile_size, max_tiles) == [(grid.rows, grid.columns)]


@given(EDGES, EDGES, st.sampled_from([20, 336]))
def test_an_image_keeps_its_proportions_and_fills_one_side(
    height: int, width: int, tile_size: int
) -> None:
    grid = choose_grid(height, width, tile_size, 16)
    new_height, new_width = fitted_size(height, width, grid, tile_size)
    most_height = min(grid.rows * tile_size, max(height, tile_size))
    most_width = min(grid.columns * tile_size, max(width, tile_size))
    assert 1 <= new_height <= most_height
    assert 1 <= new_width <= most_width
    assert new_height == most_height or new_width == most_width
    # The other side is rounded down to a whole pixel, but never to none.
    exact_height = Fraction(new_width * height, width)
    exact_width = Fraction(new_height * width, height)
    is_lost_below = new_width == most_width and 0 <= exact_height - new_height <= 1
    is_lost_right = new_height == most_height and 0 <= exact_width - new_width <= 1
    assert is_lost_below or is_lost_right or min(new_height, new_width) == 1


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_tiles_are_those_that_torch_resizes(height: int, width: int) -> None:
    tile_size = 20
    pixels = random_pixels(height, width)
    grid = choose_grid(height, width, tile_size, 16)
    tiles = cut_tiles(pixels, grid, tile_size)
    assert tiles.shape == (grid.num_tiles, 3, tile_size, tile_size)

    def resized(new_height: int, new_width: int) -> NDArray[np.float64]:
        image_BCHW = torch.from_numpy(pixels).permute(2, 0, 1)[None].double()
        size = (new_height, new_width)
        return torch.nn.functional.interpolate(
            image_BCHW, size=size, mode="bilinear", antialias=True
        )[0].numpy()

    new_height, new_width = fitted_size(height, width, grid, tile_size)
    canvas = np.zeros((3, grid.rows * tile_size, grid.columns * tile_size))
    canvas[:, :new_height, :new_width] = resized(new_height, new_width)
    for row in range(grid.rows):
        for column in range(grid.columns):
            top, left = row * tile_size, column * tile_size
            expected = canvas[:, top : top + tile_size, left : left + tile_size]
            assert_levels_near(tiles[row * grid.columns + column], expected, (row, column))
    if grid.num_tiles > 1:
        assert_levels_near(tiles[-1], resized(tile_size, tile_size), "whole image")


def assert_levels_near(ours: NDArray[np.uint8], exact: NDArray[np.float64], where: object) -> None:
    off = np.abs(ours - exact)
    worst = np.unravel_index(int(off.argmax()), off.shape)
    assert off.max() <= MAX_LEVELS_OFF, f"{where}: {off.max()} levels at {worst}"


def test_what_no_pixel_covers_is_black() -> None:
    white = np.full((30, 47, 3), 255, np.uint8)
    grid = choose_grid(30, 47, 20, 16)
    assert grid == TileGrid(rows=2, columns=3)
    tiles = cut_tiles(white, grid, 20)
    rows = tiles[:6].reshape(2, 3, 3, 20, 20).transpose(2, 0, 3, 1, 4).reshape(3, 40, 60)
    new_height, new_width = fitted_size(30, 47, grid, 20)
    assert (new_height, new_width) == (30, 47)
    assert (rows[:, :30, :47] == 255).all()
    assert not rows[:, 30:].any() and not rows[:, :, 47:].any()
    assert (tiles[6] == 255).all()


def test_levels_become_numbers_from_minus_one_to_one() -> None:
    levels = np.arange(400, dtype=np.uint8).reshape(20, 20)  # all 256 of them
    prepared = prepare_images(
        [png(np.stack([levels, 255 - levels, levels.T], axis=2))], config_of(20)
    )
    expected = (levels.astype(np.float64) / 255 - 0.5) / 0.5
    assert prepared.tiles.dtype == np.float32
    assert np.abs(prepared.tiles[0, 0] - expected).max() < 1e-6
    assert np.abs(prepared.tiles[0, 1] + expected).max() < 1e-6
    assert np.abs(prepared.tiles[0, 2] - expected.T).max() < 1e-6


def test_tiles_of_several_images_follow_each_other() -> None:
    config = config_of(20)
    files = [png(random_pixels(height, width)) for height, width in [(30, 50), (20, 20), (41, 13)]]
    together = prepare_images(files, config, max_tiles=6)
    alone = [prepare_images([file], config, max_tiles=6) for file in files]
    assert together.grids == tuple(grid for one in alone for grid in one.grids)
    assert [grid.num_tiles for grid in together.grids] == [len(one.tiles) for one in alone]
    assert np.array_equal(together.tiles, np.concatenate([one.tiles for one in alone]))
    assert together.grids[1] == TileGrid(rows=1, columns=1)
    none = prepare_images([], config)
    assert none.tiles.shape == (0, 3, 20, 20) and none.grids == ()


def test_too_many_tiles_or_images_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"^max_tiles is 0, an image may have 1 to 64"):
        prepare_images([], config_of(20), max_tiles=0)
    with pytest.raises(ConfigError, match=r"^16 tiles of 16384 x 16384 have 4,294,967,296 pixels"):
        prepare_images([], config_of(16384))
    file = png(random_pixels(5, 5))
    with pytest.raises(PromptError, match=r"^33 images in one request, at most 32"):
        prepare_images([file] * (MAX_IMAGES + 1), config_of(20))


@pytest.fixture(scope="module")
def processor_module() -> Any:
    """Transformers' Llama 4 image processor, where torchvision can be imported."""
    try:
        return importlib.import_module("transformers.models.llama4.image_processing_llama4")
    except (ImportError, RuntimeError) as error:  # RuntimeError: built for another torch
        pytest.skip(
            "not compared with transformers: its Llama 4 image processor needs torchvision, which "
            f"cannot be imported beside torch {torch.__version__} ({error})"
        )


@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize("max_tiles", [16, 5, 1])
def test_tiles_equal_those_of_transformers(
    processor_module: Any, height: int, width: int, max_tiles: int
) -> None:
    tile_size = 20
    pixels = random_pixels(height, width)
    processor = processor_module.Llama4ImageProcessor(
        size={"height": tile_size, "width": tile_size}, max_patches=max_tiles
    )
    prepared = prepare_images([png(pixels)], config_of(tile_size), max_tiles)
    theirs = processor(images=[Image.fromarray(pixels)], return_tensors="pt")
    assert [[g.rows, g.columns] for g in prepared.grids] == theirs["aspect_ratios"].tolist()
    normalised = theirs["pixel_values"].float().numpy()
    assert prepared.tiles.shape == normalised.shape
    assert np.abs(prepared.tiles - normalised).max() <= LEVEL * MAX_LEVELS_APART + BFLOAT16_ERROR
    levels = processor(
        images=[Image.fromarray(pixels)], do_rescale=False, do_normalize=False, return_tensors="pt"
    )["pixel_values"]
    assert levels.dtype == torch.uint8
    ours = cut_tiles(pixels, prepared.grids[0], tile_size)
    apart = np.abs(ours.astype(int) - levels.numpy().astype(int))
    worst = np.unravel_index(int(apart.argmax()), apart.shape)
    assert apart.max() <= MAX_LEVELS_APART, f"{apart.max()} levels at {worst}"
    assert apart.mean() <= MAX_MEAN_APART


@given(EDGES, EDGES, st.sampled_from([20, 336]), st.integers(1, 16))
def test_canvas_and_size_equal_those_of_transformers(
    processor_module: Any, height: int, width: int, tile_size: int, max_tiles: int
) -> None:
    from transformers.image_utils import SizeDict

    size = SizeDict(height=tile_size, width=tile_size)
    canvases = processor_module.find_supported_resolutions(max_tiles, size)
    best = processor_module.get_best_fit((height, width), torch.tensor(canvases)).tolist()
    grid = choose_grid(height, width, tile_size, max_tiles)
    assert [grid.rows * tile_size, grid.columns * tile_size] == best
    room = (min(max(height, tile_size), best[0]), min(max(width, tile_size), best[1]))
    fitted = processor_module.get_max_res_without_distortion((height, width), room)
    assert fitted_size(height, width, grid, tile_size) == tuple(max(1, edge) for edge in fitted)
