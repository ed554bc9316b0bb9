"""A lost device is a pause and a note for the reader: never an error, a lost or a repeated word."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import pytest
from pytestqt.qtbot import QtBot

from app.chat.conversation import Conversation
from app.chat.conversation_view import ConversationView
from app.look import Look
from app.session import Session
from app.settings import Settings
from app.split.presenter import SplitPresenter
from app.stages import Stage, StartOptions
from app.status_strip import StatusStrip
from app.window import MainWindow
from engine.host import messages as api
from engine.plan.plan import Plan, PlanShape
from engine.plan.presets import even

from .conftest import CONFIG, Recorder, finished, home_plan, node

SHAPE = PlanShape.from_config(CONFIG)
BOTH = even(SHAPE, ["this/cpu", "laptop/cpu"])
LOSS = "laptop/cpu, which computes half of every layer, was lost: killed by SIGKILL"


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def session(recorder: Recorder, clock: Clock, make_ready: Callable[..., Plan]) -> Session:
    """A session whose plan is cut between this computer and the laptop."""
    started = Session(recorder, StartOptions(), clock=clock)
    started.start()
    make_ready(started, "laptop")
    started.hear([api.PlanApplied(epoch=2, plan=BOTH)])
    return started


@pytest.fixture
def conversation(session: Session) -> Conversation:
    return Conversation(session)


def _ask(session: Session, recorder: Recorder, conversation: Conversation) -> int:
    conversation.send("hello")
    call = recorder.last(api.Generate)
    assert isinstance(call, api.Generate)
    _say(session, call.request_id, "Good ")
    return call.request_id


def _say(session: Session, request_id: int, text: str) -> None:
    session.hear([api.TokensGenerated(request_id=request_id, token_ids=(1,), text=text)])


def _lose(session: Session) -> None:
    nodes = (node("this"), node("laptop", "lost"))
    session.hear([api.NodesChanged(nodes=nodes), api.PlanInterrupted(message=LOSS)])


def _recover(session: Session) -> None:
    session.hear([api.PlanApplied(epoch=3, plan=home_plan(), note="laptop was lost")])


def _weights(request_id: int, done: int) -> api.Progress:
    return api.Progress(
        request_id=request_id, phase="weights", subject="this/cpu", done=done, total=100
    )


def test_the_answer_pauses_and_goes_on_with_a_note(
    session: Session, recorder: Recorder, conversation: Conversation, clock: Clock
) -> None:
    request_id = _ask(session, recorder, conversation)
    answer = conversation.messages[1]
    _lose(session)
    assert LOSS in conversation.pause_text(answer)
    assert answer.is_open
    assert answer.error == ""
    clock.now += 3.0
    _recover(session)
    assert "read the conversation again" in conversation.pause_text(answer)
    clock.now += 0.2
    _say(session, request_id, "day")
    assert conversation.pause_text(answer) == ""
    assert answer.notes == ["The answer went on without laptop after 3.20 s."]
    session.hear([finished(request_id, "Good day!", home_plan())])
    assert answer.text == "Good day!"
    assert answer.state == "done"


def test_nobody_is_asked_while_a_device_is_worked_around(
    session: Session, conversation: Conversation
) -> None:
    _lose(session)
    assert session.stage is Stage.RECOVERING
    assert session.trouble is None
    assert not conversation.send("now?")
    _recover(session)
    assert conversation.send("now?")


def test_stop_works_during_the_pause(
    session: Session, recorder: Recorder, conversation: Conversation
) -> None:
    request_id = _ask(session, recorder, conversation)
    _lose(session)
    conversation.stop()
    assert recorder.calls[-1] == api.Cancel(request_id=request_id)
    stopped = msgspec.structs.replace(
        finished(request_id, "Good ", BOTH), finish_reason="cancelled"
    )
    session.hear([stopped])
    answer = conversation.messages[1]
    assert answer.state == "stopped"
    assert conversation.pause_text(answer) == ""
    assert not conversation.is_answering


@pytest.mark.parametrize("request_id", [0, 1, 77])
def test_progress_of_a_plan_that_nobody_asked_for_is_shown(
    session: Session, request_id: int
) -> None:
    """Whichever call the engine host gives it to."""
    session.hear([_weights(request_id, 10)])
    assert session.progress == {}
    _lose(session)
    session.hear([_weights(request_id, 40)])
    assert session.progress["this/cpu"].done == 40
    _recover(session)
    assert session.progress == {}


def test_reading_again_does_not_look_like_a_new_answer(
    session: Session, recorder: Recorder, conversation: Conversation
) -> None:
    request_id = _ask(session, recorder, conversation)
    answer = conversation.messages[1]
    _lose(session)
    session.hear([_weights(request_id, 40)])
    assert conversation.reading is None
    _recover(session)
    session.hear(
        [api.Progress(request_id=request_id, phase="prefill", subject="prompt", done=5, total=20)]
    )
    reading = conversation.reading
    assert reading is not None
    assert (reading.done, reading.total) == (5, 20)
    assert answer.text == "Good "
    assert answer.state == "writing"


def test_a_second_loss_belongs_to_the_same_pause(
    session: Session, recorder: Recorder, conversation: Conversation, clock: Clock
) -> None:
    request_id = _ask(session, recorder, conversation)
    _lose(session)
    clock.now += 2.0
    session.hear([api.PlanInterrupted(message="attic/cpu was lost too")])
    assert "attic/cpu" in conversation.pause_text(conversation.messages[1])
    clock.now += 2.0
    _recover(session)
    _say(session, request_id, "day")
    assert conversation.messages[1].notes == ["The answer went on without laptop after 4.00 s."]


def test_where_no_plan_fits_the_pause_becomes_the_error(
    session: Session, recorder: Recorder, conversation: Conversation
) -> None:
    request_id = _ask(session, recorder, conversation)
    _lose(session)
    message = "no plan fits: the output head needs 1.2 GB, desktop has 0.9 GB"
    session.hear(
        [
            api.PlanLost(message=message),
            api.CallFailed(request_id=request_id, error="PlanError", message=message),
        ]
    )
    answer = conversation.messages[1]
    assert answer.error == message
    assert answer.pause is None
    assert session.trouble is not None
    assert session.trouble.message == message
    assert not session.is_interrupted


def test_an_apply_that_fails_on_the_way_does_not_end_the_recovery(
    session: Session, recorder: Recorder
) -> None:
    session.apply_plan(home_plan())
    apply = recorder.last(api.ApplyPlan)
    assert isinstance(apply, api.ApplyPlan)
    _lose(session)
    session.hear([api.CallFailed(request_id=apply.request_id, error="WorkerLost", message=LOSS)])
    assert session.stage is Stage.RECOVERING
    _recover(session)
    assert session.stage is Stage.READY
    assert session.plan == home_plan()


def test_the_split_follows_the_plan_that_took_over(session: Session) -> None:
    split = SplitPresenter(session)
    session.hear([api.PlanApplied(epoch=2, plan=BOTH)])
    assert split.running == BOTH
    _lose(session)
    assert not split.can_apply
    _recover(session)
    assert split.running == home_plan()
    assert not split.has_changes
    detour = session.in_force.detour
    assert detour is not None
    assert (detour.words, detour.note) == ("went on without laptop", "laptop was lost")
    session.hear([api.PlanApplied(epoch=4, plan=BOTH)])
    assert session.in_force.detour is None


def test_the_speed_of_an_earlier_plan_is_not_shown_as_the_present_one(
    session: Session, recorder: Recorder, conversation: Conversation
) -> None:
    """After "Load again" the strip showed the last answer's tok/s of the plan that was lost."""
    request_id = _ask(session, recorder, conversation)
    session.hear([finished(request_id, "Good day", BOTH)])
    assert conversation.decode_tps is not None
    session.hear([api.PlanLost(message="gone")])
    session.hear([api.PlanApplied(epoch=5, plan=home_plan())])
    assert conversation.decode_tps is None
    assert conversation.ttft_s is None


