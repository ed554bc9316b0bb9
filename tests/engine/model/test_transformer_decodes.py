"""The trainable model over its cache, and beside the model that inference runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.errors import CheckpointError, PromptError
from engine.model.config import Layer, ModelConfig
from engine.model.model_presets import model_preset
from engine.model.transformer import Transformer
from engine.model.view import View
from engine.weights.checkpoint import open_checkpoint
from tests.engine.model.transformer_cases import (
    CONFIGS,
    DENSE,
    SPAN,
    batch_of,
    fresh,
)
from tests.tiny_families import FAMILIES, save_tiny

# Float32, logits of order one; only the order of additions differs.
TOLERANCE = 1e-5


def largest_difference(found: Tensor, expected: Tensor) -> float:
    """Over all elements, relative to the largest where that is above 1."""
    assert found.shape == expected.shape
    return ((found - expected).abs().max() / expected.abs().max().clamp(min=1)).item()


@pytest.mark.parametrize("name", CONFIGS)
def test_cached_decode_equals_the_full_pass(name: str) -> None:
    """Bugs of originals: prompts read an empty cache, decode missed the newest token, chunk masks
    had the size of the prompt, `is_causal` showed a lone query the first key only."""
    config = CONFIGS[name]
    model = fresh(config)
    tokens, targets, images = batch_of(config)
    full, _ = model(tokens, targets=targets, **images)
    with torch.inference_mode():
        pieces: list[Tensor] = []
        start = 0
        for count in (9, 5, 1, 1, 6, 1):
            part = images if start == 0 else {}
            pieces.append(model(tokens[:, start : start + count], start, **part)[0])
            start += count
    assert start == tokens.shape[1] > 3 * SPAN
    assert largest_difference(torch.cat(pieces, dim=1), full) <= TOLERANCE


def test_a_lone_query_sees_every_key() -> None:
    """Bug of an original: at decode a causal flag aligned the mask to the first key alone."""
    model = fresh(DENSE)
    tokens = batch_of(DENSE)[0][:1]
    changed = tokens.clone()
    changed[0, 4] = (changed[0, 4] + 1) % 90
    with torch.inference_mode():
        found: list[Tensor] = []
        for ids in (tokens, changed):
            model(ids[:, :-1])
            found.append(model(ids[:, -1:], ids.shape[1] - 1)[0])
    assert (found[0] - found[1]).abs().max() > 1e-3


@pytest.mark.parametrize("name", CONFIGS)
def test_later_tokens_never_change_earlier_logits(name: str) -> None:
    config = CONFIGS[name]
    model = fresh(config)
    tokens, _, images = batch_of(config)
    changed = tokens.clone()
    changed[:, 15:] = (changed[:, 15:] + 7) % 90
    with torch.no_grad():
        first, second = model(tokens, **images)[0], model(changed, **images)[0]
    assert largest_difference(second[:, :15], first[:, :15]) <= TOLERANCE
    assert (second[:, 15:] - first[:, 15:]).abs().max() > 1e-2


def test_sequences_of_a_batch_do_not_see_each_other() -> None:
    for name in ("chunks and no RoPE", "softmax experts"):
        model = fresh(CONFIGS[name])
        tokens = batch_of(CONFIGS[name])[0]
        with torch.no_grad():
            together = model(tokens)[0]
            alone = torch.cat([model(tokens[n : n + 1])[0] for n in range(2)])
        assert largest_difference(together, alone) <= TOLERANCE


def test_two_models_of_one_configuration_share_no_cache() -> None:
    """Bug of an original: masks and caches hung on shared objects, and sessions mixed."""
    first, second = fresh(DENSE, 1), fresh(DENSE, 2)
    tokens = batch_of(DENSE)[0]
    with torch.inference_mode():
        first(tokens[:, :9])
        second(tokens[:, 3:12])
        found = first(tokens[:, 9:12], 9)[0]
    with torch.no_grad():
        expected = first(tokens[:, :12], targets=tokens[:, :12])[0][:, 9:]
    assert largest_difference(found, expected) <= TOLERANCE


def test_rings_of_every_layer_slide_over_a_long_text() -> None:
    """Bug of an original: one layer's eviction shifted the caches of all layers.

    The text is longer than a step and than the rings of two layers; the third forgets nothing.
    """
    layers = (
        Layer(mlp_width=33, reach="sliding", span=5),
        Layer(mlp_width=33, reach="chunked", span=9),
        Layer(mlp_width=33),
    )
    config = model_preset(
        "tiny", vocab_size=99, width=20, num_heads=2, layers=layers, max_positions=1200
    )
    assert View.of_layer(layers[1], 1200).ring_capacity < 1100
    model = fresh(config)
    tokens = torch.randint(0, 99, (2, 1100), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        full, _ = model(tokens, targets=tokens)
    with torch.inference_mode():
        pieces = [model(tokens[:, :1070])[0]]
        pieces += [model(tokens[:, n : n + 1], n)[0] for n in range(1070, 1080)]
        pieces.append(model(tokens[:, 1080:], 1080)[0])
    assert largest_difference(torch.cat(pieces, dim=1), full) <= TOLERANCE


def test_positions_that_do_not_follow_are_refused() -> None:
    """Bug of an original: the last prompt token was fed twice, at two positions."""
    model = fresh(DENSE)
    tokens = batch_of(DENSE)[0]
    with torch.inference_mode():
        with pytest.raises(PromptError, match="the cache holds 0 of 0 positions"):
            model(tokens, 3)
        model(tokens[:, :9])
        for start in (8, 10):
            with pytest.raises(PromptError, match="the cache holds 2 of 9 positions"):
                model(tokens[:, 9:10], start)
        with pytest.raises(PromptError, match="1 sequences from position 9"):
            model(tokens[:1, 9:10], 9)
        assert model(tokens[:, 9:10], 9)[0].shape == (2, 1, 99)


def test_the_cache_holds_memory_only_while_it_is_needed() -> None:
    model = fresh(DENSE)
    tokens, targets, _ = batch_of(DENSE)
    model(tokens, targets=targets)
    with torch.no_grad():
        model(tokens, targets=targets)
        assert model.cache_bytes == 0
        model(tokens)
        assert model.cache_bytes > 0
    model.clear_cache()
    assert model.cache_bytes == 0


def test_training_after_inference_still_has_gradients() -> None:
    """Tables of rotations made in inference mode must not break the pass that records."""
    model = fresh(DENSE)
    tokens, targets, _ = batch_of(DENSE)
    with torch.inference_mode():
        model(tokens)
    model(tokens, targets=targets)[1].backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.gpu
@pytest.mark.parametrize("name", CONFIGS)
def test_a_gpu_computes_the_same(name: str) -> None:
    config = CONFIGS[name]
    model = fresh(config)
    tokens, targets, images = batch_of(config)
    expected, loss = model(tokens, targets=targets, **images)
    loss.backward()
    gradient = model.embedding.grad
    twin = fresh(config).cuda()
    images = {key: value.cuda() for key, value in images.items()}
    found, loss = twin(tokens.cuda(), targets=targets.cuda(), **images)
    loss.backward()
    # Sums over many threads: one digit less.
    assert largest_difference(found.cpu(), expected) <= 10 * TOLERANCE
    assert largest_difference(twin.embedding.grad.cpu(), gradient) <= 10 * TOLERANCE
    with torch.inference_mode():
        first, _ = twin(tokens[:, :15].cuda(), **images)
        second, _ = twin(tokens[:, 15:].cuda(), 15)
    assert largest_difference(torch.cat((first, second), dim=1).cpu(), expected) <= 10 * TOLERANCE


@pytest.fixture(scope="module", params=FAMILIES)
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder: Path = tmp_path_factory.mktemp("tiny")
    oracle: Any = save_tiny(request.param, folder)
    with open_checkpoint(folder) as checkpoint:
        model = Transformer(checkpoint.config)
        model.load_checkpoint(checkpoint)
        yield checkpoint.config, model, oracle


def test_logits_loss_and_gradients_equal_transformers(
    tiny: tuple[ModelConfig, Transformer, Any],
) -> None:
    _, model, oracle = tiny
    generator = torch.Generator().manual_seed(6)
    tokens = torch.randint(3, 89, (2, 41), generator=generator)
    expected = oracle(tokens).logits
    targets = torch.randint(3, 89, (2, 41), generator=generator)
    targets[0, :5] = -100
    expected_loss = torch.nn.functional.cross_entropy(
        expected.float().flatten(0, 1), targets.flatten()
    )
    logits, loss = model(tokens, targets=targets)
    assert largest_difference(logits, expected) <= TOLERANCE
    assert abs((loss - expected_loss).item()) <= TOLERANCE
    embedding = oracle.get_input_embeddings().weight
    head = oracle.get_output_embeddings().weight
    expected_loss.backward()
    loss.backward()
    pairs = [(model.embedding, embedding)]
    if model.head is not None:
        pairs.append((model.head, head))
    # The embedding's gradient has passed through every layer.
    for ours, theirs in pairs:
        assert ours.grad is not None
        assert largest_difference(ours.grad, theirs.grad) <= TOLERANCE
        assert theirs.grad.abs().max() > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_keys_and_shapes_are_those_of_our_checkpoints(tmp_path: Path, family: str) -> None:
    save_tiny(family, tmp_path)
    with open_checkpoint(tmp_path) as checkpoint:
        config = checkpoint.config
        expected = {name: tensor.shape for name, tensor in checkpoint.tensors.items()}
    if config.is_head_tied:
        del expected["head"]
    state = Transformer(config).state_dict()
    found = {name: tuple(value.shape) for name, value in state.items()}
    assert found == expected


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    with open_checkpoint(tmp_path) as checkpoint, pytest.raises(CheckpointError, match="differs"):
        Transformer(DENSE).load_checkpoint(checkpoint)
