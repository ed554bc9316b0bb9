"""Images to the tiles that Llama 4's encoder reads.

In: image files. Out: normalised tiles and the grid of each image. Canvas, sizes and order are those
of the Llama 4 processor; pixels are resized as Pillow does, and normalised in float32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from engine.errors import ConfigError
from engine.model.config import VisionConfig
from engine.vision.files import check_number
from engine.vision.images import MAX_PIXELS, read_image
from engine.vision.layout import TileGrid
from engine.vision.preprocessor import DEFAULT_MAX_TILES, MAX_TILES


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedImages:
    """The images of a request.

    Attributes:
        tiles: float32 [B, C, H, W] in [-1, 1], all tiles of the first image row by row, then that
            image as a whole in one tile (unless one tile holds it anyway), then those of the next.
        grids: one per image; `grid.num_tiles` says how many of the tiles are its own.
    """

    tiles: NDArray[np.float32]
    grids: tuple[TileGrid, ...]


def prepare_images(
    files: Sequence[bytes],
    config: VisionConfig,
    max_tiles: int = DEFAULT_MAX_TILES,
    numbers: Sequence[int] | None = None,
) -> PreparedImages:
    """Decode, resize and cut the images of a request.

    The whole way of an image into a model: `prepare_images`, then `layout.expand_images` on the
    prompt's ids with these grids, `VisionEncoder.encode` on the tiles, and the features in place
    of the patch tokens (`decode.image_rows`, or `model.vision.merge_image_features`).

    Args:
        files: contents of PNG, JPEG, WebP, GIF or BMP files.
        config: validated; says the edge of a tile.
        max_tiles: that an image may be cut into, 1 to MAX_TILES; one more shows it whole.
        numbers: what messages call each image; None counts from 1.
    Raises: PromptError: an image is damaged, too large or too small, or there are too many.
        ConfigError: max_tiles is out of range, or that many tiles of this size are too large.
    """
    tile_size = config.image_size
    if not 1 <= max_tiles <= MAX_TILES:
        raise ConfigError(
            f"max_tiles is {max_tiles}, an image may have 1 to {MAX_TILES} tiles. Choose one of "
            "these."
        )
    if max_tiles * tile_size**2 > MAX_PIXELS:
        raise ConfigError(
            f"{max_tiles} tiles of {tile_size} x {tile_size} have {max_tiles * tile_size**2:,} "
            f"pixels, at most {MAX_PIXELS:,} are allowed. Choose fewer tiles."
        )
    check_number(len(files))
    tiles: list[NDArray[np.float32]] = []
    grids: list[TileGrid] = []
    numbers = range(1, len(files) + 1) if numbers is None else numbers
    for number, data in zip(numbers, files, strict=True):
        pixels = read_image(data, number)
        grid = choose_grid(pixels.shape[0], pixels.shape[1], tile_size, max_tiles)
        grids.append(grid)
        tiles.append(_normalise(cut_tiles(pixels, grid, tile_size)))
    none = np.empty((0, config.num_channels, tile_size, tile_size), np.float32)
    return PreparedImages(tiles=np.concatenate([none, *tiles]), grids=tuple(grids))


def choose_grid(height: int, width: int, tile_size: int, max_tiles: int) -> TileGrid:
    """The grid of tiles that keeps most of an image and wastes least.

    Where the image fits without being made smaller, the grid that would enlarge it least; else the
    one that shrinks it least; of equals the smallest.

    Args:
        height, width: of the image.
        tile_size: edge of a tile, in pixels.
    Source: transformers models/llama4.
    """
    cells = np.array(
        [
            (rows, columns)
            for rows in range(1, max_tiles + 1)
            for columns in range(1, max_tiles // rows + 1)
        ]
    )
    # float32 as the original: two scales that it takes for equal must be so here.
    scales = (cells * tile_size).astype(np.float32) / np.array([height, width], np.float32)
    scale = scales.min(axis=1)
    fits = scale >= 1
    best = scale[fits].min() if fits.any() else scale.max()
    equals = cells[scale == best]
    rows, columns = equals[equals.prod(axis=1).argmin()].tolist()
    return TileGrid(rows=rows, columns=columns)


def fitted_size(height: int, width: int, grid: TileGrid, tile_size: int) -> tuple[int, int]:
    """Height and width of an image on its canvas, with its proportions kept.

    An image is enlarged only until its canvas or one tile is full.
    """
    room_height = min(max(height, tile_size), grid.rows * tile_size)
    room_width = min(max(width, tile_size), grid.columns * tile_size)
    # One float64 division, then the product, as the original: the other order rounds elsewhere.
    by_height, by_width = room_height / height, room_width / width
    if by_width < by_height:
        return max(1, min(math.floor(height * by_width), room_height)), room_width
    return room_height, max(1, min(math.floor(width * by_height), room_width))


def cut_tiles(pixels_HWC: NDArray[np.uint8], grid: TileGrid, tile_size: int) -> NDArray[np.uint8]:
    """Resize an image onto its canvas, black at the right and below, and cut that into tiles.

    Args:
        pixels_HWC: red, green, blue.
    Returns: uint8 [grid.num_tiles, 3, tile_size, tile_size]; where there are several, the last is
        the whole image, its proportions not kept.
    """
    height, width, num_channels = pixels_HWC.shape
    image = Image.fromarray(pixels_HWC)
    canvas = np.zeros((grid.rows * tile_size, grid.columns * tile_size, num_channels), np.uint8)
    new_height, new_width = fitted_size(height, width, grid, tile_size)
    canvas[:new_height, :new_width] = _resize(image, new_height, new_width)
    cut = canvas.reshape(grid.rows, tile_size, grid.columns, tile_size, num_channels)
    tiles = cut.transpose(0, 2, 4, 1, 3).reshape(-1, num_channels, tile_size, tile_size)
    if len(tiles) == 1:
        return tiles
    whole = _resize(image, tile_size, tile_size).transpose(2, 0, 1)
    return np.concatenate([tiles, whole[None]])


def _resize(image: Image.Image, height: int, width: int) -> NDArray[np.uint8]:
    return np.asarray(image.resize((width, height), Image.Resampling.BILINEAR))


def _normalise(tiles_BCHW: NDArray[np.uint8]) -> NDArray[np.float32]:
    """0 … 255 to -1 … 1: mean and standard deviation are one half for every channel."""
    return tiles_BCHW.astype(np.float32) / np.float32(127.5) - np.float32(1)
