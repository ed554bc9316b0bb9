"""Encoder, adapter, projection and merging give what transformers' Llama 4 gives."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import Llama4Config, Llama4ForConditionalGeneration
from transformers.models.llama4.modeling_llama4 import pixel_shuffle as shuffle_of_transformers

from engine.decode.image_rows import ImageRows
from engine.errors import CheckpointError, PromptError
from engine.model.config import VisionConfig
from engine.model.vision import VisionEncoder, merge_image_features, pixel_shuffle
from engine.vision.kept_features import EncodedImage
from engine.vision.layout import TileGrid, feature_positions
from engine.vision.names import HUGGING_FACE_NAMES, vision_shapes

# float32 sums in another order; the features are of size 1.
TOLERANCE = 1e-5
TEXT_WIDTH = 48
IMAGE_TOKEN = 97
CONFIG = VisionConfig(
    image_size=42,
    patch_size=7,
    num_channels=3,
    width=60,
    mlp_width=240,  # transformers ties it to width / shuffle_ratio²
    num_layers=3,
    num_heads=3,  # head width 20
    norm_epsilon=1e-5,
    rope_theta=10000.0,
    shuffle_ratio=0.5,
    adapter_width=33,
    output_width=33,  # transformers ties it to adapter_width
    image_token_id=IMAGE_TOKEN,
)


def tiny_llama4(vision: VisionConfig) -> Llama4ForConditionalGeneration:
    """The oracle, all its tensors random and far from zero."""
    config = Llama4Config(
        vision_config={
            "hidden_size": vision.width,
            "num_hidden_layers": vision.num_layers,
            "num_attention_heads": vision.num_heads,
            "intermediate_size": vision.mlp_width,
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
            "pixel_shuffle_ratio": vision.shuffle_ratio,
            "projector_input_dim": vision.adapter_width,
            "projector_output_dim": vision.output_width,
            "vision_output_dim": vision.output_width,
            "rope_parameters": {"rope_theta": vision.rope_theta, "rope_type": "default"},
        },
        text_config={
            "vocab_size": 99,
            "hidden_size": TEXT_WIDTH,
            "intermediate_size": 21,
            "intermediate_size_mlp": 39,
            "num_hidden_layers": 1,
            "num_attention_heads": 3,
            "num_key_value_heads": 1,
            "head_dim": 20,
            "num_local_experts": 2,
            "pad_token_id": 0,
        },
        image_token_index=vision.image_token_id,
    )
    torch.manual_seed(5)
    model = Llama4ForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(mean=float("norm" in name and "weight" in name), std=0.15)
    return model


def weights_of(model: Llama4ForConditionalGeneration, num_layers: int) -> dict[str, Tensor]:
    """The oracle's tensors under our names, copied, so that gradients stay apart."""
    state = model.state_dict()
    return {
        ours.format(i=layer): state[theirs.format(i=layer)].clone()
        for ours, theirs in HUGGING_FACE_NAMES
        for layer in range(num_layers if "{i}" in ours else 1)
    }


def features_of(model: Llama4ForConditionalGeneration, tiles: Tensor) -> Tensor:
    return model.multi_modal_projector(model.vision_model(tiles).last_hidden_state)


def random_tiles(count: int, config: VisionConfig) -> Tensor:
    generator = torch.Generator().manual_seed(count)
    shape = (count, config.num_channels, config.image_size, config.image_size)
    return torch.rand(shape, generator=generator) * 2 - 1


def assert_close(ours: Tensor, theirs: Tensor, what: str) -> None:
    assert ours.shape == theirs.shape, what
    difference = (ours - theirs).abs()
    worst = np.unravel_index(int(difference.argmax()), tuple(difference.shape))
    assert float(difference.max()) <= TOLERANCE, f"{what}: {float(difference.max())} at {worst}"


@pytest.fixture(scope="module")
def oracle() -> Llama4ForConditionalGeneration:
    return tiny_llama4(CONFIG)


