"""What a draft model gains on this computer.

In: a session that has one. Out: tokens per second with and without its guesses, of the same text.
"""

from __future__ import annotations

from dataclasses import dataclass

from engine.host import messages as api
from engine.session import Session

# Free text: little of it is in the prompt, where prompt lookup would find it.
PROMPT = "Once upon a time a young fox wanted to learn how to sail across the sea, and so"


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftGain:
    """Speeds in tokens per second, and guesses of the draft model that were verified.

    Attributes:
        plain_tps: without any guesses.
        tps: with guesses where the rule of `--speculation auto` expects a gain.
    """

    name: str
    plain_tps: float
    tps: float
    drafted_tokens: int
    accepted_tokens: int


def measure_draft_gain(session: Session, num_tokens: int) -> DraftGain:
    """Write the same text without guesses, then twice with them: first their worth is found out.

    Args:
        session: with a draft model.
        num_tokens: of each answer.
    """

    def write(speculation: api.Speculation) -> api.Finished:
        return session.generate(
            PROMPT, raw=True, max_tokens=num_tokens, ignore_eos=True, speculation=speculation
        )

    plain = write("off")
    write("auto")
    guessed = write("auto")
    return DraftGain(
        name=session.model.draft_name or "",
        plain_tps=plain.decode_tps,
        tps=guessed.decode_tps,
        drafted_tokens=guessed.model_drafted_tokens,
        accepted_tokens=guessed.model_accepted_tokens,
    )
