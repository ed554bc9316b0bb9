"""All layers of a model in one process, with gradients or over a cache: what modules compute with.

In: embeddings and the weights of every layer as whole shares. Out: the residual stream after the
last layer. Every layer is the two half-layer entry points that inference runs. It holds no weights.

B sequences, T new tokens of each, M model width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, dropout, linear

from engine.errors import CacheFull, ConfigError, PromptError
from engine.kernels.matrices import Matrix
from engine.kernels.torch_kernels import (
    AttentionShare,
    Batch,
    Cache,
    MlpShare,
    attention_part,
    mlp_part,
)
from engine.model.batch import Segment, StepKind
from engine.model.config import CacheDtype, ModelConfig
from engine.model.kv_cache import CachedKeys, KVCache
from engine.model.norm import rms_norm
from engine.model.rope import RopeTable
from engine.model.shard import make_batch
from engine.model.view import LONGEST_STEP, View

# Targets that are not compared, as in torch.
IGNORED_TARGET = -100


class ParameterMatrix:
    """A `Matrix` over tensors that someone trains: nothing is copied, gradients flow."""

    def __init__(self, *parts_NK: Tensor) -> None:
        """Args: parts_NK: float32 [N, K] each, stacked along rows."""
        self._parts = parts_NK

    @property
    def num_bytes(self) -> int:
        """Memory held, by whoever owns the parameters."""
        return sum(part.nbytes for part in self._parts)

    def multiply(self, x_TK: Tensor, kind: StepKind) -> Tensor:
        """x @ W.T; the parts stay apart, since joining them would copy the weights."""
        products = [linear(x_TK, part) for part in self._parts]
        joined = products[0] if len(products) == 1 else torch.cat(products, dim=-1)
        return joined.float()  # Under autocast the product is half as wide.


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerShares:
    """One whole layer.

    Attributes:
        attention_post_norm, mlp_post_norm: what the norm of each sum multiplies by, or None.
    """

    attention: AttentionShare
    mlp: MlpShare
    attention_post_norm: Tensor | None = None
    mlp_post_norm: Tensor | None = None


class _OwnKeys:
    """Stands in for a cache: a sequence attends over its own tokens, which keep their gradient."""

    def __init__(self, view: View) -> None:
        self.view = view

    def append(self, first_position: int, keys_THD: Tensor, values_THD: Tensor) -> CachedKeys:
        """The tokens themselves; nothing is written anywhere."""
        return CachedKeys(keys_THD.transpose(0, 1), values_THD.transpose(0, 1), 0, None)


class _NoCache:
    """All layers of all sequences, without memory."""

    def __init__(self, config: ModelConfig) -> None:
        views = [View.of_layer(layer, config.max_positions) for layer in config.layers]
        self._layers = [_OwnKeys(view) for view in views]

    def layer(self, slot: int, layer: int) -> _OwnKeys:
        """One layer, the same for every sequence."""
        return self._layers[layer]


class LayerStack:
    """Runs layers over a batch of sequences of equal length, and keeps their cache.

    A pass at position 0 begins new sequences. The cache is kept only while gradients are off: it
    is written in place, and what it holds has no history.
    """

    def __init__(self, config: ModelConfig, kv_dtype: CacheDtype = "float32") -> None:
        """Args: kv_dtype: what the cache is kept in."""
        self.config = config
        self._kv_dtype: CacheDtype = kv_dtype
        self._no_cache = _NoCache(config)
        self._device = torch.device("cpu")
        self._ropes: list[RopeTable] = []
        self._cache: KVCache | None = None
        self._num_sequences = 0
        self._num_positions = 0

    def run(
        self,
        x_BTM: Tensor,
        start_pos: int,
        layers: Sequence[LayerShares],
        *,
        keeps_cache: bool = True,
        dropout_rate: float = 0.0,
    ) -> Tensor:
        """Pass new tokens through every layer.

        Args:
            x_BTM: float32 embeddings.
            start_pos: position of the first token, the same for all sequences; above 0 the tokens
                follow those of the passes before.
            keeps_cache: whether a later pass may follow this one.
            dropout_rate: of each half layer's sum; 0 outside training.
        Returns: float32 [B, T, M].
        Raises:
            ConfigError: `start_pos` above 0 while gradients are recorded.
            PromptError: the tokens do not follow, or there are none.
            CacheFull: more positions than the model's context.
        """
        num_sequences, num_tokens, _ = x_BTM.shape
        self._check(num_sequences, num_tokens, start_pos)
        self._move_to(x_BTM.device)
        if start_pos == 0:
            self.clear()
        if torch.is_grad_enabled() or (start_pos == 0 and not keeps_cache):
            return self._pass(x_BTM, 0, layers, self._no_cache, dropout_rate)
        if self._cache is None:
            heads = dict.fromkeys(range(self.config.num_layers), self.config.num_kv_heads)
            self._cache = KVCache(
                self.config, heads, self.config.max_positions, self._kv_dtype, self._device
            )
        self._num_sequences = num_sequences
        outputs: list[Tensor] = []
        for start in range(0, num_tokens, LONGEST_STEP):
            piece = x_BTM[:, start : start + LONGEST_STEP]
            for slot in range(num_sequences):
                self._cache.extend(slot, start_pos + start, piece.shape[1])
            outputs.append(self._pass(piece, start_pos + start, layers, self._cache, dropout_rate))
        self._num_positions = start_pos + num_tokens
        return torch.cat(outputs, dim=1)

    def clear(self) -> None:
        """Forget every sequence and give its memory back."""
        self._cache = None
        self._num_sequences = self._num_positions = 0

    @property
    def cache_bytes(self) -> int:
        """Memory of the sequences held."""
        return 0 if self._cache is None else self._cache.num_bytes

    def _check(self, num_sequences: int, num_tokens: int, start_pos: int) -> None:
        if start_pos < 0 or not num_tokens or not num_sequences:
            raise PromptError(
                f"{num_sequences} sequences of {num_tokens} tokens from position {start_pos} "
                "cannot be computed, at least one token from position 0 on is needed. Give tokens"
            )
        end, limit = start_pos + num_tokens, self.config.max_positions
        if end > limit:
            raise CacheFull(
                f"the tokens need {end:,} positions, the model's context has {limit:,}. Shorten "
                "them, or make the model with a larger context"
            )
        if start_pos == 0:
            return
        if torch.is_grad_enabled():
            raise ConfigError(
                f"start_pos {start_pos} with gradients on: the cache holds no history, so only "
                "position 0 can be trained from. Pass all tokens, or use torch.inference_mode()"
            )
        if num_sequences != self._num_sequences or start_pos != self._num_positions:
            raise PromptError(
                f"{num_sequences} sequences from position {start_pos}: the cache holds "
                f"{self._num_sequences} of {self._num_positions:,} positions, and new tokens must "
                "follow them. Pass all tokens from position 0, with gradients off"
            )

    def _move_to(self, device: torch.device) -> None:
        if self._ropes and device == self._device:
            return
        self._device = device
        ropes = self.config.ropes
        self._ropes = [RopeTable(rope, self.config.head_width, device) for rope in ropes]

    def _pass(
        self,
        x_BTM: Tensor,
        first_position: int,
        layers: Sequence[LayerShares],
        cache: Cache,
        dropout_rate: float,
    ) -> Tensor:
        config = self.config
        num_sequences, num_tokens, _ = x_BTM.shape
        segments = tuple(
            Segment(
                slot=slot, first_position=first_position, token_count=num_tokens, logit_offsets=()
            )
            for slot in range(num_sequences)
        )
        batch = make_batch("prompt", segments, self._ropes, config, self._device)
        x = x_BTM.flatten(0, 1)
        for layer in layers:
            x = run_layer(x, layer, batch, cache, config, dropout_rate)
        return x.view_as(x_BTM)


def run_layer(
    x_NM: Tensor,
    layer: LayerShares,
    batch: Batch,
    cache: Cache,
    config: ModelConfig,
    dropout_rate: float = 0.0,
) -> Tensor:
    """The residual stream after one whole layer, float32 [B * T, M]."""
    total = attention_part(x_NM, layer.attention, batch, cache, config)
    x_NM = x_NM + _normed(total, layer.attention_post_norm, config, dropout_rate)
    total = mlp_part(x_NM, layer.mlp, batch.kind, config)
    return x_NM + _normed(total, layer.mlp_post_norm, config, dropout_rate)


def _normed(total: Tensor, norm: Tensor | None, config: ModelConfig, dropout_rate: float) -> Tensor:
    if norm is not None:
        total = rms_norm(total, norm, config.norm_epsilon)
    return dropout(total, dropout_rate) if dropout_rate else total


def mean_loss(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    """Mean cross entropy of the targets that count.

    Args:
        targets_BT: int64, in the vocabulary or IGNORED_TARGET: what each position is compared
            with. The caller shifts.
    Returns: float32 []; 0 where no target counts.
    Raises: PromptError: another shape than the tokens, or ids outside the vocabulary.
    """
    if targets_BT.shape != logits_BTV.shape[:-1]:
        raise PromptError(
            f"targets {list(targets_BT.shape)} for tokens {list(logits_BTV.shape[:-1])}: each "
            "token needs one target. Give as many"
        )
    counted = targets_BT != IGNORED_TARGET
    check_tokens(targets_BT.masked_fill(~counted, 0), logits_BTV.shape[-1], "targets")
    total = cross_entropy(
        logits_BTV.flatten(0, 1),
        targets_BT.flatten(),
        ignore_index=IGNORED_TARGET,
        reduction="sum",
    )
    return total / counted.sum().clamp(min=1)


def check_tokens(tokens_BT: Tensor, vocab_size: int, what: str = "tokens") -> None:
    """Check a batch of ids.

    Raises: PromptError: not a matrix of int64, or an id outside the vocabulary.
    """
    if tokens_BT.ndim != 2 or tokens_BT.dtype != torch.int64:
        raise PromptError(
            f"{what} are {tokens_BT.dtype} {list(tokens_BT.shape)}, int64 [batch, length] is "
            "needed. Convert or reshape them"
        )
    if not tokens_BT.numel():
        return
    low, high = (int(bound) for bound in torch.aminmax(tokens_BT))
    if low < 0 or high >= vocab_size:
        raise PromptError(
            f"{what} hold ids from {low} to {high}, the vocabulary has 0 to {vocab_size - 1}. "
            "Use the model's own tokenizer"
        )


def whole_attention(
    config: ModelConfig,
    layer: int,
    norm: Tensor,
    qkv: Matrix,
    output: Matrix,
    *,
    qkv_bias: Tensor | None = None,
    output_bias: Tensor | None = None,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
) -> AttentionShare:
    """The share of a device that has all heads of a layer."""
    # As few runs as there can be: whole groups of query heads lie on each KV head.
    groups = [(config.num_heads, config.num_kv_heads, config.heads_per_kv)]
    return AttentionShare(
        layer=layer,
        norm=norm,
        qkv=qkv,
        output=output,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        groups=groups,
        qkv_bias=qkv_bias,
        output_bias=output_bias,
        q_norm=q_norm,
        k_norm=k_norm,
    )
