"""`shardmix bench` relates a speed to the computer that it was measured on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from engine.cli_bench import computers
from engine.kernels.available import has_native_kernels, kernels_in_use
from engine.measuring.bandwidth import ceiling_share, read_bandwidth
from engine.plan.plan import PlanShape
from engine.plan.presets import single
from engine.session import Session, SessionOptions
from tests.engine.cli.test_commands import shardmix
from tests.tiny_families import save_tiny
from tests.tiny_models import save_tiny_llama

pytestmark = [pytest.mark.network, pytest.mark.timeout(300)]

SIZES = ("--prompt-tokens", "32", "--generated-tokens", "4", "--threads", "1")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_tiny_llama(folder)
    return folder


def test_the_json_has_what_the_share_is_made_of(model: Path) -> None:
    done = shardmix("bench", "--json", "--model", str(model), "--dtype", "bfloat16", *SIZES)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["kernels"] == {"this/cpu": kernels_in_use()}
    # Layers and head in bfloat16, norms in float32; the embedding stays with the engine host.
    matrices = 3 * (48 * 20 * (6 + 2 + 2 + 6) + 3 * 48 * 75) + 99 * 48
    assert found["weight_bytes"] == 2 * matrices + 4 * 48 * (2 * 3 + 1)
    expected = found["weight_bytes"] * found["decode_tps"] / found["memory_bytes_per_second"]
    assert found["ceiling_share"] == pytest.approx(expected)


def test_a_person_reads_speeds_kernels_and_memory(model: Path) -> None:
    done = shardmix("bench", "--model", str(model), "--dtype", "float32", *SIZES)
    assert done.returncode == 0, done.stderr
    for words in (
        "computed in float32 by torch kernels on this/cpu",
        "reading a prompt of 32 tokens",
        "% of what the memory allows",
        "memory of the engine host",
        "GB/s",
    ):
        assert words in done.stdout, done.stdout


@pytest.mark.skipif(not has_native_kernels(), reason="no native kernels were built here")
def test_each_device_says_what_computes_on_it(model: Path, tmp_path: Path) -> None:
    """What the command's own process would have computed with was said of every device."""
    mixture = tmp_path / "mixture"
    save_tiny("qwen3_moe", mixture)
    for folder, kernels in (
        (model, kernels_in_use()),
        # The attention is native; the experts' products are, and the routing is not.
        (mixture, f"{kernels_in_use()} and torch"),
    ):
        with Session(SessionOptions(model=str(folder), dtype="bfloat16", num_workers=2)) as session:
            assert session.kernels == dict.fromkeys(("local-1/cpu", "local-2/cpu"), kernels)
            session.apply(single(PlanShape.from_config(session.model.config), "local-2/cpu"))
            assert session.kernels == {"local-2/cpu": kernels}


def test_devices_with_other_kernels_are_told_apart() -> None:
    kernels = {"a/cpu": "native avx2", "b/cuda0": "torch", "c/cpu": "native avx2"}
    assert computers(kernels) == "native avx2 kernels on a/cpu, c/cpu and torch kernels on b/cuda0"


def test_a_draft_models_gain_is_told_to_persons_and_programs(model: Path) -> None:
    options = ("--model", str(model), "--draft-model", str(model), *SIZES)
    done = shardmix("bench", "--json", *options)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["draft_model"]
    assert found["name"] == model.name
    assert min(found["plain_tps"], found["tps"]) > 0
    assert found["accepted_tokens"] <= found["drafted_tokens"]
    done = shardmix("bench", *options)
    assert done.returncode == 0, done.stderr
    assert f"a story, with draft model {model.name}" in done.stdout, done.stdout
    assert "guesses came true" in done.stdout


def test_a_share_is_bytes_by_bytes() -> None:
    assert ceiling_share(100_000_000, 150.0, 30e9) == 0.5


def test_memory_is_read_with_any_number_of_threads() -> None:
    for threads in (1, 3):
        assert 0 < read_bandwidth(threads, num_bytes=1 << 20, seconds=0.0) < 1e13
