"""Pairing, forgetting, adding and offering nodes, without a window."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from app.cluster.node_facts import Action
from app.cluster.presenter import ClusterPresenter
from app.session import Session
from app.split.presenter import SplitPresenter
from engine.host import messages as api
from engine.plan.plan import Plan, PlanShape
from engine.plan.presets import even, pipeline

from .conftest import CONFIG, Recorder, home_plan, node, remote_node

SHAPE = PlanShape.from_config(CONFIG)


@pytest.fixture
def split(session: Session) -> SplitPresenter:
    return SplitPresenter(session)


@pytest.fixture
def cluster(
    session: Session, split: SplitPresenter, make_ready: Callable[..., Plan]
) -> ClusterPresenter:
    made = ClusterPresenter(session, split, clock=lambda: 1000.0)
    make_ready(session)
    return made


def _nodes(session: Session, *nodes: api.NodeState) -> None:
    session.hear([api.NodesChanged(nodes=(node("this"), *nodes))])


def _pair(session: Session, recorder: Recorder, cluster: ClusterPresenter) -> int:
    _nodes(session, remote_node("attic", "discovered"))
    cluster.act("attic", Action.PAIR)
    call = recorder.last(api.PairNode)
    assert isinstance(call, api.PairNode)
    assert call.name == "attic"
    session.hear([api.PairingCode(request_id=call.request_id, name="attic", code="048215")])
    return call.request_id


def test_codes_are_compared_and_the_node_is_offered(
    session: Session, recorder: Recorder, cluster: ClusterPresenter
) -> None:
    request_id = _pair(session, recorder, cluster)
    assert cluster.pairing is not None
    assert cluster.pairing.code == "048215"
    cluster.answer(True)
    cluster.answer(True)
    confirms = [call for call in recorder.calls if isinstance(call, api.ConfirmPairing)]
    assert [(call.name, call.is_same) for call in confirms] == [("attic", True)]
    session.hear([api.Done(request_id=confirms[0].request_id), api.Done(request_id=request_id)])
    assert cluster.pairing is None
    assert cluster.offers == []
    _nodes(session, remote_node("attic", "ready"))
    assert [offer.words for offer in cluster.offers] == ["attic is paired"]


def test_codes_that_differ_end_the_attempt_with_its_reason(
    session: Session, recorder: Recorder, cluster: ClusterPresenter
) -> None:
    request_id = _pair(session, recorder, cluster)
    cluster.answer(False)
    confirm = recorder.last(api.ConfirmPairing)
    assert isinstance(confirm, api.ConfirmPairing)
    assert not confirm.is_same
    session.hear(
        [api.CallFailed(request_id=request_id, error="PeerRefused", message="the codes differ")]
    )
    assert cluster.pairing is not None
    assert cluster.pairing.error == "the codes differ"
    cluster.pair("attic")
    assert cluster.pairing.error == ""
    assert cluster.pairing.code == ""


def test_an_answer_is_given_only_to_a_code_that_was_shown(
    session: Session, recorder: Recorder, cluster: ClusterPresenter
) -> None:
    _nodes(session, remote_node("attic", "discovered"))
    cluster.pair("attic")
    cluster.answer(True)
    assert not any(isinstance(call, api.ConfirmPairing) for call in recorder.calls)


def test_closing_the_card_never_trusts(
    session: Session, recorder: Recorder, cluster: ClusterPresenter
) -> None:
    request_id = _pair(session, recorder, cluster)
    cluster.close_pairing()
    confirm = recorder.last(api.ConfirmPairing)
    assert isinstance(confirm, api.ConfirmPairing)
    assert not confirm.is_same
    assert recorder.calls[-1] == api.Cancel(request_id=request_id)
    assert cluster.pairing is None


def test_a_late_event_of_an_attempt_that_was_closed_changes_nothing(
    session: Session, recorder: Recorder, cluster: ClusterPresenter
) -> None:
    first = _pair(session, recorder, cluster)
    cluster.close_pairing()
    cluster.pair("attic")
    session.hear([api.CallFailed(request_id=first, error="PeerRefused", message="cancelled")])
    assert cluster.pairing is not None
    assert cluster.pairing.error == ""


def test_the_time_left_counts_down(
    session: Session, split: SplitPresenter, recorder: Recorder
) -> None:
    times = [1000.0]
    cluster = ClusterPresenter(session, split, clock=lambda: times[0])
    _pair(session, recorder, cluster)
    times[0] += 12
    assert cluster.seconds_left() == pytest.approx(48)
    times[0] += 100
    assert cluster.seconds_left() == 0


def test_forgetting_asks_first(
    session: Session, recorder: Recorder, cluster: ClusterPresenter
) -> None:
    _nodes(session, remote_node("attic", "lost"))
    cluster.act("attic", Action.FORGET)
    assert not any(isinstance(call, api.ForgetNode) for call in recorder.calls)
    cluster.keep()
    cluster.forget()
    assert not any(isinstance(call, api.ForgetNode) for call in recorder.calls)
    cluster.act("attic", Action.FORGET)
    cluster.forget()
    call = recorder.calls[-1]
    assert isinstance(call, api.ForgetNode)
    assert call.name == "attic"


def test_a_refusal_is_told_on_the_page(
    session: Session, recorder: Recorder, cluster: ClusterPresenter
) -> None:
    _nodes(session, remote_node("attic", "lost"))
    cluster.act("attic", Action.FORGET)
    cluster.forget()
    call = recorder.last(api.ForgetNode)
    assert isinstance(call, api.ForgetNode)
    session.hear(
        [api.CallFailed(request_id=call.request_id, error="PlanError", message="it has a share")]
    )
    assert cluster.trouble == "it has a share"


def test_a_token_joins_and_an_address_is_listed(
    recorder: Recorder, cluster: ClusterPresenter
) -> None:
    assert cluster.add("shardmix1-abc").kind == "token"
    assert isinstance(recorder.calls[-1], api.AddNode)
    assert cluster.add("attic.local:47500").kind == "address"
    call = recorder.calls[-1]
    assert isinstance(call, api.AddAddress)
    assert call.endpoint == "tcp://attic.local:47500"
    count = len(recorder.calls)
    assert not cluster.add("attic").is_usable
    assert len(recorder.calls) == count


def test_a_node_that_comes_back_is_offered_and_not_forced(
    session: Session, recorder: Recorder, cluster: ClusterPresenter, split: SplitPresenter
) -> None:
    _nodes(session, remote_node("attic", "ready"))
    assert cluster.offers == []
    _nodes(session, remote_node("attic", "lost"))
    assert cluster.offers == []
    recorder.calls.clear()
    _nodes(session, remote_node("attic", "ready"))
    assert [offer.words for offer in cluster.offers] == ["attic is back"]
    assert recorder.calls == []
    assert split.running == home_plan()
    cluster.dismiss("attic")
    assert cluster.offers == []
    _nodes(session, remote_node("attic", "ready"))
    assert cluster.offers == []


def test_a_node_is_known_by_its_key_and_not_by_its_name(
    session: Session, cluster: ClusterPresenter
) -> None:
    _nodes(session, remote_node("attic", "lost", key="k1"))
    _nodes(session, remote_node("attic-2", "ready", key="k1"))
    assert [offer.words for offer in cluster.offers] == ["attic-2 is back"]


def test_adding_puts_an_equal_part_into_the_draft_as_one_step_of_undo(
    session: Session, cluster: ClusterPresenter, split: SplitPresenter
) -> None:
    shown: list[int] = []
    cluster.split_wanted.connect(lambda: shown.append(1))
    _nodes(session, remote_node("attic", "ready"))
    cluster.act("attic", Action.ADD)
    assert shown == [1]
    assert split.draft is not None
    assert split.draft.devices == ("this/cpu", "attic/cpu")
    for row in range(SHAPE.num_rows):
        counts = split.draft.cells[row]
        assert sum(counts) == SHAPE.num_quanta(row)
        assert all(counts)
    assert session.plan == home_plan()
    split.undo_stack.undo()
    assert split.draft.used_devices() == home_plan().used_devices()


def test_whole_layers_stay_whole_when_a_node_is_added(
    session: Session, cluster: ClusterPresenter, split: SplitPresenter
) -> None:
    _nodes(session, node("local-1"), remote_node("attic", "ready"))
    plan = pipeline(SHAPE, ["this/cpu", "local-1/cpu"])
    session.hear([api.PlanApplied(epoch=2, plan=plan)])
    cluster.add_to_plan("attic")
    assert split.draft is not None
    assert len(split.draft.used_devices()) == 3
    assert all(sum(map(bool, row)) == 1 for row in split.draft.cells)


def test_a_third_node_takes_from_both_in_proportion(
    session: Session, cluster: ClusterPresenter, split: SplitPresenter
) -> None:
    _nodes(session, node("local-1"), remote_node("attic", "ready"))
    plan = even(SHAPE, ["this/cpu", "local-1/cpu"])
    session.hear([api.PlanApplied(epoch=2, plan=plan)])
    cluster.add_to_plan("attic")
    assert split.draft is not None
    assert split.draft.cells[SHAPE.attention_row(0)] == (3, 3, 3)


def test_what_needs_a_person_is_selected_until_they_choose(
    session: Session, cluster: ClusterPresenter
) -> None:
    assert cluster.selected == "this"
    _nodes(session, remote_node("attic", "discovered"))
    assert cluster.selected == "attic"
    cluster.select("this")
    _nodes(session, remote_node("attic", "discovered"), remote_node("b", "lost"))
    assert cluster.selected == "this"
    session.hear([api.NodesChanged(nodes=(remote_node("b", "lost"),))])
    assert cluster.selected == "b"


def test_a_node_that_is_not_trusted_takes_no_colour(
    session: Session, cluster: ClusterPresenter
) -> None:
    _nodes(session, remote_node("attic", "discovered"))
    _nodes(session, remote_node("attic", "discovered"), node("local-1"))
    assert session.device_order == ["this/cpu", "local-1/cpu"]
