"""What verifying several guessed tokens in a step gains, and many conversations at once.

`python benchmarks/speculation.py [--rounds 3] [--workers 0] [--dtype auto]`: the default model
answers a text-editing prompt (most of the answer is in the prompt) and writes freely (little is),
greedily, without guesses, with the rule and with every guess, in turns within one run. Then 1 and
16 answers at once without guesses. Without guesses, too, steps may be fewer than tokens: a single runner
goes on with a greedy answer by itself. Ratios are of one round; tokens must be the same in float32 and
are counted where they differ in other formats.
"""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

import machine

from engine.host import messages as api
from engine.session import Session, SessionOptions

TEXT = (
    "The old harbour of Marsby lies behind a wall of grey stone. In the morning the boats come in "
    "with herring and cod, and the gulls cry over the quay. Anna Petersen keeps the little shop "
    "beside the lighthouse, where she sells rope, lamps and strong tea. Every Friday the mail boat "
    "brings letters from the islands, and Anna sorts them on a long wooden table before the "
    "children carry them through the narrow streets. When the fog is thick, the bell on the pier "
    "rings once a minute, and nobody leaves the harbour until the sun has burned the fog away. In "
    "winter the shop is warm and full of people who talk about the weather, the price of fish and "
    "the new road that the county has promised for ten years. Anna listens, pours the tea, and "
    "writes down what everybody owes."
)
PROMPTS = {
    "editing": f"Repeat the following text, changing Anna to Maria:\n\n{TEXT}",
    "writing": "Write a short story about a fox who learns to sail.",
}
NUM_TOKENS = 180
MODES: tuple[api.Speculation, ...] = ("off", "auto", "on")
NUM_TOGETHER = 16
TOGETHER_TOKENS = 48


def measure(session: Session, rounds: int) -> dict[str, dict[api.Speculation, list[api.Finished]]]:
    """All answers, by prompt and mode; modes take turns."""
    found: dict[str, dict[api.Speculation, list[api.Finished]]] = {}
    for name, prompt in PROMPTS.items():
        modes: dict[api.Speculation, list[api.Finished]] = {mode: [] for mode in MODES}
        for _ in range(rounds):
            for mode in MODES:
                modes[mode].append(
                    session.generate(prompt, max_tokens=NUM_TOKENS, speculation=mode)
                )
        found[name] = modes
    return found


def tokens_per_second(session: Session, count: int) -> float:
    """All tokens after everybody's first, of so many answers at once."""
    prompts = [f"Tell me {n} facts about the number {n}." for n in range(2, 2 + count)]
    began = 0.0
    num_tokens = 0
    started: set[int] = set()

    def on_token(index: int, _token_id: int, _text: str) -> None:
        nonlocal began, num_tokens
        started.add(index)
        if len(started) == count:
            if not began:
                began = time.perf_counter()
            else:
                num_tokens += 1

    session.generate_batch(
        prompts,
        max_tokens=TOGETHER_TOKENS,
        ignore_eos=True,
        speculation="off",
        on_token=on_token,
    )
    return num_tokens / (time.perf_counter() - began)


def report(
    found: dict[str, dict[api.Speculation, list[api.Finished]]], rows: dict[str, Any]
) -> list[str]:
    """Lines of a table; figures go into `rows`."""
    lines = [
        "| prompt | guesses | tok/s | ratio | best ratio | tokens | steps | verified | came true | same tokens |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, modes in found.items():
        plain = modes["off"]
        for mode, answers in modes.items():
            rates = [answer.decode_tps for answer in answers]
            ratios = [a.decode_tps / b.decode_tps for a, b in zip(answers, plain, strict=True)]
            best = max(rates) / max(answer.decode_tps for answer in plain)
            last = answers[-1]
            is_same = all(answer.token_ids == plain[0].token_ids for answer in answers)
            rows[f"{name} {mode}"] = {
                "tps": rates,
                "ratios": ratios,
                "tokens": len(last.token_ids),
                "steps": last.decode_steps,
                "drafted": last.drafted_tokens,
                "accepted": last.accepted_tokens,
                "same_tokens": is_same,
            }
            lines.append(
                f"| {name} | {mode} | {machine.median(rates):.1f} | {machine.median(ratios):.2f} | "
                f"{best:.2f} | {len(last.token_ids)} | {last.decode_steps} | "
                f"{last.drafted_tokens} | {last.accepted_tokens} | {'yes' if is_same else 'no'} |"
            )
    return lines


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--model", default=None)
    given = parser.parse_args()
    about = machine.describe()
    options = SessionOptions(model=given.model, dtype=given.dtype, num_workers=given.workers)
    rows: dict[str, Any] = {}
    with Session(options) as session:
        session.benchmark(64, 8)
        dtype = session.model.dtype
        lines = report(measure(session, given.rounds), rows)
        print("answers at once", file=sys.stderr, flush=True)
        pairs = [
            (tokens_per_second(session, 1), tokens_per_second(session, NUM_TOGETHER))
            for _ in range(given.rounds)
        ]
    rows["at once"] = pairs
    alone, together = (machine.median([pair[n] for pair in pairs]) for n in (0, 1))
    ratio = machine.median([many / one for one, many in pairs])
    lines += [
        "",
        (
            f"{NUM_TOGETHER} answers at once: {together:.1f} tok/s in all, one alone {alone:.1f}: "
            f"{ratio:.2f} times."
        ),
        "",
        f"{session.model.name}, {dtype}, {given.workers or 1} runner(s), {given.rounds} rounds.",
    ]
    machine.write("speculation", about, rows, lines)


if __name__ == "__main__":
    main()
