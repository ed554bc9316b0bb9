"""What a slot holds is taken over or copied only where it is a true beginning."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from engine.cluster.messages import SlotOperation
from engine.decode.slots import MAX_KEPT, MIN_REUSED, Held, Slots, common_length, without_copies

WINDOW = 60
ROOM = 15


class Cache:
    """What the runners' slots hold, moved by operations as they move it."""

    def __init__(self) -> None:
        self.ids: dict[int, list[int]] = {}

    def apply(self, operations: list[SlotOperation]) -> None:
        for operation in operations:
            if operation.action == "free":
                self.ids.pop(operation.slot, None)
            elif operation.action == "copy":
                assert operation.slot not in self.ids
                assert operation.source != operation.slot
                source = self.ids[operation.source]
                assert operation.length <= len(source)
                self.ids[operation.slot] = source[: operation.length]
            else:
                self.ids[operation.slot] = self.ids[operation.slot][: operation.length]


# Few different tokens, so that common beginnings of any length are frequent.
PROMPTS = st.lists(st.integers(0, 1), min_size=1, max_size=70)
ACTIONS = st.lists(
    st.tuples(PROMPTS, st.sampled_from(["keep", "break"]), st.booleans()), max_size=25
)


@settings(deadline=None, max_examples=200)
@given(actions=ACTIONS)
def test_a_seat_holds_what_it_claims(actions: list[tuple[list[int], str, bool]]) -> None:
    def can_truncate(written: int, length: int) -> bool:
        return written <= WINDOW or written - length <= ROOM

    slots, cache = Slots(WINDOW, can_truncate), Cache()
    written: dict[int, int] = {}
    running: list[tuple[int, list[int], str]] = []
    for ids, end, may_reuse in actions:
        kept_before = {n: list(cache.ids[n]) for n in cache.ids}
        in_use = [Held(slot, cache.ids[slot], written[slot]) for slot, _, _ in running]
        seat, operations = slots.take(ids, may_reuse=may_reuse, in_use=in_use)
        origin = next((o.source for o in operations if o.action == "copy"), seat.slot)
        before = written.get(origin, 0) if seat.num_reused else 0
        assert seat.num_written == before
        for operation in operations:
            assert operation.slot == seat.slot
            assert can_truncate(before, operation.length)
        cache.apply(operations)
        held = cache.ids.setdefault(seat.slot, [])
        # Nobody else's slot changes, and no kept one loses more than is gained.
        assert all(cache.ids[n] == kept_before[n] for n in kept_before if n != seat.slot)
        assert len(kept_before.get(seat.slot, [])) <= 2 * seat.num_reused
        assert held == ids[: seat.num_reused]
        assert seat.num_reused < len(ids)
        assert seat.num_reused == 0 or (may_reuse and seat.num_reused >= MIN_REUSED)
        assert seat.slot not in [slot for slot, _, _ in running]
        held += ids[len(held) :]
        written[seat.slot] = max(before, len(ids))
        running.append((seat.slot, ids, end))
        if len(running) == 3:
            slot, done, how = running.pop(0)
            if how == "keep":
                cache.apply(slots.keep(slot, done, written[slot]))
            else:
                cache.apply(slots.free(slot))
            kept = [n for n in cache.ids if n not in [slot for slot, _, _ in running]]
            assert len(kept) <= MAX_KEPT
            assert sum(min(len(cache.ids[n]), WINDOW) for n in kept) <= WINDOW


@given(first=PROMPTS, second=PROMPTS)
def test_the_common_length_is_the_longest_common_beginning(
    first: list[int], second: list[int]
) -> None:
    length = common_length(first, second)
    assert first[:length] == second[:length]
    assert first[length : length + 1] != second[length : length + 1] or length == min(
        len(first), len(second)
    )


def test_the_longest_beginning_wins_and_the_last_token_is_always_computed() -> None:
    slots = Slots(1000, lambda _written, _length: True)
    for ids in ([1] * 20, [1] * 30 + [2] * 5):
        seat, _ = slots.take(ids, may_reuse=False)
        slots.keep(seat.slot, ids, len(ids))
    seat, operations = slots.take([1] * 40, may_reuse=True)
    assert seat.num_reused == 30
    assert [(op.action, op.length) for op in operations] == [("truncate", 30)]
    again, operations = slots.take([1] * 20, may_reuse=True)
    assert again.num_reused == 19
    assert [(op.action, op.length) for op in operations] == [("truncate", 19)]


def test_a_conversation_that_shares_a_small_part_gets_a_copy_and_the_other_stays() -> None:
    slots = Slots(1000, lambda _written, _length: True)
    system, first_chat = [1] * 30, [1] * 30 + [2] * 60
    seat, _ = slots.take(first_chat, may_reuse=False)
    slots.keep(seat.slot, first_chat, 90)
    other, operations = slots.take([*system, 3, 3, 3], may_reuse=True)
    assert other.num_reused == 30
    assert other.slot != seat.slot
    assert [(o.action, o.slot, o.source, o.length) for o in operations] == [
        ("copy", other.slot, seat.slot, 30)
    ]
    again, operations = slots.take([*first_chat, 4], may_reuse=True)
    assert (again.slot, again.num_reused, operations) == (seat.slot, 90, [])


def test_what_a_running_conversation_has_computed_so_far_can_be_copied() -> None:
    slots = Slots(0, lambda _written, _length: True)
    first, _ = slots.take([5] * 40, may_reuse=True)
    computed = Held(first.slot, [5] * 25, 25)
    second, operations = slots.take([5] * 60, may_reuse=True, in_use=[computed])
    assert second.num_reused == 25
    assert [o.action for o in operations] == ["copy"]
    _, operations = slots.take([5] * 60, may_reuse=False, in_use=[computed])
    assert operations == []


def test_after_a_step_that_failed_no_copy_is_asked_again() -> None:
    free, cut = SlotOperation(action="free", slot=1), SlotOperation(action="truncate", slot=2)
    copy = SlotOperation(action="copy", slot=3, length=9, source=2)
    asked = without_copies([free, cut, copy])
    assert asked == [free, cut, SlotOperation(action="free", slot=3)]
