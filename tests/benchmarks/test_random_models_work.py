"""The benchmarks' models of random weights are real files: everyone reads them, and alike."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks.make_random_model import (
    SHAPES,
    Format,
    Vocabulary,
    Weight,
    draw,
    read_vocabulary,
    write_folder,
    write_gguf,
)
from engine.plan.plan import PlanShape
from engine.plan.presets import single
from engine.text.tokenizer import load_tokenizer
from engine.weights.checkpoint import open_checkpoint
from tests.one_process import OneProcess
from tests.real_model import PROMPTS, load_oracle

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "make_random_model.py"
VOCAB_SIZE = 999
IDS = [504, 1, 998, 35, 7, 7, 123, 400]
# float32 on both sides, added in another order.
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def small_vocabulary() -> Vocabulary:
    """Its first tokens: a reader of GGUF files takes seconds for all of them."""
    whole = read_vocabulary()
    return dataclasses.replace(
        whole, tokens=whole.tokens[:VOCAB_SIZE], kinds=whole.kinds[:VOCAB_SIZE], merges=[]
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Safetensors with the whole vocabulary, as the script writes them."""
    out = tmp_path_factory.mktemp("random") / "model"
    options = ["--shape", "tiny", "--format", "safetensors", "--out", str(out)]
    subprocess.run([sys.executable, str(SCRIPT), *options], check=True, timeout=100)
    return out


def check_logits(path: Path, oracle: Any) -> None:
    """Ours are those of transformers, and of a size that a model has."""
    checkpoint = open_checkpoint(path)
    plan = single(PlanShape.from_config(checkpoint.config), "a/cpu")
    ours = OneProcess(checkpoint, plan, window=len(IDS)).logits(IDS)
    with torch.no_grad():
        theirs = oracle(torch.tensor([IDS])).logits[0].numpy()
    assert ours.shape == (len(IDS), VOCAB_SIZE)
    assert np.abs(ours - theirs).max() < TOLERANCE
    assert 0.5 < ours.std() < 5
    assert abs(ours.mean()) < 0.5


@pytest.mark.parametrize("kind", ["f16", "q4_0", "q8_0"])
def test_a_gguf_file_gives_the_logits_of_transformers(
    kind: Format, tmp_path: Path, small_vocabulary: Vocabulary
) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(path, SHAPES["tiny"], small_vocabulary, kind, seed=0)
    check_logits(path, load_oracle(path))


def test_a_folder_gives_the_logits_of_transformers(
    tmp_path: Path, small_vocabulary: Vocabulary
) -> None:
    write_folder(tmp_path, SHAPES["tiny"], small_vocabulary, seed=0)
    check_logits(tmp_path, AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32))


@pytest.mark.parametrize("kind", ["f16", "bf16", "q4_0", "q8_0"])
def test_weights_have_no_mean_and_the_deviation_asked_for(kind: Format) -> None:
    weight = Weight("a", "b", rows=6_000, columns=960, deviation=0.03)
    drawn = draw(weight, kind, seed=1, number=2)
    values = gguf.dequantize(drawn, gguf.GGMLQuantizationType[kind.upper()])
    assert values.size == weight.rows * weight.columns
    assert values.std() == pytest.approx(0.03, rel=0.04)
    # Five times what chance gives.
    assert abs(values.mean()) < 5 * 0.03 / np.sqrt(values.size)


def test_the_folder_has_the_tokenizer_of_the_default_model(
    folder: Path, default_model_path: Path
) -> None:
    ours, expected = load_tokenizer(folder), load_tokenizer(default_model_path)
    for prompt in (*PROMPTS, "<|im_start|>user\n12 345<|im_end|>"):
        assert ours.encode(prompt) == expected.encode(prompt)


def test_the_seed_alone_decides_the_bytes(tmp_path: Path, small_vocabulary: Vocabulary) -> None:
    contents: list[bytes] = []
    for number, seed in enumerate((7, 7, 8)):
        path = tmp_path / f"{number}.gguf"
        write_gguf(path, SHAPES["tiny"], small_vocabulary, "q4_0", seed)
        contents.append(path.read_bytes())
    assert contents[0] == contents[1]
    assert contents[2] != contents[0]
    assert not list(tmp_path.glob("*.unfinished"))


@pytest.mark.network
def test_the_command_line_generates_with_it(folder: Path) -> None:
    command = [sys.executable, "-m", "engine.cli", "generate", "Hello", "--raw", "--json"]
    options = ["--model", str(folder), "--max-tokens", "5", "--temperature", "0"]
    done = subprocess.run([*command, *options], check=True, timeout=100, capture_output=True)
    answer = json.loads(done.stdout)
    assert len(answer["token_ids"]) == 5 or answer["finish_reason"] == "stop"
