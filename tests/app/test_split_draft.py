"""The draft of a split always sums, snaps, can be undone, and is told from the running plan."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.session import Session
from app.split.draft import (
    Part,
    Selection,
    changes,
    move_divider,
    parse_layers,
    set_share_keeping,
    tenths_of_percent,
)
from app.split.presenter import SplitPresenter
from engine.errors import PlanError
from engine.host import messages as api
from engine.plan.plan import Plan, PlanShape
from engine.plan.presets import even, single

from .conftest import CONFIG, Recorder, node

SHAPE = PlanShape.from_config(CONFIG)
DEVICES = ("this/cpu", "local-1/cpu", "local-2/cpu")


def _label(device: str) -> str:
    return device.partition("/")[0]


@pytest.fixture
def presenter(session: Session, make_ready: Callable[..., Plan]) -> SplitPresenter:
    made = SplitPresenter(session)
    make_ready(session, "local-1", "local-2")
    return made


def _applied(session: Session, recorder: Recorder) -> Plan:
    """The engine puts the last plan that was asked for in force."""
    apply = recorder.last(api.ApplyPlan)
    assert isinstance(apply, api.ApplyPlan)
    session.hear([api.PlanApplied(epoch=2, plan=apply.plan), api.Done(request_id=apply.request_id)])
    return apply.plan


def _tenths(presenter: SplitPresenter) -> dict[str, int]:
    return {device: tenths for device, _, tenths in presenter.facts()}


# ---- the newcomer's story ------------------------------------------------------------------------


def test_layers_go_seventy_thirty_and_the_rest_to_a_third(
    session: Session, recorder: Recorder, presenter: SplitPresenter
) -> None:
    assert presenter.draft is not None
    assert presenter.draft.devices == DEVICES
    assert not presenter.has_changes
    assert presenter.select_text("0-1")
    presenter.set_share("this/cpu", 0.7)
    presenter.set_share("local-1/cpu", 0.3)
    assert presenter.draft.cells[SHAPE.attention_row(0)] == (6, 3, 0)
    assert presenter.draft.cells[SHAPE.mlp_row(1)] == (5, 2, 0)
    assert presenter.select_text("2-4")
    presenter.set_share("local-2/cpu", 1.0)
    assert [str(change) for change in presenter.changes()] == [
        "layers 0\u20131: this computer 69 %, local-1 31 %",
        "layers 2\u20134: local-2 100 %",
    ]
    presenter.apply()
    plan = _applied(session, recorder)
    assert plan.devices == DEVICES
    assert not presenter.has_changes
    assert presenter.running == plan


def test_a_fader_set_by_hand_stays_while_the_others_can_make_up() -> None:
    """70 to the first, then 30 to the second: the third gives it, not the first."""
    plan = single(SHAPE, "this/cpu", DEVICES)
    rows = list(range(SHAPE.num_rows))
    plan = set_share_keeping(plan, rows, 0, 0.7, [], [])
    plan = set_share_keeping(plan, rows, 1, 0.3, [], [0])
    assert plan.cells[0] == (6, 3, 0)
    plan = set_share_keeping(plan, rows, 2, 0.5, [], [0, 1])
    assert plan.share(1, 2) == pytest.approx(0.5, abs=0.1), "the hand on the fader wins"


# ---- sums ----------------------------------------------------------------------------------------


@given(
    st.lists(
        st.tuples(
            st.integers(0, 2),
            st.floats(0, 1),
            st.sets(st.integers(0, 2), max_size=2),
            st.lists(st.integers(0, 2), unique=True, max_size=2),
        ),
        max_size=8,
    )
)
def test_any_sequence_of_fader_moves_sums_and_keeps_locks(
    moves: list[tuple[int, float, set[int], list[int]]],
) -> None:
    plan = even(SHAPE, DEVICES)
    rows = list(range(SHAPE.num_rows))
    for column, fraction, locked, touched in moves:
        keep = sorted(locked - {column})
        before = plan
        plan = set_share_keeping(
            plan, rows, column, fraction, keep, [item for item in touched if item != column]
        )
        plan.validate()
        for row in rows:
            for held in keep:
                assert plan.cells[row][held] == before.cells[row][held]


@given(st.floats(0, 1), st.sampled_from([(0, 1), (1, 2)]))
def test_a_divider_moves_only_its_neighbours(border: float, pair: tuple[int, int]) -> None:
    plan = even(SHAPE, DEVICES)
    moved = move_divider(plan, range(SHAPE.num_rows), *pair, border).validate()
    (other,) = {0, 1, 2} - set(pair)
    for row in range(SHAPE.num_rows):
        assert moved.cells[row][other] == plan.cells[row][other]


@given(st.lists(st.integers(0, 50), min_size=1, max_size=9).filter(any))
def test_percentages_shown_always_sum_to_a_hundred(counts: list[int]) -> None:
    total = sum(counts)
    tenths = tenths_of_percent([count / total for count in counts])
    assert sum(tenths) == 1000
    assert all(abs(t - 1000 * c / total) <= 1 for t, c in zip(tenths, counts, strict=True))


def test_what_was_asked_is_told_beside_what_runs(presenter: SplitPresenter) -> None:
    presenter.set_share("local-1/cpu", 0.33)
    assert presenter.asked == ("local-1/cpu", 0.33)
    facts = {device: fact for device, fact, _ in presenter.facts()}
    assert (
        facts["local-1/cpu"].quanta == "3 of 9 heads, 2 of 7 MLP blocks, 1 of 4 vocabulary blocks"
    )
    assert sum(_tenths(presenter).values()) == 1000
    presenter.select_text("0")
    assert presenter.asked is None


def test_a_locked_fader_is_left_alone(presenter: SplitPresenter) -> None:
    presenter.use_even()
    presenter.set_locked("this/cpu", True)
    before = presenter.draft
    presenter.set_share("this/cpu", 0.9)
    assert presenter.draft == before
    presenter.set_share("local-1/cpu", 1.0)
    assert presenter.draft is not None
    assert presenter.draft.cells[0][0] == 3


# ---- undo ----------------------------------------------------------------------------------------


def test_a_drag_is_one_step_of_undo_and_starts_from_where_it_began(
    presenter: SplitPresenter,
) -> None:
    presenter.use_even()
    start = presenter.draft
    presenter.begin_gesture()
    for percent in range(43, 101):
        presenter.set_share("this/cpu", percent / 100)
    for percent in range(100, 42, -1):
        presenter.set_share("this/cpu", percent / 100)
    presenter.end_gesture()
    assert presenter.draft == start, "a drag there and back is no change"
    assert presenter.undo_stack.count() == 2
    presenter.undo_stack.undo()
    presenter.undo_stack.undo()
    assert not presenter.has_changes
    presenter.undo_stack.redo()
    assert presenter.draft == start


def test_two_drags_are_two_steps(presenter: SplitPresenter) -> None:
    for fraction in (0.5, 0.2):
        presenter.begin_gesture()
        presenter.set_share("local-1/cpu", fraction)
        presenter.end_gesture()
    presenter.undo_stack.undo()
    assert presenter.draft is not None
    assert presenter.draft.share(SHAPE.mlp_row(0), 1) == pytest.approx(0.5, abs=0.1)


def test_revert_can_be_undone(presenter: SplitPresenter) -> None:
    presenter.use_pipeline()
    draft = presenter.draft
    presenter.revert()
    assert not presenter.has_changes
    presenter.undo_stack.undo()
    assert presenter.draft == draft


# ---- draft and running ---------------------------------------------------------------------------


def test_a_change_and_its_reverse_is_no_change(presenter: SplitPresenter) -> None:
    presenter.set_share("local-1/cpu", 0.4)
    assert presenter.has_changes
    presenter.set_share("local-1/cpu", 0.0)
    assert not presenter.has_changes
    assert not presenter.can_apply


def test_columns_without_a_share_are_no_difference() -> None:
    running = single(SHAPE, "this/cpu")
    draft = single(SHAPE, "this/cpu", DEVICES)
    assert changes(running, draft, _label) == []


def test_a_new_node_joins_the_draft_without_a_share(
    session: Session, presenter: SplitPresenter
) -> None:
    presenter.use_even()
    names = ("this", "local-1", "local-2", "local-3")
    session.hear([api.NodesChanged(nodes=tuple(node(name) for name in names))])
    assert presenter.draft is not None
    assert presenter.draft.devices == (*DEVICES, "local-3/cpu")
    assert presenter.draft.cells[0] == (3, 3, 3, 0)


def test_a_lost_node_keeps_its_share_until_someone_else_gets_it(
    session: Session, presenter: SplitPresenter
) -> None:
    presenter.use_even()
    nodes = (node("this"), node("local-1", "lost"), node("local-2"))
    session.hear([api.NodesChanged(nodes=nodes)])
    assert presenter.draft is not None
    assert presenter.draft.cells[0] == (3, 3, 3)
    assert not presenter.is_available("local-1/cpu")
    presenter.set_taking_part("local-1/cpu", False)
    assert presenter.draft.devices == ("this/cpu", "local-2/cpu")
    assert sum(presenter.draft.cells[0]) == 9


def test_a_device_that_was_left_out_stays_out_until_undone(
    session: Session, presenter: SplitPresenter
) -> None:
    presenter.use_even()
    presenter.set_taking_part("local-2/cpu", False)
    session.hear([api.NodesChanged(nodes=session.nodes)])
    assert presenter.draft is not None
    assert presenter.draft.devices == DEVICES[:2]
    presenter.undo_stack.undo()
    assert presenter.draft.devices == DEVICES
    assert presenter.draft.cells[0] == (3, 3, 3)


def test_edits_survive_when_the_same_plan_is_applied_again(
    session: Session, presenter: SplitPresenter
) -> None:
    presenter.use_even()
    draft = presenter.draft
    running = presenter.running
    assert running is not None
    session.hear([api.PlanApplied(epoch=3, plan=running)])
    assert presenter.draft == draft
    assert presenter.has_changes


def test_after_a_lost_plan_the_draft_can_be_applied(
    session: Session, presenter: SplitPresenter
) -> None:
    session.hear([api.PlanLost(message="lost")])
    assert presenter.running is None
    assert presenter.can_apply


# ---- presets, text, selection --------------------------------------------------------------------


def test_presets_use_the_devices_that_take_part(presenter: SplitPresenter) -> None:
    presenter.set_taking_part("local-1/cpu", False)
    presenter.use_pipeline()
    assert presenter.draft is not None
    assert presenter.draft.devices == ("this/cpu", "local-2/cpu")
    assert [presenter.draft.group(SHAPE.attention_row(layer)) for layer in range(5)] == [
        (0,),
        (0,),
        (0,),
        (1,),
        (1,),
    ]
    presenter.use_home()
    assert not presenter.has_changes


def test_the_text_of_a_draft_can_be_taken_back(presenter: SplitPresenter) -> None:
    presenter.use_even()
    draft = presenter.draft
    text = presenter.as_text()
    presenter.use_home()
    presenter.use_text(text)
    assert presenter.draft == draft
    with pytest.raises(PlanError, match="not TOML"):
        presenter.use_text("devices = [")


@pytest.mark.parametrize(
    ("text", "layers"),
    [
        ("0-2", {0, 1, 2}),
        ("3", {3}),
        ("0, 2-3", {0, 2, 3}),
        ("1\u20132", {1, 2}),
        ("3-1", None),
        ("0-5", None),
        ("-1", None),
        ("a", None),
        ("", None),
    ],
)
def test_layers_are_typed_by_their_numbers(text: str, layers: set[int] | None) -> None:
    assert parse_layers(text, 5) == layers


def test_a_selection_knows_its_rows() -> None:
    both = Selection(frozenset({1}), True)
    assert both.rows(SHAPE) == [2, 3, 10]
    assert Selection(frozenset({1}), True, Part.ATTENTION).rows(SHAPE) == [2]
    assert Selection(frozenset(), True, Part.MLP).rows(SHAPE) == [10]
    assert Selection.everything(SHAPE).describe(SHAPE) == "All layers and the output head"


def test_editing_attention_leaves_the_mlp(presenter: SplitPresenter) -> None:
    presenter.choose_part(Part.ATTENTION)
    presenter.set_share("local-1/cpu", 1.0)
    assert presenter.draft is not None
    assert presenter.draft.cells[0] == (0, 9, 0)
    assert presenter.draft.cells[1] == (7, 0, 0)
