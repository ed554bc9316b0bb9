"""llama.cpp's programs are found, run and read, or it is said in one line what is wrong."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest

from benchmarks.llama_cpp import (
    LlamaSpeed,
    find_llama_cpp,
    measure_llama_cpp,
    parse_speeds,
    rpc_servers,
)
from engine.errors import ConfigError
from tests.benchmarks.llama_programs import DECODE_SPEED, PROMPT_SPEED, write_programs

# Two tests in the fields that its documentation lists, with numbers of our own.
SAMPLE = """[
  {"build_commit": "0000000", "build_number": 1, "cpu_info": "a processor", "gpu_info": "",
   "backends": "CPU", "model_filename": "m.gguf", "model_type": "llama ?B Q4_0",
   "model_size": 90, "model_n_params": 160, "n_batch": 2048, "n_ubatch": 512, "n_threads": 2,
   "type_k": "f16", "type_v": "f16", "n_gpu_layers": 0, "flash_attn": -1,
   "n_prompt": 512, "n_gen": 0, "n_depth": 0, "test_time": "2026-01-01T00:00:00Z",
   "avg_ns": 2000000000, "stddev_ns": 0, "avg_ts": 256.0, "stddev_ts": 0.0,
   "samples_ns": [2000000000], "samples_ts": [256.0]},
  {"build_commit": "0000000", "backends": "CPU", "n_threads": 1,
   "n_prompt": 0, "n_gen": 64, "n_depth": 128, "avg_ns": 1000000000, "stddev_ns": 0,
   "avg_ts": 64.0, "stddev_ts": 0.0, "samples_ns": [1000000000], "samples_ts": [64.0]}
]"""


def assert_four_parts(error: ConfigError, *words: str) -> None:
    text = str(error)
    assert "\n" not in text
    for word in words:
        assert word in text


def test_prompts_and_answers_are_told_apart() -> None:
    prompt, answer = parse_speeds(SAMPLE)
    assert prompt == LlamaSpeed(
        is_prompt=True, tokens=512, context=0, num_threads=2, tokens_per_second=256.0
    )
    assert answer == LlamaSpeed(
        is_prompt=False, tokens=64, context=128, num_threads=1, tokens_per_second=64.0
    )


@pytest.mark.parametrize(
    "text",
    [
        "",
        "| model | size |",
        '{"avg_ts": 1}',
        '[{"n_prompt": 512, "n_gen": 0, "n_depth": 0, "n_threads": 1}]',
        json.dumps([{"n_prompt": 5, "n_gen": 5, "n_depth": 0, "n_threads": 1, "avg_ts": 1.0}]),
    ],
)
def test_other_output_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_speeds(text)
    assert_four_parts(caught.value, "llama-bench", "JSON", "avg_ts")


def test_programs_are_found_in_a_build_folder_or_its_bin(tmp_path: Path) -> None:
    write_programs(tmp_path / "bin")
    for folder in (tmp_path, tmp_path / "bin"):
        found = find_llama_cpp(folder)
        assert found is not None
        assert found.bench == tmp_path / "bin" / "llama-bench"
        assert found.rpc_server == tmp_path / "bin" / "rpc-server"


def test_the_path_is_searched_where_no_folder_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_llama_cpp(None) is None
    write_programs(tmp_path)
    found = find_llama_cpp(None)
    assert found is not None
    assert found.bench == tmp_path / "llama-bench"


def test_a_folder_without_them_is_told_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        find_llama_cpp(tmp_path)
    assert_four_parts(caught.value, str(tmp_path), "llama-bench", "leave the option out")


@pytest.mark.network
def test_servers_listen_for_the_block_and_are_gone_after_it(tmp_path: Path) -> None:
    write_programs(tmp_path)
    model = tmp_path / "model.gguf"
    model.write_bytes(b"GGUF")
    found = find_llama_cpp(tmp_path)
    assert found is not None
    assert found.rpc_server is not None
    with rpc_servers(found.rpc_server, 2) as addresses:
        assert len(set(addresses)) == 2
        speeds = measure_llama_cpp(
            found,
            model,
            num_threads=1,
            prompt_tokens=32,
            generated_tokens=8,
            contexts=(16, 64),
            servers=addresses,
        )
    assert [(s.is_prompt, s.tokens, s.context) for s in speeds] == [
        (True, 32, 0),
        (False, 8, 16),
        (False, 8, 64),
    ]
    assert {s.tokens_per_second for s in speeds} == {PROMPT_SPEED, DECODE_SPEED}
    for address in addresses:
        host, _, port = address.partition(":")
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((host, int(port)), 5)


@pytest.mark.network
def test_a_server_that_ends_at_once_is_told_in_one_line(tmp_path: Path) -> None:
    write_programs(tmp_path, server="import sys; sys.exit(7)")
    with (
        pytest.raises(ConfigError) as caught,
        rpc_servers(tmp_path / "rpc-server", 2),
    ):
        pass
    assert_four_parts(caught.value, "rpc-server", "code 7", "GGML_RPC")


def test_a_program_that_fails_is_told_in_one_line(tmp_path: Path) -> None:
    write_programs(tmp_path, bench="import sys; sys.exit('illegal\\nno such model')")
    found = find_llama_cpp(tmp_path)
    assert found is not None
    with pytest.raises(ConfigError) as caught:
        measure_llama_cpp(
            found,
            tmp_path / "x.gguf",
            num_threads=1,
            prompt_tokens=8,
            generated_tokens=8,
            contexts=(8,),
        )
    assert_four_parts(caught.value, "llama-bench", "code 1", "no such model")
