"""Every layer name of the tlama document, beside torch's own modules and complex numbers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from engine.errors import CacheFull, ConfigError, EngineError, PromptError
from engine.seed_api import (
    Attention,
    FeedForward,
    RMSNorm,
    TlamaConfig,
    TransformerBlock,
    apply_rope,
    compute_freqs_cis,
    repeat_kv,
    reshape_for_broadcast,
)

# Float32 of order one, another order of additions.
TOLERANCE = 1e-5
CONFIG = TlamaConfig(
    vocab_size=99,
    d_model=60,
    n_layers=3,
    n_heads=6,
    n_kv_heads=2,
    multiple_of=25,
    max_batch_size=3,
    max_seq_len=40,
    kv_cache=True,
)


def assert_close(found: Tensor, expected: Tensor) -> None:
    """Compare, and say how far off the worst is."""
    assert found.shape == expected.shape and found.dtype == expected.dtype
    difference = (found - expected).abs().max().item()
    assert difference <= TOLERANCE * max(1.0, expected.abs().max().item()), difference


def causal(num_queries: int, num_keys: int) -> Tensor:
    """True where a key is no later than the query; the queries are the last."""
    return torch.ones(num_queries, num_keys, dtype=torch.bool).tril(num_keys - num_queries)


def test_rms_norm_is_that_of_torch() -> None:
    norm = RMSNorm(dim=37, eps=1e-3)
    oracle = nn.RMSNorm(37, eps=1e-3)
    assert norm.eps == 1e-3 and RMSNorm(37).eps == 1e-6
    with torch.no_grad():
        norm.weight.normal_()
        oracle.weight.copy_(norm.weight)
    x = torch.randn(3, 5, 37)
    assert_close(norm(x), oracle(x))
    assert_close(
        norm._norm(x).square().mean(-1), torch.ones(3, 5) - 1e-3 / (x.square().mean(-1) + 1e-3)
    )
    half = norm(x.bfloat16())
    # Normalised in float32: only the rounding of the values and of the result are left.
    assert (
        half.float() - oracle(x.bfloat16().float())
    ).abs().max() < 0.02 * norm.weight.abs().max()


def test_rotations_are_powers_of_one_complex_number() -> None:
    table = compute_freqs_cis(dim=20, end=33, theta=500.0)
    assert table.shape == (33, 10) and table.dtype == torch.complex64
    first = torch.polar(torch.ones(10).double(), 500.0 ** (-torch.arange(0, 20, 2).double() / 20))
    for position in range(33):
        assert (table[position] - first**position).abs().max() < 1e-5
    assert torch.equal(compute_freqs_cis(8, 4), compute_freqs_cis(8, 4, theta=10000.0))


def test_rope_multiplies_pairs_as_complex_numbers() -> None:
    xq, xk = torch.randn(2, 9, 6, 20), torch.randn(2, 9, 3, 20)
    freqs_cis = compute_freqs_cis(20, 64)[30:39]
    for found, x in zip(apply_rope(xq, xk, freqs_cis), (xq, xk), strict=True):
        pairs = torch.view_as_complex(x.unflatten(-1, (10, 2)))
        turned = pairs * freqs_cis[None, :, None, :]
        assert_close(found, torch.view_as_real(turned).flatten(-2))
    assert apply_rope(xq.bfloat16(), xk, freqs_cis)[0].dtype == torch.bfloat16


def test_rotations_get_the_dimensions_of_what_they_turn() -> None:
    table = compute_freqs_cis(20, 9)
    x = torch.randn(2, 9, 6, 20)
    assert torch.equal(reshape_for_broadcast(table, x), table[None, :, None, :])
    pairs = torch.view_as_complex(x.unflatten(-1, (10, 2)))
    assert reshape_for_broadcast(table, pairs).shape == (1, 9, 1, 10)
    assert reshape_for_broadcast(table, x[:, :, 0]).shape == (1, 9, 10)


def test_repeated_heads_stand_side_by_side() -> None:
    kv = torch.randn(2, 7, 3, 20)
    found = repeat_kv(kv, n_rep=4)
    assert found.shape == (2, 7, 12, 20)
    for head in range(12):
        assert torch.equal(found[:, :, head], kv[:, :, head // 4])
    assert torch.equal(repeat_kv(kv, 1), kv)


def oracle_attention(module: Attention, x: Tensor, freq_cis: Tensor, mask: Tensor | None) -> Tensor:
    """By hand, head by head, with complex rotations and an explicit softmax."""
    groups = module.n_local_heads // module.n_kv_heads
    query, key, value = (
        (x @ w.weight.T).unflatten(-1, (-1, module.head_dim))
        for w in (module.Wq, module.Wk, module.Wv)
    )

    def turn(h: Tensor) -> Tensor:
        pairs = torch.view_as_complex(h.unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * freq_cis[None, :, None]).flatten(-2)

    query, key = turn(query), turn(key)
    heads: list[Tensor] = []
    for head in range(module.n_local_heads):
        keys, values = key[:, :, head // groups], value[:, :, head // groups]
        scores = query[:, :, head] @ keys.transpose(1, 2) / module.head_dim**0.5
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf)
        heads.append(torch.softmax(scores, dim=-1) @ values)
    return torch.cat(heads, dim=-1) @ module.Wo.weight.T


def test_attention_has_its_documented_parts() -> None:
    """Bug of the original: K and V projections were as wide as those of all query heads."""
    attention = Attention(CONFIG)
    assert (attention.n_kv_heads, attention.n_local_kv_heads, attention.n_local_heads) == (2, 2, 6)
    assert (attention.n_rep, attention.head_dim) == (3, 10)
    assert attention.Wq.weight.shape == attention.Wo.weight.shape == (60, 60)
    assert attention.Wk.weight.shape == attention.Wv.weight.shape == (20, 60)
    assert attention.cache_k.shape == attention.cache_v.shape == (3, 40, 2, 10)
    assert not hasattr(Attention(TlamaConfig(d_model=48, n_heads=6)), "cache_k")
    # The cache is no weight.
    assert set(attention.state_dict()) == {f"W{name}.weight" for name in "qkvo"}


@pytest.mark.parametrize("kv_heads", [1, 2, 6])
@pytest.mark.parametrize("kv_cache", [True, False])
def test_attention_equals_a_softmax_by_hand(kv_heads: int, kv_cache: bool) -> None:
    """Bug of the original: without the cache KV heads were not repeated."""
    config = TlamaConfig(d_model=60, n_heads=6, n_kv_heads=kv_heads, max_seq_len=40, kv_cache=True)
    attention = Attention(config)
    x = torch.randn(2, 9, 60)
    freq_cis = compute_freqs_cis(10, 9)
    with torch.no_grad():
        for mask in (None, causal(9, 9)):
            expected = oracle_attention(attention, x, freq_cis, mask)
            assert_close(attention(x, 0, freq_cis, mask, kv_cache=kv_cache), expected)
        added = torch.zeros(9, 9).masked_fill(~causal(9, 9), -torch.inf)
        assert_close(attention(x, 0, freq_cis, added, kv_cache), expected)


def test_attention_over_the_cache_equals_the_whole_pass() -> None:
    """Bug of the original: the block never let attention use its cache."""
    attention = Attention(CONFIG)
    x = torch.randn(2, 20, 60)
    freq_cis = compute_freqs_cis(10, 40)
    expected = oracle_attention(attention, x, freq_cis[:20], causal(20, 20))
    with torch.inference_mode():
        found: list[Tensor] = []
        for start, end in ((0, 7), (7, 8), (8, 17), (17, 20)):
            mask = causal(end - start, end) if end - start > 1 else None
            found.append(attention(x[:, start:end], start, freq_cis[start:end], mask))
    assert_close(torch.cat(found, dim=1), expected)


def test_every_projection_learns() -> None:
    """Bug of an original: K and V went through the cache with detach, and got no gradient."""
    attention = Attention(CONFIG)
    attention(
        torch.randn(2, 9, 60), 0, compute_freqs_cis(10, 9), causal(9, 9)
    ).square().sum().backward()
    for name, parameter in attention.named_parameters():
        assert parameter.grad is not None and bool(parameter.grad.any()), name


@pytest.mark.parametrize(
    ("d_model", "hidden_dim", "multiple_of", "multiplier", "width"),
    [
        (48, 4 * 4096, 1024, 1.3, 14336),  # Llama 3 8B
        (48, 4 * 8192, 4096, 1.3, 28672),  # Llama 3 70B
        (48, 4 * 4096, 256, None, 11008),  # Llama 2 7B
        (64, 256, 256, 1.0, 256),
    ],
)
def test_the_feed_forward_width_is_that_of_published_models(
    d_model: int, hidden_dim: int, multiple_of: int, multiplier: float | None, width: int
) -> None:
    """Bug of the original: the multiplier took the place of the 2/3, and gave 21504 for 14336."""
    module = FeedForward(d_model, hidden_dim, multiple_of, multiplier, use_parallel=False)
    assert module.w1.weight.shape == module.w3.weight.shape == (width, d_model)
    assert module.w2.weight.shape == (d_model, width)


def test_feed_forward_gates_as_torch_does_by_hand() -> None:
    """Bug of the original: its default, use_parallel, was a NameError."""
    module = FeedForward(d_model=48, hidden_dim=113, multiple_of=25, ffn_dim_multiplier=1.0)
    x = torch.randn(2, 5, 48)
    gate = x @ module.w1.weight.T
    expected = (gate / (1 + torch.exp(-gate)) * (x @ module.w3.weight.T)) @ module.w2.weight.T
    assert_close(module(x), expected)
    assert module.w1.weight.shape[0] == 75


def test_a_block_is_two_residuals_behind_norms() -> None:
    block = TransformerBlock(layer_id=1, config=CONFIG)
    assert block.layer_id == 1
    with torch.no_grad():
        block.attention_norm.weight.normal_()
        block.ffn_norm.weight.normal_()
    x, freq_cis = torch.randn(2, 9, 60), compute_freqs_cis(10, 9)
    normed = nn.functional.rms_norm(x, (60,), block.attention_norm.weight, CONFIG.norm_eps)
    h = x + oracle_attention(block.attention, normed, freq_cis, causal(9, 9))
    normed = nn.functional.rms_norm(h, (60,), block.ffn_norm.weight, CONFIG.norm_eps)
    assert_close(block(x, 0, freq_cis, causal(9, 9)), h + block.ffn(normed))
    with torch.inference_mode():
        block(x[:, :8], 0, freq_cis[:8], causal(8, 8))
        last = block(x[:, 8:], 8, freq_cis[8:], None)
    assert_close(last, block(x, 0, freq_cis, causal(9, 9))[:, 8:].detach())


X = torch.zeros(2, 5, 60)
ROWS = compute_freqs_cis(10, 5)


def _at(start: int, batch: int = 2) -> None:
    with torch.no_grad():
        Attention(CONFIG)(X.repeat(2, 1, 1)[:batch], start, ROWS, None)


REFUSED = {
    "with gradients": (lambda: Attention(CONFIG)(X, 3, ROWS, None), ConfigError, "no history"),
    "a gap": (lambda: _at(3), PromptError, "the cache holds 0 of 0 positions"),
    "too far": (lambda: _at(36), CacheFull, "2 sequences of 41 positions"),
    "too many": (lambda: _at(0, 4), CacheFull, "has room for 3 of 40"),
    "rows": (lambda: apply_rope(X[..., None, :], X[..., None, :], ROWS[:, :4]), PromptError, "rotations"),
    "short rows": (lambda: Attention(CONFIG)(X, 0, ROWS[:4], None), PromptError, "Cut the table"),
    "odd width": (lambda: compute_freqs_cis(7, 3), ConfigError, "dim must be even"),
    "repeats": (lambda: repeat_kv(torch.ones(1, 2, 3, 4), 0), PromptError, "a number above 0"),
    "heads": (lambda: TlamaConfig(d_model=50, n_heads=6), ConfigError, "d_model 50 is not"),
    "kv heads": (lambda: TlamaConfig(n_heads=16, n_kv_heads=3), ConfigError, "num_kv_heads 3"),
    "spread": (lambda: TlamaConfig(weight_init=[-0.02, 0.0]), ConfigError, "weight_init"),
    "width": (lambda: FeedForward(8, 8, 0), ConfigError, "multiple_of 0 is not above 0"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_computed_is_refused_in_one_line(name: str) -> None:
    call, error, text = REFUSED[name]
    with pytest.raises(error, match=text) as found:
        call()
    assert isinstance(found.value, EngineError) and "\n" not in str(found.value)
