"""From the samples of a run to medians, ratios and Markdown. Pure.

In: for every turn and round the figures that it brought. Out: what is kept as JSON, and lines. A
ratio is taken within a round, then the median of the rounds' ratios.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import speed_matrix as names
from speed_matrix import Sample, Sizes, conversations, decode, prefill, slowest

from engine.measuring.bandwidth import ceiling_share

# By turn, for every round; a round may lack a figure.
Samples = Mapping[str, Sequence[Sample]]

CEILING = "share of the ceiling"
MEGABYTE = 1_000_000


@dataclass(frozen=True, slots=True)
class Question:
    """A promise: one figure, or one by another, of the first context unless it says so.

    Attributes:
        under: what it is divided by; None for a figure that stands alone.
        limits: by name of the model; a model without one is only told.
        is_most: whether the limit is the most that may be, not the least.
    """

    text: str
    over: tuple[str, str]
    under: tuple[str, str] | None
    limits: Mapping[str, float]
    is_most: bool = False


def questions(sizes: Sizes) -> list[Question]:
    """What is asked of a run; the limits hold for a machine of two cores with AMX."""
    near, long = decode(sizes.contexts[0]), decode(sizes.long_context)
    read = prefill(sizes.prompt_tokens)
    main, most = names.MAIN, sizes.conversations[-1]
    asked = [
        Question("decode, by llama.cpp", (main, near), (names.LLAMA, near), _limits(2.4, 2.3)),
        Question(
            "decode with 1 thread, by llama.cpp",
            (names.ONE_THREAD, near),
            (names.LLAMA_ONE_THREAD, near),
            {"1b": 1.9},
        ),
        Question("decode, share of the ceiling", (main, CEILING), None, _limits(0.80, 0.83)),
        Question(
            "prefill, by transformers", (main, read), (names.TRANSFORMERS, read), _limits(1.5, 0.95)
        ),
        Question("prefill, by llama.cpp", (main, read), (names.LLAMA, read), _limits(10, 3.5)),
        Question(
            "decode, 2 workers of 1 core by 2 threads",
            (names.TWO_WORKERS, near),
            (main, near),
            {"1b": 0.9},
        ),
        Question(
            "decode, 2 workers of 1 core by llama.cpp RPC",
            (names.TWO_WORKERS, near),
            (names.LLAMA_RPC, near),
            {"1b": 4.0},
        ),
        Question(
            f"{most} conversations, by one",
            (main, conversations(most)),
            (main, conversations(1)),
            {"default": 6.0},
        ),
        Question(
            f"slowest of {most} conversations, by their mean",
            (main, slowest(most)),
            None,
            {"default": 0.5, "1b": 0.5},
        ),
        Question(
            f"{long}, by {near}",
            (main, long),
            (main, near),
            _limits(0.45, 0.70),
        ),
        Question(
            "runner above weights and KV, MB",
            (main, names.RUNNER_ABOVE),
            None,
            _limits(400, 400),
            True,
        ),
        Question(
            "engine host above its embeddings, MB",
            (main, names.HOST_ABOVE),
            None,
            _limits(600, 600),
            True,
        ),
    ]
    return [q for q in asked if sizes.long_context or q.over[1] != long]


def _limits(default: float, one_billion: float) -> dict[str, float]:
    return {"default": default, "1b": one_billion}


def with_ceiling(samples: Samples, near: str) -> dict[str, list[Sample]]:
    """The same samples, with the share of the ceiling of our turns.

    The ceiling is the memory's best speed of the run: what else ran can only have lowered it.
    """
    memory = samples[names.MEMORY]
    best = {key: max(sample[key] for sample in memory) for key in memory[0]}
    extended: dict[str, list[Sample]] = {}
    for name, rounds in samples.items():
        bandwidth = best[names.threads(1 if name == names.ONE_THREAD else 2)]
        extended[name] = [
            {**s, CEILING: ceiling_share(int(s[names.WEIGHT_BYTES]), s[near], bandwidth)}
            if names.WEIGHT_BYTES in s
            else dict(s)
            for s in rounds
        ]
    return extended


def medians(rounds: Sequence[Sample]) -> Sample:
    """Of every figure, over the rounds that have it."""
    keys = dict.fromkeys(key for sample in rounds for key in sample)
    return {key: statistics.median([s[key] for s in rounds if key in s]) for key in keys}


def answer(question: Question, samples: Samples) -> list[float]:
    """What was found in every round that has all figures of a question, in the limit's unit."""
    name, figure = question.over
    scale = 1 / MEGABYTE if question.is_most else 1.0
    if question.under is None:
        return [s[figure] * scale for s in samples.get(name, []) if figure in s]
    under_name, under_figure = question.under
    pairs = zip(samples.get(name, []), samples.get(under_name, []), strict=False)
    return [a[figure] / b[under_figure] for a, b in pairs if figure in a and under_figure in b]


