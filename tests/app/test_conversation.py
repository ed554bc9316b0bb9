"""A conversation asks, streams, stops, fails and goes on."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import pytest

from app.chat.conversation import ChatSettings, Conversation
from app.session import Session
from engine.host import messages as api
from engine.plan.plan import Plan

from .conftest import Recorder, finished, home_plan


@pytest.fixture
def conversation(session: Session, make_ready: Callable[..., Plan]) -> Conversation:
    make_ready(session)
    return Conversation(session)


def _last_generate(recorder: Recorder) -> api.Generate:
    call = recorder.last(api.Generate)
    assert isinstance(call, api.Generate)
    return call


def _say(session: Session, request_id: int, text: str) -> None:
    session.hear([api.TokensGenerated(request_id=request_id, token_ids=(1, 2), text=text)])


def test_nothing_is_sent_before_a_plan_is_in_force(session: Session) -> None:
    conversation = Conversation(session)
    assert not conversation.send("hello")
    assert conversation.messages == []


def test_an_answer_streams_and_tells_what_it_took(
    session: Session, recorder: Recorder, conversation: Conversation
) -> None:
    assert conversation.send("  hello  ")
    call = _last_generate(recorder)
    assert call.turns == (api.ChatTurn(role="user", content="hello"),)
    answer = conversation.messages[1]
    session.hear(
        [
            api.Progress(
                request_id=call.request_id, phase="prefill", subject="prompt", done=340, total=500
            )
        ]
    )
    assert conversation.facts(answer) == "reading the prompt 68 % · 340 of 500 tokens"
    _say(session, call.request_id, "Good ")
    _say(session, call.request_id, "day")
    assert answer.text == "Good day"
    assert conversation.facts(answer) == "4 tokens so far"
    session.hear([finished(call.request_id, "Good day!", home_plan())])
    assert answer.text == "Good day!"
    assert not conversation.is_answering
    assert conversation.used_tokens == 23
    facts = conversation.facts(answer)
    for part in ("3 tokens", "41.2 tok/s", "first token after 250 ms", "1 process", "by itself"):
        assert part in facts
    assert [share.label for share in answer.shares] == ["this computer"]


def test_the_next_question_sends_the_whole_conversation(
    session: Session, recorder: Recorder, conversation: Conversation
) -> None:
    conversation.settings = ChatSettings(system_prompt="Be brief.", temperature=0.0, seed=5)
    conversation.send("one")
    session.hear([finished(_last_generate(recorder).request_id, "first", home_plan())])
    conversation.send("two")
    call = _last_generate(recorder)
    assert [(turn.role, turn.content) for turn in call.turns] == [
        ("system", "Be brief."),
        ("user", "one"),
        ("assistant", "first"),
        ("user", "two"),
    ]
    assert call.sampling == api.SamplingSettings(temperature=0.0, seed=5)


def test_stop_names_the_call_and_keeps_what_was_written(
    session: Session, recorder: Recorder, conversation: Conversation
) -> None:
    conversation.send("long story")
    call = _last_generate(recorder)
    _say(session, call.request_id, "Once")
    conversation.stop()
    assert recorder.calls[-1] == api.Cancel(request_id=call.request_id)
    end = msgspec.structs.replace(
        finished(call.request_id, "Once", home_plan()), finish_reason="cancelled"
    )
    session.hear([end])
    assert conversation.messages[1].state == "stopped"
    assert "stopped by you" in conversation.facts(conversation.messages[1])


def test_a_failed_call_is_told_in_the_place_of_the_answer(
    session: Session, recorder: Recorder, conversation: Conversation
) -> None:
    conversation.send("question")
    call = _last_generate(recorder)
    _say(session, call.request_id, "half")
    session.hear(
        [
            api.CallFailed(
                request_id=call.request_id, error="WorkerLost", message="local-1/cpu, layers 0-9"
            )
        ]
    )
    answer = conversation.messages[1]
    assert (answer.state, answer.error, answer.text) == (
        "failed",
        "local-1/cpu, layers 0-9",
        "half",
    )
    assert not conversation.is_answering


def test_an_engine_that_dies_fails_the_answer_under_way(
    session: Session, conversation: Conversation
) -> None:
    conversation.send("question")
    session.engine_lost("the engine host ended")
    assert conversation.messages[1].error == "the engine host ended"


def test_regenerate_replaces_the_last_answer(
    session: Session, recorder: Recorder, conversation: Conversation
) -> None:
    conversation.send("question")
    session.hear([finished(_last_generate(recorder).request_id, "no", home_plan())])
    conversation.regenerate()
    call = _last_generate(recorder)
    assert call.turns == (api.ChatTurn(role="user", content="question"),)
    assert [message.role for message in conversation.messages] == ["user", "assistant"]


def test_late_text_of_a_forgotten_chat_is_not_shown(
    session: Session, recorder: Recorder, conversation: Conversation
) -> None:
    conversation.send("question")
    call = _last_generate(recorder)
    conversation.new_chat()
    _say(session, call.request_id, "late")
    assert conversation.messages == []
    assert conversation.can_send


def test_the_oldest_turns_are_left_out_when_the_context_is_full(
    session: Session, recorder: Recorder, conversation: Conversation
) -> None:
    """The window holds 1,024 positions; every turn here is some 170 tokens."""
    for index in range(6):
        conversation.send(f"question {index} " + "word " * 120)
        request_id = _last_generate(recorder).request_id
        session.hear([finished(request_id, "answer " * 20, home_plan())])
    sent = _last_generate(recorder).turns
    assert sent[-1].content.startswith("question 5")
    assert conversation.messages[0].is_left_out
    assert not any(turn.content.startswith("question 0") for turn in sent)