def test_the_conversation_shows_the_pause_under_open_code(
    session: Session, recorder: Recorder, conversation: Conversation, look: Look
) -> None:
    view = ConversationView(conversation, session, look)
    request_id = _ask(session, recorder, conversation)
    _say(session, request_id, "code:\n\n```python\nfirst = 1\n")
    _lose(session)
    view.flush()
    assert "was lost: killed by SIGKILL" in view.toPlainText()
    _recover(session)
    _say(session, request_id, "second = 2\n```\n")
    view.flush()
    text = view.toPlainText()
    assert "Paused" not in text
    assert text.count("first = 1") == 1
    assert text.count("second = 2") == 1
    assert "The answer went on without laptop" in text


def test_the_strip_and_the_pages_say_it_calmly(
    session: Session, look: Look, settings: Settings, qtbot: QtBot
) -> None:
    window = MainWindow(session, look, settings)
    qtbot.addWidget(window)
    strip = window.strip
    assert isinstance(strip, StatusStrip)
    _lose(session)
    assert strip._plan.text() == f"{LOSS} · working around it"
    title = window.split_page.apply_bar._title.text()
    assert title == "Working around a lost device"
    _recover(session)
    assert strip._plan.text() == "this computer computes all 5 layers · went on without laptop"
    assert window.split_page._detour.text() == "Went on without laptop. laptop was lost"
    window.close()