@pytest.fixture(scope="module")
def weights(oracle: Llama4ForConditionalGeneration) -> dict[str, Tensor]:
    return weights_of(oracle, CONFIG.num_layers)


@pytest.mark.parametrize("num_tiles", [1, 3])
def test_features_of_tiles_equal_those_of_transformers(
    oracle: Llama4ForConditionalGeneration, weights: dict[str, Tensor], num_tiles: int
) -> None:
    tiles = random_tiles(num_tiles, CONFIG)
    with torch.no_grad():
        ours = VisionEncoder(CONFIG, TEXT_WIDTH, weights).encode(tiles)
        theirs = features_of(oracle, tiles)
    assert ours.shape == (num_tiles, CONFIG.tokens_per_tile, TEXT_WIDTH)
    assert float(theirs.std()) > 0.1  # else a wrong feature could hide below the tolerance
    assert_close(ours, theirs, "features")


@pytest.mark.parametrize(
    ("image_size", "patch_size", "width", "num_heads", "ratio"),
    [(20, 5, 12, 3, 0.5), (24, 3, 8, 1, 0.25), (15, 5, 16, 2, 1.0)],
)
def test_other_shapes_of_encoder_equal_transformers_too(
    image_size: int, patch_size: int, width: int, num_heads: int, ratio: float
) -> None:
    config = VisionConfig(
        image_size=image_size,
        patch_size=patch_size,
        num_channels=3,
        width=width,
        mlp_width=round(width / ratio**2),
        num_layers=1,
        num_heads=num_heads,
        norm_epsilon=1e-5,
        rope_theta=500.0,
        shuffle_ratio=ratio,
        adapter_width=17,
        output_width=17,
        image_token_id=IMAGE_TOKEN,
    )
    oracle, tiles = tiny_llama4(config), random_tiles(2, config)
    with torch.no_grad():
        encoder = VisionEncoder(config, TEXT_WIDTH, weights_of(oracle, 1))
        assert_close(encoder.encode(tiles), features_of(oracle, tiles), "features")


def test_gradients_of_every_tensor_equal_those_of_transformers(
    oracle: Llama4ForConditionalGeneration, weights: dict[str, Tensor]
) -> None:
    tiles = random_tiles(2, CONFIG)
    direction = torch.randn(2, CONFIG.tokens_per_tile, TEXT_WIDTH)
    ours = {name: tensor.clone().requires_grad_() for name, tensor in weights.items()}
    encoder = VisionEncoder(CONFIG, TEXT_WIDTH, ours)
    (encoder.encode(tiles) * direction).mean().backward()
    theirs = dict(oracle.named_parameters())
    names = [
        (o.format(i=i), h.format(i=i))
        for o, h in HUGGING_FACE_NAMES
        for i in range(CONFIG.num_layers if "{i}" in o else 1)
    ]
    expected = torch.autograd.grad(
        (features_of(oracle, tiles) * direction).mean(), [theirs[h] for _, h in names]
    )
    for (name, _), gradient in zip(names, expected, strict=True):
        found = ours[name].grad
        assert found is not None, f"{name} has no gradient"
        assert_close(found, gradient, f"gradient of {name}")
        # A bias of the keys adds the same to all scores of a query: softmax does not see it.
        if not name.endswith("k.bias"):
            assert float(gradient.abs().max()) > 0, name


def test_the_name_table_has_every_tensor_of_a_saved_model(
    oracle: Llama4ForConditionalGeneration, weights: dict[str, Tensor]
) -> None:
    table = {theirs for _, theirs in HUGGING_FACE_NAMES}
    saved = {
        re.sub(r"layers\.\d+\.", "layers.{i}.", name)
        for name in oracle.state_dict()
        if not name.startswith("language_model.")
    }
    assert table == saved
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    assert vision_shapes(CONFIG, TEXT_WIDTH) == shapes


