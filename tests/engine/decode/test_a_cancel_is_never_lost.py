"""A request that is cancelled ends, wherever it was on its way to the runners."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.decode.sequence import Sequence
from tests.engine.decode.scheduler_and_runners import Memory, Running


def test_a_request_made_and_cancelled_while_weights_are_loaded_is_not_computed(
    tmp_path: Path,
) -> None:
    """The cancel was forgotten before the request was taken up: its whole answer was computed."""
    has_asked = False

    def ask_and_cancel() -> None:
        nonlocal has_asked
        if not has_asked:
            has_asked = True
            running.ask(1, "abc", 200)
            running.scheduler.cancel(1)

    with Running(tmp_path, 1) as running:
        running.heard.while_loading = ask_and_cancel
        running.begin_anew()
        assert has_asked
        running.ask(2, "xyz", 5)
        running.assert_answered(2, 5)
        first = running.heard.end(1)
    assert isinstance(first, Sequence)
    assert first.finish_reason == "cancelled"
    assert first.num_generated == 0


def test_an_answer_ends_while_a_piece_of_anothers_prompt_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It went on until the step ended, which takes seconds where weights are large."""
    memory = Memory(monkeypatch)
    ended: list[object] = []

    def cancel_in_the_step(thread: str) -> None:
        # The runner looks for memory in the step that reads the prompt, and has not answered yet.
        if thread == "node-0/cpu" and not ended:
            running.scheduler.cancel(1)
            ended.append(running.heard.end(1))

    def ask_long() -> None:
        if not has_asked:
            has_asked.append(True)
            memory.say = cancel_in_the_step
            running.ask(2, "q" * 1500, 3)

    has_asked: list[bool] = []
    with Running(tmp_path, 1) as running:
        running.begin_anew()
        running.ask(1, "abcabcabc", 1000, on_text=ask_long, speculation="off")
        running.assert_answered(2, 3)
        running.ask(3, "abcabcabc and so on", 12)
        assert running.assert_answered(3, 12).num_reused >= len("abcabcabc")
        first = running.heard.end(1)
        assert ended == [first]
    assert isinstance(first, Sequence)
    assert first.finish_reason == "cancelled"
