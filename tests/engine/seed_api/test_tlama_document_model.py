"""The transformer of the tlama document, beside transformers and this engine's own model."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import engine.model.transformer
from engine.errors import CacheFull, ConfigError, PromptError
from engine.seed_api import RMSNorm, TlamaConfig, Transformer, TransformerBlock, compute_freqs_cis

# Float32 of order one, another order of additions.
TOLERANCE = 1e-5
CONFIG = TlamaConfig(
    vocab_size=99,
    d_model=60,
    n_layers=3,
    n_heads=6,
    n_kv_heads=2,
    multiple_of=25,
    ffn_dim_multiplier=0.7,
    max_batch_size=3,
    max_seq_len=40,
    norm_eps=1e-5,
    rope_theta=5000.0,
    weight_init=[0.1, 0.0],
    use_parallel=False,
    kv_cache=True,
)


def fresh() -> Transformer:
    """A model whose norms are random too."""
    torch.manual_seed(6)
    model = Transformer(CONFIG)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def tokens_of(length: int = 23) -> Tensor:
    return torch.randint(0, 99, (2, length), generator=torch.Generator().manual_seed(1))


def to_halves(weight: Tensor, heads: int) -> Tensor:
    """Rows of a projection whose pairs are (i, i + D/2), as transformers wants them."""
    return weight.view(heads, -1, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def transformers_model(model: Transformer) -> LlamaForCausalLM:
    """The same weights in transformers."""
    config = LlamaConfig(
        vocab_size=99,
        hidden_size=60,
        intermediate_size=CONFIG.hidden_dim,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        rms_norm_eps=1e-5,
        max_position_embeddings=40,
        rope_parameters={"rope_theta": 5000.0, "rope_type": "default"},
        tie_word_embeddings=False,
        attn_implementation="eager",
    )
    oracle = LlamaForCausalLM(config).eval()
    names = {
        "model.embed_tokens.weight": model.token_emb.weight,
        "model.norm.weight": model.norm.weight,
        "lm_head.weight": model.output.weight,
    }
    for number, block in enumerate(model.layers):
        assert isinstance(block, TransformerBlock)
        prefix = f"model.layers.{number}."
        names |= {
            prefix + "input_layernorm.weight": block.attention_norm.weight,
            prefix + "post_attention_layernorm.weight": block.ffn_norm.weight,
            prefix + "self_attn.q_proj.weight": to_halves(block.attention.Wq.weight, 6),
            prefix + "self_attn.k_proj.weight": to_halves(block.attention.Wk.weight, 2),
            prefix + "self_attn.v_proj.weight": block.attention.Wv.weight,
            prefix + "self_attn.o_proj.weight": block.attention.Wo.weight,
            prefix + "mlp.gate_proj.weight": block.ffn.w1.weight,
            prefix + "mlp.up_proj.weight": block.ffn.w3.weight,
            prefix + "mlp.down_proj.weight": block.ffn.w2.weight,
        }
    oracle.load_state_dict({name: value.detach() for name, value in names.items()}, strict=True)
    return oracle


def engine_model(model: Transformer) -> engine.model.transformer.Transformer:
    """The same weights in this engine's own model."""
    twin = engine.model.transformer.Transformer(CONFIG.model_config())
    state = {
        "embedding": model.token_emb.weight,
        "final_norm": model.norm.weight,
        "head": model.output.weight,
    }
    for number, block in enumerate(model.layers):
        assert isinstance(block, TransformerBlock)
        prefix = f"layers.{number}."
        state |= {
            prefix + "attention_norm": block.attention_norm.weight,
            prefix + "mlp_norm": block.ffn_norm.weight,
            prefix + "q": block.attention.Wq.weight,
            prefix + "k": block.attention.Wk.weight,
            prefix + "v": block.attention.Wv.weight,
            prefix + "o": block.attention.Wo.weight,
            prefix + "gate": block.ffn.w1.weight,
            prefix + "up": block.ffn.w3.weight,
            prefix + "down": block.ffn.w2.weight,
        }
    twin.load_state_dict(state, strict=True)
    return twin


