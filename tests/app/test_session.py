"""The session brings the engine from nothing to a running plan, and says what is in the way."""

from __future__ import annotations

from collections.abc import Callable

from app.plan_facts import without_idle_devices
from app.session import Session
from app.stages import Stage, StartOptions
from engine.host import messages as api
from engine.plan.plan import Plan, PlanShape
from engine.plan.presets import even, single

from .conftest import CONFIG, Recorder, home_plan, model_opened, node

SHAPE = PlanShape.from_config(CONFIG)


def test_the_start_opens_the_model_and_adds_what_the_command_line_asked(
    recorder: Recorder,
) -> None:
    options = StartOptions(model="/m.gguf", dtype="float32", demo_workers=2, join_tokens=("t",))
    Session(recorder, options).start()
    assert recorder.num_starts == 1
    opening, simulated, joined = recorder.calls
    assert isinstance(opening, api.OpenModel)
    assert (opening.path, opening.dtype) == ("/m.gguf", "float32")
    assert isinstance(simulated, api.AddSimulatedNodes)
    assert simulated.count == 2
    assert isinstance(joined, api.AddNode)
    assert len({opening.request_id, simulated.request_id, joined.request_id}) == 3


def test_the_first_plan_is_this_computer_whichever_comes_first(recorder: Recorder) -> None:
    """The model and the nodes arrive in any order."""
    for nodes_first in (True, False):
        session = Session(recorder, StartOptions())
        session.start()
        opening = recorder.last(api.OpenModel)
        assert isinstance(opening, api.OpenModel)
        news = [
            api.NodesChanged(nodes=(node("local-1"), node("this"))),
            model_opened(opening.request_id),
        ]
        session.hear(news if nodes_first else news[::-1])
        apply = recorder.last(api.ApplyPlan)
        assert isinstance(apply, api.ApplyPlan)
        assert apply.plan == home_plan()
        assert session.stage is Stage.LOADING
        recorder.calls.clear()


def test_it_is_ready_when_the_plan_is_in_force(
    session: Session, make_ready: Callable[..., Plan]
) -> None:
    assert not session.is_ready
    make_ready(session)
    assert session.stage is Stage.READY


def test_this_computer_has_the_first_colour_and_others_by_joining(session: Session) -> None:
    session.hear([api.NodesChanged(nodes=(node("local-2"),))])
    session.hear([api.NodesChanged(nodes=(node("local-2"), node("this"), node("local-1")))])
    order = ["this/cpu", "local-2/cpu", "local-1/cpu"]
    assert [session.device_index(device) for device in order] == [0, 1, 2]
    session.hear([api.NodesChanged(nodes=(node("local-1"),))])
    assert session.device_index("local-1/cpu") == 2


def test_a_node_with_two_devices_names_them(session: Session) -> None:
    session.hear([api.NodesChanged(nodes=(node("this", devices=("cpu", "cuda0")), node("b")))])
    assert session.device_label("this/cuda0") == "this computer CUDA0"
    assert session.device_label("b/cpu") == "b"


def test_a_lost_plan_stops_and_can_be_loaded_again(
    session: Session, recorder: Recorder, make_ready: Callable[..., Plan]
) -> None:
    plan = make_ready(session)
    session.hear([api.PlanLost(message="this/cpu, which computes layers 0-4, was lost")])
    assert not session.is_ready
    assert session.trouble is not None
    assert "layers 0-4" in session.trouble.message
    recorder.calls.clear()
    session.mend()
    (apply,) = recorder.calls
    assert isinstance(apply, api.ApplyPlan)
    assert apply.plan == plan
    assert session.trouble is None


def test_a_plan_that_fails_to_apply_leaves_the_running_one(
    session: Session, recorder: Recorder, make_ready: Callable[..., Plan]
) -> None:
    plan = make_ready(session, "local-1")
    failures: list[str] = []
    session.call_failed.connect(failures.append)
    session.apply_plan(even(SHAPE, ["this/cpu", "local-1/cpu"]))
    apply = recorder.last(api.ApplyPlan)
    assert isinstance(apply, api.ApplyPlan)
    session.hear(
        [api.CallFailed(request_id=apply.request_id, error="PlanError", message="too large")]
    )
    assert failures == ["too large"]
    assert session.is_ready
    assert session.plan == plan


def test_a_model_that_cannot_be_opened_offers_the_default(
    session: Session, recorder: Recorder
) -> None:
    session.engine_started()
    session.open_model("/broken.gguf")
    opening = recorder.last(api.OpenModel)
    assert isinstance(opening, api.OpenModel)
    session.hear(
        [api.CallFailed(request_id=opening.request_id, error="CheckpointError", message="bad")]
    )
    assert session.trouble is not None
    assert session.trouble.remedy == "open_default"
    session.mend()
    again = recorder.last(api.OpenModel)
    assert isinstance(again, api.OpenModel)
    assert again.path is None


def test_a_model_that_cannot_be_opened_leaves_the_earlier_one(
    session: Session, recorder: Recorder, make_ready: Callable[..., Plan]
) -> None:
    make_ready(session)
    session.open_model("/broken.gguf")
    opening = recorder.last(api.OpenModel)
    assert isinstance(opening, api.OpenModel)
    session.hear(
        [api.CallFailed(request_id=opening.request_id, error="CheckpointError", message="bad")]
    )
    assert session.is_ready
    assert session.trouble is not None
    assert session.trouble.message == "bad. The earlier model stays open"
    session.dismiss_trouble()
    assert session.trouble is None
    assert session.is_ready


def test_events_of_an_earlier_open_change_nothing(session: Session, recorder: Recorder) -> None:
    """The newest open counts: an older one that ends later must not replace its model."""
    old = recorder.last(api.OpenModel)
    session.open_model("/new.gguf")
    assert isinstance(old, api.OpenModel)
    session.hear([model_opened(old.request_id)])
    assert session.model is None


def test_the_engine_can_be_started_again_with_its_simulated_nodes(
    session: Session, recorder: Recorder, make_ready: Callable[..., Plan]
) -> None:
    make_ready(session)
    session.add_simulated_nodes(2)
    session.engine_lost("the engine host ended")
    assert session.plan is None
    assert session.nodes == ()
    recorder.calls.clear()
    session.mend()
    assert recorder.num_starts == 2
    assert {type(call) for call in recorder.calls} == {api.OpenModel, api.AddSimulatedNodes}


def test_progress_of_weights_is_kept_per_device(session: Session, recorder: Recorder) -> None:
    session.apply_plan(home_plan())
    apply = recorder.last(api.ApplyPlan)
    assert isinstance(apply, api.ApplyPlan)

    def progress(phase: str, subject: str, done: int) -> api.Progress:
        return api.Progress(
            request_id=apply.request_id,
            phase=phase,  # type: ignore[arg-type]
            subject=subject,
            done=done,
            total=9,
        )

    session.hear([progress("start", "a, b", 0), progress("start", "b", 1)])
    assert list(session.progress) == [""]
    session.hear([progress("weights", "a", 1), progress("weights", "b", 2)])
    assert {name: item.done for name, item in session.progress.items()} == {"a": 1, "b": 2}


def test_devices_without_a_share_are_left_out_of_what_is_applied() -> None:
    plan = single(SHAPE, "b/cpu", ["a/cpu", "b/cpu", "c/cpu"])
    assert without_idle_devices(plan) == single(SHAPE, "b/cpu")
