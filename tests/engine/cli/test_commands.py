"""The command line as a person uses it: what it prints, and how it says no."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from engine.weights.families import FAMILIES
from tests.real_model import chat_ids, oracle_logits
from tests.tiny_models import save_tiny_llama

pytestmark = [pytest.mark.network, pytest.mark.timeout(300)]


def shardmix(*arguments: str, text: str = "") -> subprocess.CompletedProcess[str]:
    """Run the command in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "engine.cli", *arguments],
        input=text,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def assert_one_line_error(result: subprocess.CompletedProcess[str], *words: str) -> None:
    """Exit code 1, nothing on stdout, one line on stderr with these words."""
    assert result.returncode == 1, result.stderr
    assert result.stdout == ""
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("shardmix: ")
    for word in words:
        assert word in lines[0], lines[0]


def test_generate_names_paris_in_the_promised_json(default_model_path: Path) -> None:
    result = shardmix(
        *("generate", "What is the capital of France?", "--temperature", "0"),
        *("--max-tokens", "32", "--json", "--model", str(default_model_path)),
    )
    assert result.returncode == 0, result.stderr
    found: dict[str, Any] = json.loads(result.stdout)
    assert "Paris" in found["text"]
    assert found["prompt_tokens"] == len(
        chat_ids(default_model_path, "What is the capital of France?")
    )
    assert found["finish_reason"] == "stop"
    assert set(found["timings"]) == {"ttft_s", "prefill_tps", "decode_tps"}
    assert found["plan"]["devices"] == ["this/cpu"]
    assert [d["name"] for d in found["devices"]] == ["this/cpu"]
    assert found["devices"][0]["compute_s"] > 0


def test_generate_streams_the_text_and_stops_at_a_stop_text(default_model_path: Path) -> None:
    result = shardmix(
        *("generate", "What is the capital of France?", "--temperature", "0", "--stop", "is"),
        *("--model", str(default_model_path)),
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == "The capital of France \n"


def test_logits_under_a_plan_file_equal_transformers(
    default_model_path: Path, tmp_path: Path
) -> None:
    plan = tmp_path / "plan.toml"
    plan.write_text(
        'devices = ["this/cpu", "local-1/cpu", "local-2/cpu"]\n'
        'wire = "float32"\nhead = [192, 0, 0]\n'
        '[[layers]]\nrange = "0-9"\nattention = [6, 3, 0]\nmlp = [34, 14, 0]\n'
        '[[layers]]\nrange = "10-29"\nattention = [0, 0, 9]\nmlp = [0, 0, 48]\n',
        encoding="utf-8",
    )
    out = tmp_path / "logits.npy"
    ids = [504, 3575, 282, 4649, 314]
    result = shardmix(
        *("logits", "--ids", ",".join(map(str, ids)), "--out", str(out), "--plan", str(plan)),
        *("--model", str(default_model_path)),
    )
    assert result.returncode == 0, result.stderr
    found = np.load(out)
    expected = oracle_logits(default_model_path, ids)
    assert found.dtype == np.float32
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


def test_chat_remembers_and_starts_over(default_model_path: Path) -> None:
    result = shardmix(
        *("chat", "--temperature", "0", "--model", str(default_model_path)),
        text="What is the capital of France?\n/new\n/exit\n",
    )
    assert result.returncode == 0, result.stderr
    assert "Paris" in result.stdout
    assert "tok/s" in result.stderr


def test_bench_prints_the_promised_json(default_model_path: Path) -> None:
    result = shardmix(
        *("bench", "--json", "--prompt-tokens", "32", "--generated-tokens", "4"),
        *("--model", str(default_model_path), "--threads", "1"),
    )
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["prefill_tps"] > 0
    assert found["decode_tps"] > 0


def test_generate_takes_every_decoding_option(tmp_path: Path) -> None:
    """The bias makes token 40 win every time, until min_tokens let the stop id end the answer."""
    save_tiny_llama(tmp_path)
    result = shardmix(
        *("generate", "abc", "--raw", "--model", str(tmp_path), "--json", "--logprobs", "2"),
        *("--temperature", "0.8", "--top-k", "50", "--top-p", "0.99", "--min-p", "0.01"),
        *("--repetition-penalty", "1.05", "--presence-penalty", "0.1", "--seed", "7"),
        *("--frequency-penalty", "0.1", "--logit-bias", "40=90", "--logit-bias", "41=100"),
        *("--stop-id", "41", "--min-tokens", "3", "--max-tokens", "9"),
    )
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["token_ids"] == [40, 40, 40, 41]
    assert found["finish_reason"] == "stop"
    assert [t["token_id"] for t in found["logprobs"]] == found["token_ids"]
    for token in found["logprobs"]:
        # Of the model itself: the biased token is an ordinary one.
        first, second = token["top"]
        assert token["logprob"] <= first["logprob"] < 0
        assert second["logprob"] <= first["logprob"]
        assert second["token_id"] != first["token_id"]


# ---- bad input -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--logit-bias", "5"), ("--logit-bias '5'", "15=-2.5")),
        (("--logit-bias", "5=nan"), ("logit_bias of token 5", "nan")),
        (("--min-p", "2"), ("min_p", "from 0 to 1", "got 2")),
        (("--presence-penalty", "inf"), ("presence_penalty", "inf")),
        (("--min-tokens", "600"), ("min_tokens 600", "max_tokens 512")),
        (("--seed", str(2**64)), ("seed", str(2**64 - 1))),
        (("--max-tokens", "-1"), ("max_tokens", "-1")),
        (("--logprobs", "21", "--json"), ("logprobs", "20", "got 21")),
        (("--stop-id", "-3"), ("stop id -3", "0")),
    ],
)
def test_decoding_options_that_break_a_rule_are_refused_before_anything_starts(
    arguments: tuple[str, ...], words: tuple[str, ...]
) -> None:
    """The model does not exist: whoever looked for it would say so instead."""
    result = shardmix("generate", "hi", *arguments, "--model", "nowhere.gguf")
    assert_one_line_error(result, *words)


