"""Answers with guesses verified are those of single steps, on one runner and on two workers."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from engine.client import Event
from engine.decode.drafting import MAX_DRAFT
from engine.host import messages as api
from engine.plan.plan import PlanShape
from engine.plan.presets import even, single
from engine.session import Session, SessionOptions, simulated_devices
from tests.engine.host.conftest import runner_of

pytestmark = pytest.mark.network

LOGPROB_TOLERANCE = 2e-5
# Enough for a model of random weights to fall into a loop, which is text that comes again.
NUM_TOKENS = 90
COLD = api.SamplingSettings(temperature=0.05, top_p=1.0, seed=11)
REQUESTS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": {"sampling": COLD},
    "sampled, every filter": {
        "sampling": api.SamplingSettings(
            temperature=0.4, top_k=20, top_p=0.95, min_p=0.01, seed=2**64 - 1
        ),
    },
    "sampled from all tokens": {
        "sampling": api.SamplingSettings(temperature=1.0, top_p=1.0, seed=4)
    },
    "penalties": {
        "sampling": api.SamplingSettings(
            temperature=0.0, repetition_penalty=1.02, presence_penalty=0.1, frequency_penalty=0.01
        )
    },
    "bias": {"sampling": api.SamplingSettings(temperature=0.0, logit_bias=((40, 2.0), (5, -3.0)))},
    "min_tokens": {
        "min_tokens": 50,
        "ignore_eos": False,
        "sampling": api.SamplingSettings(temperature=0.0, logit_bias=((2, 30.0),)),
    },
    "logprobs": {"logprobs": 5},
    "two tokens": {"max_tokens": 2},
    "one token": {"max_tokens": 1},
}


@pytest.fixture(scope="module", params=["one runner", "two workers"])
def session(request: pytest.FixtureRequest, opened_session: Session) -> Session:
    shape = PlanShape.from_config(opened_session.model.config)
    is_one = request.param == "one runner"
    plan = single(shape, "this/cpu") if is_one else even(shape, simulated_devices(2))
    opened_session.apply(plan)
    return opened_session


def answer(session: Session, speculation: api.Speculation, **options: Any) -> api.Finished:
    defaults = {"max_tokens": NUM_TOKENS, "ignore_eos": True}
    return session.generate(
        "abcabcabcab", raw=True, speculation=speculation, **{**defaults, **options}
    )


@pytest.mark.parametrize("request_name", REQUESTS)
def test_no_option_makes_a_difference(session: Session, request_name: str) -> None:
    options = REQUESTS[request_name]
    plain = answer(session, "off", **options)
    guessed = answer(session, "on", **options)
    assert guessed.token_ids == plain.token_ids
    assert guessed.text == plain.text
    assert guessed.finish_reason == plain.finish_reason
    assert plain.drafted_tokens == plain.accepted_tokens == 0
    assert plain.decode_steps == len(plain.token_ids) - 1
    assert guessed.decode_steps == len(plain.token_ids) - 1 - guessed.accepted_tokens
    assert (guessed.logprobs is None) == (plain.logprobs is None)
    for found, expected in zip(guessed.logprobs or (), plain.logprobs or (), strict=True):
        assert abs(found.logprob - expected.logprob) < LOGPROB_TOLERANCE
        assert [i for i, _ in found.top] == [i for i, _ in expected.top]


def test_text_that_comes_again_takes_fewer_steps_and_round_trips(session: Session) -> None:
    plain = answer(session, "off")
    guessed = answer(session, "on")
    assert guessed.accepted_tokens > NUM_TOKENS // 4
    assert guessed.decode_steps < plain.decode_steps * 3 // 4
    auto = answer(session, "auto")
    assert auto.token_ids == plain.token_ids


def test_stops_end_the_answer_in_the_middle_of_a_guess(session: Session) -> None:
    whole = answer(session, "off")
    for place in (40, 45):
        stop = whole.text[place : place + 3]
        run = whole.token_ids[place : place + 2]
        for options in ({"stop": (stop,)}, {"stop_sequences": (run,)}, {"max_tokens": place}):
            plain = answer(session, "off", **options)
            guessed = answer(session, "on", **options)
            assert guessed.token_ids == plain.token_ids
            assert guessed.text == plain.text
            assert guessed.finish_reason == plain.finish_reason
    # What is kept of an answer that ended so is what its next turn begins with.
    again = session.generate("abcabcabcab" + plain.text + "z", raw=True, max_tokens=20)
    fresh = session.generate("abcabcabcab" + plain.text + "z", raw=True, max_tokens=20)
    assert again.reused_tokens > 40
    assert again.token_ids == fresh.token_ids


def test_every_member_of_a_batch_guesses_for_itself(session: Session) -> None:
    prompts = ["abcabc", "the quick brown fox", "zz", "abcabc", "x" * 30]
    options: dict[str, Any] = {"raw": True, "max_tokens": 60, "ignore_eos": True, "sampling": COLD}
    plain = session.generate_batch(prompts, speculation="off", **options)
    heard: dict[int, list[int]] = {n: [] for n in range(len(prompts))}
    guessed = session.generate_batch(
        prompts,
        speculation="on",
        on_token=lambda index, token_id, _text: heard[index].append(token_id),
        **options,
    )
    assert [f.token_ids for f in guessed] == [f.token_ids for f in plain]
    assert [tuple(ids) for ids in heard.values()] == [f.token_ids for f in plain]
    assert sum(f.accepted_tokens for f in guessed) > 0


def test_a_window_that_slides_makes_no_difference(tiny_folder: Path) -> None:
    options = SessionOptions(model=str(tiny_folder), dtype="float32", kv_window=40)
    with Session(options) as session:
        plain = answer(session, "off", max_tokens=120)
        guessed = answer(session, "on", max_tokens=120)
        assert guessed.accepted_tokens > 0
        assert guessed.token_ids == plain.token_ids


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
def test_guesses_are_no_part_of_what_is_computed_again(session: Session) -> None:
    """A device is lost, and another plan applied, while guesses are verified."""
    plain = answer(session, "off")
    shape = PlanShape.from_config(session.model.config)
    victim = runner_of(session, session.plan.devices[session.plan.used_devices()[-1]])
    num_heard = 0

    def on_event(event: Event) -> None:
        nonlocal num_heard
        if isinstance(event.message, api.TokensGenerated):
            num_heard += len(event.message.token_ids)
            if num_heard == 40:
                victim.kill()

    call = api.Generate(
        request_id=session.client.next_request_id(),
        raw_prompt="abcabcabcab",
        max_tokens=NUM_TOKENS,
        ignore_eos=True,
        sampling=api.SamplingSettings(temperature=0.0),
        speculation="on",
    )
    plan = session.plan
    found = session.client.run(call, on_event, timeout_seconds=100)
    assert isinstance(found, api.Finished)
    assert found.token_ids == plain.token_ids
    assert found.accepted_tokens > 0
    session.apply(single(shape, "this/cpu"))
    assert answer(session, "on").token_ids == plain.token_ids
    session.apply(plan)


# ---- the real model --------------------------------------------------------------------------

TEXT = (
    "The old harbour of Marsby lies behind a wall of grey stone. In the morning the boats come in "
    "with herring and cod, and the gulls cry over the quay. Anna Petersen keeps the little shop "
    "beside the lighthouse, where she sells rope, lamps and strong tea. Every Friday the mail boat "
    "brings letters from the islands, and Anna sorts them on a long wooden table before the "
    "children carry them through the narrow streets."
)


@pytest.fixture(scope="module", params=[0, 2], ids=["one runner", "two workers"])
def real_session(request: pytest.FixtureRequest, default_model_path: Path) -> Iterator[Session]:
    options = SessionOptions(
        model=str(default_model_path), dtype="float32", num_workers=request.param
    )
    with Session(options) as session:
        yield session


def test_the_default_model_copies_a_text_in_far_fewer_steps(real_session: Session) -> None:
    prompt = f"Repeat the following text, changing Anna to Maria:\n\n{TEXT}"
    plain = real_session.generate(prompt, max_tokens=40, speculation="off")
    guessed = real_session.generate(prompt, max_tokens=40, speculation="on")
    assert guessed.token_ids == plain.token_ids
    assert guessed.decode_steps <= (len(plain.token_ids) - 1) * 2 // 3
    assert guessed.drafted_tokens <= MAX_DRAFT * guessed.decode_steps
    sampling = api.SamplingSettings(temperature=0.7, top_p=0.9, repetition_penalty=1.05, seed=3)
    plain = real_session.generate(prompt, max_tokens=15, speculation="off", sampling=sampling)
    guessed = real_session.generate(prompt, max_tokens=15, speculation="on", sampling=sampling)
    assert guessed.token_ids == plain.token_ids
