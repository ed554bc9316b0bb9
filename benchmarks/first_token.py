"""Answers one prompt and prints a mark when the first token comes; `speed.py` times it from outside.

`python benchmarks/first_token.py MODEL THREADS DTYPE`: a process of its own, because a cold start
begins with the interpreter's.
"""

from __future__ import annotations

import sys

from engine.cluster.messages import Message
from engine.host import messages as api
from engine.session import Session, SessionOptions


def main() -> None:
    """Start, answer, end."""
    model, threads, dtype = sys.argv[1:]

    def on_event(message: Message) -> None:
        if isinstance(message, api.TokensGenerated):
            print("token", flush=True)

    options = SessionOptions(model=model, num_threads=int(threads), dtype=dtype)  # type: ignore[arg-type]
    with Session(options, on_event) as session:
        session.benchmark(16, 1)


if __name__ == "__main__":
    main()
