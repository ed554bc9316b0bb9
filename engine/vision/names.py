"""The tensors of an image encoder: our names, their shapes, and what Hugging Face calls them.

In: a vision configuration. Out: tables of names. It opens no file and needs no torch.
"""

from __future__ import annotations

from engine.model.config import VisionConfig

_MODEL = "vision_model."
_LAYER = _MODEL + "model.layers.{i}."

# (ours, Hugging Face's); `{i}` stands for the layer. A saved folder may put "model." before each.
HUGGING_FACE_NAMES: tuple[tuple[str, str], ...] = (
    ("vision.patch", _MODEL + "patch_embedding.linear.weight"),
    ("vision.class_token", _MODEL + "class_embedding"),
    ("vision.positions", _MODEL + "positional_embedding_vlm"),
    ("vision.pre_norm.weight", _MODEL + "layernorm_pre.weight"),
    ("vision.pre_norm.bias", _MODEL + "layernorm_pre.bias"),
    ("vision.post_norm.weight", _MODEL + "layernorm_post.weight"),
    ("vision.post_norm.bias", _MODEL + "layernorm_post.bias"),
    ("vision.layers.{i}.attention_norm.weight", _LAYER + "input_layernorm.weight"),
    ("vision.layers.{i}.attention_norm.bias", _LAYER + "input_layernorm.bias"),
    ("vision.layers.{i}.q.weight", _LAYER + "self_attn.q_proj.weight"),
    ("vision.layers.{i}.q.bias", _LAYER + "self_attn.q_proj.bias"),
    ("vision.layers.{i}.k.weight", _LAYER + "self_attn.k_proj.weight"),
    ("vision.layers.{i}.k.bias", _LAYER + "self_attn.k_proj.bias"),
    ("vision.layers.{i}.v.weight", _LAYER + "self_attn.v_proj.weight"),
    ("vision.layers.{i}.v.bias", _LAYER + "self_attn.v_proj.bias"),
    ("vision.layers.{i}.o.weight", _LAYER + "self_attn.o_proj.weight"),
    ("vision.layers.{i}.o.bias", _LAYER + "self_attn.o_proj.bias"),
    ("vision.layers.{i}.mlp_norm.weight", _LAYER + "post_attention_layernorm.weight"),
    ("vision.layers.{i}.mlp_norm.bias", _LAYER + "post_attention_layernorm.bias"),
    ("vision.layers.{i}.up.weight", _LAYER + "mlp.fc1.weight"),
    ("vision.layers.{i}.up.bias", _LAYER + "mlp.fc1.bias"),
    ("vision.layers.{i}.down.weight", _LAYER + "mlp.fc2.weight"),
    ("vision.layers.{i}.down.bias", _LAYER + "mlp.fc2.bias"),
    ("vision.adapter.first", _MODEL + "vision_adapter.mlp.fc1.weight"),
    ("vision.adapter.second", _MODEL + "vision_adapter.mlp.fc2.weight"),
    ("vision.projection", "multi_modal_projector.linear_1.weight"),
)


def vision_shapes(config: VisionConfig, text_width: int) -> dict[str, tuple[int, ...]]:
    """Every tensor of the encoder, its adapter and the projection.

    Args:
        config: validated.
        text_width: width of the text embeddings that the features join.
    Returns: shape per name. Matrices are [outputs, inputs]; the columns of `vision.patch` run
        over channel, row, column; the last row of `vision.positions` is the class token's.
    """
    width, mlp_width = config.width, config.mlp_width
    shapes: dict[str, tuple[int, ...]] = {
        "vision.patch": (width, config.num_channels * config.patch_size**2),
        "vision.class_token": (width,),
        "vision.positions": (config.num_patches + 1, width),
        "vision.adapter.first": (
            config.adapter_width,
            width * round(1 / config.shuffle_ratio) ** 2,
        ),
        "vision.adapter.second": (config.output_width, config.adapter_width),
        "vision.projection": (text_width, config.output_width),
    }
    norms = ["vision.pre_norm", "vision.post_norm"]
    for layer in range(config.num_layers):
        prefix = f"vision.layers.{layer}."
        norms += [prefix + "attention_norm", prefix + "mlp_norm"]
        for name in "qkvo":
            shapes[f"{prefix}{name}.weight"] = (width, width)
            shapes[f"{prefix}{name}.bias"] = (width,)
        shapes[prefix + "up.weight"] = (mlp_width, width)
        shapes[prefix + "up.bias"] = (mlp_width,)
        shapes[prefix + "down.weight"] = (width, mlp_width)
        shapes[prefix + "down.bias"] = (width,)
    for norm in norms:
        shapes[norm + ".weight"] = shapes[norm + ".bias"] = (width,)
    return shapes
