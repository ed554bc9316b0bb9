"""The command `shardmix`: window, generate, logits, chat, bench, models, nodes.

In: arguments. Out: text or JSON on standard output; progress and errors on standard error. An
error is one line; exit codes are 0, 1 for an error, 2 for usage, 130 when interrupted.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import signal
import sys
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from engine.cli_bench import bench
from engine.cli_nodes import app as nodes_app
from engine.cli_options import (
    BiasOption,
    CacheDtype,
    CacheDtypeOption,
    DraftModelOption,
    Dtype,
    DtypeOption,
    FrequencyOption,
    ImageOption,
    JsonOption,
    LogprobsOption,
    MinPOption,
    MinTokensOption,
    ModelOption,
    NodeOption,
    PlanOption,
    PresenceOption,
    RepetitionOption,
    SeedOption,
    Speculation,
    SpeculationOption,
    StopIdOption,
    StopOption,
    ThreadsOption,
    TopKOption,
    TopPOption,
    WindowOption,
    WorkersOption,
    parse_biases,
)
from engine.cli_output import ProgressDisplay, printer, report
from engine.cli_running import become, fail, has_display, run_session
from engine.decode.request_rules import check_ids, check_request, check_sampling
from engine.errors import ConfigError, EngineError, PromptError
from engine.host import messages as api
from engine.session import GenerateOptions, Prompt, Session, SessionOptions, parse_ids
from engine.vision.files import read_image_files

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Run language models on the computers you already own. Without a command: the window.",
)
app.add_typer(nodes_app, name="nodes")


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
        fail(
            ConfigError(
                "the window needs PySide6, which is not installed here; install it with "
                "`pip install 'shardmix[app]'`, or use `shardmix chat`"
            )
        )
    arguments = ["--dtype", dtype.value]
    if model is not None:
        arguments += ["--model", model]
    if not has_display():
        print(
            "no display found (DISPLAY and WAYLAND_DISPLAY are empty): chat starts in the terminal",
            file=sys.stderr,
        )
        # The window calls them demo workers, the commands workers.
        become("engine.cli", ["chat", *arguments, "--workers", str(demo_workers)])
    become("app", [*arguments, "--demo-workers", str(demo_workers)])


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="What to say to the model.")],
    model: ModelOption = None,
    image: ImageOption = None,
    max_tokens: Annotated[
        int, typer.Option(help="Longest answer, in tokens; 0: until the KV window is full.")
    ] = 512,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.3,
    top_k: TopKOption = 0,
    top_p: TopPOption = 0.9,
    min_p: MinPOption = 0.0,
    repetition_penalty: RepetitionOption = 1.0,
    presence_penalty: PresenceOption = 0.0,
    frequency_penalty: FrequencyOption = 0.0,
    logit_bias: BiasOption = None,
    seed: SeedOption = None,
    min_tokens: MinTokensOption = 0,
    stop: StopOption = None,
    stop_id: StopIdOption = None,
    logprobs: LogprobsOption = None,
    speculation: SpeculationOption = Speculation.AUTO,
    draft_model: DraftModelOption = None,
    raw: Annotated[bool, typer.Option("--raw", help="Skip the chat template.")] = False,
    workers: WorkersOption = 0,
    plan: PlanOption = None,
    threads: ThreadsOption = None,
    dtype: DtypeOption = Dtype.AUTO,
    kv_window: WindowOption = None,
    kv_dtype: CacheDtypeOption = CacheDtype.AUTO,
    node: NodeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Answer one prompt; the text appears as it comes."""
    if logprobs is not None and not as_json:
        raise typer.BadParameter("--logprobs are part of the JSON object; give --json too")
    if image and raw:
        raise typer.BadParameter("--image needs the chat template; leave --raw out")
    images = tuple(str(path.absolute()) for path in image or ())
    try:
        sampling = api.SamplingSettings(
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            repetition_penalty=repetition_penalty,
            seed=seed,
            min_p=min_p,
            presence_penalty=presence_penalty,
            frequency_penalty=frequency_penalty,
            logit_bias=parse_biases(logit_bias),
        )
        answer = GenerateOptions(
            max_tokens=max_tokens,
            stop=tuple(stop or ()),
            stop_ids=tuple(stop_id or ()),
            min_tokens=min_tokens,
            logprobs=logprobs,
            speculation=speculation.value,
        )
        call = api.Generate(request_id=0, sampling=sampling, **answer)
        check_request(call)
        read_image_files(images)
    except EngineError as error:
        fail(error)

    def check(opened: api.ModelOpened) -> None:
        check_request(call, opened.config.vocab_size)
        if images and opened.config.vision is None:
            raise PromptError(
                f"--image: {opened.name} reads text only. Leave it out, or give a model with an "
                "image encoder, such as Llama 4"
            )

    def work(session: Session, display: ProgressDisplay) -> None:
        session.listen(printer(display) if not as_json else display.show)
        asked: Prompt = prompt
        if images:
            asked = (api.ChatTurn(role="user", content=prompt, images=images),)
        finished = session.generate(asked, raw=raw, sampling=sampling, **answer)
        display.stop()
        print(json.dumps(report(finished, session.memory)) if as_json else "")

    run_session(
        _options(model, dtype, workers, plan, threads, kv_window, kv_dtype, node, draft_model),
        work,
        check,
    )


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
    kv_dtype: CacheDtypeOption = CacheDtype.AUTO,
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
        fail(error)

    def check(opened: api.ModelOpened) -> None:
        check_ids(numbers, opened.config.vocab_size)

    def work(session: Session, display: ProgressDisplay) -> None:
        rows = session.logits(numbers)
        display.stop()
        try:
            with out.open("wb") as file:
                np.save(file, rows)
        except OSError as error:
            raise ConfigError(f"--out {out} cannot be written: {error.strerror}") from error
        print(f"{out}: float32 {list(rows.shape)}", file=sys.stderr)

    run_session(
        _options(model, dtype, workers, plan, threads, kv_window, kv_dtype, node), work, check
    )


