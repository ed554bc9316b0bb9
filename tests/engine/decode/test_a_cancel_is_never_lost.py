"""A request that is cancelled ends, wherever it was on its way to the runners."""

from __future__ import annotations

from pathlib import Path

from engine.decode.sequence import Sequence
from tests.engine.decode.scheduler_and_runners import Running


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
