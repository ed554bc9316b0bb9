"""The image encoder of Llama 4: tiles to features that stand in for text embeddings.

In: prepared tiles (`engine.vision.tiles`) and named tensors. Out: features of the text's width. It
reads no files, knows no tokens but the one that a feature replaces, and leaves to the caller
whether gradients are recorded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.functional import gelu, layer_norm, linear, scaled_dot_product_attention

from engine.errors import CheckpointError
from engine.model.config import VisionConfig
from engine.model.rope import apply_rope
from engine.vision.layout import feature_positions
from engine.vision.names import vision_shapes

# B tiles, C channels, P patches of a tile, T patches and the class token, H heads, D head width,
# V encoder width, N features of all tiles, W text width

_MAX_LISTED = 4


class VisionEncoder:
    """Encoder, pixel shuffle, adapter and projection over tensors that others hold."""

    def __init__(
        self, config: VisionConfig, text_width: int, weights: Mapping[str, Tensor]
    ) -> None:
        """Check that every tensor is there.

        Args:
            config: validated.
            text_width: width of the text embeddings.
            weights: float32, with the names and shapes of `vision_shapes`, all on one device; not
                copied, so that training may change them in place.
        Raises: CheckpointError: tensors are missing or have another shape.
        """
        shapes = vision_shapes(config, text_width)
        wrong = [
            f"{name} {list(weights[name].shape) if name in weights else 'is missing'}, "
            f"expected {list(shape)}"
            for name, shape in shapes.items()
            if name not in weights or tuple(weights[name].shape) != shape
        ]
        if wrong:
            more = f" and {len(wrong) - _MAX_LISTED} more" if len(wrong) > _MAX_LISTED else ""
            raise CheckpointError(
                f"the image encoder does not fit its configuration: "
                f"{'; '.join(wrong[:_MAX_LISTED])}{more}. Use a whole copy of the model."
            )
        self._config = config
        self._weights = weights
        device = weights["vision.patch"].device
        self._cos, self._sin = (table.to(device) for table in _rope_rows(config))

    def encode(self, tiles_BCHW: Tensor) -> Tensor:
        """Features of each tile; memory grows with the number of tiles.

        Args:
            tiles_BCHW: float32, values in [-1, 1], edges of `config.image_size` pixels.
        Returns: float32 [B, tokens_per_tile, text_width], in the order of the tokens.
        Source: transformers models/llama4; patches as in arXiv 2010.11929.
        """
        config, weights = self._config, self._weights
        edge = (config.num_channels, config.image_size, config.image_size)
        assert tiles_BCHW.shape[1:] == edge, f"tiles {list(tiles_BCHW.shape)}, expected {edge}"
        x_BPV = linear(_cut_patches(tiles_BCHW, config.patch_size), weights["vision.patch"])
        class_token = weights["vision.class_token"].expand(x_BPV.shape[0], 1, -1)
        # The class token comes last, not first as in most encoders of this kind.
        x_BTV = torch.cat((x_BPV, class_token), dim=1) + weights["vision.positions"]
        x_BTV = self._norm(x_BTV, "vision.pre_norm")
        for layer in range(config.num_layers):
            prefix = f"vision.layers.{layer}."
            x_BTV = x_BTV + self._attend(self._norm(x_BTV, prefix + "attention_norm"), prefix)
            x_BTV = x_BTV + self._mlp(self._norm(x_BTV, prefix + "mlp_norm"), prefix)
        x_BPV = self._norm(x_BTV, "vision.post_norm")[:, :-1]
        x = pixel_shuffle(x_BPV, round(1 / config.shuffle_ratio))
        x = gelu(linear(x, weights["vision.adapter.first"]))
        x = gelu(linear(x, weights["vision.adapter.second"]))
        return linear(x, weights["vision.projection"])

    def _norm(self, x: Tensor, name: str) -> Tensor:
        weight, bias = self._weights[name + ".weight"], self._weights[name + ".bias"]
        return layer_norm(x, weight.shape, weight, bias, self._config.norm_epsilon)

    def _linear(self, x: Tensor, name: str) -> Tensor:
        return linear(x, self._weights[name + ".weight"], self._weights[name + ".bias"])

    def _attend(self, x_BTV: Tensor, prefix: str) -> Tensor:
        """Every patch sees every patch: no mask, no cache."""
        num_tiles, num_tokens, width = x_BTV.shape
        shape = (num_tiles, num_tokens, self._config.num_heads, -1)
        query_BTHD = self._linear(x_BTV, prefix + "q").reshape(shape)
        key_BTHD = self._linear(x_BTV, prefix + "k").reshape(shape)
        value_BTHD = self._linear(x_BTV, prefix + "v").reshape(shape)
        output_BHTD = scaled_dot_product_attention(
            apply_rope(query_BTHD, self._cos, self._sin, "adjacent").transpose(1, 2),
            apply_rope(key_BTHD, self._cos, self._sin, "adjacent").transpose(1, 2),
            value_BTHD.transpose(1, 2),
        )
        output_BTV = output_BHTD.transpose(1, 2).reshape(num_tiles, num_tokens, width)
        return self._linear(output_BTV, prefix + "o")

    def _mlp(self, x_BTV: Tensor, prefix: str) -> Tensor:
        return self._linear(gelu(self._linear(x_BTV, prefix + "up")), prefix + "down")


def pixel_shuffle(x_BPV: Tensor, block: int) -> Tensor:
    """Join the features of each square of patches into one longer feature.

    Args:
        x_BPV: features of a square grid of patches, row by row.
        block: edge of a square, in patches; divides the grid's edge.
    Returns: [B, P / block², V · block²]: squares row by row; within one, its patches row by row,
        each with all its channels.
    """
    num_tiles, num_patches, width = x_BPV.shape
    edge = round(num_patches**0.5)
    blocks = edge // block
    x = x_BPV.reshape(num_tiles, blocks, block, blocks, block, width)
    return x.transpose(2, 3).reshape(num_tiles, blocks * blocks, block * block * width)


def merge_image_features(
    embeddings_TW: Tensor, ids: Sequence[int], features_NW: Tensor, image_token_id: int
) -> Tensor:
    """Put one feature in place of the embedding of each image token, in order.

    Args:
        embeddings_TW: of every id.
        ids: of the whole prompt, T of them.
        features_NW: of all tiles of all images, in their order; the dtype of the embeddings.
    Returns: [T, W]; gradients reach the features and the embeddings of text alone.
    Raises: PromptError: there are more or fewer image tokens than features.
    """
    positions = feature_positions(ids, features_NW.shape[0], image_token_id)
    index = torch.tensor(positions, dtype=torch.int64, device=embeddings_TW.device)
    return embeddings_TW.index_put((index,), features_NW)


def _cut_patches(tiles_BCHW: Tensor, patch_size: int) -> Tensor:
    """[B, P, C · patch_size²]: patches row by row; in each: channel, row, column."""
    num_tiles, num_channels, height, _ = tiles_BCHW.shape
    edge = height // patch_size
    x = tiles_BCHW.reshape(num_tiles, num_channels, edge, patch_size, edge, patch_size)
    return x.permute(0, 2, 4, 1, 3, 5).reshape(num_tiles, edge * edge, -1)


def _rope_rows(config: VisionConfig) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every patch, then of the class token, two float32 [T, D / 2].

    The first half of a head's pairs turns with the column, the other with the row.
    """
    half_width = config.width // config.num_heads // 2
    exponents = torch.arange(0, half_width, 2, dtype=torch.float32) / half_width
    frequencies = 1.0 / (config.rope_theta**exponents)
    edge = config.image_size // config.patch_size
    # Places begin at 1, so that no patch shares the class token's lack of rotation.
    places = torch.arange(1, edge + 1, dtype=torch.float32)
    columns, rows = places.repeat(edge), places.repeat_interleave(edge)
    angles = torch.cat((torch.outer(columns, frequencies), torch.outer(rows, frequencies)), dim=1)
    angles = torch.cat((angles, torch.zeros_like(angles[:1])))
    return angles.cos(), angles.sin()
