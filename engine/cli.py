"""The command `shardmix`: window, generate, logits, chat, bench.

In: arguments. Out: text or JSON on standard output; progress and errors on standard error. An
error is one line; exit codes are 0, 1 for an error, 2 for usage, 130 when interrupted.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import platform
import signal
import subprocess
import sys
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated, NoReturn

import numpy as np
import typer

from engine.cli_output import ProgressDisplay, plan_dict, printer, report
from engine.decode.sampling import validate_sampling
from engine.errors import ConfigError, EngineError
from engine.host import messages as api
from engine.session import Session, SessionOptions, parse_ids

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Run language models on the computers you already own. Without a command: the window.",
)


class Dtype(StrEnum):
    """Formats a model computes in."""

    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    INT8 = "int8"


ModelOption = Annotated[
    str | None,
    typer.Option(
        help="GGUF file, or folder with safetensors. Default: SmolLM2-135M-Instruct, fetched once."
    ),
]
WorkersOption = Annotated[
    int,
    typer.Option(
        min=0, max=16, help="Start this many simulated nodes; without --plan they share evenly."
    ),
]
PlanOption = Annotated[
    Path | None, typer.Option(help="Plan file (TOML) that says which device computes what.")
]
ThreadsOption = Annotated[
    int | None, typer.Option(min=1, max=1024, help="Threads per runner. Default: cores / runners.")
]
DtypeOption = Annotated[Dtype, typer.Option(help="What the model computes in.")]
WindowOption = Annotated[
    int | None,
    typer.Option(help="Positions a conversation may have. Default: the model's, at most 8192."),
]
NodeOption = Annotated[
    list[str] | None,
    typer.Option(help="Join token that `shardmix-worker run` printed on another computer."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object at the end.")]


def _fail(error: EngineError) -> NoReturn:
    """One line on standard error, exit code 1."""
    line = " ".join(str(error).split())
    print(f"shardmix: {line}", file=sys.stderr)
    raise typer.Exit(1)


def _run(options: SessionOptions, work: Callable[[Session, ProgressDisplay], None]) -> None:
    """Open a session, do the work, and turn errors into exit codes."""
    display = ProgressDisplay()
    try:
        with Session(options, display.show) as session:
            for name in session.unused_nodes:
                print(
                    f"note: node {name} computes nothing: no plan names {name}/cpu (see --plan)",
                    file=sys.stderr,
                )
            work(session, display)
    except EngineError as error:
        display.stop()
        _fail(error)
    except BrokenPipeError:
        # The reader of our output is gone; so is its interest.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(1) from None
    finally:
        display.stop()


@app.callback(invoke_without_command=True)
def window(
    context: typer.Context,
    demo_workers: Annotated[
        int, typer.Option(min=0, max=16, help="Simulated nodes to start with the window.")
    ] = 0,
    model: ModelOption = None,
    dtype: DtypeOption = Dtype.AUTO,
) -> None:
    """Run language models on the computers you already own. Without a command: the window."""
    if context.invoked_subcommand is not None:
        given = [
            name
            for name in ("demo_workers", "model", "dtype")
            if (source := context.get_parameter_source(name)) and source.name == "COMMANDLINE"
        ]
        if given:
            option = "--" + given[0].replace("_", "-")
            raise typer.BadParameter(
                f"{option} before {context.invoked_subcommand} is for the window; write it after"
            )
        return
    if importlib.util.find_spec("PySide6") is None:
        _fail(
            ConfigError(
                "the window needs PySide6, which is not installed here; install it with "
                "`pip install 'shardmix[app]'`, or use `shardmix chat`"
            )
        )
    arguments = ["--dtype", dtype.value]
    if model is not None:
        arguments += ["--model", model]
    if not _has_display():
        print(
            "no display found (DISPLAY and WAYLAND_DISPLAY are empty): chat starts in the terminal",
            file=sys.stderr,
        )
        # The window calls them demo workers, the commands workers.
        _become("engine.cli", ["chat", *arguments, "--workers", str(demo_workers)])
    _become("app", [*arguments, "--demo-workers", str(demo_workers)])


def _has_display() -> bool:
    """Whether a window can be shown."""
    names = ("DISPLAY", "WAYLAND_DISPLAY", "QT_QPA_PLATFORM")
    return sys.platform != "linux" or any(os.environ.get(name) for name in names)


def _become(module: str, arguments: list[str]) -> NoReturn:
    """Run another program in this one's place, so that what ends this one ends it."""
    command = [sys.executable, "-P", "-m", module, *arguments]
    if os.name != "nt":
        os.execv(command[0], command)
    process = subprocess.Popen(command)
    try:
        raise typer.Exit(process.wait())
    except KeyboardInterrupt:
        process.terminate()
        process.wait()
        raise typer.Exit(130) from None


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="What to say to the model.")],
    model: ModelOption = None,
    max_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens; 0: no limit.")] = 512,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.3,
    top_k: Annotated[int, typer.Option(help="Sample among the k likeliest; 0: all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Sample among the likeliest that sum to p.")] = 0.9,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1 discourages repeats.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Makes sampling repeatable.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="Text that ends the answer.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Skip the chat template.")] = False,
    workers: WorkersOption = 0,
    plan: PlanOption = None,
    threads: ThreadsOption = None,
    dtype: DtypeOption = Dtype.AUTO,
    kv_window: WindowOption = None,
    node: NodeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Answer one prompt; the text appears as it comes."""
    options = _options(model, dtype, workers, plan, threads, kv_window, node)
    sampling = api.SamplingSettings(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
    )

    try:
        validate_sampling(sampling)
    except EngineError as error:
        _fail(error)

    def work(session: Session, display: ProgressDisplay) -> None:
        session.listen(printer(display) if not as_json else display.show)
        finished = session.generate(
            prompt, raw=raw, max_tokens=max_tokens, sampling=sampling, stop=tuple(stop or ())
        )
        display.stop()
        print(json.dumps(report(finished)) if as_json else "")

    _run(options, work)


@app.command()
def logits(
    out: Annotated[Path, typer.Option(help="Where to write float32 [tokens, vocabulary], .npy.")],
    ids: Annotated[str | None, typer.Option(help="Token ids, such as 1,2,3.")] = None,
    ids_file: Annotated[Path | None, typer.Option(help="File with token ids.")] = None,
    model: ModelOption = None,
    workers: WorkersOption = 0,
    plan: PlanOption = None,
    threads: ThreadsOption = None,
    dtype: DtypeOption = Dtype.FLOAT32,
    kv_window: WindowOption = None,
    node: NodeOption = None,
) -> None:
    """Write the logits of every position, to compare with another implementation."""
    if (ids is None) == (ids_file is None):
        raise typer.BadParameter("give either --ids or --ids-file")
    try:
        text = ids if ids is not None else _read_text(ids_file)
        numbers = parse_ids(text)
        if not out.parent.is_dir():
            raise ConfigError(f"--out {out}: the folder {out.parent} does not exist; make it first")
    except EngineError as error:
        _fail(error)

    def work(session: Session, display: ProgressDisplay) -> None:
        rows = session.logits(numbers)
        display.stop()
        try:
            with out.open("wb") as file:
                np.save(file, rows)
        except OSError as error:
            raise ConfigError(f"--out {out} cannot be written: {error.strerror}") from error
        print(f"{out}: float32 {list(rows.shape)}", file=sys.stderr)

    _run(_options(model, dtype, workers, plan, threads, kv_window, node), work)


@app.command()
def chat(
    model: ModelOption = None,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.3,
    top_p: Annotated[float, typer.Option(help="Sample among the likeliest that sum to p.")] = 0.9,
    seed: Annotated[int | None, typer.Option(help="Makes sampling repeatable.")] = None,
    workers: WorkersOption = 0,
    plan: PlanOption = None,
    threads: ThreadsOption = None,
    dtype: DtypeOption = Dtype.AUTO,
    kv_window: WindowOption = None,
    node: NodeOption = None,
) -> None:
    """Talk in the terminal. Ctrl+C stops an answer, /new starts over, Ctrl+D or /exit ends."""
    sampling = api.SamplingSettings(temperature=temperature, top_p=top_p, seed=seed)

    def work(session: Session, display: ProgressDisplay) -> None:
        display.stop()
        print(f"{session.model.name} is ready. /new starts over, /exit ends.", file=sys.stderr)
        session.listen(printer(display))
        turns: list[api.ChatTurn] = []
        while True:
            try:
                line = input("> ").strip()
            except (EOFError, KeyboardInterrupt):
                print()
                return
            if line in ("/exit", "/quit"):
                return
            if line == "/new":
                turns = []
                continue
            if not line:
                continue
            asked = [*turns, api.ChatTurn(role="user", content=line)]
            try:
                finished = session.generate(tuple(asked), sampling=sampling)
            except KeyboardInterrupt:
                print("\n(stopped)", file=sys.stderr)
                continue
            except EngineError as error:
                print(f"shardmix: {error}", file=sys.stderr)
                continue
            display.stop()
            print()
            turns = [*asked, api.ChatTurn(role="assistant", content=finished.text)]
            print(
                f"[{len(finished.token_ids)} tokens, {finished.decode_tps:.1f} tok/s, first after "
                f"{finished.ttft_s:.2f} s, {finished.finish_reason}]",
                file=sys.stderr,
            )

    _run(_options(model, dtype, workers, plan, threads, kv_window, node), work)


@app.command()
def bench(
    model: ModelOption = None,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Tokens of the prompt.")] = 512,
    generated_tokens: Annotated[int, typer.Option(min=2, help="Tokens of the answer.")] = 64,
    workers: WorkersOption = 0,
    plan: PlanOption = None,
    threads: ThreadsOption = None,
    dtype: DtypeOption = Dtype.AUTO,
    kv_window: WindowOption = None,
    node: NodeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure prefill and decode speed."""

    def work(session: Session, display: ProgressDisplay) -> None:
        session.benchmark(min(prompt_tokens, 64), 8)  # Warm caches and thread pools.
        finished = session.benchmark(prompt_tokens, generated_tokens)
        display.stop()
        result = {
            "model": session.model.name,
            "dtype": session.model.dtype,
            "kernels": "torch",
            "prompt_tokens": finished.prompt_tokens,
            "generated_tokens": len(finished.token_ids),
            "prefill_tps": finished.prefill_tps,
            "decode_tps": finished.decode_tps,
            "ttft_s": finished.ttft_s,
            "plan": plan_dict(finished),
            "devices": report(finished)["devices"],
            "machine": platform.processor() or platform.machine(),
        }
        if as_json:
            print(json.dumps(result))
            return
        print(
            f"{result['model']} {result['dtype']}: prefill {finished.prefill_tps:.1f} tok/s, "
            f"decode {finished.decode_tps:.1f} tok/s"
        )

    _run(_options(model, dtype, workers, plan, threads, kv_window, node), work)


def _options(
    model: str | None,
    dtype: Dtype,
    workers: int,
    plan: Path | None,
    threads: int | None,
    kv_window: int | None,
    node: list[str] | None,
) -> SessionOptions:
    return SessionOptions(
        model=model,
        dtype=dtype.value,
        num_workers=workers,
        plan=plan,
        num_threads=threads,
        kv_window=kv_window,
        nodes=tuple(node or ()),
    )


def _read_text(path: Path | None) -> str:
    assert path is not None
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--ids-file {path} cannot be read: {error}") from error


def _on_terminate(_number: int, _frame: object) -> None:
    sys.exit(143)


def main() -> None:
    """Entry of `shardmix`."""
    with contextlib.suppress(AttributeError, ValueError):
        sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]
    # A terminated command cleans up like an interrupted one.
    signal.signal(signal.SIGTERM, _on_terminate)
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