def speed_rows(samples: Samples, sizes: Sizes) -> list[str]:
    """The table of speeds: every turn, its medians, and ratios to transformers."""
    contexts = sorted({*sizes.contexts, sizes.prompt_tokens, *filter(None, [sizes.long_context])})
    columns = [prefill(sizes.prompt_tokens), *map(decode, contexts)]
    base = (names.TRANSFORMERS, columns[0]), (names.TRANSFORMERS, decode(sizes.contexts[0]))
    head = [
        *("configuration", columns[0], "by transformers"),
        *columns[1:],
        f"{base[1][1]} by transformers",
        CEILING,
    ]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for name, rounds in samples.items():
        if name == names.MEMORY:
            continue
        found = medians(rounds)
        ratios = [
            _median_text(answer(Question("", (name, under[1]), under, {}), samples))
            for under in base
        ]
        share = f"{found[CEILING]:.0%}" if CEILING in found else ""
        cells = [
            *(name, _text(found, columns[0]), ratios[0]),
            *(_text(found, column) for column in columns[1:]),
            *(ratios[1], share),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def question_rows(kind: str, samples: Samples, sizes: Sizes, rows: dict[str, Any]) -> list[str]:
    """The table of promises; fills `rows` with what was found in every round.

    Args: kind: name of the model, which decides about limits; any other has none.
    """
    lines = ["| what | promised | found | lowest, highest |", "|---|---|---|---|"]
    for question in questions(sizes):
        found = answer(question, samples)
        limit = question.limits.get(kind)
        rows[question.text] = {"promised": limit, "found": found}
        if not found:
            continue
        promised = "" if limit is None else f"{'≤' if question.is_most else '≥'} {limit:g}"
        places = 0 if question.is_most else 2
        middle, low, high = (
            f"{value:.{places}f}" for value in (statistics.median(found), min(found), max(found))
        )
        lines.append(f"| {question.text} | {promised} | {middle} | {low}, {high} |")
    return lines


def other_rows(samples: Samples, sizes: Sizes) -> list[str]:
    """Conversations, waiting and memory of the main configuration."""
    found = medians(samples[names.MAIN])
    memory = medians(samples[names.MEMORY])
    lines = ["| conversations at once | tok/s | each | slowest by mean |", "|---|---|---|---|"]
    for count in sizes.conversations:
        total = found[conversations(count)]
        lines.append(
            f"| {count} | {total:.1f} | {total / count:.1f} | {found[slowest(count)]:.2f} |"
        )
    speeds = ", ".join(f"{value / 1e9:.1f} GB/s with {key}" for key, value in memory.items())
    sentences = [
        (
            "From the start of the first process to the first token: "
            f"{found[names.COLD]:.2f} s, the model's file not in the system's cache."
        ),
        f"Memory is read at {speeds}.",
        (
            f"Private memory at its peak: runner {found[names.RUNNER_PEAK] / 1e6:.0f} MB, engine host "
            f"{found[names.HOST_PEAK] / 1e6:.0f} MB."
        ),
    ]
    if names.WARM in found:
        sentences.insert(1, f"With the file in it: {found[names.WARM]:.2f} s.")
    if names.WEIGHT_BYTES in found:
        sentences.append(f"A token reads {found[names.WEIGHT_BYTES] / 1e6:.1f} MB of weights.")
    return [*lines, "", " ".join(sentences)]


def _text(found: Sample, key: str) -> str:
    return f"{found[key]:.1f}" if key in found else ""


def _median_text(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.2f}" if values else ""
