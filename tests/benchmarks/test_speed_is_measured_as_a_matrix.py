"""One command measures the matrix, keeps it with machine and date, and a plot is drawn of it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from tests.benchmarks.llama_programs import DECODE_SPEED, PROMPT_SPEED, write_programs

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
OURS = {"shardmix auto, 1 thread", "shardmix auto, 2 threads", "shardmix auto, 2 workers of 1 core"}
LLAMA = {"llama.cpp, 1 thread", "llama.cpp, 2 threads", "llama.cpp RPC, 2 servers of 1 core"}
MAIN = "shardmix auto, 2 threads"


def run(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A script in a process of its own."""
    return subprocess.run(
        [sys.executable, str(BENCHMARKS / script), *arguments],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the result of a quick run on a tiny model, beside stand-ins for llama.cpp."""
    folder = tmp_path_factory.mktemp("speed")
    write_programs(folder / "llama")
    done = run(
        *("speed.py", "--quick", "--model", "tiny", "--out", str(folder / "results")),
        *("--llama-cpp", str(folder / "llama")),
    )
    assert done.returncode == 0, done.stderr
    return folder / "results"


def read(results: Path) -> dict[str, Any]:
    """The only JSON file."""
    (path,) = results.glob("speed-*.json")
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.slow
@pytest.mark.network
@pytest.mark.timeout(300)
def test_every_configuration_has_its_figures(results: Path) -> None:
    found = read(results)
    assert found["machine"]["cores"] >= 1
    assert found["machine"]["date"] in next(results.glob("*.md")).name
    samples = found["rows"]["models"]["tiny"]["samples"]
    assert set(samples) == {*OURS, *LLAMA, "transformers bfloat16, 2 threads", "memory bandwidth"}
    speeds = {"prefill 64", "decode at 32", "decode at 64"}
    for name in samples.keys() - {"memory bandwidth"}:
        (sample,) = samples[name]
        assert all(sample[key] > 0 for key in speeds), name
    (main,) = samples[MAIN]
    # What a runner has must hold its weights.
    assert main["runner peak bytes"] > main["weight bytes"] > 0
    assert main["host peak bytes"] > 0
    assert main["first token from a cold start"] > 0
    assert 0 < main["4 at once, slowest"] <= 1


@pytest.mark.slow
@pytest.mark.network
@pytest.mark.timeout(300)
def test_ratios_are_of_figures_of_the_same_round(results: Path) -> None:
    kept = read(results)["rows"]["models"]["tiny"]
    (main,), (one,) = kept["samples"][MAIN], kept["samples"]["shardmix auto, 1 thread"]
    (memory,) = kept["samples"]["memory bandwidth"]
    found = {text: asked["found"] for text, asked in kept["promises"].items()}
    assert found["decode, by llama.cpp"] == [main["decode at 32"] / DECODE_SPEED]
    assert found["decode with 1 thread, by llama.cpp"] == [one["decode at 32"] / DECODE_SPEED]
    assert found["prefill, by llama.cpp"] == [main["prefill 64"] / PROMPT_SPEED]
    assert found["4 conversations, by one"] == [main["4 at once"] / main["1 at once"]]
    read_bytes = main["weight bytes"] * main["decode at 32"]
    (share,) = found["decode, share of the ceiling"]
    assert share == pytest.approx(read_bytes / memory["2 threads"])


@pytest.mark.slow
@pytest.mark.network
@pytest.mark.timeout(300)
def test_the_plot_shows_every_configuration(results: Path, tmp_path: Path) -> None:
    (path,) = results.glob("speed-*.json")
    out = tmp_path / "speed.svg"
    done = run("plot.py", str(path), "--out", str(out))
    assert done.returncode == 0, done.stderr
    drawing = ElementTree.fromstring(out.read_text(encoding="utf-8"))
    texts = [node.text or "" for node in drawing.iter("{http://www.w3.org/2000/svg}text")]
    for name in ("2 threads", "2 workers of 1 core"):
        # Once for decode, once for prefill.
        assert texts.count(f"shardmix, {name}") == 2
    for name in (*LLAMA, "transformers bfloat16, 2 threads"):
        assert texts.count(name) == 2
    assert texts.count(f"{PROMPT_SPEED:.0f}") == len(LLAMA)
    assert out.stat().st_size < 200_000


@pytest.mark.parametrize(
    ("script", "arguments", "words"),
    [
        (
            "speed.py",
            ["--llama-cpp", "no/such"],
            ["no/such", "llama-bench", "leave the option out"],
        ),
        ("speed.py", ["--model", "no/such.gguf"], ["no/such.gguf", "default", "1b"]),
        ("plot.py", ["no/such.json"], ["no/such.json"]),
    ],
)
def test_what_is_not_there_is_told_in_one_line(
    script: str, arguments: list[str], words: list[str]
) -> None:
    done = run(script, *arguments)
    assert done.returncode == 1
    assert done.stdout == ""
    (line,) = done.stderr.strip().splitlines()
    for word in words:
        assert word in line


def test_a_file_that_is_no_result_is_not_drawn(tmp_path: Path) -> None:
    path = tmp_path / "other.json"
    path.write_text('{"machine": {}}', encoding="utf-8")
    done = run("plot.py", str(path), "--out", str(tmp_path / "x.svg"))
    assert done.returncode == 1
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "x.svg").exists()
