"""Prefill, decode, conversations, memory and waiting, beside transformers and llama.cpp, in one run.

`python benchmarks/speed.py [--quick] [--rounds 3] [--model default] [--model 1b] [--llama-cpp DIR]`:
every configuration once per round, in turn, started afresh and alone while it is timed; the order
turns round every other round, so that a machine that gets slower does so for all of them. Figures
are medians, ratios are medians of the ratios within a round. Ours are of the whole product: engine
host, worker, runner, sampling, streaming.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import machine
import make_random_model
import speed_matrix as matrix
import speed_tables as tables
from llama_cpp import LlamaCpp, find_llama_cpp

from engine.errors import ConfigError, EngineError
from engine.host import messages as api
from engine.kernels.available import kernels_in_use
from engine.weights.models import fetch_default_model

# What is kept of a run with models to come.
UNFINISHED = "unfinished-speed"
DEFAULT_MODELS = ["default", "1b"]
DTYPES = [name for name in get_args(api.DtypeChoice) if name != "auto"]


def model_files(name: str, folder: Path) -> matrix.ModelFiles:
    """A model by its name, or by its path; those of random weights are written if they are not there.

    Raises: ConfigError: it is neither.
    """
    if name == "default":
        path = fetch_default_model(lambda _done, _total: None)
        return matrix.ModelFiles.of("SmolLM2-135M-Instruct Q4_1", path, path)
    if name in make_random_model.SHAPES:
        shape = make_random_model.SHAPES[name]
        path, other = folder / f"random-{name}-q4_0.gguf", folder / f"random-{name}"
        vocabulary = make_random_model.read_vocabulary()
        if not path.exists():
            make_random_model.write_gguf(path, shape, vocabulary, "q4_0", seed=0)
        if not (other / "model.safetensors").exists():
            make_random_model.write_folder(other, shape, vocabulary, seed=0)
        return matrix.ModelFiles.of(f"random weights in the shape of {name}, Q4_0", path, other)
    path = Path(name)
    if not path.exists():
        known = ", ".join(["default", *make_random_model.SHAPES])
        raise ConfigError(
            f"--model {name} is neither a file or folder here nor one of {known}. Name one of them"
        )
    return matrix.ModelFiles.of(path.name, path, path)


def run_rounds(turns: Sequence[matrix.Turn], num_rounds: int) -> dict[str, list[matrix.Sample]]:
    """Everything once per round."""
    samples: dict[str, list[matrix.Sample]] = {turn.name: [] for turn in turns}
    for number in range(num_rounds):
        for turn in turns if number % 2 == 0 else reversed(turns):
            print(f"round {number + 1}: {turn.name}", file=sys.stderr, flush=True)
            samples[turn.name].append(turn.measure(number))
    return samples


def measure_model(
    name: str, options: argparse.Namespace, sizes: matrix.Sizes, programs: LlamaCpp | None
) -> tuple[dict[str, Any], list[str]]:
    """What is kept of a model, and its part of the Markdown."""
    with tempfile.TemporaryDirectory() as temporary:
        files = model_files(name, options.models_folder or Path(temporary))
        # llama.cpp reads GGUF files alone.
        if files.path.suffix != ".gguf":
            programs = None
        with matrix.llama_servers(programs) as servers:
            turns = [
                matrix.memory_turn(),
                *matrix.our_turns(files, sizes, options.dtype),
                *matrix.neighbour_turns(files, sizes, programs, servers),
            ]
            samples = run_rounds(turns, options.rounds)
    samples = tables.with_ceiling(samples, matrix.decode(sizes.contexts[0]))
    asked: dict[str, Any] = {}
    # The promises are about the whole sizes.
    kind = "" if options.quick else name
    lines = [
        f"## {files.title}",
        "",
        *tables.speed_rows(samples, sizes),
        "",
        *tables.question_rows(kind, samples, sizes, asked),
        "",
        *tables.other_rows(samples, sizes),
        "",
    ]
    rows = {
        "title": files.title,
        "median": {turn: tables.medians(rounds) for turn, rounds in samples.items()},
        "samples": samples,
        "promises": asked,
    }
    return rows, lines


def arguments() -> argparse.Namespace:
    """What was asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one round of small sizes")
    parser.add_argument("--rounds", type=int, help="how often each is measured (3)")
    parser.add_argument(
        "--model",
        action="append",
        help="default, a shape of random weights (1b, 7b, tiny), or a path; may be repeated (default, 1b)",
    )
    parser.add_argument(
        "--dtype",
        action="append",
        default=[],
        choices=DTYPES,
        help="measure this compute format, too; may be repeated",
    )
    parser.add_argument(
        "--llama-cpp", type=Path, help="folder with llama-bench, if not on the PATH"
    )
    parser.add_argument("--models-folder", type=Path, help="keep models of random weights here")
    parser.add_argument(
        "--out",
        type=Path,
        help="folder where the result is kept (benchmarks/results; nowhere with --quick)",
    )
    options = parser.parse_args()
    options.rounds = options.rounds or (1 if options.quick else 3)
    options.model = options.model or (["default"] if options.quick else DEFAULT_MODELS)
    options.out = options.out or (None if options.quick else machine.RESULTS)
    return options


def main() -> int:
    """Measure and write the result; an error is one line."""
    options = arguments()
    about = machine.describe()
    sizes = matrix.QUICK if options.quick else matrix.Sizes()
    found: dict[str, tuple[dict[str, Any], list[str]]] = {}
    try:
        programs = find_llama_cpp(options.llama_cpp)
        for name in dict.fromkeys(options.model):
            found[name] = measure_model(name, options, sizes, programs)
            # After each: a large model takes long, and may be given up.
            is_whole = len(found) == len(set(options.model))
            keep(found, options, sizes, programs, about, is_whole=is_whole)
    except EngineError as error:
        print(f"speed.py: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0


def keep(
    found: Mapping[str, tuple[dict[str, Any], list[str]]],
    options: argparse.Namespace,
    sizes: matrix.Sizes,
    programs: LlamaCpp | None,
    about: dict[str, Any],
    *,
    is_whole: bool,
) -> None:
    """Keep what was found of the models so far; print it when it is the whole."""
    neighbour = "not found, so not compared" if programs is None else str(programs.bench)
    lines = [
        (
            f"Prompt of {sizes.prompt_tokens} tokens, {sizes.generated_tokens} generated; tokens per "
            f"second, medians of {options.rounds} round(s) in one run, ratios within a round. Our "
            f"kernels: {kernels_in_use()}. llama.cpp: {neighbour}; its figures are without sampling. "
            "What is promised is promised for a machine of two cores with AMX. Private memory is the "
            "most anonymous memory seen at 20 looks a second (RssAnon; elsewhere than on Linux the "
            "unique set size)."
        ),
        "",
    ]
    rows: dict[str, Any] = {
        "kernels": kernels_in_use(),
        "prompt_tokens": sizes.prompt_tokens,
        "context": sizes.contexts[0],
        "models": {},
    }
    for name, (kept, part) in found.items():
        rows["models"][name] = kept
        lines += part
    name = "speed" if is_whole else UNFINISHED
    machine.write(name, about, rows, lines, options.out, is_shown=is_whole)
    if is_whole and options.out is not None:
        for path in options.out.glob(f"{UNFINISHED}-*"):
            path.unlink()


if __name__ == "__main__":
    sys.exit(main())
