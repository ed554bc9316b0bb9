"""The layers of the tlama document: norm, rotations, attention, feed-forward.

Weights lie in the modules under the documented names; norms, rotations and masks are those of
`engine.model`. Pairs of a head are adjacent (2i, 2i + 1), as Meta has them.

B sequences, T new tokens, S tokens attended over, H query heads, K kv heads, D head width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention, silu

from engine.errors import CacheFull, ConfigError, PromptError
from engine.model.config import Rope
from engine.model.norm import l2_norm
from engine.model.rope import apply_rope as rotate
from engine.model.rope import inverse_frequencies
from engine.seed_api.tlama_config import TlamaConfig, ffn_width


class RMSNorm(nn.Module):
    """Root mean square normalisation with a weight.

    Attributes:
        weight: [dim].
        eps: added to the mean square.
    """

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        """Make a weight of ones."""
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def _norm(self, x: Tensor) -> Tensor:
        """Scale each row to root mean square 1; the dtype of x."""
        return l2_norm(x.float(), self.eps).type_as(x)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise in float32, go back to the dtype of x, then multiply by the weight.

        Args:
            x: [..., dim].
        Returns: [..., dim].
        """
        return self._norm(x) * self.weight


def compute_freqs_cis(dim: int, end: int, theta: float = 10000.0) -> Tensor:
    """Rotations of every position as complex numbers of length 1.

    Args:
        dim: width of a head, even.
        end: number of positions.
    Returns: complex64 [end, dim / 2].
    Raises: ConfigError: an odd width, or no positions.
    Source: arXiv 2104.09864.
    """
    if dim < 2 or dim % 2 or end < 1 or not theta > 0:
        raise ConfigError(
            f"rotations of dim {dim}, end {end}, theta {theta}: dim must be even, all above 0. "
            "Choose others"
        )
    angles = torch.outer(
        torch.arange(end, dtype=torch.float32), inverse_frequencies(Rope(theta=theta), dim)
    )
    return torch.polar(torch.ones_like(angles), angles)


