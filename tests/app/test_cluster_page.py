"""The Cluster page in a window: what is seen in each state, and that keys reach all of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from PySide6.QtCore import QSize, Qt
from PySide6.QtWidgets import QLabel, QLineEdit, QPushButton
from pytestqt.qtbot import QtBot

from app.look import Look
from app.session import Session
from app.settings import Settings
from app.window import MainWindow
from engine.host import messages as api
from engine.plan.plan import Plan
from engine.plan.presets import single

from .conftest import Recorder, node, remote_node


@pytest.fixture
def window(
    session: Session,
    look: Look,
    settings: Settings,
    make_ready: Callable[..., Plan],
    qtbot: QtBot,
) -> Iterator[MainWindow]:
    made = MainWindow(session, look, settings)
    qtbot.addWidget(made)
    made.show()
    make_ready(session)
    made.show_page(1)
    yield made
    made.close()


def _nodes(session: Session, *nodes: api.NodeState) -> None:
    session.hear([api.NodesChanged(nodes=(node("this"), *nodes))])


def _button(window: MainWindow, name: str) -> QPushButton:
    found = window.findChild(QPushButton, name)
    assert found is not None, name
    return found


def _text(window: MainWindow, name: str) -> str:
    found = window.findChild(QLabel, name)
    assert found is not None, name
    return found.text() if found.isVisible() else ""


def _begin_pairing(window: MainWindow, session: Session, recorder: Recorder) -> int:
    _nodes(session, remote_node("attic", "discovered"))
    _button(window, "pairButton").click()
    call = recorder.last(api.PairNode)
    assert isinstance(call, api.PairNode)
    return call.request_id


def test_a_discovered_node_is_paired_by_its_code(
    window: MainWindow, session: Session, recorder: Recorder
) -> None:
    request_id = _begin_pairing(window, session, recorder)
    assert "shardmix-worker pair" in _text(window, "pairingText")
    assert not _button(window, "codesSameButton").isVisible()
    session.hear([api.PairingCode(request_id=request_id, name="attic", code="048215")])
    assert _text(window, "pairingCode") == "048 215"
    assert _text(window, "pairingText") == (
        "Is the same code shown on attic (run  shardmix-worker pair  there)?"
    )
    assert _text(window, "pairingLeft").endswith("s left")
    # Nobody trusts a computer by an Enter that was meant for something else.
    assert not _button(window, "codesSameButton").hasFocus()
    _button(window, "codesSameButton").click()
    confirm = recorder.calls[-1]
    assert isinstance(confirm, api.ConfirmPairing)
    assert confirm.is_same
    session.hear([api.Done(request_id=request_id)])
    assert not window.cluster_page.pairing.isVisible()
    _nodes(session, remote_node("attic", "ready"))
    assert _text(window, "clusterOfferText").startswith("attic is paired.")
    _button(window, "clusterOfferAdd").click()
    assert window.pages.currentIndex() == 2
    assert window.split.draft is not None
    assert "attic/cpu" in window.split.draft.devices


def test_a_pairing_that_failed_says_why_and_can_be_tried_again(
    window: MainWindow, session: Session, recorder: Recorder
) -> None:
    request_id = _begin_pairing(window, session, recorder)
    session.hear(
        [api.CallFailed(request_id=request_id, error="PeerRefused", message="nobody waits there")]
    )
    assert _text(window, "pairingText") == "nobody waits there"
    _button(window, "pairAgainButton").click()
    assert isinstance(recorder.calls[-1], api.PairNode)
    _button(window, "pairingCloseButton").click()
    assert not window.cluster_page.pairing.isVisible()


def test_forgetting_is_asked_in_place_and_keeping_is_the_safe_key(
    window: MainWindow, session: Session, recorder: Recorder, qtbot: QtBot
) -> None:
    _nodes(session, remote_node("attic", "lost"))
    _button(window, "forgetButton").click()
    assert _text(window, "forgetQuestion").startswith("Forget attic? Its pairing is destroyed")
    assert window.focusWidget() is _button(window, "forgetKeepButton")
    qtbot.keyClick(_button(window, "forgetKeepButton"), Qt.Key.Key_Space)
    assert _text(window, "forgetQuestion") == ""
    _button(window, "forgetButton").click()
    _button(window, "forgetConfirmButton").click()
    call = recorder.calls[-1]
    assert isinstance(call, api.ForgetNode)
    assert call.name == "attic"


def test_a_node_of_the_running_split_cannot_be_forgotten(
    window: MainWindow, session: Session
) -> None:
    _nodes(session, remote_node("attic", "ready"))
    window.cluster.select("attic")
    assert _button(window, "forgetButton").isEnabled()
    plan = session.plan
    assert plan is not None
    session.hear([api.PlanApplied(epoch=2, plan=single(plan.shape, "attic/cpu"))])
    assert not _button(window, "forgetButton").isEnabled()
    assert "running split" in _button(window, "forgetButton").toolTip()


def test_the_field_says_what_it_takes(window: MainWindow, recorder: Recorder, qtbot: QtBot) -> None:
    _button(window, "addNodeButton").click()
    field = window.findChild(QLineEdit, "tokenEdit")
    assert field is not None
    assert window.focusWidget() is field
    assert not _button(window, "connectButton").isEnabled()
    qtbot.keyClicks(field, "attic")
    assert _text(window, "addNodeKind").startswith("Neither")
    qtbot.keyClicks(field, ".local:47500")
    assert _text(window, "addNodeKind").startswith("An address")
    qtbot.keyClick(field, Qt.Key.Key_Return)
    assert isinstance(recorder.calls[-1], api.AddAddress)
    assert field.text() == ""


def test_the_list_and_the_details_follow_each_other(
    window: MainWindow, session: Session, qtbot: QtBot
) -> None:
    _nodes(session, remote_node("attic", "ready"), remote_node("mini", "ready"))
    tree, model = window.cluster_page.tree, window.cluster_page.model
    # A row inside a node shows that node.
    tree.setCurrentIndex(model.index(0, 0, model.index_of("mini")))
    assert _text(window, "detailName") == "mini"
    _nodes(session, remote_node("attic", "lost"), remote_node("mini", "busy"))
    assert _text(window, "detailName") == "mini"
    tree.setFocus()
    qtbot.keyClick(tree, Qt.Key.Key_Up)
    assert _text(window, "detailName") == "mini"
    qtbot.keyClick(tree, Qt.Key.Key_Up)
    assert _text(window, "detailName") == "attic"
    tree.activated.emit(tree.currentIndex())
    assert window.focusWidget() is _button(window, "forgetButton")


def test_links_refresh_in_place(window: MainWindow, session: Session) -> None:
    _nodes(session, remote_node("attic", "ready"))
    window.cluster.select("attic")

    def heard(seconds: float) -> None:
        link = api.Link(
            from_device="attic/cpu",
            to_device="this/cpu",
            round_trip_seconds=seconds,
            bytes_per_second=117.5e6,
        )
        session.hear([api.LinksChanged(links=(link,))])

    heard(0.0004)
    name = "fact link attic/cpu this/cpu"
    label = window.findChild(QLabel, name)
    assert label is not None
    assert label.text() == "0.400 ms, 940 Mbit/s"
    heard(0.0012)
    assert window.findChild(QLabel, name) is label
    assert label.text() == "1.20 ms, 940 Mbit/s"


def test_a_node_that_came_back_is_offered_beside_the_chat_too(
    window: MainWindow, session: Session
) -> None:
    window.show_page(0)
    _nodes(session, remote_node("attic", "lost"))
    _nodes(session, remote_node("attic", "ready"))
    assert _text(window, "chatOfferText").startswith("attic is back.")
    _button(window, "chatOfferDismiss").click()
    assert _text(window, "chatOfferText") == ""


@pytest.mark.parametrize("base_px", [13, 18])
def test_nothing_is_clipped_where_the_window_is_small(
    window: MainWindow,
    session: Session,
    recorder: Recorder,
    look: Look,
    base_px: int,
    qtbot: QtBot,
) -> None:
    look.change_text_size(base_px - look.theme.base_px)
    window.resize(QSize(1024, 640))
    request_id = _begin_pairing(window, session, recorder)
    session.hear([api.PairingCode(request_id=request_id, name="attic", code="048215")])
    _nodes(session, remote_node("attic", "pairing"), remote_node("mini", "ready"))
    window.cluster.select("mini")
    window.cluster.act("mini", window.cluster.actions(session.nodes[2])[-1])
    _button(window, "addNodeButton").click()
    qtbot.wait(30)
    page = window.cluster_page
    assert window.width() == 1024
    for button in page.findChildren(QPushButton):
        if button.isVisible() and button.text():
            needed = button.fontMetrics().horizontalAdvance(button.text())
            assert button.width() >= needed, button.objectName()
            assert button.accessibleName(), button.objectName()
    header = page.tree.header()
    shown = [i for i in range(header.count()) if not header.isSectionHidden(i)]
    assert sum(header.sectionSize(i) for i in shown) <= page.tree.viewport().width()
    state = header.sectionSize(1)
    assert state >= page.tree.fontMetrics().horizontalAdvance("loading weights 42 s") + 30