def test_what_the_vocabulary_lacks_is_refused_before_weights_are_read(tmp_path: Path) -> None:
    """Bug: ids were checked only after the plan was in force; here there is none to put in force."""
    save_tiny_llama(tmp_path)
    for arguments in (
        ("generate", "hi", "--stop-id", "99"),
        ("generate", "hi", "--logit-bias", "99=1"),
        ("logits", "--ids", "5,99", "--out", str(tmp_path / "x.npy")),
    ):
        result = shardmix(*arguments, "--model", str(tmp_path), "--plan", "nowhere.toml")
        assert_one_line_error(result, " 99 is not in the vocabulary of 99")


def test_models_lists_families_and_what_their_tensors_are_called() -> None:
    listed = shardmix("models")
    assert listed.returncode == 0
    assert [line.split()[0] for line in listed.stdout.splitlines()[: len(FAMILIES)]] == list(
        FAMILIES
    )
    table = shardmix("models", "llama4")
    assert table.returncode == 0
    for name in (
        "layers.{i}.experts.{e}.gate",
        "model.layers.{i}.feed_forward.experts.gate_up_proj",
        "blk.{i}.ffn_gate_exps.weight",
    ):
        assert name in table.stdout
    assert_one_line_error(shardmix("models", "gpt2"), "'gpt2' is no family", "llama4")


def test_an_answer_slides_past_a_small_window_and_says_what_memory_it_took(tmp_path: Path) -> None:
    save_tiny_llama(tmp_path)
    result = shardmix(
        *("generate", "abc", "--raw", "--temperature", "0", "--model", str(tmp_path)),
        *("--max-tokens", "90", "--min-tokens", "90", "--kv-window", "24", "--kv-dtype", "float16"),
        "--json",
    )
    assert result.returncode == 0, result.stderr
    found: dict[str, Any] = json.loads(result.stdout)
    assert len(found["token_ids"]) == 90
    # 3 layers of 2 KV heads of 20, keys and values in two bytes, 256 positions at first.
    device = found["devices"][0]
    assert device["cache_bytes"] == device["cache_limit_bytes"] == 3 * 2 * 20 * 2 * 2 * 256
    bad = shardmix("generate", "abc", "--model", str(tmp_path), "--kv-window", "0")
    assert_one_line_error(bad, "--kv-window 0 is not between 1 and 16,777,216")


