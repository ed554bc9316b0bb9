"""Whoever makes a scheduler hears why it cannot begin, and does not wait for ever."""

from __future__ import annotations

import threading

from engine.cluster.coordinator import Coordinator
from engine.decode.scheduler import Scheduler
from engine.errors import EngineError
from tests.engine.decode.scheduler_and_runners import Heard


def test_what_the_coordinator_raises_is_raised_where_the_scheduler_is_made() -> None:
    def refuse() -> Coordinator:
        raise EngineError("too many open files; raise the limit with `ulimit -n`")

    before = set(threading.enumerate())
    raised: list[EngineError] = []

    def make() -> None:
        try:
            Scheduler(refuse, Heard())
        except EngineError as error:
            raised.append(error)

    maker = threading.Thread(target=make, daemon=True)
    maker.start()
    maker.join(30)
    assert not maker.is_alive(), "it waits for a thread that has ended"
    assert [str(error) for error in raised] == [
        "too many open files; raise the limit with `ulimit -n`"
    ]
    assert not set(threading.enumerate()) - before