@pytest.mark.parametrize(("edge", "width", "block"), [(6, 5, 2), (8, 4, 4), (3, 7, 1)])
def test_the_pixel_shuffle_puts_each_number_where_transformers_puts_it(
    edge: int, width: int, block: int
) -> None:
    x = torch.arange(2 * edge**2 * width, dtype=torch.float32).reshape(2, edge**2, width)
    assert torch.equal(pixel_shuffle(x, block), shuffle_of_transformers(x, 1 / block))


def test_features_replace_the_embeddings_that_transformers_replaces(
    oracle: Llama4ForConditionalGeneration, weights: dict[str, Tensor]
) -> None:
    tiles = random_tiles(2, CONFIG)
    patches = [IMAGE_TOKEN] * CONFIG.tokens_per_tile
    ids = [4, 8, *patches, 15, 16, *patches, 23]
    seen: list[Tensor] = []

    def keep(module: torch.nn.Module, arguments: object, named: dict[str, Tensor]) -> None:
        seen.append(named["inputs_embeds"])

    hook = oracle.language_model.register_forward_pre_hook(keep, with_kwargs=True)
    with torch.no_grad():
        oracle(input_ids=torch.tensor([ids]), pixel_values=tiles)
        hook.remove()
        embeddings = oracle.get_input_embeddings()(torch.tensor(ids))
        before = embeddings.clone()
        features = VisionEncoder(CONFIG, TEXT_WIDTH, weights).encode(tiles).flatten(0, 1)
        merged = merge_image_features(embeddings, ids, features, IMAGE_TOKEN)
    assert_close(merged, seen[0][0], "embeddings")
    assert torch.equal(embeddings, before)
    images = [
        EncodedImage(
            digest=bytes([n]), grid=TileGrid(rows=1, columns=1), features=half.contiguous().numpy()
        )
        for n, half in enumerate(features.chunk(2))
    ]
    placed = ImageRows(feature_positions(ids, len(features), IMAGE_TOKEN), images)
    for piece in (1, 5, len(ids)):
        rows = before.numpy().copy()
        for first in range(0, len(ids), piece):
            placed.put(rows[first : first + piece], first)
        assert np.array_equal(rows, merged.numpy()), piece


def test_gradients_reach_features_and_only_the_embeddings_of_text() -> None:
    embeddings = torch.randn(5, 7, requires_grad=True)
    features = torch.randn(2, 7, requires_grad=True)
    direction = torch.randn(5, 7)
    ids = [3, IMAGE_TOKEN, 5, IMAGE_TOKEN, 9]
    (merge_image_features(embeddings, ids, features, IMAGE_TOKEN) * direction).sum().backward()
    assert features.grad is not None and embeddings.grad is not None
    assert torch.equal(features.grad, direction[[1, 3]])
    is_text = torch.tensor([[1.0], [0.0], [1.0], [0.0], [1.0]])
    assert torch.equal(embeddings.grad, direction * is_text)


def test_as_many_features_as_image_tokens_or_one_line() -> None:
    ids = [1, *[IMAGE_TOKEN] * 144, 2]
    with pytest.raises(PromptError, match=r"^144 image tokens, 288 features"):
        merge_image_features(torch.zeros(146, 5), ids, torch.zeros(288, 5), IMAGE_TOKEN)
    with pytest.raises(PromptError, match=r"^144 image tokens, 0 features"):
        feature_positions(ids, 0, IMAGE_TOKEN)


def test_missing_and_misshapen_tensors_are_named(weights: dict[str, Tensor]) -> None:
    changed = {name: tensor for name, tensor in weights.items() if name != "vision.class_token"}
    changed["vision.layers.1.up.weight"] = changed["vision.layers.1.up.weight"].T
    with pytest.raises(CheckpointError) as caught:
        VisionEncoder(CONFIG, TEXT_WIDTH, changed)
    message = str(caught.value)
    assert "vision.class_token is missing, expected [60]" in message
    assert "vision.layers.1.up.weight [60, 240], expected [240, 60]" in message
    with pytest.raises(CheckpointError, match=f"and {len(weights) - 4} more") as caught:
        VisionEncoder(CONFIG, TEXT_WIDTH, {})
    assert "\n" not in str(caught.value)
