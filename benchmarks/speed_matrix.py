"""What `speed.py` measures in a round: our configurations and, beside them, other programs.

In: files of one model, sizes. Out: turns, each a name and a function that measures everything of it
once and returns figures by their names. It neither repeats nor compares.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import llama_cpp
from transformers_speed import TransformersModel

from engine.errors import EngineError
from engine.host import messages as api
from engine.measuring.bandwidth import read_bandwidth
from engine.measuring.conversations import measure_conversations
from engine.measuring.private_memory import MemoryWatch
from engine.session import Session, SessionOptions
from engine.weights.checkpoint import open_checkpoint
from engine.weights.formats import num_bytes

FIRST_TOKEN = Path(__file__).parent / "first_token.py"
FIRST_TOKEN_SECONDS = 600.0
# A long prompt is read in every round where that takes no longer, else in the first one alone.
LONG_PROMPT_SECONDS = 40.0
THREADS = (1, 2)

Sample = dict[str, float]
Measure = Callable[[], Sample]

# Names of turns.
MAIN = "shardmix auto, 2 threads"
ONE_THREAD = "shardmix auto, 1 thread"
TWO_WORKERS = "shardmix auto, 2 workers of 1 core"
THREE_WORKERS = "shardmix auto, 3 workers of 1 core"
TRANSFORMERS = "transformers bfloat16, 2 threads"
LLAMA_ONE_THREAD = "llama.cpp, 1 thread"
LLAMA = "llama.cpp, 2 threads"
LLAMA_RPC = "llama.cpp RPC, 2 servers of 1 core"
MEMORY = "memory bandwidth"

# Names of figures; the rest has sizes in its name.
RUNNER_PEAK, HOST_PEAK = "runner peak bytes", "host peak bytes"
RUNNER_ABOVE, HOST_ABOVE = "runner above weights and KV", "host above embeddings"
WEIGHT_BYTES = "weight bytes"
COLD, WARM = "first token from a cold start", "first token, file in memory"


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much is measured.

    Attributes:
        contexts: tokens before those that are generated; the first is the one compared with others.
        long_context: the same, for one configuration; 0 for none.
        tokens_each: of every conversation while all of them stream.
        has_warm_start: whether the start is timed with the file in the system's cache, too.
    """

    prompt_tokens: int = 512
    generated_tokens: int = 64
    contexts: tuple[int, ...] = (128, 512)
    long_context: int = 4096
    conversations: tuple[int, ...] = (1, 4, 16)
    tokens_each: int = 32
    num_workers: tuple[int, ...] = (2, 3)
    has_warm_start: bool = True


QUICK = Sizes(
    prompt_tokens=64,
    generated_tokens=16,
    contexts=(32, 64),
    long_context=0,
    conversations=(1, 4),
    tokens_each=8,
    num_workers=(2,),
    has_warm_start=False,
)


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """One model: as we and llama.cpp read it, and as transformers does.

    Attributes:
        tensor_files: what is read when it is loaded.
        embedding_bytes: in the file's format, as the engine host keeps them.
    """

    title: str
    path: Path
    transformers_path: Path
    tensor_files: tuple[Path, ...]
    embedding_bytes: int

    @classmethod
    def of(cls, title: str, path: Path, transformers_path: Path) -> ModelFiles:
        """Look into the files.

        Raises: CheckpointError: they are no model.
        """
        with open_checkpoint(path) as checkpoint:
            info = checkpoint.tensors["embedding"]
            size = num_bytes(info.format, info.shape)
            return cls(title, path, transformers_path, checkpoint.files, size)


@dataclass(frozen=True, slots=True)
class Turn:
    """Something that is measured once per round; it gets the round's number, from 0."""

    name: str
    measure: Callable[[int], Sample]


def prefill(tokens: int) -> str:
    """Name of the speed of reading a prompt."""
    return f"prefill {tokens}"


def decode(context: int) -> str:
    """Name of the speed of generating after so many tokens."""
    return f"decode at {context}"


def conversations(count: int) -> str:
    """Name of the speed of so many streams together."""
    return f"{count} at once"


