"""The trainable model: gradients reach everything, and they are right."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from engine.errors import CacheFull, ConfigError, PromptError
from engine.kernels.torch_kernels import mlp_part
from engine.model.config import Experts, Layer, ModelConfig
from engine.model.model_presets import PRESETS, default_mlp_width, model_preset
from engine.model.transformer import Transformer
from tests.engine.model.transformer_cases import (
    CONFIGS,
    DENSE,
    SIGMOID,
    SOFTMAX,
    VOCAB,
    batch_of,
    dense_with,
    fresh,
)


@pytest.fixture(params=CONFIGS)
def config(request: pytest.FixtureRequest) -> Iterator[ModelConfig]:
    yield CONFIGS[request.param].validate()


def test_every_parameter_receives_a_gradient(config: ModelConfig) -> None:
    """Bug of an original: K, V and the routed path were detached and never learned."""
    model = fresh(config)
    tokens, targets, images = batch_of(config)
    _, loss = model(tokens, targets=targets, **images)
    assert loss is not None
    loss.backward()
    without = [
        name
        for name, parameter in model.named_parameters()
        if parameter.grad is None or not bool((parameter.grad != 0).any())
    ]
    # An expert that no token visits has nothing to learn; here each has visitors.
    assert without == []


# Central differences of a float32 loss near 5: its rounding of 5e-7 over a step of 1e-3 is 5e-4, and
# the third derivative adds less. A longer step changes which expert a token visits.
STEP = 1e-3
GRADIENT_TOLERANCE = 2e-3


@torch.no_grad()
def loss_at(model: Transformer, shift: dict[str, Tensor], step: float) -> float:
    """The loss with every parameter moved along `shift`; the model is left as it was."""
    tokens, targets, images = batch_of(model.config)
    kept = {name: parameter.clone() for name, parameter in model.named_parameters()}
    for name, parameter in model.named_parameters():
        parameter.add_(shift[name], alpha=step)
    _, loss = model(tokens, targets=targets, **images)
    for name, parameter in model.named_parameters():
        parameter.copy_(kept[name])
    return float(loss)


def test_the_gradient_is_the_slope_of_the_loss(config: ModelConfig) -> None:
    """By finite differences: every parameter moves along its own gradient, up or down by chance."""
    model = fresh(config)
    tokens, targets, images = batch_of(config)
    _, loss = model(tokens, targets=targets, **images)
    loss.backward()
    unit: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        unit[name] = parameter.grad / parameter.grad.norm().clamp(min=1e-12)
    norms = {
        name: float(p.grad.norm()) for name, p in model.named_parameters() if p.grad is not None
    }
    generator = torch.Generator().manual_seed(2)
    differences: list[float] = []
    for _ in range(5):
        signs = (torch.randint(0, 2, (len(unit),), generator=generator) * 2 - 1).tolist()
        scale = len(unit) ** -0.5
        shift = {n: unit[n] * s * scale for n, s in zip(unit, signs, strict=True)}
        slope = sum(norms[n] * s * scale for n, s in zip(unit, signs, strict=True))
        found = (loss_at(model, shift, STEP) - loss_at(model, shift, -STEP)) / (2 * STEP)
        differences.append(abs(found - slope) / max(1.0, abs(slope)))
    # A gradient that was half of what it should be would be found.
    assert max(norms.values()) * len(unit) ** -0.5 > 20 * GRADIENT_TOLERANCE
    assert all(difference <= GRADIENT_TOLERANCE for difference in differences), differences


def moe_output(model: Transformer, x: Tensor, experts: Experts) -> Tensor:
    """What the experts of layer 0 add to x, token by token, by hand."""
    state = model.state_dict()
    norm, router = state["layers.0.mlp_norm"], state["layers.0.router"]
    rows: list[Tensor] = []
    for token in x:
        normed = norm * token / (token.square().mean() + 1e-5).sqrt()
        scores = router @ normed
        if experts.router == "softmax":
            scores = torch.softmax(scores, dim=0)
        total = torch.zeros_like(token)
        chosen = scores.argsort(descending=True)[: experts.used]
        weights = torch.sigmoid(scores[chosen]) if experts.router == "sigmoid" else scores[chosen]
        if experts.is_normalized:
            weights = weights / weights.sum()
        runs = [(f"experts.{e}", w.item()) for e, w in zip(chosen.tolist(), weights, strict=True)]
        for name, weight in [*runs, *([("shared", 1.0)] if experts.has_shared else [])]:
            gate, up, down = (state[f"layers.0.{name}.{part}"] for part in ("gate", "up", "down"))
            seen = normed * weight if experts.weighs == "input" else normed
            output = down @ (torch.nn.functional.silu(gate @ seen) * (up @ seen))
            total += output * weight if experts.weighs == "output" else output
        rows.append(total)
    return torch.stack(rows)


@pytest.mark.parametrize("weighs", ["input", "output"])
@pytest.mark.parametrize("base", [SOFTMAX, SIGMOID])
def test_experts_are_weighed_where_the_configuration_says(base: Experts, weighs: Any) -> None:
    """Bug of an original: weighing the input of a softmax router's expert, where its output is
    meant; inside a gated network that is not the same."""
    experts = msgspec.structs.replace(base, weighs=weighs)
    model = fresh(dense_with(layers=(Layer(mlp_width=37, has_experts=True),), experts=experts))
    x = torch.randn(13, 48)
    with torch.no_grad():
        share = next(iter(model.layers)).shares().mlp
        found = mlp_part(x, share, "prompt", model.config)
        other = msgspec.structs.replace(
            model.config,
            experts=msgspec.structs.replace(
                experts, weighs="input" if weighs == "output" else "output"
            ),
        )
        expected = moe_output(model, x, experts)
        assert (found - expected).abs().max() <= 1e-5 * max(1, expected.abs().max())
        assert (mlp_part(x, share, "prompt", other) - found).abs().max() > 1e-2


def test_an_expert_computes_its_own_tokens_alone() -> None:
    """Bug of an original: every expert processed every token, and most results were dropped."""
    flops: list[int] = []
    for count in (5, 20):
        experts = msgspec.structs.replace(SOFTMAX, count=count)
        model = fresh(dense_with(layers=(Layer(mlp_width=37, has_experts=True),), experts=experts))
        share = next(iter(model.layers)).shares().mlp
        counter = FlopCounterMode(display=False)
        with torch.no_grad(), counter:
            mlp_part(torch.randn(13, 48), share, "prompt", model.config)
        flops.append(counter.get_total_flops())
    router = 2 * 13 * 48
    assert flops[0] == 2 * 13 * SOFTMAX.used * 3 * 37 * 48 + 5 * router
    assert flops[1] - flops[0] == 15 * router


def test_training_in_half_precision_follows_that_in_float32() -> None:
    for name in ("dense", "softmax experts"):
        model = fresh(CONFIGS[name])
        tokens, targets, _ = batch_of(CONFIGS[name])
        exact = model(tokens, targets=targets)[1].item()
        with torch.autocast("cpu", torch.bfloat16):
            logits, loss = model(tokens, targets=targets)
        loss.backward()
        assert logits.dtype == torch.float32
        # Eight bits of mantissa.
        assert loss.item() == pytest.approx(exact, rel=2e-2)
        assert loss.item() != exact
        assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())


@pytest.mark.parametrize("name", ["dense", "softmax experts", "sigmoid experts"])
def test_training_learns_a_repeated_sequence(name: str) -> None:
    config = CONFIGS[name]
    torch.manual_seed(3)
    model = Transformer(config, dropout=0.05)
    optimizer = model.configure_optimizers(0.0, 1e-2, "cpu")
    pattern = torch.randint(0, VOCAB, (1, 11))
    tokens = pattern.repeat(2, 3)
    _, first = model(tokens[:, :-1], targets=tokens[:, 1:])
    assert first.item() == pytest.approx(torch.tensor(float(VOCAB)).log().item(), abs=0.3)
    for _ in range(80):
        _, loss = model(tokens[:, :-1], targets=tokens[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        logits, loss = model(tokens[:, :-1], targets=tokens[:, 1:])
    assert loss.item() < 0.02
    # What was learned is said token by token, over the cache.
    with torch.inference_mode():
        said = pattern.clone()
        logits, _ = model(said)
        while said.shape[1] < 33:
            chosen = logits[:, -1:].argmax(-1)
            said = torch.cat((said, chosen), dim=1)
            logits, _ = model(chosen, start_pos=said.shape[1] - 1)
    assert torch.equal(said, pattern.repeat(1, 3))


def test_dropout_acts_in_training_alone() -> None:
    """Bug of an original: dropout was applied whatever the mode."""
    tokens = batch_of(DENSE)[0]
    model = Transformer(DENSE, dropout=0.5)
    first, second = model(tokens)[0], model(tokens)[0]
    assert not torch.allclose(first, second)
    model.eval()
    plain = Transformer(DENSE)
    plain.load_state_dict(model.state_dict())
    assert torch.equal(model(tokens)[0], model(tokens)[0])
    assert torch.equal(model(tokens)[0], plain(tokens)[0])
    with pytest.raises(ConfigError, match="dropout 1 is not between"):
        Transformer(DENSE, dropout=1)


@pytest.mark.parametrize("name", ["dense", "tied head, adjacent pairs"])
def test_targets_are_compared_as_given_and_minus_100_is_not(name: str) -> None:
    model = fresh(CONFIGS[name])
    tokens, targets, _ = batch_of(CONFIGS[name])
    targets[:, ::3] = -100
    logits, loss = model(tokens, targets=targets)
    rows = torch.log_softmax(logits.double(), dim=-1)
    counted = targets != -100
    expected = -rows[counted].gather(-1, targets[counted][:, None]).mean()
    assert abs((loss - expected).item()) <= 1e-5
    _, nothing = model(tokens, targets=torch.full_like(targets, -100))
    assert nothing.item() == 0.0


def test_the_initial_weights_have_the_stated_spread() -> None:
    """Bug of an original: the spread of output projections came out negative, or was never used."""
    config = dense_with(
        width=240, layers=(Layer(mlp_width=317, has_experts=True),) * 3, experts=SIGMOID
    )
    model = Transformer(config, generator=torch.Generator().manual_seed(4))
    residual = 0.02 / 6**0.5
    for name, value in model.named_parameters():
        if name.endswith("norm"):
            assert bool((value == 1).all()), name
            continue
        expected = residual if name.rpartition(".")[2] in ("o", "down") else 0.02
        # Ten standard errors of the spread of so many numbers.
        assert value.std().item() == pytest.approx(expected, rel=10 / (2 * value.numel()) ** 0.5)
        assert abs(value.mean().item()) <= 10 * expected / value.numel() ** 0.5
    ones = Transformer(CONFIGS["post norms"])
    norms = [p for n, p in ones.named_parameters() if n.endswith("norm")]
    assert len(norms) == 4 * 3 + 1
    assert not any(bool(norm.any()) for norm in norms)


def test_the_optimizer_decays_matrices_alone() -> None:
    model = Transformer(CONFIGS["biases"])
    optimizer = model.configure_optimizers(0.1, 3e-4, "cpu")
    decay = {g["weight_decay"]: g["params"] for g in optimizer.param_groups}
    assert set(decay) == {0.0, 0.1}
    names = {id(p): n for n, p in model.named_parameters()}
    assert {names[id(p)] for p in decay[0.0]} == {
        n for n in names.values() if n.endswith(("norm", "bias"))
    }
    assert len(decay[0.0]) + len(decay[0.1]) == len(names)
    group = optimizer.param_groups[0]
    assert (group["betas"], group["eps"], group["lr"]) == ((0.9, 0.95), 1e-8, 3e-4)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_their_sizes(name: str) -> None:
    config = model_preset(name)
    expected = {
        "tiny": (128, 4, 4, 1, 512),
        "small": (256, 8, 8, 2, 768),
        "medium": (512, 12, 8, 2, 1536),
        "large": (768, 24, 12, 4, 2048),
    }[name]
    found = (config.width, config.num_layers, config.num_heads, config.num_kv_heads)
    assert (*found, config.layers[0].mlp_width) == expected
    assert (config.vocab_size, config.max_positions) == (50304, 1024)
    assert config.head_width * config.num_heads == config.width


def test_a_preset_can_be_changed_and_counts_its_parameters() -> None:
    """Bug of an original: parameters were counted before the layers existed, and came to 0."""
    config = model_preset("tiny", vocab_size=VOCAB, width=56, num_layers=2, is_head_tied=False)
    assert config.layers[0].mlp_width == default_mlp_width(56) == 256
    layer = 56 * 56 * 2 + 56 * 14 * 2 + 3 * 56 * 256 + 2 * 56
    assert Transformer(config).count_parameters() == 2 * layer + 2 * 56 * VOCAB + 56
    with pytest.raises(ConfigError, match="no preset is called 'huge'"):
        model_preset("huge")
    with pytest.raises(ConfigError, match="has no num_layer;"):
        model_preset("tiny", num_layer=3)
    with pytest.raises(ConfigError, match="num_layers 0"):
        model_preset("tiny", num_layers=0)
    with pytest.raises(ConfigError, match="does not divide into 7 heads"):
        model_preset("tiny", num_heads=7)


REFUSED: dict[str, tuple[Any, type[Exception], str]] = {
    "start_pos in training": (
        lambda m, t: m(t, start_pos=23),
        ConfigError,
        "start_pos 23 with gradients on",
    ),
    "too long": (
        lambda m, t: m(torch.zeros(1, 65, dtype=torch.int64)),
        CacheFull,
        "need 65 positions, the model's context has 64",
    ),
    "floats": (lambda m, t: m(t.float()), PromptError, "tokens are torch.float32"),
    "a flat batch": (lambda m, t: m(t[0]), PromptError, r"int64 \[batch, length\]"),
    "no tokens": (lambda m, t: m(t[:, :0]), PromptError, "at least one token"),
    "a foreign id": (lambda m, t: m(t * 0 + 99), PromptError, "the vocabulary has 0 to 98"),
    "a foreign target": (
        lambda m, t: m(t, targets=t * 0 - 3),
        PromptError,
        "targets hold ids from -3",
    ),
    "short targets": (lambda m, t: m(t, targets=t[:, 1:]), PromptError, "each token needs one"),
    "images": (
        lambda m, t: m(t, tiles=torch.zeros(1, 3, 28, 28)),
        PromptError,
        "a model that reads text alone",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_computed_is_refused_in_one_line(name: str) -> None:
    """Bug of an original: inputs longer than the context were cut from the left, silently."""
    call, error, text = REFUSED[name]
    with pytest.raises(error, match=text) as found:
        call(Transformer(DENSE), batch_of(DENSE)[0])
    assert "\n" not in str(found.value)


def test_images_that_do_not_fit_are_refused() -> None:
    """Bug of an original: an image whose mask did not fit was dropped with a warning."""
    config = CONFIGS["images"]
    model = Transformer(config)
    tokens, _, images = batch_of(config)
    with pytest.raises(PromptError, match="8 image tokens, 4 features"):
        model(tokens, tiles=images["tiles"][:1])
    with pytest.raises(PromptError, match=r"reads \[tiles, 3, 28, 28\]"):
        model(tokens, tiles=images["tiles"][..., :27])
