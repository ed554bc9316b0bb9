"""Every key that the gguf package knows is read, refused unless it changes nothing, or harmless."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import gguf
import pytest

from engine.errors import ConfigError
from engine.model.config import ModelConfig
from engine.weights.checkpoint import open_checkpoint
from engine.weights.gguf_neutral import NEUTRAL
from tests.tiny_families import GGUF_CHANGES, save_tiny, save_tiny_gguf

Change = Callable[[gguf.GGUFWriter], None]

# Key -> the family whose tiny file reads it.
READ = {
    "vocab_size": "llama",
    "context_length": "llama",
    "embedding_length": "llama",
    "embedding_length_out": "llama",
    "block_count": "llama",
    "feed_forward_length": "llama",
    "expert_count": "mixtral",
    "expert_used_count": "mixtral",
    "expert_feed_forward_length": "qwen3_moe",
    "expert_shared_feed_forward_length": "qwen3_moe",
    "expert_weights_norm": "qwen3_moe",
    "expert_gating_func": "qwen3_moe",
    "interleave_moe_layer_step": "llama4",
    "final_logit_softcapping": "gemma3",
    "attention.head_count": "llama",
    "attention.head_count_kv": "llama",
    "attention.key_length": "llama",
    "attention.value_length": "llama",
    "attention.key_length_swa": "gemma3",
    "attention.value_length_swa": "gemma3",
    "attention.layer_norm_rms_epsilon": "llama",
    "attention.scale": "llama",
    "attention.sliding_window": "gemma3",
    "attention.sliding_window_pattern": "gemma3",
    "rope.dimension_count": "llama",
    "rope.dimension_count_swa": "gemma3",
    "rope.freq_base": "llama",
    "rope.freq_base_swa": "gemma3",
    "rope.scaling.type": "llama",
    "rope.scaling.factor": "yarn",
    "rope.scaling.attn_factor": "llama",
    "rope.scaling.original_context_length": "yarn",
    "rope.scaling.yarn_log_multiplier": "yarn",
    "rope.scaling.yarn_beta_fast": "yarn",
    "rope.scaling.yarn_beta_slow": "yarn",
}
# Key -> why it may say anything.
HARMLESS = {
    "tensor_data_layout": "tells where the weights came from",
    "pooling_type": "of embeddings of whole texts, which are not computed",
    "dense_feat_in": "of matrices after such a pooling, whose tensors are refused",
    "dense_feat_out": "of matrices after such a pooling, whose tensors are refused",
    "classifier.output_labels": "of a classifier, whose tensors are refused",
    "decoder_start_token_id": "of a decoder with an encoder, whose tensors are refused",
    "attention.layer_norm_epsilon": "all norms of these architectures are RMS norms",
    "attention.group_norm_epsilon": "all norms of these architectures are RMS norms",
    "attention.group_norm_groups": "all norms of these architectures are RMS norms",
    "rope.scaling.finetuned": "tells how the model was trained",
}


def known_keys() -> Iterator[str]:
    for section in vars(gguf.Keys).values():
        for value in vars(section).values() if isinstance(section, type) else ():
            if isinstance(value, str) and value.startswith("{arch}."):
                yield value.removeprefix("{arch}.").replace("{dense}", "dense")


def test_every_key_is_in_one_list() -> None:
    """Keys of attention's temperature, of shared keys and others were passed over in silence."""
    lists = (READ.keys(), NEUTRAL.keys(), HARMLESS.keys())
    found = set(known_keys())
    assert len(found) > 100
    assert {key: sum(key in each for each in lists) for key in found} == dict.fromkeys(found, 1)
    assert set().union(*lists) == found


YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "rope_theta": 10000.0,
}


def read(folder: Path, family: str, change: Change) -> ModelConfig:
    """The configuration of a family's file with more keys; those it had are replaced."""
    name, changes = (family, GGUF_CHANGES.get(family, {}))
    if family == "yarn":
        name, changes = "llama", {"rope_parameters": YARN}
    oracle = save_tiny(name, folder / "huggingface", **changes)
    with open_checkpoint(save_tiny_gguf(oracle, folder / "tiny.gguf", change=change)) as model:
        return model.config


@pytest.mark.parametrize("key", READ)
def test_a_key_that_is_read_must_be_of_its_type(tmp_path: Path, key: str) -> None:
    def change(writer: gguf.GGUFWriter) -> None:
        full = f"{writer.arch}.{key}"
        for data in writer.kv_data:
            data.pop(full, None)
        writer.add_array(full, ["a", "b"])

    with pytest.raises(ConfigError, match=rf"\.{key} must be one \w+, found string\[\]") as caught:
        read(tmp_path, READ[key], change)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", NEUTRAL)
def test_a_key_that_changes_the_arithmetic_is_refused(
    tmp_path: Path, make: SimpleNamespace, key: str
) -> None:
    for value in (0.25, [0.0, 0.25], "yes", 7):
        with pytest.raises(ConfigError, match=rf"llama\.{key} = .* is not supported; use a model"):
            write(make, tmp_path, f"llama.{key}", value)


@pytest.mark.parametrize("key", NEUTRAL)
def test_a_value_that_changes_nothing_is_taken(
    tmp_path: Path, make: SimpleNamespace, key: str
) -> None:
    plain = write(make, tmp_path, "llama.other", 1)
    for value in NEUTRAL[key]:
        assert write(make, tmp_path, f"llama.{key}", value) == plain
        assert write(make, tmp_path, f"llama.{key}", [value, value]) == plain


@pytest.mark.parametrize("key", HARMLESS)
def test_a_harmless_key_may_say_anything(tmp_path: Path, make: SimpleNamespace, key: str) -> None:
    plain = write(make, tmp_path, "llama.other", 1)
    for value in (0.25, True, 7, "yes", ["a", "b"]):
        assert write(make, tmp_path, f"llama.{key}", value) == plain


def write(make: SimpleNamespace, folder: Path, key: str, value: object) -> ModelConfig:
    """The configuration of the tiny llama with one more key."""

    def change(writer: gguf.GGUFWriter) -> None:
        kind = gguf.GGUFValueType.get_type(value)
        writer.add_key_value(key, value, kind)

    with open_checkpoint(make.gguf(folder / "tiny.gguf", change=change)) as model:
        return model.config


def widths(**values: int) -> Change:
    def change(writer: gguf.GGUFWriter) -> None:
        for key, value in values.items():
            writer.add_uint32(f"{writer.arch}.{key.replace('__', '.')}", value)

    return change


@pytest.mark.parametrize(
    "key",
    ["attention__key_length_swa", "attention__value_length_swa", "rope__dimension_count_swa"],
)
def test_layers_with_a_window_have_heads_as_wide_as_the_others(tmp_path: Path, key: str) -> None:
    """The tiny families have heads of 20."""
    plain = read(tmp_path, "gemma3", widths())
    assert read(tmp_path, "gemma3", widths(**{key: 20})) == plain
    message = rf"{key.replace('__', '.')} 16 differs from head width 20"
    with pytest.raises(ConfigError, match=message):
        read(tmp_path, "gemma3", widths(**{key: 16}))


@pytest.mark.parametrize("family", ["llama", "gemma3", "yarn"])
def test_the_factor_of_cosine_and_sine_holds_with_and_without_scaling(
    tmp_path: Path, family: str
) -> None:
    """It was read of yarn only."""
    plain = read(tmp_path, family, widths())
    scaled = read(tmp_path, family, lambda w: w.add_rope_scaling_attn_factors(0.5))
    for before, after in zip(plain.ropes, scaled.ropes, strict=True):
        assert after.attention_factor == 0.5 * before.attention_factor