def slowest(count: int) -> str:
    """Name of the slowest stream's share of the mean."""
    return f"{count} at once, slowest"


def threads(count: int) -> str:
    """Name of the memory's speed with so many threads."""
    return f"{count} thread" + "s" * (count > 1)


def our_turns(files: ModelFiles, sizes: Sizes, dtypes: Sequence[api.DtypeChoice]) -> list[Turn]:
    """Our configurations; the main one is measured in more ways than the others."""
    model = str(files.path)
    turns = [
        _our_turn(ONE_THREAD, SessionOptions(model=model, num_threads=1), files, sizes),
        _main_turn(files, sizes),
    ]
    names = {2: TWO_WORKERS, 3: THREE_WORKERS}
    for count in sizes.num_workers:
        options = SessionOptions(model=model, num_threads=1, num_workers=count)
        turns.append(_our_turn(names[count], options, files, sizes))
    for dtype in dtypes:
        options = SessionOptions(model=model, num_threads=2, dtype=dtype)
        turns.append(_our_turn(f"shardmix {dtype}, 2 threads", options, files, sizes))
    return turns


def neighbour_turns(
    files: ModelFiles,
    sizes: Sizes,
    programs: llama_cpp.LlamaCpp | None,
    servers: Sequence[str],
) -> list[Turn]:
    """transformers always, llama.cpp where it is there.

    Args:
        servers: addresses of its RPC servers; none leaves that turn out.
    """
    model = TransformersModel(files.transformers_path)

    def measure_transformers(_round: int) -> Sample:
        sample: Sample = {}
        for context in sorted({*sizes.contexts, sizes.prompt_tokens}):
            speeds = model.measure(context, sizes.generated_tokens, 2)
            sample[prefill(context)], sample[decode(context)] = speeds
        return sample

    turns = [Turn(TRANSFORMERS, measure_transformers)]
    if programs is not None:
        # What cannot run here says so before minutes of measuring.
        llama_cpp.check_llama_cpp(programs, files.path, servers)
        for name, count in ((LLAMA_ONE_THREAD, 1), (LLAMA, 2)):
            turns.append(Turn(name, _llama_measure(programs, files.path, sizes, count, ())))
        if servers:
            rpc = _llama_measure(programs, files.path, sizes, 1, servers)
            turns.append(Turn(LLAMA_RPC, rpc))
    return turns


def memory_turn() -> Turn:
    """The memory's speed by number of threads, in bytes per second."""
    return Turn(MEMORY, lambda _round: {threads(n): read_bandwidth(n) for n in THREADS})


def _our_turn(name: str, options: SessionOptions, files: ModelFiles, sizes: Sizes) -> Turn:
    def measure(_round: int) -> Sample:
        with MemoryWatch() as watch, Session(options) as session:
            return _measure_session(session, files, sizes, watch)

    return Turn(name, measure)


def _main_turn(files: ModelFiles, sizes: Sizes) -> Turn:
    options = SessionOptions(model=str(files.path), num_threads=2)

    def measure(round_number: int) -> Sample:
        sample = {COLD: seconds_to_first_token(files, options, is_cold=True)}
        if sizes.has_warm_start:
            sample[WARM] = seconds_to_first_token(files, options, is_cold=False)
        with MemoryWatch() as watch, Session(options) as session:
            sample |= _measure_session(session, files, sizes, watch)
            seconds = sizes.long_context / sample[prefill(sizes.prompt_tokens)]
            if sizes.long_context and (not round_number or seconds <= LONG_PROMPT_SECONDS):
                finished = session.benchmark(sizes.long_context, sizes.generated_tokens)
                sample[prefill(sizes.long_context)] = finished.prefill_tps
                sample[decode(sizes.long_context)] = finished.decode_tps
                _note_memory(session, files, finished, watch, sample)
            for count in sizes.conversations:
                found = measure_conversations(session, count, tokens_each=sizes.tokens_each)
                sample[conversations(count)] = found.total
                sample[slowest(count)] = found.slowest_share
        return sample

    return Turn(MAIN, measure)


