"""Every name of the advanced transformer document, beside transformers and our own model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from torch import Tensor

import engine.model.transformer
from engine.errors import CacheFull, CheckpointError, ConfigError, EngineError, PromptError
from engine.seed_api import (
    LLM,
    MaskedEmbedding,
    ModelArgs,
    MoEArgs,
    TransformerInput,
    TransformerOutput,
    VisionArgs,
)
from engine.seed_api.llm_names import FUSED, RENAMED, STACKED, printable_table
from tests.tiny_families import save_tiny

# Float32 of order one, another order of additions.
TOLERANCE = 1e-5
CHUNK = 12
DENSE = ModelArgs(
    dim=48, n_layers=4, n_heads=6, n_kv_heads=2, head_dim=20, vocab_size=99, multiple_of=25,
    max_seq_len=64, rope_theta=10000.0,
)  # fmt: skip
# Widths, intervals and constants of `tiny_families`' Llama 4.
LLAMA4 = msgspec.structs.replace(
    DENSE,
    multiple_of=37,
    ffn_exp=75 / 48,
    ffn_dim_multiplier=0.5,
    nope_layer_interval=3,
    use_qk_norm=True,
    attention_chunk_size=CHUNK,
    attn_temperature_tuning=True,
    floor_scale=7,
    attn_scale=0.3,
    moe_args=MoEArgs(num_experts=5, top_k=1, interleave_moe_layer_step=2),
)
VISION = msgspec.structs.replace(
    DENSE,
    vision_args=VisionArgs(
        image_size=28, patch_size=7, dim=24, n_layers=2, n_heads=3, output_dim=33, adapter_dim=31
    ),
)
ALL_ARGS = {"dense": DENSE, "Llama 4": LLAMA4, "images": VISION}


def fresh(args: ModelArgs) -> LLM:
    """A model whose every value is random."""
    torch.manual_seed(4)
    model = LLM(args)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def tokens_of(length: int = 41) -> Tensor:
    return torch.randint(3, 89, (2, length), generator=torch.Generator().manual_seed(3))


def assert_close(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape
    difference = (found - expected).abs().max().item()
    assert difference <= TOLERANCE * max(1.0, expected.abs().max().item()), difference


def from_transformers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A saved Llama 4 of transformers under the names of the document."""
    found: dict[str, Tensor] = {}
    names = {
        "model.embed_tokens": "tok_embeddings", "model.norm": "norm", "lm_head": "output",
        "input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm",
        "self_attn.q_proj": "attention.wq", "self_attn.k_proj": "attention.wk",
        "self_attn.v_proj": "attention.wv", "self_attn.o_proj": "attention.wo",
        "shared_expert.gate_proj": "shared_expert.w1", "shared_expert.up_proj": "shared_expert.w3",
        "shared_expert.down_proj": "shared_expert.w2", "feed_forward.gate_proj": "feed_forward.w1",
        "feed_forward.up_proj": "feed_forward.w3", "feed_forward.down_proj": "feed_forward.w2",
        "experts.down_proj": "experts.w2", "model.layers": "layers",
    }  # fmt: skip
    for name, value in state.items():
        if name.endswith("router.weight"):
            found[name.removeprefix("model.").replace("router.weight", "router_DE")] = value.T
            continue
        if name.endswith("gate_up_proj"):
            prefix = name.removeprefix("model.").removesuffix("gate_up_proj")
            found[prefix + "w1"], found[prefix + "w3"] = value.chunk(2, dim=-1)
            continue
        for old, new in names.items():
            name = name.replace(old, new)
        found[name] = value
    return found


def test_llama4_equals_transformers_with_gradients(tmp_path: Path) -> None:
    """Bugs of originals: masks of local layers had the prompt's size; experts, K and V were
    detached; every expert computed every token."""
    oracle: Any = save_tiny("llama4", tmp_path)
    model = LLM(LLAMA4)
    model.load_state_dict(from_transformers(oracle.state_dict()))
    tokens = tokens_of()
    targets = torch.randint(3, 89, tokens.shape, generator=torch.Generator().manual_seed(9))
    expected = oracle(tokens).logits
    output = model(TransformerInput(tokens=tokens, tokens_position=torch.arange(41)))
    assert isinstance(output, TransformerOutput)
    assert output.logits.dtype == torch.float32
    assert_close(output.logits, expected)
    for logits in (output.logits, expected):
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
    assert model.tok_embeddings.weight.grad is not None
    assert_close(model.tok_embeddings.weight.grad, oracle.get_input_embeddings().weight.grad)


