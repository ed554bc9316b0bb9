"""How fast several conversations are answered at once, and whether one of them starves.

In: a session. Out: tokens per second of each stream, in the time when all of them stream. The pure
part is `speeds`; `measure_conversations` asks and listens.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from engine.errors import EngineError, error_by_name
from engine.host import messages as api
from engine.session import Session

# More than any stream reaches before all have enough; they are cancelled then.
LONGEST_ANSWER = 4096
DEADLINE_SECONDS = 300.0


@dataclass(frozen=True, slots=True)
class ConversationSpeeds:
    """Tokens per second of streams that ran at the same time."""

    streams: tuple[float, ...]

    @property
    def total(self) -> float:
        """All streams together."""
        return sum(self.streams)

    @property
    def slowest_share(self) -> float:
        """The slowest stream's speed by the mean: 1 where all are served alike."""
        return min(self.streams) * len(self.streams) / self.total


def speeds(arrivals: Mapping[int, Sequence[float]], tokens_each: int) -> ConversationSpeeds | None:
    """Speeds between the last stream's first token and the moment when each has had enough.

    Args:
        arrivals: of each stream, when its tokens came, in seconds, ascending.
        tokens_each: how many every stream has from then on, at least; >= 1.
    Returns: None where some stream has not yet that many.
    """
    if not all(arrivals.values()):
        return None
    begin = max(times[0] for times in arrivals.values())
    later = [[t for t in times if t > begin] for times in arrivals.values()]
    if any(len(times) < tokens_each for times in later):
        return None
    end = max(times[tokens_each - 1] for times in later)
    seconds = end - begin
    return ConversationSpeeds(tuple(sum(t <= end for t in times) / seconds for times in later))


def measure_conversations(
    session: Session,
    count: int,
    *,
    prompt_tokens: int = 64,
    tokens_each: int = 64,
    deadline_seconds: float = DEADLINE_SECONDS,
) -> ConversationSpeeds:
    """Answer so many prompts at once, greedily, and time their streams.

    Args:
        count: of conversations, >= 1; none of them takes over what another one computed.
    Raises: EngineError: one failed, or there were too few tokens when the deadline passed.
    """
    client = session.client
    calls = [
        api.Benchmark(
            request_id=client.next_request_id(),
            prompt_tokens=prompt_tokens,
            generated_tokens=LONGEST_ANSWER,
        )
        for _ in range(count)
    ]
    arrivals: dict[int, list[float]] = {call.request_id: [] for call in calls}
    deadline = time.monotonic() + deadline_seconds
    for call in calls:
        client.post(call)
    try:
        while True:
            event = client.receive(0.5)
            now = time.perf_counter()
            message = None if event is None else event.message
            if isinstance(message, api.CallFailed) and message.request_id in arrivals:
                del arrivals[message.request_id]  # There is nothing left to cancel of it.
                raise error_by_name(message.error, message.message)
            if isinstance(message, api.TokensGenerated) and message.request_id in arrivals:
                times = arrivals[message.request_id]
                times.extend([now] * len(message.token_ids))
                if len(times) > tokens_each and (found := speeds(arrivals, tokens_each)):
                    return found
            if time.monotonic() > deadline:
                slowest = min(len(times) for times in arrivals.values())
                raise EngineError(
                    f"{count} conversations at once were to bring {tokens_each} tokens each within "
                    f"{deadline_seconds:.0f} s, the slowest brought {slowest}. Ask for fewer"
                )
    finally:
        session.cancel(arrivals)