def _measure_session(
    session: Session, files: ModelFiles, sizes: Sizes, watch: MemoryWatch
) -> Sample:
    """Prefill, decode at the contexts, memory."""
    watch.settle()
    session.benchmark(sizes.prompt_tokens, 8)  # Warm caches and thread pools.
    sample: Sample = {}
    for context in sorted({*sizes.contexts, sizes.prompt_tokens}):
        finished = session.benchmark(context, sizes.generated_tokens)
        sample[prefill(context)] = finished.prefill_tps
        sample[decode(context)] = finished.decode_tps
        _note_memory(session, files, finished, watch, sample)
    if session.model.config.experts is None:  # else a token reads but some of the weights
        sample[WEIGHT_BYTES] = sum(need.weight_bytes for need in session.memory.values())
    return sample


def _note_memory(
    session: Session,
    files: ModelFiles,
    finished: api.Finished,
    watch: MemoryWatch,
    sample: Sample,
) -> None:
    """Peaks so far, and what they are above what they must be, of the largest runner."""
    sample[RUNNER_PEAK], sample[HOST_PEAK] = watch.peak("runner"), watch.peak("host")
    needs = [session.memory[d.device].weight_bytes + d.cache_bytes for d in finished.devices]
    sample[RUNNER_ABOVE] = sample[RUNNER_PEAK] - max(needs)
    sample[HOST_ABOVE] = sample[HOST_PEAK] - files.embedding_bytes


def _llama_measure(
    programs: llama_cpp.LlamaCpp,
    path: Path,
    sizes: Sizes,
    num_threads: int,
    servers: Sequence[str],
) -> Callable[[int], Sample]:
    def measure(_round: int) -> Sample:
        found = llama_cpp.measure_llama_cpp(
            programs,
            path,
            num_threads=num_threads,
            prompt_tokens=sizes.prompt_tokens,
            generated_tokens=sizes.generated_tokens,
            contexts=sizes.contexts,
            servers=servers,
        )
        return {
            prefill(s.tokens) if s.is_prompt else decode(s.context): s.tokens_per_second
            for s in found
        }

    return measure


@contextlib.contextmanager
def llama_servers(programs: llama_cpp.LlamaCpp | None) -> Iterator[list[str]]:
    """Two RPC servers of llama.cpp, while a block runs; none where it has no such program."""
    if programs is None or programs.rpc_server is None:
        yield []
        return
    with llama_cpp.rpc_servers(programs.rpc_server, 2) as addresses:
        yield addresses


def seconds_to_first_token(files: ModelFiles, options: SessionOptions, *, is_cold: bool) -> float:
    """From the start of the first process to the first token of a short prompt.

    Args:
        is_cold: the model's file is not in the system's file cache, as far as it lets itself be
            driven out; else it is there.
    Raises: EngineError: no token came.
    """
    for file in files.tensor_files:
        _set_cached(file, is_cached=not is_cold)
    arguments = [str(files.path), str(options.num_threads), options.dtype]
    started = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, str(FIRST_TOKEN), *arguments], stdout=subprocess.PIPE, text=True
    )
    deadline = threading.Timer(FIRST_TOKEN_SECONDS, process.kill)
    deadline.start()
    try:
        assert process.stdout is not None
        with process.stdout:
            line = process.stdout.readline()
            seconds = time.perf_counter() - started
        process.wait()
    finally:
        deadline.cancel()
    if not line:
        raise EngineError(
            f"{files.path} was to bring a first token within {FIRST_TOKEN_SECONDS:.0f} s and brought none "
            f"(exit code {process.returncode}). Run {FIRST_TOKEN.name} by itself to see why"
        )
    return seconds


def _set_cached(file: Path, *, is_cached: bool) -> None:
    """Bring a file into the system's file cache, or ask that it leave."""
    with file.open("rb", buffering=0) as opened:
        if not is_cached and hasattr(os, "posix_fadvise"):
            # Pages that were never written back cannot be dropped.
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        while is_cached and opened.read(1 << 24):
            pass
