"""The configuration of the advanced transformer document: Llama 4's arguments.

Plain numbers; unknown fields are errors. No torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from engine.errors import ConfigError
from engine.model.config import NO_ROPE, Experts, Layer, ModelConfig, Rope, VisionConfig
from engine.seed_api.tlama_config import ffn_width

_ORIGINAL_POSITIONS = 8192


class MoEArgs(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Experts of the layers that have them: a sigmoid router and one shared expert.

    Attributes:
        num_experts: routed experts of a layer.
        top_k: experts that a token visits.
        interleave_moe_layer_step: every so many layers one has experts, the last of each run.
        capacity_factor, auto_scale_F: with the latter, an expert's width is the dense width divided
            by 1 + capacity_factor.
    """

    num_experts: int
    top_k: int = 1
    interleave_moe_layer_step: int = 1
    capacity_factor: float = 1.0
    auto_scale_F: bool = True  # noqa: N815 - the documented name


class VisionArgs(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An image encoder.

    Attributes:
        image_size, patch_size: edges in pixels.
        mlp_ratio: inner width of its feed-forward networks per width.
        output_dim: width of the features, before the projection to the text width.
        adapter_dim: inner width of the adapter; `output_dim` if None.
    """

    image_size: int
    patch_size: int
    dim: int
    n_layers: int
    n_heads: int
    output_dim: int
    mlp_ratio: float = 4.0
    pixel_shuffle_ratio: float = 0.5
    adapter_dim: int | None = None
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0


class ModelArgs(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Sizes and constants of an `LLM`.

    Attributes:
        n_kv_heads: as `n_heads` if None.
        head_dim: `dim` / `n_heads` if None.
        ffn_exp: inner width of the dense networks per `dim`; None follows `ffn_width`.
        use_scaled_rope: stretch long waves by `rope_scaling_factor` (8 if None), blending towards
            those shorter than the original context over `rope_high_freq_factor` (4 if None).
        nope_layer_interval: every so many layers one has no rotations, sees all positions, and may
            scale its queries; None or 0: all layers rotate.
        use_qk_norm: queries and keys to root mean square 1, after the rotation.
        attention_chunk_size: layers with rotations see only their chunk of so many positions.
        attn_temperature_tuning, floor_scale, attn_scale: growth of the queries of layers without
            rotations, by `1 + attn_scale * ln(1 + floor((position + 1) / floor_scale))`.
        batch_size: sequences at once; a larger batch is an error.
    """

    dim: int = 512
    n_layers: int = 8
    n_heads: int = 8
    n_kv_heads: int | None = None
    head_dim: int | None = None
    vocab_size: int = 32000
    multiple_of: int = 256
    ffn_dim_multiplier: float | None = None
    ffn_exp: float | None = None
    norm_eps: float = 1e-5
    rope_theta: float = 500000.0
    use_scaled_rope: bool = False
    rope_scaling_factor: float | None = None
    rope_high_freq_factor: float | None = None
    nope_layer_interval: int | None = None
    use_qk_norm: bool = False
    attention_chunk_size: int | None = None
    attn_temperature_tuning: bool = False
    floor_scale: float = 8192.0
    attn_scale: float = 0.1
    moe_args: MoEArgs | None = None
    vision_args: VisionArgs | None = None
    max_seq_len: int = 2048
    batch_size: int = 32

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> ModelArgs:
        """Check the fields of a params.json.

        Raises: ConfigError: an unknown field, or a value of another type.
        """
        try:
            return msgspec.convert(dict(fields), cls)
        except msgspec.ValidationError as error:
            known = ", ".join(cls.__struct_fields__)
            raise ConfigError(f"model arguments: {error}. The fields are {known}") from None

    def model_config(self) -> ModelConfig:
        """The same model as this engine describes it.

        Raises: ConfigError: a size that breaks a rule.
        """
        if self.head_dim is None and (self.n_heads < 1 or self.dim % self.n_heads):
            raise ConfigError(
                f"dim {self.dim} is not a multiple of n_heads {self.n_heads}; give head_dim"
            )
        if self.batch_size < 1:
            raise ConfigError(f"batch_size {self.batch_size} is not above 0; choose a larger one")
        if self.floor_scale != int(self.floor_scale):
            raise ConfigError(f"floor_scale {self.floor_scale} is not a whole number of positions")
        vision = None if self.vision_args is None else _vision_config(self.vision_args)
        return ModelConfig(
            family="llama4",
            width=self.dim,
            layers=tuple(self._layer(number) for number in range(self.n_layers)),
            num_heads=self.n_heads,
            num_kv_heads=self.n_heads if self.n_kv_heads is None else self.n_kv_heads,
            head_width=self.head_dim or self.dim // self.n_heads,
            vocab_size=self.vocab_size,
            norm_epsilon=self.norm_eps,
            ropes=(self._rope(),),
            rope_layout="adjacent",
            max_positions=self.max_seq_len,
            is_head_tied=False,
            qk_norm="l2" if self.use_qk_norm else "none",
            tuning_floor=int(self.floor_scale) if self.attn_temperature_tuning else 0,
            tuning_scale=self.attn_scale if self.attn_temperature_tuning else 0.0,
            experts=self._experts(),
            vision=vision,
        ).validate()

    def _layer(self, number: int) -> Layer:
        is_nope = bool(self.nope_layer_interval) and (number + 1) % self.nope_layer_interval == 0
        is_chunked = bool(self.attention_chunk_size) and not is_nope
        moe = self.moe_args
        has_experts = moe is not None and (number + 1) % max(1, moe.interleave_moe_layer_step) == 0
        return Layer(
            mlp_width=self._mlp_width(has_experts),
            rope=NO_ROPE if is_nope else 0,
            reach="chunked" if is_chunked else "full",
            span=self.attention_chunk_size or 0 if is_chunked else 0,
            has_experts=has_experts,
        )

    def _mlp_width(self, is_expert: bool) -> int:
        if self.ffn_exp is not None and not is_expert:
            return max(1, int(self.ffn_exp * self.dim))
        multiplier = 1.0 if self.ffn_dim_multiplier is None else self.ffn_dim_multiplier
        if not is_expert or self.moe_args is None or not self.moe_args.auto_scale_F:
            return ffn_width(4 * self.dim, self.multiple_of, multiplier)
        share = multiplier / (1 + self.moe_args.capacity_factor)
        return ffn_width(4 * self.dim, self.multiple_of, share)

    def _rope(self) -> Rope:
        if not self.use_scaled_rope:
            return Rope(theta=self.rope_theta)
        return Rope(
            theta=self.rope_theta,
            kind="llama3",
            factor=8.0 if self.rope_scaling_factor is None else self.rope_scaling_factor,
            original_positions=_ORIGINAL_POSITIONS,
            low_factor=1.0,
            high_factor=4.0 if self.rope_high_freq_factor is None else self.rope_high_freq_factor,
        )

    def _experts(self) -> Experts | None:
        if self.moe_args is None:
            return None
        return Experts(
            count=self.moe_args.num_experts,
            used=self.moe_args.top_k,
            router="sigmoid",
            is_normalized=False,
            weighs="input",
            has_shared=True,
        )


def _vision_config(args: VisionArgs) -> VisionConfig:
    return VisionConfig(
        image_size=args.image_size,
        patch_size=args.patch_size,
        num_channels=3,
        width=args.dim,
        mlp_width=int(args.mlp_ratio * args.dim),
        num_layers=args.n_layers,
        num_heads=args.n_heads,
        norm_epsilon=args.norm_eps,
        rope_theta=args.rope_theta,
        shuffle_ratio=args.pixel_shuffle_ratio,
        adapter_width=args.adapter_dim or args.output_dim,
        output_width=args.output_dim,
        image_token_id=0,  # An `LLM` is told by a mask where features go.
    )
