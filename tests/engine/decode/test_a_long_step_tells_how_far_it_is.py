"""A piece of a prompt may take seconds: how far its rows are is told meanwhile."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest

from engine.cluster import runner
from tests.engine.decode.scheduler_and_runners import Running


@pytest.mark.parametrize("num_devices", [1, 2])
def test_progress_comes_between_the_rows_of_a_prompt(
    num_devices: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As if every row took longer than a report.
    monkeypatch.setattr(runner, "REPORT_SECONDS", 0.0)
    done: list[int] = []
    with Running(tmp_path, num_devices) as running:
        running.begin_anew()
        running.ask(1, "q" * 300, 2, on_prefill=done.append)
        answer = running.assert_answered(1, 2)
        num_steps = len(set(done))
        num_rows = running.model.config.num_layers * 2
        # A second prompt, whose beginning is there already.
        done.clear()
        running.ask(2, "q" * 300 + "z" * 300, 2, on_prefill=done.append)
        reused = running.assert_answered(2, 2)
    assert reused.num_reused
    assert all(a <= b for a, b in pairwise(done))
    assert done[0] >= reused.num_reused
    assert done[-1] == reused.num_prompt
    assert answer.num_prompt < reused.num_prompt
    # Several rows of each step, and not the end of the step alone.
    assert num_steps > num_rows
