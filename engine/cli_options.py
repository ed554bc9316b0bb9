"""The options of the command line that several commands share, and those with a form of their own.

In: text that a person typed. Out: types for typer, and values; errors name the option.
"""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from engine.decode.request_rules import MAX_LOGPROBS
from engine.errors import PromptError


class Dtype(StrEnum):
    """Formats a model computes in."""

    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    INT8 = "int8"
    INT4 = "int4"


class CacheDtype(StrEnum):
    """Formats keys and values are kept in."""

    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


class Speculation(StrEnum):
    """Whether guesses at the next tokens are verified with them."""

    AUTO = "auto"
    ON = "on"
    OFF = "off"


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
    typer.Option(
        help="Positions a conversation remembers; longer answers slide. Default: the model's, at "
        "most 8192, or OPEN_CLUSTER_KV_WINDOW."
    ),
]
CacheDtypeOption = Annotated[
    CacheDtype,
    typer.Option(
        help="What keys and values are kept in. Default: float32 if the model computes in it, else "
        "bfloat16, or OPEN_CLUSTER_KV_CACHE_DTYPE."
    ),
]
ImageOption = Annotated[
    list[Path] | None,
    typer.Option(help="Image file to show the model before the prompt; may be repeated."),
]
NodeOption = Annotated[
    list[str] | None,
    typer.Option(
        help="Join token that `shardmix-worker token` printed on another computer; once is enough."
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object at the end.")]

TopKOption = Annotated[int, typer.Option(help="Sample among the k likeliest; 0: all.")]
TopPOption = Annotated[float, typer.Option(help="Sample among the likeliest that sum to p.")]
MinPOption = Annotated[
    float,
    typer.Option(help="Sample among those at least this many times as likely as the likeliest."),
]
RepetitionOption = Annotated[
    float, typer.Option(help="Above 1 discourages what prompt or answer already have.")
]
PresenceOption = Annotated[
    float, typer.Option(help="Above 0 discourages what the answer already has; -2 to 2.")
]
FrequencyOption = Annotated[
    float, typer.Option(help="The same, for every time that the answer has it; -2 to 2.")
]
BiasOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="ID=VALUE", help="Add this to a token's logit, -100 to 100; may be repeated."
    ),
]
SeedOption = Annotated[int | None, typer.Option(help="Makes sampling repeatable.")]
MinTokensOption = Annotated[
    int, typer.Option(help="Until the answer has as many tokens, nothing but a limit ends it.")
]
StopOption = Annotated[
    list[str] | None, typer.Option(help="Text that ends the answer; may be repeated.")
]
StopIdOption = Annotated[
    list[int] | None, typer.Option(help="Token id that ends the answer; may be repeated.")
]
SpeculationOption = Annotated[
    Speculation,
    typer.Option(
        help="Verify guesses from the text so far, and of a --draft-model, several in a step: where "
        "that measured faster, always, or never. With --dtype float32 the answer is the same."
    ),
]
DraftModelOption = Annotated[
    str | None,
    typer.Option(
        help="GGUF file or folder of a smaller model with the same vocabulary, whose guesses are "
        "verified as --speculation says; computed on this computer."
    ),
]
LogprobsOption = Annotated[
    int | None,
    typer.Option(
        help="With --json: the natural log-probability of every token, and of the N likeliest "
        f"(0 to {MAX_LOGPROBS}), before temperature, penalties and filters."
    ),
]


def parse_biases(texts: list[str] | None) -> tuple[tuple[int, float], ...]:
    """Pairs of token id and bias from texts such as "15=-2.5".

    Raises: PromptError: names the text that is none.
    """
    pairs: list[tuple[int, float]] = []
    for text in texts or []:
        left, _, right = text.partition("=")
        try:
            pairs.append((int(left), float(right)))
        except ValueError:
            raise PromptError(
                f"--logit-bias {text!r} is not a token id, = and a number; write it like 15=-2.5"
            ) from None
    return tuple(pairs)