def assert_close(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape
    difference = (found - expected).abs().max().item()
    assert difference <= TOLERANCE * max(1.0, expected.abs().max().item()), difference


def test_it_has_its_documented_parts() -> None:
    model = fresh()
    assert isinstance(model.token_emb, torch.nn.Embedding)
    assert model.token_emb.weight.shape == model.output.weight.shape == (99, 60)
    assert len(model.layers) == 3 and all(isinstance(b, TransformerBlock) for b in model.layers)
    assert isinstance(model.norm, RMSNorm)
    assert torch.equal(model.freq_cis, compute_freqs_cis(10, 80, 5000.0))
    logits, loss = model(tokens_of(), 0)
    assert logits.shape == (2, 23, 99) and logits.dtype == torch.float32 and loss is None


def test_logits_loss_and_gradients_equal_transformers_and_our_own_model() -> None:
    model = fresh()
    oracle, twin = transformers_model(model), engine_model(model)
    tokens = tokens_of()
    targets = torch.randint(0, 99, tokens.shape, generator=torch.Generator().manual_seed(2))
    expected = oracle(tokens).logits
    expected_loss = torch.nn.functional.cross_entropy(expected.flatten(0, 1), targets.flatten())
    expected_loss.backward()
    for found in (model, twin):
        logits, loss = found(tokens, 0, targets)
        assert loss is not None
        assert_close(logits, expected)
        assert_close(loss, expected_loss)
        loss.backward()
    assert model.token_emb.weight.grad is not None
    expected_grad = oracle.get_input_embeddings().weight.grad
    assert_close(model.token_emb.weight.grad, expected_grad)
    assert_close(twin.embedding.grad, expected_grad)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and bool(parameter.grad.any()), name


def test_cached_decode_equals_the_whole_pass() -> None:
    """Bug of the original: every block switched the cache off."""
    model = fresh()
    tokens = tokens_of()
    whole, _ = model(tokens, 0)
    with torch.inference_mode():
        pieces = [model(tokens[:, a:b], a)[0] for a, b in ((0, 9), (9, 10), (10, 16), (16, 23))]
    assert_close(torch.cat(pieces, dim=1), whole)


def test_the_initial_weights_spread_as_asked() -> None:
    """Bug of the original: `(2 * n) * -0.5` made the spread negative, and nothing used it."""
    model = Transformer(
        TlamaConfig(vocab_size=999, d_model=240, n_heads=6, n_layers=2, weight_init=[0.05, 0.01])
    )
    for name, parameter in model.named_parameters():
        if "norm" in name:
            assert bool((parameter == 1).all())
            continue
        std = 0.05 / 2 if name.endswith(("Wo.weight", "w2.weight")) else 0.05
        assert parameter.std().item() == pytest.approx(std, rel=0.03), name
        assert parameter.mean().item() == pytest.approx(0.01, abs=0.001), name


def test_init_weights_fills_one_module() -> None:
    model = fresh()
    linear = torch.nn.Linear(200, 300)
    model._init_weights(linear)
    assert linear.weight.std().item() == pytest.approx(0.1, rel=0.05)
    assert not linear.bias.any()


def test_parameters_are_counted_when_they_are_there() -> None:
    """Bug of the original: it counted before it had layers, and said 0."""
    layer = 60 * 60 * 2 + 60 * 20 * 2 + 3 * 60 * CONFIG.hidden_dim + 2 * 60
    assert fresh().count_parameters() == 3 * layer + 2 * 60 * 99 + 60


def test_the_optimizer_lowers_the_loss_and_decays_matrices_alone() -> None:
    model = fresh()
    optimizer = model.configure_optimizers(
        weight_decay=0.1, learning_rate=1e-2, device_type="cuda", master_process=False
    )
    decayed, kept = optimizer.param_groups
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.1, 0.0)
    assert all(p.ndim >= 2 for p in decayed["params"]) and all(p.ndim == 1 for p in kept["params"])
    assert (optimizer.defaults["betas"], optimizer.defaults["eps"]) == ((0.9, 0.95), 1e-8)
    tokens = tokens_of(12)
    first = last = 0.0
    for step in range(30):
        _, loss = model(tokens[:, :-1], start_pos=0, targets=tokens[:, 1:])
        assert loss is not None
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        first, last = (loss.item() if step == 0 else first), loss.item()
    assert first > 4 and last < 0.5


def test_half_precision_keeps_the_rotations() -> None:
    """A complex buffer would lose its imaginary part with a warning, which is an error here."""
    model = fresh()
    tokens = tokens_of()
    expected, _ = model(tokens)
    found, _ = model.bfloat16()(tokens)
    assert found.dtype == torch.float32
    # Three significant digits of bfloat16, through three layers.
    assert (found - expected).abs().max() < 0.05 * expected.abs().max()


def test_what_cannot_be_computed_is_refused_in_one_line() -> None:
    """Bug of an original: tokens beyond the context were cut off, silently."""
    model = fresh()
    with pytest.raises(CacheFull, match="need 41 positions, max_seq_len is 40"):
        model(tokens_of(41), 0)
    with pytest.raises(ConfigError, match="start_pos 5 without a cache"):
        model(tokens_of(), 5)
    with pytest.raises(PromptError, match="vocabulary has 0 to 98"):
        model(torch.full((1, 3), 99), 0)
    with torch.no_grad(), pytest.raises(PromptError, match="new tokens must follow"):
        model(tokens_of(), 5)
    with torch.no_grad(), pytest.raises(CacheFull, match="has room for 3 of 40"):
        model(tokens_of().repeat(2, 1), 0)
