"""The shape of a model: plain numbers, no torch, so that every process can hold one.

Built by `engine.weights` from a file's metadata, sent to runners, read by the plan and the window.
What differs between layers is said per layer; nothing here knows a family by name.
"""

from __future__ import annotations

import math
from typing import Literal

import msgspec

from engine.errors import ConfigError

RopeLayout = Literal["half", "adjacent"]
RopeKind = Literal["default", "linear", "llama3", "dynamic", "yarn", "factors"]
Reach = Literal["full", "sliding", "chunked"]
Activation = Literal["silu", "gelu_tanh"]
QkNorm = Literal["none", "weight", "l2"]
CacheDtype = Literal["float32", "bfloat16", "float16"]

MAX_LAYERS = 1024
MAX_WIDTH = 1 << 20
MAX_EXPERTS = 4096
# Each has a table in memory of its own; models have one or two.
MAX_ROPES = 8
NO_ROPE = -1


class Rope(msgspec.Struct, frozen=True, kw_only=True, array_like=True, forbid_unknown_fields=True):
    """One table of rotary frequencies.

    Attributes:
        theta: base of the geometric series of wavelengths.
        kind: how the frequencies are changed for longer contexts; "factors" divides each by an
            own number, as GGUF files store it.
        factor: by which the context grows.
        original_positions: trained context before it was extended (llama3, yarn, dynamic).
        low_factor, high_factor: borders of the llama3 rule, in wavelengths per context.
        beta_fast, beta_slow: borders of the yarn rule, in rotations per context.
        is_truncated: whether yarn rounds its borders to whole pairs.
        attention_factor: multiplies cosine and sine.
        factors: one divisor per pair, for kind "factors".
    """

    theta: float
    kind: RopeKind = "default"
    factor: float = 1.0
    original_positions: int = 0
    low_factor: float = 1.0
    high_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    is_truncated: bool = True
    attention_factor: float = 1.0
    factors: tuple[float, ...] = ()


class Layer(msgspec.Struct, frozen=True, kw_only=True, array_like=True, forbid_unknown_fields=True):
    """What one layer is.

    Attributes:
        mlp_width: intermediate columns; of each expert, where the layer has experts.
        rope: index into `ModelConfig.ropes`, or NO_ROPE.
        reach: which earlier positions attention sees: all, the last `span`, or those in the same
            chunk of `span` positions.
        has_experts: whether the MLP is a mixture of experts.
    """

    mlp_width: int
    rope: int = 0
    reach: Reach = "full"
    span: int = 0
    has_experts: bool = False


class Experts(
    msgspec.Struct, frozen=True, kw_only=True, array_like=True, forbid_unknown_fields=True
):
    """How the layers with experts choose and weigh them.

    Attributes:
        count: experts of a layer.
        used: experts that a token visits.
        router: what turns the router's logits into weights.
        is_normalized: whether the weights of the chosen experts are scaled to sum to 1.
        weighs: whether the weight multiplies an expert's input (Llama 4) or its output.
        has_shared: whether one more expert sees every token, unweighted.
    """

    count: int
    used: int
    router: Literal["softmax", "sigmoid"]
    is_normalized: bool
    weighs: Literal["input", "output"]
    has_shared: bool


