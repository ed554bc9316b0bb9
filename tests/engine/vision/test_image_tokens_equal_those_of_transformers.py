"""Each place of an image becomes the tokens that transformers' Llama 4 processor writes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import models, pre_tokenizers
from transformers.models.llama4.processing_llama4 import Llama4Processor

from engine.errors import ConfigError, PromptError
from engine.model.config import VisionConfig
from engine.vision.layout import (
    ImageTokens,
    TileGrid,
    expand_images,
    feature_positions,
    find_image_tokens,
)

IMAGE_TEXTS = [
    "<|image_start|>",
    "<|image_end|>",
    "<|image|>",
    "<|patch|>",
    "<|tile_x_separator|>",
    "<|tile_y_separator|>",
]
IMAGE = "<|image|>"
GRIDS = st.builds(TileGrid, rows=st.integers(1, 5), columns=st.integers(1, 5))


def config_of(image_token_id: int) -> VisionConfig:
    return VisionConfig(
        image_size=30,
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
        image_token_id=image_token_id,
    )


@pytest.fixture(scope="module")
def tokenizer() -> tokenizers.Tokenizer:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())[:80]
    built = tokenizers.Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(letters)}, merges=[]))
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.add_special_tokens(IMAGE_TEXTS)
    return built


def patch_id(tokenizer: tokenizers.Tokenizer) -> int:
    id = tokenizer.token_to_id("<|patch|>")
    assert id is not None
    return id


@pytest.fixture(scope="module")
def tokens(tokenizer: tokenizers.Tokenizer) -> ImageTokens:
    return find_image_tokens(tokenizer.token_to_id, config_of(patch_id(tokenizer)))


@given(
    st.lists(st.tuples(st.text("ABC,.!", max_size=9), GRIDS), max_size=4),
    st.text("XYZ", max_size=5),
    st.integers(1, 11),
)
def test_places_become_what_transformers_writes(
    tokenizer: tokenizers.Tokenizer,
    tokens: ImageTokens,
    parts: list[tuple[str, TileGrid]],
    end: str,
    tokens_per_tile: int,
) -> None:
    write: Callable[..., str] = Llama4Processor._prompt_split_image
    prompt = "".join(text + IMAGE for text, _ in parts) + end
    expected = ""
    for text, grid in parts:
        expected += text + write(None, (grid.rows, grid.columns), tokens_per_tile)
    grids = [grid for _, grid in parts]
    ids = tokenizer.encode(prompt).ids
    expanded = expand_images(ids, grids, tokens, tokens_per_tile)
    assert expanded == tokenizer.encode(expected + end).ids
    num_features = sum(grid.num_tiles for grid in grids) * tokens_per_tile
    positions = feature_positions(expanded, num_features, tokens.patch)
    assert [i for i, id in enumerate(expanded) if id == tokens.patch] == positions


@pytest.mark.parametrize(("places", "images"), [(0, 1), (1, 0), (2, 1), (1, 3)])
def test_places_and_images_must_be_equally_many(
    tokens: ImageTokens, places: int, images: int
) -> None:
    ids = [1, *[tokens.image] * places, 2]
    grids = [TileGrid(rows=1, columns=1)] * images
    with pytest.raises(PromptError, match=f"^{places} image places in the prompt, {images} images"):
        expand_images(ids, grids, tokens, 9)


def test_a_prompt_cannot_bring_patches_of_its_own(tokens: ImageTokens) -> None:
    ids = [1, tokens.image, tokens.patch, 2]
    with pytest.raises(PromptError, match="image tokens of its own"):
        expand_images(ids, [TileGrid(rows=1, columns=1)], tokens, 9)


@pytest.mark.parametrize("num_features", [0, 143, 145, 288])
def test_features_and_image_tokens_must_be_equally_many(num_features: int) -> None:
    with pytest.raises(PromptError, match=f"^144 image tokens, {num_features} features"):
        feature_positions([5, *[97] * 144, 6], num_features, 97)


@pytest.mark.parametrize("text", IMAGE_TEXTS)
def test_a_missing_image_token_is_named(tokenizer: tokenizers.Tokenizer, text: str) -> None:
    config = config_of(patch_id(tokenizer))
    with pytest.raises(ConfigError) as caught:
        find_image_tokens(lambda t: None if t == text else tokenizer.token_to_id(t), config)
    assert f"has no token {text}." in str(caught.value)


def test_image_tokens_that_contradict_each_other_are_refused(
    tokenizer: tokenizers.Tokenizer,
) -> None:
    patch = patch_id(tokenizer)
    with pytest.raises(ConfigError, match=f"is token {patch} in the tokenizer, 7 in the config"):
        find_image_tokens(tokenizer.token_to_id, config_of(7))
    with pytest.raises(ConfigError, match="have one id"):
        find_image_tokens(
            lambda t: patch if t == IMAGE else tokenizer.token_to_id(t), config_of(patch)
        )
