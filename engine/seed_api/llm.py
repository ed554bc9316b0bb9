"""The model of the advanced transformer document, over the layers that inference runs.

In: tokens, their positions, features of images. Out: logits. Weights lie under Llama 4's names;
attention, experts and norms are computed by `engine.model`.

B sequences, T tokens, M width, E experts, F inner width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from engine.errors import CheckpointError, PromptError
from engine.kernels.torch_kernels import HeadShare, Mlp, MlpShare, head_part
from engine.model.config import ModelConfig
from engine.model.layer_stack import (
    LayerShares,
    LayerStack,
    ParameterMatrix,
    check_tokens,
    whole_attention,
)
from engine.model.rope import inverse_frequencies
from engine.model.transformer import INITIAL_STD, NamedParameters
from engine.model.vision import VisionEncoder
from engine.seed_api.llm_args import ModelArgs
from engine.seed_api.llm_names import current_names
from engine.seed_api.tlama_layers import RMSNorm
from engine.vision.names import vision_shapes

_MAX_LISTED = 6


@dataclass(frozen=True, slots=True)
class MaskedEmbedding:
    """Features of images, and where they go.

    Attributes:
        embedding: float32 [N, output_dim], one for each True of the mask, in order.
        mask: bool [B, T], True where a feature replaces the token.
    """

    embedding: Tensor
    mask: Tensor


@dataclass(frozen=True, slots=True)
class TransformerInput:
    """A batch.

    Attributes:
        tokens: int64 [B, T].
        tokens_position: int64 [T], ascending by one; or the position of the first.
        image_embedding: features that replace tokens.
    """

    tokens: Tensor
    tokens_position: Tensor | int = 0
    image_embedding: MaskedEmbedding | None = None


@dataclass(frozen=True, slots=True)
class TransformerOutput:
    """What the model says: float32 [B, T, vocab_size]."""

    logits: Tensor


class LLMAttention(nn.Module):
    """Projections of one layer."""

    def __init__(self, config: ModelConfig) -> None:
        """Make random weights."""
        super().__init__()
        kv_width = config.num_kv_heads * config.head_width
        q_width = config.num_heads * config.head_width
        self.wq = nn.Linear(config.width, q_width, bias=False)
        self.wk = nn.Linear(config.width, kv_width, bias=False)
        self.wv = nn.Linear(config.width, kv_width, bias=False)
        self.wo = nn.Linear(q_width, config.width, bias=False)


class LLMFeedForward(nn.Module):
    """A gated network: w1 gets the activation, w3 gates, w2 leads back."""

    def __init__(self, width: int, hidden_dim: int) -> None:
        """Make random weights."""
        super().__init__()
        self.w1 = nn.Linear(width, hidden_dim, bias=False)
        self.w2 = nn.Linear(hidden_dim, width, bias=False)
        self.w3 = nn.Linear(width, hidden_dim, bias=False)

    def share(self) -> Mlp:
        """All of its columns."""
        return Mlp(
            gate_up=ParameterMatrix(self.w1.weight, self.w3.weight),
            down=ParameterMatrix(self.w2.weight),
        )


class LLMExperts(nn.Module):
    """Routed experts, stacked: w1 and w3 are [E, M, F], w2 is [E, F, M], used as x @ w."""

    def __init__(self, count: int, width: int, hidden_dim: int) -> None:
        """Make empty weights."""
        super().__init__()
        self.w1 = nn.Parameter(torch.empty(count, width, hidden_dim))
        self.w2 = nn.Parameter(torch.empty(count, hidden_dim, width))
        self.w3 = nn.Parameter(torch.empty(count, width, hidden_dim))

    def shares(self) -> tuple[Mlp, ...]:
        """All columns of each."""
        return tuple(
            Mlp(gate_up=ParameterMatrix(w1.T, w3.T), down=ParameterMatrix(w2.T))
            for w1, w2, w3 in zip(self.w1, self.w2, self.w3, strict=True)
        )


class LLMMoE(nn.Module):
    """A router, its experts, and one that sees every token."""

    def __init__(self, count: int, width: int, hidden_dim: int) -> None:
        """Make random weights."""
        super().__init__()
        self.router_DE = nn.Parameter(torch.empty(width, count))
        self.experts = LLMExperts(count, width, hidden_dim)
        self.shared_expert = LLMFeedForward(width, hidden_dim)


class LLMBlock(nn.Module):
    """One layer: attention, then a feed-forward network or experts."""

    def __init__(self, layer_id: int, config: ModelConfig) -> None:
        """Make random weights."""
        super().__init__()
        self.layer_id, self._config = layer_id, config
        layer = config.layers[layer_id]
        self.attention_norm = RMSNorm(config.width, config.norm_epsilon)
        self.attention = LLMAttention(config)
        self.ffn_norm = RMSNorm(config.width, config.norm_epsilon)
        if layer.has_experts and config.experts is not None:
            self.feed_forward = LLMMoE(config.experts.count, config.width, layer.mlp_width)
        else:
            self.feed_forward = LLMFeedForward(config.width, layer.mlp_width)

    def shares(self) -> LayerShares:
        """The whole layer, as the half-layer functions take it."""
        heads, mlp = self.attention, self.feed_forward
        attention = whole_attention(
            self._config,
            self.layer_id,
            self.attention_norm.weight,
            ParameterMatrix(heads.wq.weight, heads.wk.weight, heads.wv.weight),
            ParameterMatrix(heads.wo.weight),
        )
        norm = self.ffn_norm.weight
        if isinstance(mlp, LLMFeedForward):
            return LayerShares(attention=attention, mlp=MlpShare(norm=norm, dense=mlp.share()))
        share = MlpShare(
            norm=norm,
            dense=mlp.shared_expert.share(),
            router=mlp.router_DE.T,
            experts=mlp.experts.shares(),
        )
        return LayerShares(attention=attention, mlp=share)


class VisionEmbeddings(NamedParameters):
    """An image encoder with its adapter: tiles to features of `output_dim`."""

    def __init__(self, config: ModelConfig) -> None:
        """Make empty weights."""
        super().__init__()
        assert config.vision is not None
        self._config = config.vision
        for name, shape in vision_shapes(self._config, config.width).items():
            if name != "vision.projection":
                self.add(name.removeprefix("vision."), shape)

    def forward(self, tiles: Tensor) -> Tensor:
        """Features of each tile.

        Args:
            tiles: float32 [N, 3, image_size, image_size], values in [-1, 1].
        Returns: float32 [N, features of a tile, output_dim].
        """
        width = self._config.output_width
        weights = {f"vision.{name}": value for name, value in self.named_parameters()}
        # The projection to the text width is a module of its own here; this one changes nothing.
        weights["vision.projection"] = nn.Parameter(
            torch.eye(width, device=tiles.device), requires_grad=False
        )
        return VisionEncoder(self._config, width, weights).encode(tiles)


class LLM(nn.Module):
    """A decoder as Llama 4 has it.

    Attributes:
        tok_embeddings, layers, norm, output: its parts.
        vision_embeddings, vision_projection: with `vision_args` alone.
        freqs_cis: complex64 [2 * max_seq_len, head_dim / 2], the rotation of each position.
    """

    def __init__(self, args: ModelArgs) -> None:
        """Make random weights.

        Raises: ConfigError: a size that breaks a rule.
        """
        super().__init__()
        self.args = args
        self.config = config = args.model_config()
        self._stack = LayerStack(config)
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.width)
        if config.vision is not None:
            self.vision_embeddings = VisionEmbeddings(config)
            self.vision_projection = nn.Linear(config.vision.output_width, config.width, bias=False)
        self.layers = nn.ModuleList(LLMBlock(n, config) for n in range(config.num_layers))
        self.norm = RMSNorm(config.width, config.norm_epsilon)
        self.output = nn.Linear(config.width, config.vocab_size, bias=False)
        frequencies = inverse_frequencies(config.ropes[0], config.head_width)
        angles = torch.outer(torch.arange(2.0 * config.max_positions), frequencies)
        self.freqs_cis = torch.polar(torch.ones_like(angles), angles)
        self._reset_weights()

    def forward(self, model_input: TransformerInput) -> TransformerOutput:
        """Logits of every token.

        While gradients are off, keys and values are kept, so that the next positions may follow;
        a pass at position 0 begins anew.

        Raises:
            PromptError: tokens, positions or features that do not fit the model or each other.
            CacheFull: more than max_seq_len positions.
            ConfigError: positions above 0 while gradients are recorded.
        """
        tokens = model_input.tokens
        check_tokens(tokens, self.config.vocab_size)
        if tokens.shape[0] > self.args.batch_size:
            raise PromptError(
                f"{tokens.shape[0]} sequences at once, batch_size is {self.args.batch_size}. Pass "
                "fewer, or raise batch_size"
            )
        start_pos = _first_position(model_input.tokens_position, tokens.shape[1])
        x = self.tok_embeddings(tokens)
        if model_input.image_embedding is not None:
            x = self._merge(x, model_input.image_embedding)
        layers = [cast(LLMBlock, layer).shares() for layer in self.layers]
        x = self._stack.run(x, start_pos, layers)
        head = HeadShare(norm=self.norm.weight, matrix=ParameterMatrix(self.output.weight))
        logits = head_part(x.flatten(0, 1), head, self.config)
        return TransformerOutput(logits.view(*tokens.shape, -1))

    def _merge(self, x_BTM: Tensor, images: MaskedEmbedding) -> Tensor:
        features, mask = images.embedding, images.mask
        if self.config.vision is None:
            raise PromptError(
                "features of images for a model without vision_args; leave them out, or give the "
                "model an image encoder"
            )
        if mask.shape != x_BTM.shape[:2] or mask.dtype != torch.bool:
            raise PromptError(
                f"the image mask is {mask.dtype} {list(mask.shape)}, bool "
                f"{list(x_BTM.shape[:2])} is needed, one for each token. Reshape it"
            )
        width = self.config.vision.output_width
        num_places = int(mask.sum())
        if features.ndim != 2 or features.shape[1] != width or features.shape[0] != num_places:
            raise PromptError(
                f"features {list(features.shape)} for {num_places} places in the mask: "
                f"[{num_places}, {width}] are needed. Give each place one feature"
            )
        index = mask.nonzero(as_tuple=True)
        return x_BTM.index_put(index, self.vision_projection(features))

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Load values under these names, Llama 4's older ones, or its fused forms.

        Raises: CheckpointError: with `strict`, lists what is missing, left over, or of another
            shape; nothing is loaded then.
        """
        named = current_names(state_dict, self.config)
        own = self.state_dict()
        wrong = [
            f"{name} {list(value.shape)}, expected {list(own[name].shape)}"
            for name, value in named.items()
            if name in own and own[name].shape != value.shape
        ]
        problems = [("of another shape", wrong)]
        if strict:
            problems.append(("missing", [name for name in own if name not in named]))
            problems.append(("left over", [name for name in named if name not in own]))
        found = [f"{what}: {_listed(names)}" for what, names in problems if names]
        if found:
            raise CheckpointError(
                f"the checkpoint does not fit the model's {len(own)} tensors; {'; '.join(found)}. "
                "Use the arguments that belong to it"
            )
        return super().load_state_dict(named, strict=strict, assign=assign)

    @torch.no_grad()
    def _reset_weights(self) -> None:
        residual_std = INITIAL_STD * (2 * self.config.num_layers) ** -0.5
        for name, parameter in self.named_parameters():
            if name.endswith("norm.weight"):
                parameter.fill_(1.0)
            elif name.endswith("bias"):
                parameter.zero_()
            else:
                is_last = name.endswith(("wo.weight", "w2.weight", "experts.w2"))
                parameter.normal_(0.0, residual_std if is_last else INITIAL_STD)


def _first_position(positions: Tensor | int, num_tokens: int) -> int:
    """Positions as one number.

    Raises: PromptError: they do not ascend by one, or are not as many as the tokens.
    """
    if isinstance(positions, int):
        return positions
    flat = positions.flatten()
    if flat.numel() == 1:
        return int(flat[0])
    expected = torch.arange(num_tokens, device=flat.device) + (flat[0] if flat.numel() else 0)
    if flat.shape != expected.shape or not bool((flat == expected).all()):
        raise PromptError(
            f"tokens_position {list(positions.shape)} for {num_tokens} tokens must be one number, "
            "or ascend by one with one for each. Use torch.arange"
        )
    return int(flat[0])


def _listed(names: list[str]) -> str:
    more = len(names) - _MAX_LISTED
    shown = ", ".join(name[:100] for name in names[:_MAX_LISTED])
    return f"{shown} and {more} more" if more > 0 else shown