def test_in_pieces_over_the_cache_it_equals_transformers(tmp_path: Path) -> None:
    """Bug of the original: at decode local layers saw the whole cache, past their chunk."""
    oracle: Any = save_tiny("llama4", tmp_path)
    model = LLM(LLAMA4).eval()
    model.load_state_dict(from_transformers(oracle.state_dict()))
    tokens = tokens_of()
    pieces: list[Tensor] = []
    with torch.inference_mode():
        expected = oracle(tokens).logits
        for a, b in ((0, 9), (9, 14), (14, 15), (15, 30), *((n, n + 1) for n in range(30, 41))):
            positions = torch.arange(a, b)
            pieces.append(model(TransformerInput(tokens[:, a:b], positions)).logits)
    assert_close(torch.cat(pieces, dim=1), expected)


def test_the_chunk_matters_at_decode() -> None:
    """Without its chunk a local layer gives other logits: the test above can fail."""
    model = fresh(LLAMA4)
    wide = fresh(msgspec.structs.replace(LLAMA4, attention_chunk_size=None))
    wide.load_state_dict(model.state_dict())
    tokens = tokens_of()
    found = [m(TransformerInput(tokens)).logits for m in (model, wide)]
    assert_close(found[0][:, :CHUNK], found[1][:, :CHUNK])
    assert (found[0] - found[1])[:, CHUNK:].abs().max() > 1e-2


@pytest.mark.parametrize("name", ["dense", "Llama 4"])
def test_it_equals_our_own_model_with_the_same_weights(name: str) -> None:
    model = fresh(ALL_ARGS[name])
    twin = engine.model.transformer.Transformer(model.config)
    state = dict[str, Tensor]()
    for key, value in model.state_dict().items():
        key = key.removesuffix(".weight").replace("attention.w", "")
        key = key.replace("ffn_norm", "mlp_norm").replace("tok_embeddings", "embedding")
        key = {"norm": "final_norm", "output": "head"}.get(key, key)
        prefix, _, rest = key.partition("feed_forward.")
        for old, new in {"w1": "gate", "w2": "down", "w3": "up"}.items():
            rest = rest.replace("shared_expert." + old, "shared." + new)
            if rest == old:
                rest = new
        if rest == "router_DE":
            rest, value = "router", value.T
        if rest.startswith("experts."):
            new = {"w1": "gate", "w2": "down", "w3": "up"}[rest[-2:]]
            state |= {f"{prefix}experts.{e}.{new}": v.T for e, v in enumerate(value)}
        else:
            state[prefix + rest] = value
    twin.load_state_dict(state, strict=True)
    tokens = tokens_of()
    assert_close(model(TransformerInput(tokens)).logits, twin(tokens)[0])


def test_it_has_its_documented_parts() -> None:
    model = LLM(VISION)
    assert model.tok_embeddings.weight.shape == model.output.weight.shape == (99, 48)
    assert len(model.layers) == 4 and model.norm.weight.shape == (48,)
    assert model.freqs_cis.shape == (128, 10) and model.freqs_cis.is_complex()
    assert (model.freqs_cis[7, 0] - torch.polar(torch.tensor(1.0), torch.tensor(7.0))).abs() < 1e-6
    assert model.vision_projection.weight.shape == (48, 33)
    assert model.vision_embeddings(torch.zeros(3, 3, 28, 28)).shape == (3, 4, 33)
    block = model.layers[0]
    assert {name for name, _ in block.named_children()} == {
        "attention_norm", "attention", "ffn_norm", "feed_forward",
    }  # fmt: skip
    assert not hasattr(LLM(DENSE), "vision_embeddings")


@pytest.mark.parametrize("size", [1, 2, 3])
def test_any_number_of_sequences_is_computed_as_each_alone(size: int) -> None:
    """Bug of the original: the stream was unpacked along the batch, which only two survive."""
    model = fresh(LLAMA4)
    tokens = tokens_of().repeat(2, 1)[:size].roll(1, dims=1)
    with torch.no_grad():
        together = model(TransformerInput(tokens)).logits
        alone = [model(TransformerInput(row[None])).logits for row in tokens]
    assert_close(together, torch.cat(alone))


def with_images(model: LLM, tokens: Tensor) -> TransformerInput:
    tiles = torch.rand(2, 3, 28, 28, generator=torch.Generator().manual_seed(7)) * 2 - 1
    mask = torch.zeros_like(tokens, dtype=torch.bool)
    mask[:, 3:7] = True
    features = model.vision_embeddings(tiles).flatten(0, 1)
    return TransformerInput(tokens, torch.arange(tokens.shape[1]), MaskedEmbedding(features, mask))