class VisionConfig(
    msgspec.Struct, frozen=True, kw_only=True, array_like=True, forbid_unknown_fields=True
):
    """An image encoder as Llama 4 has it, with its adapter.

    Attributes:
        image_size, patch_size: edge of a tile and of a patch, in pixels.
        width, mlp_width, num_layers, num_heads: of the encoder.
        shuffle_ratio: pixel shuffle; 0.5 makes one token of four patches.
        adapter_width: inner width of the adapter's MLP.
        output_width: width of the adapter's features, before the projection to the text width.
        image_token_id: the token whose embedding a feature replaces.
    """

    image_size: int
    patch_size: int
    num_channels: int
    width: int
    mlp_width: int
    num_layers: int
    num_heads: int
    norm_epsilon: float
    rope_theta: float
    shuffle_ratio: float
    adapter_width: int
    output_width: int
    image_token_id: int

    @property
    def num_patches(self) -> int:
        """Patches of a tile."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def tokens_per_tile(self) -> int:
        """Features of a tile after the pixel shuffle."""
        return round(self.num_patches * self.shuffle_ratio**2)


class ModelConfig(
    msgspec.Struct, frozen=True, kw_only=True, array_like=True, forbid_unknown_fields=True
):
    """Sizes and constants of a LLaMA-style decoder.

    Attributes:
        family: a name of `engine.weights.families`, for messages and name tables only.
        rope_layout: "half" rotates pairs (i, i + D/2), as Hugging Face Llama does; "adjacent"
            rotates (2i, 2i + 1), as Meta and the GGUF llama family do.
        max_positions: the trained context length, in tokens.
        qk_norm: "weight" normalises each head of q and k before RoPE; "l2" has no weight, comes
            after RoPE, and only on layers with RoPE.
        norm_adds_one: norms multiply by 1 + weight.
        has_post_norms: attention and MLP outputs are normalised before the residual.
        attention_scale: factor of q · k; 0 means head_width ** -0.5.
        logit_softcap: logits become cap * tanh(logit / cap); 0 means none.
        tuning_floor, tuning_scale: temperature of queries on layers without RoPE; floor 0: none.
    """

    family: str
    width: int
    layers: tuple[Layer, ...]
    num_heads: int
    num_kv_heads: int
    head_width: int
    vocab_size: int
    norm_epsilon: float
    ropes: tuple[Rope, ...]
    rope_layout: RopeLayout
    max_positions: int
    is_head_tied: bool
    activation: Activation = "silu"
    has_qkv_bias: bool = False
    has_output_bias: bool = False
    qk_norm: QkNorm = "none"
    norm_adds_one: bool = False
    has_post_norms: bool = False
    embedding_scale: float = 1.0
    attention_scale: float = 0.0
    logit_softcap: float = 0.0
    tuning_floor: int = 0
    tuning_scale: float = 0.0
    experts: Experts | None = None
    vision: VisionConfig | None = None

    @property
    def num_layers(self) -> int:
        """Layers of the decoder."""
        return len(self.layers)

    @property
    def heads_per_kv(self) -> int:
        """Query heads that share one KV head."""
        return self.num_heads // self.num_kv_heads

    def num_experts(self, layer: int) -> int:
        """MLPs of a layer, the shared expert included; 1 for a dense layer."""
        if self.experts is None or not self.layers[layer].has_experts:
            return 1
        return self.experts.count + self.experts.has_shared

    def validate(self) -> ModelConfig:
        """Return self, or raise.

        Raises: ConfigError: names the field, its value and the rule it breaks.
        """
        bounds = {
            "width": MAX_WIDTH,
            "num_layers": MAX_LAYERS,
            "num_heads": 4096,
            "num_kv_heads": 4096,
            "head_width": 4096,
            "vocab_size": 1 << 22,
            "max_positions": 1 << 30,
        }
        for field, limit in bounds.items():
            _check_whole(field, getattr(self, field), 1, limit)
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"num_kv_heads {self.num_kv_heads} does not divide num_heads {self.num_heads}"
            )
        _check_positive("norm_epsilon", self.norm_epsilon)
        _check_positive("embedding_scale", self.embedding_scale)
        for field in ("attention_scale", "logit_softcap"):
            _check_number(field, getattr(self, field))
        _check_whole("tuning_floor", self.tuning_floor, 0, 1 << 30)
        if not math.isfinite(self.tuning_scale):
            raise ConfigError(f"tuning_scale {self.tuning_scale} is not a number")
        if len(self.ropes) > MAX_ROPES:
            raise ConfigError(f"{len(self.ropes):,} RoPE tables, at most {MAX_ROPES} are allowed")
        for rope in self.ropes:
            _check_rope(rope, self.head_width)
        for number, layer in enumerate(self.layers):
            self._check_layer(number, layer)
        if self.experts is not None:
            _check_experts(self.experts)
        if self.vision is not None:
            _check_vision(self.vision, self.vocab_size)
        return self

    def _check_layer(self, number: int, layer: Layer) -> None:
        _check_whole(f"mlp_width of layer {number}", layer.mlp_width, 1, MAX_WIDTH)
        if layer.rope != NO_ROPE:
            _check_whole(f"RoPE table of layer {number}", layer.rope, 0, len(self.ropes) - 1)
            if self.head_width % 2:
                raise ConfigError(f"head_width {self.head_width} is odd; RoPE rotates pairs")
        if layer.reach != "full":
            _check_whole(f"{layer.reach} attention span of layer {number}", layer.span, 1, 1 << 30)
        if layer.has_experts and self.experts is None:
            raise ConfigError(f"layer {number} has experts, but their number is not said")


def _check_whole(field: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise ConfigError(f"{field} {value} is not between {low} and {high:,}")


def _check_positive(field: str, value: float) -> None:
    if not (math.isfinite(value) and value > 0):
        raise ConfigError(f"{field} {value} is not a positive number")


def _check_number(field: str, value: float) -> None:
    if not (math.isfinite(value) and value >= 0):
        raise ConfigError(f"{field} {value} is not a number >= 0")


def _check_between(field: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:  # true of what is no number, too
        raise ConfigError(f"{field} {value} is not between {low:g} and {high:g}")


# Wider than any model has, and so narrow that no table of float32 overflows.
_ROPE_BOUNDS = {
    "theta": (1e-3, 1e12),
    "factor": (1e-3, 1e6),
    "attention_factor": (1e-3, 1e3),
    "beta_fast": (1e-3, 1e6),
    "beta_slow": (1e-3, 1e6),
    "low_factor": (1e-3, 1e6),
    "high_factor": (1e-3, 1e6),
}
# Files switch a pair off with a divisor of 1e30.
_DIVISOR_BOUNDS = (1e-6, 1e30)


def _check_rope(rope: Rope, head_width: int) -> None:
    for field, (low, high) in _ROPE_BOUNDS.items():
        _check_between(f"RoPE {field}", getattr(rope, field), low, high)
    if rope.kind in ("llama3", "yarn", "dynamic"):
        _check_whole(f"original positions of RoPE {rope.kind}", rope.original_positions, 1, 1 << 30)
    if rope.kind == "llama3" and rope.low_factor > rope.high_factor:
        raise ConfigError(
            f"RoPE low_factor {rope.low_factor} is above high_factor {rope.high_factor}"
        )
    if rope.kind == "yarn" and rope.theta <= 1:
        raise ConfigError(f"RoPE theta {rope.theta} must be above 1 for yarn")
    if rope.kind == "dynamic" and head_width < 4:
        raise ConfigError(f"head_width {head_width} is below 4, the least for dynamic RoPE")
    if rope.kind == "factors":
        if len(rope.factors) != head_width // 2:
            raise ConfigError(
                f"{len(rope.factors)} RoPE factors for {head_width // 2} pairs of a head"
            )
        for value in rope.factors:
            _check_between("a RoPE factor", value, *_DIVISOR_BOUNDS)


def _check_experts(experts: Experts) -> None:
    _check_whole("number of experts", experts.count, 1, MAX_EXPERTS)
    if not 1 <= experts.used <= experts.count:
        raise ConfigError(f"a token visits {experts.used} experts, the layers have {experts.count}")


def _check_vision(vision: VisionConfig, vocab_size: int) -> None:
    bounds = {
        "image_size": 1 << 14,
        "patch_size": 1 << 14,
        "num_channels": 3,
        "width": MAX_WIDTH,
        "mlp_width": MAX_WIDTH,
        "num_layers": MAX_LAYERS,
        "num_heads": 4096,
        "adapter_width": MAX_WIDTH,
        "output_width": MAX_WIDTH,
    }
    for field, limit in bounds.items():
        _check_whole(f"vision {field}", getattr(vision, field), 1, limit)
    _check_positive("vision norm_epsilon", vision.norm_epsilon)
    _check_between("vision rope_theta", vision.rope_theta, *_ROPE_BOUNDS["theta"])
    if vision.image_size % vision.patch_size:
        raise ConfigError(
            f"vision patch_size {vision.patch_size} does not divide image_size {vision.image_size}"
        )
    if vision.num_channels != 3:
        raise ConfigError(f"vision num_channels {vision.num_channels} is not 3 (red, green, blue)")
    if vision.width % vision.num_heads or (vision.width // vision.num_heads) % 4:
        raise ConfigError(
            f"vision width {vision.width} is not {vision.num_heads} heads of a multiple of 4"
        )
    edge = vision.image_size // vision.patch_size
    inverse = round(1 / vision.shuffle_ratio) if 0 < vision.shuffle_ratio <= 1 else 0
    if not inverse or abs(inverse * vision.shuffle_ratio - 1) > 1e-9 or edge % inverse:
        raise ConfigError(
            f"vision shuffle ratio {vision.shuffle_ratio} does not divide {edge} patches an edge"
        )
    _check_whole("vision image_token_id", vision.image_token_id, 0, vocab_size - 1)
