"""The list of nodes is a proper Qt model whose figures change in place."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
from PySide6.QtCore import QModelIndex, Qt
from pytestqt.modeltest import ModelTester

from app.cluster.node_model import NodeModel
from app.cluster.node_rows import COLUMNS, summary
from app.figures import UNKNOWN
from app.look import Look
from app.session import Session
from engine.cluster.messages import ProcessUsage
from engine.host import messages as api
from engine.plan.plan import Plan

from .conftest import node


def _texts(model: NodeModel, parent: QModelIndex | None = None) -> list[str]:
    """Names of all rows, children indented."""
    top = parent or QModelIndex()
    found: list[str] = []
    for row in range(model.rowCount(top)):
        index = model.index(row, 0, top)
        found.append(str(index.data()))
        found += [f"  {text}" for text in _texts(model, index)]
    return found


def test_nodes_come_go_and_change_without_breaking_the_model(
    session: Session, look: Look, qtmodeltester: ModelTester
) -> None:
    model = NodeModel(session, look)
    qtmodeltester.check(model, force_py=True)
    for names in (("this",), ("this", "b"), ("b", "this"), ("this", "b", "c"), ("c",), ()):
        session.hear([api.NodesChanged(nodes=tuple(node(name) for name in names))])
        assert model.rowCount() == len(names)
    qtmodeltester.check(model, force_py=True)


def test_a_new_figure_changes_a_cell_and_nothing_else(session: Session, look: Look) -> None:
    model = NodeModel(session, look)
    session.hear([api.NodesChanged(nodes=(node("this"),))])
    changed: list[str] = []
    model.dataChanged.connect(lambda first, _last: changed.append(first.data()))
    resets: list[int] = []
    model.rowsInserted.connect(lambda: resets.append(1))
    model.rowsRemoved.connect(lambda: resets.append(1))
    model.modelReset.connect(lambda: resets.append(1))
    busier = msgspec.structs.replace(node("this"), cpu_percent=99.0)
    session.hear([api.NodesChanged(nodes=(busier,))])
    assert changed == ["this computer"]
    assert resets == []


def test_processes_and_devices_are_listed_under_their_node(
    session: Session, look: Look, make_ready: Callable[..., Plan]
) -> None:
    model = NodeModel(session, look)
    make_ready(session, "local-1")
    assert _texts(model) == [
        "this computer",
        "  CPU  a chip",
        "  worker",
        "local-1  (simulated)",
        "  CPU  a chip",
        "  worker",
    ]
    home = model.index(0, 0)
    assert model.index(0, 1, home).data() == "all layers, output head"
    assert model.index(1, 6, home).data() == "400"
    runner = ProcessUsage(role="runner this/cpu", pid=77, cpu_percent=180.0, memory_bytes=5)
    with_runner = msgspec.structs.replace(node("this"), processes=(*node("this").processes, runner))
    session.hear([api.NodesChanged(nodes=(with_runner, node("local-1")))])
    assert model.index(2, 2, home).data() == "180 %"


def test_what_is_not_measured_is_a_dash(session: Session, look: Look) -> None:
    model = NodeModel(session, look)
    bare = msgspec.structs.replace(
        node("this", "starting"), cpu_percent=None, memory_used_bytes=None, devices=()
    )
    session.hear([api.NodesChanged(nodes=(bare,))])
    texts = [model.index(0, column).data() for column in range(len(COLUMNS))]
    assert texts[1:6] == ["starting", UNKNOWN, UNKNOWN, UNKNOWN, UNKNOWN]


def test_a_lost_node_says_why(session: Session, look: Look) -> None:
    model = NodeModel(session, look)
    session.hear([api.NodesChanged(nodes=(node("this"), node("local-1", "lost")))])
    state = model.index(1, 1)
    assert state.data() == "lost: killed by SIGKILL"
    assert state.data(Qt.ItemDataRole.ForegroundRole) == look.theme.colour("bad")
    assert summary(session.nodes) == "1 node ready · 1 lost"