def test_a_truncated_model_is_refused(default_model_path: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(default_model_path.read_bytes()[:1_000_000])
    assert_one_line_error(shardmix("generate", "hi", "--model", str(cut)), "cut.gguf")


def test_a_foreign_file_is_refused(tmp_path: Path) -> None:
    foreign = tmp_path / "photo.gguf"
    foreign.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(1000))
    assert_one_line_error(
        shardmix("generate", "hi", "--model", str(foreign)), "photo.gguf", "not a GGUF file"
    )


def test_a_missing_model_is_refused() -> None:
    assert_one_line_error(
        shardmix("generate", "hi", "--model", "nowhere.gguf"), "nowhere.gguf", "no such file"
    )


def test_an_unknown_architecture_is_named(tmp_path: Path) -> None:
    path = tmp_path / "strange.gguf"
    writer = gguf.GGUFWriter(path, "rwkv9")
    writer.add_block_count(1)
    writer.add_tensor("token_embd.weight", np.zeros((4, 32), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert_one_line_error(shardmix("generate", "hi", "--model", str(path)), "rwkv9", "llama")


def test_a_prompt_longer_than_the_window_is_refused(default_model_path: Path) -> None:
    result = shardmix(
        *("generate", "word " * 60, "--kv-window", "50", "--model", str(default_model_path))
    )
    assert_one_line_error(result, "positions", "50", "--kv-window")


def test_top_p_of_two_is_refused() -> None:
    assert_one_line_error(shardmix("generate", "hi", "--top-p", "2"), "top_p", "at most 1", "got 2")


def test_a_plan_whose_rows_do_not_fit_is_refused(default_model_path: Path, tmp_path: Path) -> None:
    plan = tmp_path / "plan.toml"
    plan.write_text(
        'devices = ["this/cpu", "local-1/cpu"]\nwire = "float32"\nhead = [192, 0]\n'
        '[[layers]]\nrange = "0-29"\nattention = [6, 4]\nmlp = [34, 14]\n',
        encoding="utf-8",
    )
    result = shardmix("generate", "hi", "--plan", str(plan), "--model", str(default_model_path))
    assert_one_line_error(result, "plan.toml", "attention", "6 + 4 = 10", "9")


def test_a_plan_with_an_unknown_node_is_refused(default_model_path: Path, tmp_path: Path) -> None:
    plan = tmp_path / "plan.toml"
    plan.write_text(
        'devices = ["attic/cpu"]\nwire = "float32"\nhead = [192]\n'
        '[[layers]]\nrange = "0-29"\nattention = [9]\nmlp = [48]\n',
        encoding="utf-8",
    )
    result = shardmix("generate", "hi", "--plan", str(plan), "--model", str(default_model_path))
    assert_one_line_error(result, "attic", "this")


@pytest.mark.parametrize(
    "arguments",
    [
        ("generate",),
        ("generate", "hi", "--dtype", "float8"),
        ("generate", "hi", "--workers", "-1"),
        ("logits", "--out", "x.npy"),
        ("generate", "hi", "--logprobs", "2"),
        ("fly",),
        ("--nonsense",),
    ],
)
def test_wrong_usage_exits_with_2(arguments: tuple[str, ...]) -> None:
    result = shardmix(*arguments)
    assert result.returncode == 2
    assert "Traceback" not in result.stderr


def test_ids_outside_the_vocabulary_are_refused(default_model_path: Path, tmp_path: Path) -> None:
    result = shardmix(
        *("logits", "--ids", "5,999999", "--out", str(tmp_path / "x.npy")),
        *("--model", str(default_model_path)),
    )
    assert_one_line_error(result, "999999", "49,152")


def test_help_lists_only_what_works() -> None:
    text = shardmix("--help").stdout
    for command in ("generate", "logits", "chat", "bench", "models"):
        assert command in text
    for command in ("serve", "train", "doctor", "plan"):
        assert f"\n  {command}" not in text
