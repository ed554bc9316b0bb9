"""llama.cpp's own benchmark as a neighbour in a table: found, run, and its JSON read.

In: a folder with its programs or the PATH, a GGUF file, sizes. Out: tokens per second. Its figures
hold neither sampling nor detokenising, ours do. It builds nothing.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.errors import ConfigError

BENCH = "llama-bench"
# The name changed between its releases.
RPC_SERVERS = ("ggml-rpc-server", "rpc-server")
RUN_SECONDS = 900.0
START_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class LlamaCpp:
    """Where its programs are; `rpc_server` is None where it was built without."""

    bench: Path
    rpc_server: Path | None


@dataclass(frozen=True, slots=True)
class LlamaSpeed:
    """One figure: so many tokens after `context` others, of a prompt or generated."""

    is_prompt: bool
    tokens: int
    context: int
    num_threads: int
    tokens_per_second: float


def find_llama_cpp(folder: Path | None) -> LlamaCpp | None:
    """Its programs in a folder, or on the PATH.

    Returns: None where no folder was named and there is none on the PATH.
    Raises: ConfigError: the folder that was named has none.
    """
    places = None
    if folder is not None:
        places = os.pathsep.join(str(place) for place in (folder, folder / "bin"))
    bench = shutil.which(BENCH, path=places)
    if bench is None:
        if folder is None:
            return None
        raise ConfigError(
            f"--llama-cpp {folder}: there is no program {BENCH} in it, nor in its folder bin. Name "
            "the folder with llama.cpp's programs, such as build/bin, or leave the option out"
        )
    server = next(filter(None, (shutil.which(name, path=places) for name in RPC_SERVERS)), None)
    return LlamaCpp(Path(bench), None if server is None else Path(server))


def parse_speeds(text: str) -> list[LlamaSpeed]:
    """The figures in what `llama-bench -o json` printed.

    Raises: ConfigError: it is not that.
    """
    try:
        return [_speed(test) for test in json.loads(text)]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{BENCH} was to print a list of tests in JSON, and {type(error).__name__} came of "
            f"reading it ({' '.join(str(error).split())[:120]}). Take a llama.cpp whose "
            f"`{BENCH} -o json` has n_prompt, n_gen, n_depth, n_threads and avg_ts"
        ) from None


def _speed(test: dict[str, Any]) -> LlamaSpeed:
    num_prompt, num_generated = int(test["n_prompt"]), int(test["n_gen"])
    if bool(num_prompt) == bool(num_generated):
        raise ValueError(f"a test of {num_prompt} prompt and {num_generated} generated tokens")
    return LlamaSpeed(
        is_prompt=bool(num_prompt),
        tokens=num_prompt or num_generated,
        context=int(test["n_depth"]),
        num_threads=int(test["n_threads"]),
        tokens_per_second=float(test["avg_ts"]),
    )


def measure_llama_cpp(
    programs: LlamaCpp,
    model: Path,
    *,
    num_threads: int,
    prompt_tokens: int,
    generated_tokens: int,
    contexts: Sequence[int],
    servers: Sequence[str] = (),
) -> list[LlamaSpeed]:
    """Read a prompt, and generate after each context, once.

    Args:
        contexts: tokens before the generated ones.
        servers: HOST:PORT of RPC servers, which then compute all layers.
    Raises: ConfigError: it failed, took too long, or printed something else.
    """
    command = [
        *(str(programs.bench), "-m", str(model), "-t", str(num_threads), "-r", "1", "-o", "json"),
        *("-ngl", "99" if servers else "0"),
    ]
    if servers:
        command += ["--rpc", ",".join(servers)]
    depths = ",".join(map(str, contexts))
    return [
        *parse_speeds(_output([*command, "-p", str(prompt_tokens), "-n", "0"])),
        *parse_speeds(_output([*command, "-p", "0", "-n", str(generated_tokens), "-d", depths])),
    ]


def check_llama_cpp(programs: LlamaCpp, model: Path, servers: Sequence[str]) -> None:
    """Compute a few tokens, alone and with the servers.

    Raises: ConfigError: as `measure_llama_cpp`.
    """
    for addresses in dict.fromkeys([(), tuple(servers)]):
        measure_llama_cpp(
            programs,
            model,
            num_threads=1,
            prompt_tokens=8,
            generated_tokens=2,
            contexts=(8,),
            servers=addresses,
        )


def _output(command: list[str]) -> str:
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=RUN_SECONDS,
            check=False,
        )
    except OSError as error:
        raise ConfigError(
            f"{command[0]} was to measure llama.cpp and cannot be run: {error.strerror}. Build it "
            "for this computer, or leave --llama-cpp out"
        ) from None
    except subprocess.TimeoutExpired:
        raise ConfigError(
            f"{command[0]} was to measure llama.cpp and did not end within {RUN_SECONDS:.0f} s. "
            "Choose a smaller --model, or leave --llama-cpp out"
        ) from None
    if done.returncode:
        words = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise ConfigError(
            f"{command[0]} was to measure llama.cpp and ended with code {done.returncode}: "
            f"{words[:200]}. Build it anew, or leave --llama-cpp out"
        )
    return done.stdout


@contextlib.contextmanager
def rpc_servers(program: Path, count: int) -> Iterator[list[str]]:
    """Run RPC servers of one thread each on the loopback, while a block runs.

    Raises: ConfigError: one did not start to listen.
    """
    processes: list[subprocess.Popen[bytes]] = []
    addresses: list[str] = []
    try:
        for _ in range(count):
            port = _free_port()
            command = [str(program), "-H", "127.0.0.1", "-p", str(port), "-t", "1"]
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            processes.append(process)
            _wait_for(process, port, program)
            addresses.append(f"127.0.0.1:{port}")
        yield addresses
    finally:
        for process in processes:
            process.kill()
            process.wait()


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def _wait_for(process: subprocess.Popen[bytes], port: int, program: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1.0):
            return
        time.sleep(0.05)
    raise ConfigError(
        f"{program} was to listen on port {port} and did not within {START_SECONDS:.0f} s (exit "
        f"code {process.poll()}). Build llama.cpp with -DGGML_RPC=ON, or leave --llama-cpp out"
    )