@pytest.mark.parametrize("name", ALL_ARGS)
def test_every_parameter_receives_a_gradient(name: str) -> None:
    """Bugs of the original: K, V, router and all below the routed path got none."""
    model = fresh(ALL_ARGS[name])
    tokens = tokens_of()
    batch = with_images(model, tokens) if name == "images" else TransformerInput(tokens)
    logits = model(batch).logits
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten()).backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None and bool(parameter.grad.any()), key


def test_features_take_the_place_of_masked_tokens() -> None:
    model = fresh(VISION)
    tokens = tokens_of()
    other = tokens.clone()
    other[:, 3:7] = 17
    first, second = (model(with_images(model, ids)).logits for ids in (tokens, other))
    assert torch.equal(first, second)
    assert (first - model(TransformerInput(tokens)).logits)[:, 3:].abs().max() > 1e-2
    assert_close(first[:, :3], model(TransformerInput(tokens)).logits[:, :3])


def old_form(model: LLM) -> dict[str, Tensor]:
    """The state under every old and fused name there is."""
    state = dict(model.state_dict())
    for number, block in enumerate(model.layers):
        p = f"layers.{number}."
        state[p + "attention.wqkv.weight"] = torch.cat(
            [state.pop(f"{p}attention.w{name}.weight") for name in "qkv"]
        )
        state[p + "attention.wqkv.layer_norm_weight"] = state.pop(p + "attention_norm.weight")
        state[p + "feed_forward.mlp.layer_norm_weight"] = state.pop(p + "ffn_norm.weight")
        f = p + "feed_forward."
        if hasattr(block.feed_forward, "experts"):
            for new, old in (("w1", "in"), ("w2", "out"), ("w3", "swiglu")):
                letters = "eF_D" if new == "w2" else "eD_F"
                stacked = state.pop(f"{f}experts.{new}").flatten(0, 1)
                state[f"{f}experts.moe_w_{old}_{letters}"] = stacked
            state[f + "w_in_shared_FD.weight"] = state.pop(f + "shared_expert.w1.weight")
            state[f + "w_out_shared_DF.weight"] = state.pop(f + "shared_expert.w2.weight")
            state[f + "w_swiglu_FD.weight"] = state.pop(f + "shared_expert.w3.weight")
        elif number % 2:
            for new, old in (("w1", "gate"), ("w2", "out"), ("w3", "value")):
                state[f"{f}w_{old}.weight"] = state.pop(f"{f}{new}.weight")
        else:
            rows = [state.pop(f"{f}{name}.weight") for name in ("w1", "w3")]
            state[f + "mlp.fc1_weight"] = torch.cat(rows)
            state[f + "mlp.fc2_weight"] = state.pop(f + "w2.weight")
        state[p + "attention.wqkv._extra_state"] = torch.zeros(1)
    state["lm_head.weight"] = state.pop("output.weight")
    state["rope.freqs"] = torch.zeros(5)
    return state


@pytest.mark.parametrize("name", ["dense", "Llama 4"])
def test_old_and_fused_names_load_strictly(name: str) -> None:
    model, other = fresh(ALL_ARGS[name]), LLM(ALL_ARGS[name])
    other.load_state_dict(old_form(model), strict=True)
    for key, value in model.state_dict().items():
        assert torch.equal(other.state_dict()[key], value), key


def test_older_names_of_norms_load_too() -> None:
    model, other = fresh(DENSE), LLM(DENSE)
    state = dict(model.state_dict())
    for number in range(4):
        p = f"layers.{number}."
        state[p + "attention.norm.weight"] = state.pop(p + "attention_norm.weight")
        state[p + "feed_forward.norm.weight"] = state.pop(p + "ffn_norm.weight")
    other.load_state_dict(state)
    assert torch.equal(other.layers[2].ffn_norm.weight, model.layers[2].ffn_norm.weight)


def test_every_name_of_the_table_is_used_by_these_tests() -> None:
    used = {*old_form(fresh(DENSE)), *old_form(fresh(LLAMA4))}
    used |= {"layers.0.attention.norm.weight", "layers.0.feed_forward.norm.weight"}
    ends = {
        key.partition(".")[2].partition(".")[2] if key.startswith("layers") else key for key in used
    }
    for old, _ in (*RENAMED, *FUSED, *STACKED):
        assert old.removeprefix("*") in ends
        assert old in printable_table()


def _state(**changes: Tensor | None) -> dict[str, Tensor]:
    state: dict[str, Any] = {**LLM(DENSE).state_dict(), **changes}
    return {name: value for name, value in state.items() if value is not None}


