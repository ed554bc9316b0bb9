"""While a long prompt is read, answers go on, and a short prompt gets its turn: by order of events."""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass

import pytest

from engine.host import messages as api
from engine.session import Session

pytestmark = pytest.mark.network

LAST_SECONDS = 90.0
# Several pieces at any speed: a step takes at most 1,024 tokens.
LONG_PROMPT = "read all of this. " * 400
GREEDY = api.SamplingSettings(temperature=0.0)


@dataclass(frozen=True)
class Heard:
    """One event of one request: "token", "piece" or "end"."""

    name: str
    what: str


class Asked:
    """Requests of one session, and what was heard of them, in order."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.names: dict[int, str] = {}
        self.heard: list[Heard] = []
        self.deadline = time.monotonic() + LAST_SECONDS

    def post(self, name: str, text: str, count: int) -> None:
        call = api.Generate(
            request_id=self.session.client.next_request_id(),
            raw_prompt=text,
            max_tokens=count,
            ignore_eos=True,
            sampling=GREEDY,
        )
        self.names[call.request_id] = name
        self.session.client.post(call)

    def wait_for(self, name: str, what: str) -> None:
        """Hear events until one of them."""
        while not self.heard or self.heard[-1] != Heard(name, what):
            assert time.monotonic() < self.deadline, f"no {what} of {name}: {self.heard[-20:]}"
            event = self.session.client.receive(0.5)
            message = event.message if event is not None else None
            request_name = self.names.get(getattr(message, "request_id", 0))
            assert not isinstance(message, api.CallFailed), message
            if request_name is None:
                continue
            if isinstance(message, api.TokensGenerated):
                self.heard.append(Heard(request_name, "token"))
            elif isinstance(message, api.Progress) and message.phase == "prefill":
                self.heard.append(Heard(request_name, "piece"))
            elif isinstance(message, api.Finished):
                self.heard.append(Heard(request_name, "end"))

    def places(self, name: str, what: str) -> list[int]:
        return [n for n, heard in enumerate(self.heard) if heard == Heard(name, what)]


def test_every_answer_streams_between_any_two_pieces_of_a_long_prompt(session: Session) -> None:
    asked = Asked(session)
    neighbours = [f"neighbour {n}" for n in range(3)]
    for name in neighbours:
        asked.post(name, name, 5000)
        asked.wait_for(name, "token")
    asked.post("long", LONG_PROMPT, 2)
    asked.wait_for("long", "end")
    pieces = asked.places("long", "piece")
    assert len(pieces) >= 5
    for name in neighbours:
        tokens = asked.places(name, "token")
        for first, second in itertools.pairwise(pieces):
            assert any(first < n < second for n in tokens), f"{name} waited: {first} to {second}"
    for request_id in asked.names:
        session.client.post(api.Cancel(request_id=request_id))
    for name in neighbours:
        if not asked.places(name, "end"):
            asked.wait_for(name, "end")


def test_a_short_prompt_does_not_wait_for_a_long_one_to_be_read(session: Session) -> None:
    asked = Asked(session)
    asked.post("long", LONG_PROMPT, 2)
    asked.wait_for("long", "piece")
    asked.post("short", "hello", 4)
    asked.wait_for("long", "end")
    assert asked.places("short", "end")[0] < asked.places("long", "piece")[-1]
