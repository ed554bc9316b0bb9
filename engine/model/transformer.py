"""The trainable model: parameters under our own names, computed as inference computes them.

In: token ids, and images where the model sees them. Out: logits, and the loss where targets are
given. The keys of its state are the canonical tensor names, so a saved state is a checkpoint of
ours. It reads no files but through a `Checkpoint`, and knows no training loop.

B sequences, T tokens of each, M model width, V vocabulary.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, embedding

from engine.errors import CheckpointError, ConfigError, PromptError
from engine.kernels.torch_kernels import HeadShare, Mlp, MlpShare, head_part
from engine.model.config import CacheDtype, ModelConfig
from engine.model.layer_stack import (
    LayerShares,
    LayerStack,
    ParameterMatrix,
    check_tokens,
    mean_loss,
    whole_attention,
)
from engine.model.vision import VisionEncoder, merge_image_features
from engine.vision.names import vision_shapes
from engine.weights.checkpoint import Checkpoint
from engine.weights.formats import dequantize

INITIAL_STD = 0.02
ADAM_BETAS = (0.9, 0.95)
ADAM_EPSILON = 1e-8


def _empty(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(*shape))


class GatedMlp(nn.Module):
    """Weights of one MLP; an expert is one too."""

    def __init__(self, width: int, mlp_width: int) -> None:
        """Make empty weights."""
        super().__init__()
        self.gate = _empty(mlp_width, width)
        self.up = _empty(mlp_width, width)
        self.down = _empty(width, mlp_width)

    def share(self) -> Mlp:
        """Its columns, all of them."""
        return Mlp(gate_up=ParameterMatrix(self.gate, self.up), down=ParameterMatrix(self.down))


class DecoderLayer(nn.Module):
    """Weights of one layer: attention, then a gated MLP or experts."""

    def __init__(self, config: ModelConfig, number: int) -> None:
        """Make empty weights."""
        super().__init__()
        self._config, self._number = config, number
        width = config.width
        q_width = config.num_heads * config.head_width
        kv_width = config.num_kv_heads * config.head_width
        has_head_norms = config.qk_norm == "weight"
        self.attention_norm = _empty(width)
        self.q = _empty(q_width, width)
        self.k = _empty(kv_width, width)
        self.v = _empty(kv_width, width)
        self.q_bias = _empty(q_width) if config.has_qkv_bias else None
        self.k_bias = _empty(kv_width) if config.has_qkv_bias else None
        self.v_bias = _empty(kv_width) if config.has_qkv_bias else None
        self.q_norm = _empty(config.head_width) if has_head_norms else None
        self.k_norm = _empty(config.head_width) if has_head_norms else None
        self.o = _empty(width, q_width)
        self.o_bias = _empty(width) if config.has_output_bias else None
        self.attention_post_norm = _empty(width) if config.has_post_norms else None
        self.mlp_norm = _empty(width)
        self.mlp_post_norm = _empty(width) if config.has_post_norms else None
        self._add_mlp(config, config.layers[number].mlp_width)

    def _add_mlp(self, config: ModelConfig, mlp_width: int) -> None:
        experts = config.experts if config.layers[self._number].has_experts else None
        if experts is None:
            # The names of a dense layer have no level of their own for its MLP.
            dense = GatedMlp(config.width, mlp_width)
            self.gate, self.up, self.down = dense.gate, dense.up, dense.down
            return
        self.router = _empty(experts.count, config.width)
        self.experts = nn.ModuleList(
            GatedMlp(config.width, mlp_width) for _ in range(experts.count)
        )
        if experts.has_shared:
            self.shared = GatedMlp(config.width, mlp_width)

    def shares(self) -> LayerShares:
        """The whole layer, as the half-layer functions take it."""
        biases: list[Tensor] = [
            bias for bias in (self.q_bias, self.k_bias, self.v_bias) if bias is not None
        ]
        attention = whole_attention(
            self._config,
            self._number,
            self._factor(self.attention_norm),
            ParameterMatrix(self.q, self.k, self.v),
            ParameterMatrix(self.o),
            qkv_bias=torch.cat(biases) if biases else None,
            output_bias=self.o_bias,
            q_norm=None if self.q_norm is None else self._factor(self.q_norm),
            k_norm=None if self.k_norm is None else self._factor(self.k_norm),
        )
        post, mlp_post = self.attention_post_norm, self.mlp_post_norm
        return LayerShares(
            attention=attention,
            mlp=self._mlp_share(),
            attention_post_norm=None if post is None else self._factor(post),
            mlp_post_norm=None if mlp_post is None else self._factor(mlp_post),
        )

    def _mlp_share(self) -> MlpShare:
        norm = self._factor(self.mlp_norm)
        experts = self._config.experts if self._config.layers[self._number].has_experts else None
        if experts is None:
            matrix = ParameterMatrix(self.gate, self.up)
            return MlpShare(norm=norm, dense=Mlp(gate_up=matrix, down=ParameterMatrix(self.down)))
        return MlpShare(
            norm=norm,
            dense=self.shared.share() if experts.has_shared else None,
            router=self.router,
            experts=tuple(cast(GatedMlp, expert).share() for expert in self.experts),
        )

    def _factor(self, weight: Tensor) -> Tensor:
        return weight + 1 if self._config.norm_adds_one else weight


class NamedParameters(nn.Module):
    """Parameters under dotted names, made of nested modules."""

    def add(self, name: str, shape: tuple[int, ...]) -> None:
        """Add one parameter."""
        first, _, rest = name.partition(".")
        if not rest:
            self.register_parameter(first, _empty(*shape))
            return
        if first not in self._modules:
            self.add_module(first, NamedParameters())
        cast(NamedParameters, self._modules[first]).add(rest, shape)


class Transformer(nn.Module):
    """A decoder of any `ModelConfig`.

    Attributes:
        config: validated.
        dropout: share of the embedding and of each half layer's sum that is dropped in training.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        dropout: float = 0.0,
        kv_dtype: CacheDtype = "float32",
        generator: torch.Generator | None = None,
    ) -> None:
        """Make random weights.

        Args:
            dropout: in [0, 1).
            kv_dtype: what the cache of `start_pos` above 0 is kept in.
            generator: for the weights; torch's own if None.
        Raises: ConfigError: a value that breaks a rule.
        """
        super().__init__()
        self.config = config.validate()
        if not 0 <= dropout < 1:
            raise ConfigError(f"dropout {dropout} is not between 0 and 1; 0 drops nothing")
        self.dropout = dropout
        self._stack = LayerStack(config, kv_dtype)
        self.embedding = _empty(config.vocab_size, config.width)
        self.layers = nn.ModuleList(DecoderLayer(config, n) for n in range(config.num_layers))
        self.final_norm = _empty(config.width)
        self.head = None if config.is_head_tied else _empty(config.vocab_size, config.width)
        if config.vision is not None:
            self.vision = NamedParameters()
            for name, shape in vision_shapes(config.vision, config.width).items():
                self.vision.add(name.removeprefix("vision."), shape)
        self.reset_weights(generator)

    def forward(
        self,
        tokens: Tensor,
        start_pos: int = 0,
        targets: Tensor | None = None,
        tiles: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Logits of every token, and the loss.

        While gradients are off, a pass without targets keeps its keys and values, so that one
        with the next `start_pos` may follow. One at 0 begins anew.

        Args:
            tokens: int64 [B, T].
            start_pos: position of the first, for all sequences.
            targets: int64 [B, T], what each token's logits are compared with (the caller shifts);
                -100 is not compared.
            tiles: float32 [N, C, S, S] image tiles, in the order of the image tokens of the
                sequences one after the other.
        Returns: float32 [B, T, V], and float32 [] or None.
        Raises:
            PromptError: tokens, targets or tiles that do not fit the model or each other.
            CacheFull: more positions than the model's context; nothing is cut off silently.
            ConfigError: `start_pos` above 0 while gradients are recorded.
        """
        config = self.config
        check_tokens(tokens, config.vocab_size)
        rate = self.dropout if self.training else 0.0
        x = self._embed(tokens, tiles)
        x = dropout(x, rate) if rate else x
        layers = [cast(DecoderLayer, layer).shares() for layer in self.layers]
        keeps_cache = start_pos > 0 or targets is None
        x = self._stack.run(x, start_pos, layers, keeps_cache=keeps_cache, dropout_rate=rate)
        norm = self.final_norm + 1 if config.norm_adds_one else self.final_norm
        rows = self.embedding if self.head is None else self.head
        head = HeadShare(norm=norm, matrix=ParameterMatrix(rows))
        logits = head_part(x.flatten(0, 1), head, config).view(*tokens.shape, -1)
        return logits, None if targets is None else mean_loss(logits, targets)

    def _embed(self, tokens: Tensor, tiles: Tensor | None) -> Tensor:
        x = embedding(tokens, self.embedding) * self.config.embedding_scale
        if tiles is None:
            return x
        vision = self.config.vision
        if vision is None:
            raise PromptError(
                f"{tiles.shape[0]} image tiles for a model that reads text alone. Leave them out, "
                "or use a model with an image encoder"
            )
        edge = (vision.num_channels, vision.image_size, vision.image_size)
        if tiles.ndim != 4 or tiles.shape[1:] != edge:
            raise PromptError(
                f"image tiles {list(tiles.shape)}, the encoder reads [tiles, {edge[0]}, {edge[1]}, "
                f"{edge[2]}]. Prepare the images for this model"
            )
        weights = {f"vision.{name}": value for name, value in self.vision.named_parameters()}
        features = VisionEncoder(vision, self.config.width, weights).encode(tiles).flatten(0, 1)
        ids = cast("list[int]", tokens.flatten().tolist())  # pyright: ignore
        merged = merge_image_features(x.flatten(0, 1), ids, features, vision.image_token_id)
        return merged.view_as(x)

    def clear_cache(self) -> None:
        """Forget the sequences of earlier passes and give their memory back."""
        self._stack.clear()

    @property
    def cache_bytes(self) -> int:
        """Memory of keys and values held."""
        return self._stack.cache_bytes

    def count_parameters(self) -> int:
        """Numbers to train; a tied head counts once."""
        return sum(parameter.numel() for parameter in self.parameters())

    @torch.no_grad()
    def reset_weights(self, generator: torch.Generator | None = None) -> None:
        """Random matrices, norms that change nothing, no biases.

        What is added to the residual stream begins smaller the more layers add to it.
        Source: GPT-2 (Radford et al. 2019), section 2.3.
        """
        residual_std = INITIAL_STD * (2 * self.config.num_layers) ** -0.5
        for name, parameter in self.named_parameters():
            last = name.rpartition(".")[2]
            if name.startswith("vision."):
                _reset_vision(name, parameter, generator)
            elif last.endswith("norm"):
                parameter.fill_(0.0 if self.config.norm_adds_one else 1.0)
            elif last.endswith("bias"):
                parameter.zero_()
            else:
                std = residual_std if last in ("o", "down") else INITIAL_STD
                parameter.normal_(0.0, std, generator=generator)

    def configure_optimizers(
        self, weight_decay: float, learning_rate: float, device_type: str
    ) -> torch.optim.AdamW:
        """AdamW that decays matrices alone, not norms and biases.

        Args:
            device_type: "cuda" has one fused kernel for all parameters.
        Source: arXiv 1711.05101.
        """
        return make_adamw(self, weight_decay, learning_rate, device_type)

    @torch.no_grad()
    def load_checkpoint(self, checkpoint: Checkpoint) -> None:
        """Take over the values of an open checkpoint.

        Raises: CheckpointError: it is of another model.
        """
        if checkpoint.config != self.config:
            raise CheckpointError(
                f"{checkpoint.path}: the checkpoint's configuration differs from the model's. Make "
                "the model from checkpoint.config"
            )
        for name, parameter in self.named_parameters():
            info = checkpoint.tensors[name]
            raw = checkpoint.read_slice(name, 0, 0, info.shape[0])
            values = dequantize(info.format, raw, info.shape)
            parameter.copy_(torch.from_numpy(values))  # pyright: ignore[reportUnknownMemberType]


def _reset_vision(name: str, parameter: Tensor, generator: torch.Generator | None) -> None:
    if name.endswith("bias"):
        parameter.zero_()
    elif name.endswith("norm.weight"):
        parameter.fill_(1.0)
    else:
        parameter.normal_(0.0, INITIAL_STD, generator=generator)


def make_adamw(
    module: nn.Module, weight_decay: float, learning_rate: float, device_type: str
) -> torch.optim.AdamW:
    """AdamW with two groups: what has at least two dimensions decays, the rest does not."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    # The fused kernel needs the parameters on the device already.
    is_fused = device_type == "cuda" and all(p.is_cuda for p in parameters)
    return torch.optim.AdamW(
        groups, lr=learning_rate, betas=ADAM_BETAS, eps=ADAM_EPSILON, fused=is_fused
    )
