"""A cancelled request ends, frees its slot, and leaves the next one as if it had never been."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from engine.client import Event
from engine.host import messages as api
from engine.session import Session

pytestmark = pytest.mark.network


def endless(session: Session) -> api.Generate:
    return api.Generate(
        request_id=session.client.next_request_id(),
        raw_prompt="abc",
        max_tokens=90_000,
        sampling=api.SamplingSettings(temperature=0.0),
        ignore_eos=True,
    )


def test_a_cancel_in_the_middle_of_an_answer_ends_it_with_what_was_said(session: Session) -> None:
    call = endless(session)
    seen: list[int] = []

    def on_event(event: Event) -> None:
        if isinstance(event.message, api.TokensGenerated):
            seen.extend(event.message.token_ids)
            if len(seen) == 10:
                session.client.post(api.Cancel(request_id=call.request_id))

    finished = session.client.run(call, on_event, timeout_seconds=60)
    assert isinstance(finished, api.Finished)
    assert finished.finish_reason == "cancelled"
    assert list(finished.token_ids) == seen


def test_the_slot_of_a_cancelled_request_is_free_for_the_next(session: Session) -> None:
    before = session.generate("abcabc", raw=True, max_tokens=10)
    call = endless(session)
    timer = threading.Timer(0.3, session.client.post, [api.Cancel(request_id=call.request_id)])
    timer.start()
    session.client.run(call, timeout_seconds=60)
    timer.join()
    assert session.generate("abcabc", raw=True, max_tokens=10).token_ids == before.token_ids


def test_a_cancel_before_the_prompt_is_read_ends_the_request(session: Session) -> None:
    call = api.Generate(
        request_id=session.client.next_request_id(),
        raw_prompt="abcdefgh" * 4000,
        max_tokens=5,
        ignore_eos=True,
    )
    session.client.post(api.Cancel(request_id=call.request_id + 1))  # Of nobody: ignored.

    def on_event(event: Event) -> None:
        if isinstance(event.message, api.Progress) and event.message.phase == "prefill":
            session.client.post(api.Cancel(request_id=call.request_id))

    finished = session.client.run(call, on_event, timeout_seconds=60)
    assert isinstance(finished, api.Finished)
    assert finished.finish_reason == "cancelled"
    assert finished.token_ids == ()


def test_several_requests_at_once_give_what_each_gives_alone(session: Session) -> None:
    prompts = ["abc", "hello there", "zzzzzzzzzzzzzzzzzzzz", "a"]
    alone = [session.generate(p, raw=True, max_tokens=15).token_ids for p in prompts]
    calls = [
        api.Generate(
            request_id=session.client.next_request_id(),
            raw_prompt=prompt,
            max_tokens=15,
            sampling=api.SamplingSettings(temperature=0.0),
        )
        for prompt in prompts
    ]
    found: dict[int, tuple[int, ...]] = {}
    for call in calls:
        session.client.post(call)
    deadline = time.monotonic() + 60
    while len(found) < len(calls):
        assert time.monotonic() < deadline, f"only {len(found)} of {len(calls)} have ended"
        event = session.client.receive(1)
        if event is None:
            continue
        assert not isinstance(event.message, api.CallFailed), event.message
        if isinstance(event.message, api.Finished):
            found[event.message.request_id] = event.message.token_ids
    assert [found[call.request_id] for call in calls] == alone


def test_applying_a_plan_in_the_middle_of_an_answer_changes_no_token(session: Session) -> None:
    """Float32: the known tokens are computed anew under the new plan."""
    from engine.plan.plan import PlanShape
    from engine.plan.presets import single

    expected = session.generate("abc", raw=True, max_tokens=60).token_ids
    call = api.Generate(
        request_id=session.client.next_request_id(),
        raw_prompt="abc",
        max_tokens=60,
        sampling=api.SamplingSettings(temperature=0.0),
    )
    plan = single(PlanShape.from_config(session.model.config), "local-2/cpu")
    apply = api.ApplyPlan(request_id=session.client.next_request_id(), plan=plan)
    seen = 0

    def on_event(event: Event) -> None:
        nonlocal seen
        if isinstance(event.message, api.TokensGenerated):
            seen += 1
            if seen == 20:
                session.client.post(apply)

    finished = session.client.run(call, on_event, timeout_seconds=60)
    assert isinstance(finished, api.Finished)
    assert finished.token_ids == expected
    assert finished.plan == plan


def test_opening_another_model_ends_what_runs_on_the_old_one(
    session: Session, tiny_folder: Path
) -> None:
    """Whatever moment it comes in, the host lives and the new model answers the same."""
    before = session.generate("abc", raw=True, max_tokens=8).token_ids
    running = endless(session)
    apply = api.ApplyPlan(request_id=session.client.next_request_id(), plan=session.plan)
    opening = api.OpenModel(
        request_id=session.client.next_request_id(), path=str(tiny_folder), dtype="float32"
    )
    for call in (running, apply, opening):
        session.client.post(call)
    ended: dict[int, str] = {}
    deadline = time.monotonic() + 60
    while len(ended) < 3:
        assert time.monotonic() < deadline, f"ended: {ended}"
        event = session.client.receive(1)
        if event is not None and isinstance(event.message, api.Done | api.CallFailed):
            ended[event.message.request_id] = type(event.message).__name__
    assert ended[running.request_id] == "CallFailed"
    assert ended[opening.request_id] == "Done"
    session.apply(session.plan)
    assert session.generate("abc", raw=True, max_tokens=8).token_ids == before