def reshape_for_broadcast(freqs_cis: Tensor, x: Tensor) -> Tensor:
    """Give rotations the number of dimensions of what they turn.

    Args:
        freqs_cis: [T, D / 2].
        x: [B, T, ..., D] real, or [B, T, ..., D / 2] complex; T is its second dimension.
    Returns: [1, T, 1, ..., D / 2], a view.
    Raises: PromptError: other sizes.
    """
    wanted = (x.shape[1], x.shape[-1] // (1 if x.is_complex() else 2)) if x.ndim > 1 else None
    if freqs_cis.ndim != 2 or tuple(freqs_cis.shape) != wanted:
        raise PromptError(
            f"rotations {list(freqs_cis.shape)} do not fit {list(x.shape)}: one row for each of "
            "the tokens in dimension 1, one number for each pair. Cut the table to the tokens"
        )
    middle = (1,) * (x.ndim - 3)
    return freqs_cis.view(1, freqs_cis.shape[0], *middle, freqs_cis.shape[1])


def apply_rope(xq: Tensor, xk: Tensor, freqs_cis: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate queries and keys by their positions, in float32.

    Args:
        xq: [B, T, H, D].
        xk: [B, T, K, D].
        freqs_cis: complex64 [T, D / 2], the rows of these tokens.
    Returns: both rotated, in their dtypes.
    Raises: PromptError: sizes that do not fit.
    """
    reshape_for_broadcast(freqs_cis, xq)
    reshape_for_broadcast(freqs_cis, xk)
    cos, sin = freqs_cis.real, freqs_cis.imag
    query, key = (rotate(x.float(), cos, sin, "adjacent").type_as(x) for x in (xq, xk))
    return query, key


def repeat_kv(kv: Tensor, n_rep: int) -> Tensor:
    """Repeat each key or value head for the query heads that share it, side by side.

    Args:
        kv: [B, S, K, D].
        n_rep: query heads per KV head, at least 1.
    Returns: [B, S, K * n_rep, D].
    Raises: PromptError: no such number or shape.
    """
    if kv.ndim != 4 or n_rep < 1:
        raise PromptError(
            f"{list(kv.shape)} cannot be repeated {n_rep} times: [batch, length, heads, width] and "
            "a number above 0 are needed. Reshape it"
        )
    return kv if n_rep == 1 else kv.repeat_interleave(n_rep, dim=2)


class Attention(nn.Module):
    """Grouped-query attention, over a cache where the configuration has one.

    Attributes:
        n_kv_heads, n_rep, head_dim: sizes; `n_rep` query heads share a KV head.
        n_local_heads, n_local_kv_heads: all heads: this module is one device's.
        Wq, Wk, Wv, Wo: projections without bias.
        cache_k, cache_v: [max_batch_size, max_seq_len, K, D], where the cache is enabled.
    """

    cache_k: Tensor
    cache_v: Tensor

    def __init__(self, config: TlamaConfig) -> None:
        """Make random weights and an empty cache."""
        super().__init__()
        self.config = config
        self.n_kv_heads = config.n_heads if config.n_kv_heads is None else config.n_kv_heads
        self.n_local_heads = config.n_heads
        self.n_local_kv_heads = self.n_kv_heads
        self.n_rep = config.n_heads // self.n_kv_heads
        self.head_dim = config.head_dim
        kv_width = self.n_kv_heads * self.head_dim
        self.Wq = nn.Linear(config.d_model, config.d_model, bias=False)
        self.Wk = nn.Linear(config.d_model, kv_width, bias=False)
        self.Wv = nn.Linear(config.d_model, kv_width, bias=False)
        self.Wo = nn.Linear(config.d_model, config.d_model, bias=False)
        self._cached = (0, 0)  # sequences, positions
        if config.kv_cache:
            shape = (config.max_batch_size, config.max_seq_len, self.n_kv_heads, self.head_dim)
            # Not zeros: memory that nobody writes need not exist. Only what was written is read.
            self.register_buffer("cache_k", torch.empty(shape), persistent=False)
            self.register_buffer("cache_v", torch.empty(shape), persistent=False)

    def forward(
        self,
        x: Tensor,
        start_pos: int,
        freq_cis: Tensor,
        mask: Tensor | None,
        kv_cache: bool = True,
    ) -> Tensor:
        """Attend.

        Args:
            x: [B, T, d_model].
            start_pos: position of the first token.
            freq_cis: complex64 [T, D / 2], the rows of these tokens.
            mask: broadcasts to [B, H, T, S]: bool, True where a key may be seen, or float, added
                to the scores. None hides nothing: a prompt needs a causal mask.
            kv_cache: whether to attend over the tokens of earlier calls too. Where gradients are
                recorded, or the configuration has no cache, only `start_pos` 0 is possible.
        Returns: [B, T, d_model].
        Raises:
            ConfigError: `start_pos` above 0 without a cache to read, or with gradients.
            PromptError: the tokens do not follow those in the cache.
            CacheFull: more sequences or positions than the cache has room for.
        """
        num_sequences, num_tokens, _ = x.shape
        shape = (num_sequences, num_tokens, -1, self.head_dim)
        query, keys = apply_rope(self.Wq(x).view(shape), self.Wk(x).view(shape), freq_cis)
        values = self.Wv(x).view(shape)
        if kv_cache and self.config.kv_cache and not torch.is_grad_enabled():
            keys, values = self._extend(start_pos, keys, values)
        elif start_pos:
            raise ConfigError(
                f"start_pos {start_pos} without a cache: it is off, or gradients are on, and what "
                "it holds has no history. Pass all tokens from 0, or use torch.inference_mode()"
            )
        output = scaled_dot_product_attention(
            query.transpose(1, 2),
            repeat_kv(keys, self.n_rep).transpose(1, 2),
            repeat_kv(values, self.n_rep).transpose(1, 2),
            attn_mask=mask.type_as(query)
            if mask is not None and mask.is_floating_point()
            else mask,
        )
        return self.Wo(output.transpose(1, 2).reshape(x.shape))

    def _extend(self, start_pos: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write new tokens; returns all up to them, as [B, S, K, D]."""
        num_sequences, num_tokens = keys.shape[:2]
        end = start_pos + num_tokens
        if num_sequences > self.cache_k.shape[0] or end > self.cache_k.shape[1]:
            raise CacheFull(
                f"{num_sequences} sequences of {end:,} positions; the cache has room for "
                f"{self.cache_k.shape[0]} of {self.cache_k.shape[1]:,}. Raise max_batch_size or "
                "max_seq_len"
            )
        held, length = (num_sequences, 0) if start_pos == 0 else self._cached
        if num_sequences != held or start_pos > length:
            raise PromptError(
                f"{num_sequences} sequences from position {start_pos}: the cache holds {held} of "
                f"{length:,} positions, and new tokens must follow. Begin with start_pos 0"
            )
        self._cached = (num_sequences, end)
        self.cache_k[:num_sequences, start_pos:end] = keys
        self.cache_v[:num_sequences, start_pos:end] = values
        found = (cache[:num_sequences, :end] for cache in (self.cache_k, self.cache_v))
        keys, values = (part.type_as(keys) for part in found)
        return keys, values


class FeedForward(nn.Module):
    """A gated network: w2(silu(w1 x) * w3 x), without biases.

    Attributes:
        w1: gets the activation.
        w2: back to `d_model`.
        w3: gates.
    """

    def __init__(
        self,
        d_model: int,
        hidden_dim: int,
        multiple_of: int,
        ffn_dim_multiplier: float | None = None,
        use_parallel: bool = True,
    ) -> None:
        """Make random weights of `ffn_width`.

        Args:
            use_parallel: without effect here: a plan shares a model out over devices.
        """
        super().__init__()
        width = ffn_width(hidden_dim, multiple_of, ffn_dim_multiplier)
        self.w1 = nn.Linear(d_model, width, bias=False)
        self.w2 = nn.Linear(width, d_model, bias=False)
        self.w3 = nn.Linear(d_model, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, d_model] to [B, T, d_model]."""
        return self.w2(silu(self.w1(x)) * self.w3(x))


class TransformerBlock(nn.Module):
    """Attention and feed-forward, each behind a norm and with a residual.

    Attributes:
        attention, ffn, attention_norm, ffn_norm: the four modules.
    """

    def __init__(self, layer_id: int, config: TlamaConfig) -> None:
        """Make random weights."""
        super().__init__()
        self.layer_id = layer_id
        self.attention = Attention(config)
        self.ffn = FeedForward(
            config.d_model,
            4 * config.d_model,
            config.multiple_of,
            config.ffn_dim_multiplier,
            config.use_parallel,
        )
        self.attention_norm = RMSNorm(config.d_model, config.norm_eps)
        self.ffn_norm = RMSNorm(config.d_model, config.norm_eps)

    def forward(self, x: Tensor, start_pos: int, freq_cis: Tensor, mask: Tensor | None) -> Tensor:
        """[B, T, d_model] to [B, T, d_model]; arguments and errors as `Attention.forward`."""
        h = x + self.attention(self.attention_norm(x), start_pos, freq_cis, mask)
        return h + self.ffn(self.ffn_norm(h))