BAD_STATES = {
    "left over": (lambda: _state(stray=torch.ones(1)), "left over: stray"),
    "missing": (lambda: _state(**{"norm.weight": None}), "missing: norm.weight"),
    "shape": (lambda: _state(**{"norm.weight": torch.ones(3)}), r"norm.weight \[3\], expected \[48\]"),
    "fused": (
        lambda: _state(**{"layers.0.attention.wqkv.weight": torch.ones(7, 48)}),
        r"wqkv.weight \[7, 48\] cannot be cut into 120 \+ 40 \+ 40 rows",
    ),
    "twice": (lambda: _state(**{"lm_head.weight": torch.ones(99, 48)}), "output.weight is in the"),
    "experts": (
        lambda: _state(**{"layers.0.feed_forward.experts.moe_w_in_eD_F": torch.ones(9, 4)}),
        "cannot be cut into 0 experts",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_STATES)
def test_a_checkpoint_that_does_not_fit_is_refused_in_one_line(name: str) -> None:
    make, text = BAD_STATES[name]
    model = LLM(DENSE)
    before = model.norm.weight.clone()
    with pytest.raises(CheckpointError, match=text) as found:
        model.load_state_dict(make())
    assert "\n" not in str(found.value)
    assert torch.equal(model.norm.weight, before)


def test_arguments_come_from_a_params_file() -> None:
    args = ModelArgs.from_dict({"dim": 48, "n_heads": 6, "moe_args": {"num_experts": 5}})
    assert args.moe_args == MoEArgs(num_experts=5)
    assert args.model_config().layers[0].has_experts
    for fields, text in (
        ({"n_head": 3}, "unknown field `n_head`"),
        ({"moe_args": {"num_experts": 2, "topk": 1}}, "unknown field `topk`"),
        ({"dim": "wide"}, "Expected `int`"),
    ):
        with pytest.raises(ConfigError, match=text) as found:
            ModelArgs.from_dict(fields)
        assert "\n" not in str(found.value)
    with pytest.raises(TypeError):
        ModelArgs(n_head=3)  # type: ignore[call-arg]


def test_widths_follow_the_published_rule() -> None:
    """Bug of an original: the multiplier replaced the 2/3."""
    args = ModelArgs(dim=4096, n_heads=32, multiple_of=1024, ffn_dim_multiplier=1.3)
    assert args.model_config().layers[0].mlp_width == 14336
    # Llama 4 Scout: 8192 for each of 16 experts, one of them chosen, beside the shared one.
    scout = ModelArgs(
        dim=5120, n_layers=4, n_heads=40, n_kv_heads=8, multiple_of=2048, ffn_dim_multiplier=1.2,
        moe_args=MoEArgs(num_experts=16), use_scaled_rope=True, rope_scaling_factor=16,
        rope_high_freq_factor=1, nope_layer_interval=4, attention_chunk_size=8192,
    ).model_config()  # fmt: skip
    assert [layer.mlp_width for layer in scout.layers] == [8192] * 4
    assert [layer.rope for layer in scout.layers] == [0, 0, 0, -1]
    assert [layer.reach for layer in scout.layers] == ["chunked"] * 3 + ["full"]
    assert (scout.ropes[0].kind, scout.ropes[0].factor, scout.ropes[0].high_factor) == (
        "llama3",
        16,
        1,
    )


TOKENS = tokens_of(5)
REFUSED = {
    "batch": (lambda: LLM(msgspec.structs.replace(DENSE, batch_size=1)), TransformerInput(TOKENS), PromptError, "batch_size is 1"),
    "positions": (lambda: LLM(DENSE), TransformerInput(TOKENS, torch.tensor([0, 1, 2, 4, 5])), PromptError, "ascend by one"),
    "gradients": (lambda: LLM(DENSE), TransformerInput(TOKENS, 3), ConfigError, "gradients on"),
    "context": (lambda: LLM(DENSE), TransformerInput(TOKENS.repeat(1, 13)), CacheFull, "need 65 positions"),
    "no encoder": (lambda: LLM(DENSE), TransformerInput(TOKENS, 0, MaskedEmbedding(torch.ones(1, 33), TOKENS == 0)), PromptError, "without vision_args"),
    "mask": (lambda: LLM(VISION), TransformerInput(TOKENS, 0, MaskedEmbedding(torch.ones(1, 33), TOKENS)), PromptError, "the image mask is torch.int64"),
    "features": (lambda: LLM(VISION), TransformerInput(TOKENS, 0, MaskedEmbedding(torch.ones(7, 33), TOKENS > 0)), PromptError, "for 10 places"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_computed_is_refused_in_one_line(name: str) -> None:
    """Bug of the original: an image that did not fit was dropped with a warning."""
    make, batch, error, text = REFUSED[name]
    with pytest.raises(error, match=text) as found:
        make()(batch)
    assert isinstance(found.value, EngineError) and "\n" not in str(found.value)