@app.command()
def chat(
    model: ModelOption = None,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.3,
    top_p: TopPOption = 0.9,
    seed: SeedOption = None,
    speculation: SpeculationOption = Speculation.AUTO,
    draft_model: DraftModelOption = None,
    workers: WorkersOption = 0,
    plan: PlanOption = None,
    threads: ThreadsOption = None,
    dtype: DtypeOption = Dtype.AUTO,
    kv_window: WindowOption = None,
    kv_dtype: CacheDtypeOption = CacheDtype.AUTO,
    node: NodeOption = None,
) -> None:
    """Talk in the terminal. Ctrl+C stops an answer, /new starts over, Ctrl+D or /exit ends."""
    sampling = api.SamplingSettings(temperature=temperature, top_p=top_p, seed=seed)
    try:
        check_sampling(sampling)
    except EngineError as error:
        fail(error)

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
                finished = session.generate(
                    tuple(asked), sampling=sampling, speculation=speculation.value
                )
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

    run_session(
        _options(model, dtype, workers, plan, threads, kv_window, kv_dtype, node, draft_model), work
    )


app.command()(bench)


@app.command()
def models(
    family: Annotated[
        str | None, typer.Argument(help="Show what this family's tensors are called.")
    ] = None,
) -> None:
    """List the supported families, or what one family's tensors are called in its files."""
    # Their tables take a moment to build, which other commands need not wait for.
    from engine.weights.families import FAMILIES
    from engine.weights.models import default_model_path
    from engine.weights.names import SOURCE_TITLES, printable_table

    if family is None:
        for name, entry in FAMILIES.items():
            print(f"{name:10} {', '.join(SOURCE_TITLES[source] for source in entry.tables)}")
        path = default_model_path()
        state = "here" if path.is_file() else "not fetched yet"
        print(f"\ndefault model: {path} ({state})")
    elif family in FAMILIES:
        print(printable_table(family))
    else:
        fail(ConfigError(f"{family!r} is no family; choose one of {', '.join(FAMILIES)}"))


def _options(
    model: str | None,
    dtype: Dtype,
    workers: int,
    plan: Path | None,
    threads: int | None,
    kv_window: int | None,
    kv_dtype: CacheDtype,
    node: list[str] | None,
    draft_model: str | None = None,
) -> SessionOptions:
    return SessionOptions(
        model=model,
        dtype=dtype.value,
        num_workers=workers,
        plan=plan,
        num_threads=threads,
        kv_window=kv_window,
        kv_dtype=kv_dtype.value,
        nodes=tuple(node or ()),
        draft_model=draft_model,
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
