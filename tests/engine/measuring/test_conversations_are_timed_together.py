"""Streams are timed while all of them run: not before the last began, not after all have enough."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.errors import EngineError
from engine.measuring.conversations import measure_conversations, speeds
from engine.session import Session, SessionOptions
from tests.tiny_models import save_tiny_llama


def test_only_the_time_in_which_all_stream_counts() -> None:
    # The first begins 10 s early; from second 10 on it has twice the other's speed.
    early = [float(n) for n in range(10)] + [10.5, 11.0, 11.5, 12.0, 12.5]
    late = [10.0, 11.0, 12.0]
    found = speeds({1: early, 2: late}, tokens_each=2)
    assert found is not None
    assert found.streams == (2.0, 1.0)
    assert found.total == 3.0
    assert found.slowest_share == pytest.approx(2 / 3)


def test_nothing_is_said_before_every_stream_has_enough() -> None:
    assert speeds({1: [0.0, 1.0, 2.0], 2: []}, tokens_each=1) is None
    assert speeds({1: [0.0, 1.0, 2.0], 2: [0.5, 1.5]}, tokens_each=2) is None
    assert speeds({1: [0.0, 1.0, 2.0], 2: [0.5, 1.5]}, tokens_each=1) is not None


@pytest.mark.network
def test_a_session_streams_to_all_and_is_idle_afterwards(tmp_path: Path) -> None:
    save_tiny_llama(tmp_path)
    with Session(SessionOptions(model=str(tmp_path), num_threads=1)) as session:
        found = measure_conversations(session, 3, prompt_tokens=20, tokens_each=10)
        assert len(found.streams) == 3
        assert all(speed > 0 for speed in found.streams)
        # What was cancelled is gone: only the new request's events come.
        finished = session.benchmark(20, 4)
        assert len(finished.token_ids) == 4
        with pytest.raises(EngineError, match="2 conversations at once"):
            measure_conversations(session, 2, prompt_tokens=20, deadline_seconds=0.0)
        with pytest.raises(EngineError, match="window has 256"):
            measure_conversations(session, 2, prompt_tokens=500)
