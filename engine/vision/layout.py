"""Where images stand among a prompt's tokens, as Llama 4 lays them out.

In: ids, the tile grid of every image, how the tokenizer names its image tokens. Out: ids, and the
positions that features go to. It sees no pixels and needs no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from engine.errors import ConfigError, PromptError
from engine.model.config import VisionConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class TileGrid:
    """Into how many tiles an image was cut, the resized whole image not counted."""

    rows: int
    columns: int

    @property
    def num_tiles(self) -> int:
        """Tiles of the image; the whole image comes last unless one tile holds it all."""
        cut = self.rows * self.columns
        return cut + 1 if cut > 1 else cut


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageTokens:
    """Ids of a tokenizer.

    Attributes:
        start, end: around an image.
        image: in a prompt, the place of an image; in the layout, what stands before the tile with
            the whole image.
        patch: has a feature instead of an embedding.
        next_column, next_row: after a tile that another follows in its row; after each row.
    """

    start: int
    end: int
    image: int
    patch: int
    next_column: int
    next_row: int


def find_image_tokens(id_of: Callable[[str], int | None], config: VisionConfig) -> ImageTokens:
    """Ask a tokenizer for the tokens of the layout.

    Args:
        id_of: the id of a special token's text, or None.
    Raises: ConfigError: a token is missing, two are the same, or the configuration names another
        token for features than the tokenizer.
    """
    texts = {
        "start": "<|image_start|>",
        "end": "<|image_end|>",
        "image": "<|image|>",
        "patch": "<|patch|>",
        "next_column": "<|tile_x_separator|>",
        "next_row": "<|tile_y_separator|>",
    }
    found: dict[str, int] = {}
    for field, text in texts.items():
        id = id_of(text)
        if id is None:
            raise ConfigError(
                f"the model reads images, but its tokenizer has no token {text}. "
                "Use the tokenizer that belongs to the model."
            )
        found[field] = id
    if len(set(found.values())) < len(found):
        raise ConfigError(
            f"two of the {len(found)} image tokens have one id ({sorted(found.values())}), each "
            "needs its own. Use the tokenizer that belongs to the model."
        )
    if found["patch"] != config.image_token_id:
        raise ConfigError(
            f"<|patch|> is token {found['patch']} in the tokenizer, {config.image_token_id} in the "
            "configuration. Use the tokenizer that belongs to the model."
        )
    return ImageTokens(**found)


def expand_images(
    ids: Sequence[int], grids: Sequence[TileGrid], tokens: ImageTokens, tokens_per_tile: int
) -> list[int]:
    """Replace each place of an image by the tokens of its tiles.

    Args:
        ids: a prompt with one `tokens.image` per image.
        grids: of the images, in the order of their places.
        tokens_per_tile: features of a tile.
    Returns: the prompt as the model reads it.
    Raises: PromptError: places and images differ in number, or the prompt has patches already.
    """
    places = sum(id == tokens.image for id in ids)
    if places != len(grids):
        raise PromptError(
            f"{places} image places in the prompt, {len(grids)} images. "
            "Give each image one place, and each place one image."
        )
    if tokens.patch in ids:
        raise PromptError(
            f"the prompt has image tokens of its own (id {tokens.patch}), only images may bring "
            "them. Take them out, and give the images instead."
        )
    waiting = iter(grids)
    expanded: list[int] = []
    for id in ids:
        if id == tokens.image:
            expanded += _image_ids(next(waiting), tokens, tokens_per_tile)
        else:
            expanded.append(id)
    return expanded


def feature_positions(ids: Sequence[int], num_features: int, image_token_id: int) -> list[int]:
    """Where the features of a prompt's images go, in order.

    Args:
        ids: of the whole prompt.
        num_features: of all its images.
    Raises: PromptError: there are more or fewer image tokens than features.
    """
    positions = [position for position, id in enumerate(ids) if id == image_token_id]
    if len(positions) != num_features:
        raise PromptError(
            f"{len(positions)} image tokens, {num_features} features. Their numbers must be equal: "
            "give the prompt exactly the images that it has places for."
        )
    return positions


def _image_ids(grid: TileGrid, tokens: ImageTokens, tokens_per_tile: int) -> list[int]:
    tile = [tokens.patch] * tokens_per_tile
    ids = [tokens.start]
    if grid.rows * grid.columns > 1:
        row = tile + [tokens.next_column, *tile] * (grid.columns - 1) + [tokens.next_row]
        ids += row * grid.rows
    return [*ids, tokens.image, *tile, tokens.end]
