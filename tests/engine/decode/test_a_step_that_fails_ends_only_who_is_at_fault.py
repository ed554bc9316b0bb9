"""Where memory is short, copies are not made, and only the request that needs too much ends."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from engine.errors import CacheFull
from tests.engine.decode.scheduler_and_runners import Memory, Running

SYSTEM = "you are a tiny model with random weights. "
DEVICES = ("node-0/cpu", "node-1/cpu")


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with Running(tmp_path_factory.mktemp("tiny"), len(DEVICES)) as running:
        yield running


@pytest.fixture
def running(opened: Running) -> Iterator[Running]:
    opened.begin_anew()
    yield opened
    assert not opened.heard.losses


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Memory:
    return Memory(monkeypatch)


@pytest.mark.parametrize("full", [DEVICES[:1], DEVICES[1:], DEVICES])
def test_a_copy_without_memory_is_not_made_and_its_beginning_is_computed(
    running: Running, memory: Memory, full: tuple[str, ...]
) -> None:
    """Every request of the step that was to make the copy ended with an error."""
    running.ask(1, SYSTEM + "tell me of the sea, of ships, of harbours, and of all that is wet", 2)
    running.assert_answered(1, 2)
    refusals: list[str] = []

    def refuse_once(thread: str) -> int | None:
        if thread not in full or thread in refusals:
            return None
        refusals.append(thread)
        return 0

    def two_more() -> None:
        if not refusals and 3 not in running.heard.ended and memory.say is not refuse_once:
            memory.say = refuse_once
            running.ask(3, SYSTEM + "who?", 12)
            running.ask(4, "another prompt, read in the same step", 12)

    running.ask(2, "abcabcabc", 80, on_text=two_more, speculation="on")
    copied = running.assert_answered(3, 12)
    running.assert_answered(4, 12)
    running.assert_answered(2, 80)
    assert copied.num_reused == 0
    assert sorted(refusals) == list(full)
    running.ask(5, SYSTEM + "and who else?", 12)
    assert running.assert_answered(5, 12).num_reused >= len(SYSTEM)


@pytest.mark.parametrize("full", [DEVICES[:1], DEVICES[1:]])
def test_an_answer_that_needs_more_memory_than_there_is_ends_alone(
    running: Running, memory: Memory, full: tuple[str, ...]
) -> None:
    """Its neighbours, whose tokens the same step was to choose, ended with its error."""

    asked: set[int] = set()

    def once(request_id: int, prompt: str, count: int, then: Callable[[], None]) -> None:
        if request_id not in asked:
            asked.add(request_id)
            speculation = "on" if request_id == 3 else "off"
            running.ask(request_id, prompt, count, on_text=then, speculation=speculation)

    def fill() -> None:
        memory.say = lambda thread: 0 if thread in full else None

    # Past 256 positions a slot's memory doubles.
    def ask_for_too_much() -> None:
        once(1, "z" * 250, 12, fill)

    def ask_for_another() -> None:
        once(3, "the quick brown fox", 100, ask_for_too_much)

    once(2, "abcabcabc", 100, ask_for_another)
    error = running.heard.end(1)
    assert isinstance(error, CacheFull)
    assert "257 positions need" in str(error)
    assert "\n" not in str(error)
    running.assert_answered(2, 100)
    running.assert_answered(3, 100)
    memory.say = lambda _thread: None
    running.ask(4, "z" * 250, 12)
    running.assert_answered(4, 12)


@pytest.mark.parametrize("full", [DEVICES[:1], DEVICES[1:], DEVICES])
def test_a_conversation_that_has_ended_gives_its_memory_to_one_that_waits(
    running: Running, memory: Memory, full: tuple[str, ...]
) -> None:
    """The new one ended with an error, while the memory held what nobody was waiting for."""
    running.ask(1, SYSTEM + "tell me of the sea", 2)
    running.assert_answered(1, 2)
    refusals: list[str] = []

    def refuse_once(thread: str) -> int | None:
        if thread not in full or thread in refusals:
            return None
        refusals.append(thread)
        return 0

    memory.say = refuse_once
    running.ask(2, "q" * 400, 3)
    running.assert_answered(2, 3)
    assert sorted(refusals) == list(full)
    running.ask(3, SYSTEM + "tell me of the sea", 2)
    assert running.assert_answered(3, 2).num_reused == 0
    # Where that does not help, the request is told; once, and nobody else.
    memory.say = lambda thread: 0 if thread in full else None
    running.ask(4, "p" * 700, 3)
    error = running.heard.end(4)
    assert isinstance(error, CacheFull)
    assert "positions need" in str(error)
    memory.say = lambda _thread: None
    running.ask(5, "p" * 700, 3)
    running.assert_answered(5, 3)


def test_a_copy_that_fails_while_its_step_is_given_up_is_not_counted_on(
    running: Running, memory: Memory
) -> None:
    """What others in the step were cancelled for hid that one device had not made the copy: its
    next step found a gap, and ended every request."""
    running.ask(1, SYSTEM + "tell me of the sea, of ships, of harbours, and of all that is wet", 2)
    running.assert_answered(1, 2)
    has_asked = False
    num_refused = 0

    def refuse_after_the_cancel(thread: str) -> int | None:
        nonlocal num_refused
        if thread != DEVICES[1] or num_refused:
            return None
        num_refused += 1
        running.scheduler.cancel(2)
        running.heard.end(2)
        return 0

    def ask_for_a_copy(_done: int) -> None:
        nonlocal has_asked
        if not has_asked:
            has_asked = True
            memory.say = refuse_after_the_cancel
            # A piece of the long prompt was read: the answer's turn comes next, with the copy.
            running.ask(4, SYSTEM + "who?", 12)

    def ask_long() -> None:
        if not long_asked:
            long_asked.append(True)
            running.ask(3, "q" * 1500, 3, on_prefill=ask_for_a_copy)

    long_asked: list[bool] = []
    running.ask(2, "abcabcabc", 1000, on_text=ask_long, speculation="off")
    running.assert_answered(4, 12)
    running.assert_answered(3, 3)
    assert num_refused == 1
