"""The bridge coalesces without loss, never floods the window, and ends what it started."""

from __future__ import annotations

import queue
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pytestqt.qtbot import QtBot

from app.bridge import Bridge, EventBuffer
from engine.client import Event
from engine.cluster.messages import Message
from engine.errors import WorkerLost
from engine.host import messages as api

from .conftest import node

WAIT_MS = 5000


def _tokens(request_id: int, text: str) -> api.TokensGenerated:
    return api.TokensGenerated(request_id=request_id, token_ids=(len(text),), text=text)


def _progress(request_id: int, subject: str, done: int) -> api.Progress:
    return api.Progress(
        request_id=request_id, phase="weights", subject=subject, done=done, total=100
    )


events = st.one_of(
    st.builds(_tokens, st.integers(1, 3), st.text("ab ", min_size=1, max_size=3)),
    st.builds(_progress, st.integers(1, 3), st.sampled_from(["x", "y"]), st.integers(0, 100)),
    st.builds(lambda name: api.NodesChanged(nodes=(node(name),)), st.sampled_from(["this", "b"])),
    st.builds(lambda r: api.Done(request_id=r), st.integers(1, 3)),
)


def _story(heard: list[Message], request_id: int) -> list[object]:
    """What a request's owner makes of its events: text, and the latest progress in between."""
    story: list[object] = []
    for event in heard:
        if getattr(event, "request_id", None) != request_id:
            continue
        if isinstance(event, api.TokensGenerated):
            if story and isinstance(story[-1], str):
                story[-1] += event.text
            else:
                story.append(event.text)
        elif isinstance(event, api.Progress):
            if not story or not isinstance(story[-1], dict):
                story.append({})
            latest = story[-1]
            assert isinstance(latest, dict)
            latest[event.subject] = event.done
        else:
            story.append(type(event))
    return story


@given(st.lists(events, max_size=40))
def test_coalesced_events_tell_every_request_the_same_story(heard: list[Message]) -> None:
    buffer = EventBuffer()
    for event in heard:
        buffer.add(event)
    taken = list(buffer.take())
    assert not buffer
    for request_id in (1, 2, 3):
        assert _story(taken, request_id) == _story(heard, request_id)
    nodes = [event for event in heard if isinstance(event, api.NodesChanged)]
    assert [event for event in taken if isinstance(event, api.NodesChanged)] == nodes[-1:]


def test_two_thousand_tokens_become_one_event() -> None:
    buffer = EventBuffer()
    for index in range(2000):
        buffer.add(_tokens(1, f"{index} "))
    (event,) = buffer.take()
    assert isinstance(event, api.TokensGenerated)
    assert len(event.token_ids) == 2000
    assert event.text.startswith("0 1 2 ")


class ScriptedClient:
    """Says what a test puts into its queue; an exception ends it."""

    def __init__(self) -> None:
        self.says: queue.Queue[Message | Exception | None] = queue.Queue()
        self.posted: list[Message] = []
        self.closed = threading.Event()

    def post(self, call: Message) -> None:
        self.posted.append(call)

    def wake(self) -> None:
        self.says.put(None)

    def receive(self, timeout_seconds: float | None = None) -> Event | None:
        try:
            said = self.says.get(timeout=timeout_seconds)
        except queue.Empty:
            return None
        if isinstance(said, Exception):
            raise said
        return None if said is None else Event(said, [])

    def close(self) -> None:
        self.closed.set()


@pytest.fixture
def client() -> ScriptedClient:
    return ScriptedClient()


@pytest.fixture
def bridge(client: ScriptedClient, qtbot: QtBot) -> Bridge:
    return Bridge(lambda: client)


def test_calls_before_the_start_are_posted_after_it(
    bridge: Bridge, client: ScriptedClient, qtbot: QtBot
) -> None:
    call = api.OpenModel(request_id=1, path=None)
    bridge.post(call)
    with qtbot.waitSignal(bridge.engine_started, timeout=WAIT_MS):
        bridge.start()
    assert client.posted == [call]
    bridge.close()
    assert client.closed.is_set()


def test_a_busy_window_gets_one_batch_and_then_all_the_rest_as_one(
    bridge: Bridge, client: ScriptedClient, qtbot: QtBot
) -> None:
    """Nothing is queued behind a batch that the window has not taken."""
    batches: list[tuple[Message, ...]] = []
    bridge.events_arrived.connect(batches.append)
    with qtbot.waitSignal(bridge.engine_started, timeout=WAIT_MS):
        bridge.start()
    # The test holds the window's thread: no event loop runs until all is said.
    for index in range(500):
        client.says.put(_tokens(1, f"{index},"))
    while not client.says.empty():
        pass
    with qtbot.waitSignal(bridge.events_arrived, timeout=WAIT_MS):
        pass
    qtbot.waitUntil(lambda: _text(batches).endswith("499,"), timeout=WAIT_MS)
    assert _text(batches) == "".join(f"{index}," for index in range(500))
    assert len(batches) <= 3
    bridge.close()


def test_a_host_that_dies_is_told_with_its_reason(
    bridge: Bridge, client: ScriptedClient, qtbot: QtBot
) -> None:
    heard: list[Message] = []
    bridge.events_arrived.connect(heard.extend)
    bridge.start()
    client.says.put(_tokens(1, "last words"))
    with qtbot.waitSignal(bridge.engine_lost, timeout=WAIT_MS) as lost:
        client.says.put(WorkerLost("the engine host ended: killed by SIGKILL"))
    assert lost.args == ["the engine host ended: killed by SIGKILL"]
    assert _text([tuple(heard)]) == "last words"
    assert client.closed.wait(5)
    bridge.close()


def test_a_host_that_cannot_start_is_told(qtbot: QtBot) -> None:
    def fail() -> ScriptedClient:
        raise WorkerLost("shardmix-host ended at its start: exit code 1")

    bridge = Bridge(fail)
    with qtbot.waitSignal(bridge.engine_lost, timeout=WAIT_MS) as lost:
        bridge.start()
    assert lost.args == ["shardmix-host ended at its start: exit code 1"]
    bridge.close()


def test_it_can_be_started_again_after_the_host_died(qtbot: QtBot) -> None:
    clients: list[ScriptedClient] = []

    def make() -> ScriptedClient:
        clients.append(ScriptedClient())
        return clients[-1]

    bridge = Bridge(make)
    with qtbot.waitSignal(bridge.engine_started, timeout=WAIT_MS):
        bridge.start()
    with qtbot.waitSignal(bridge.engine_lost, timeout=WAIT_MS):
        clients[0].says.put(WorkerLost("gone"))
    with qtbot.waitSignal(bridge.engine_started, timeout=WAIT_MS):
        bridge.start()
    bridge.post(api.AddSimulatedNodes(request_id=9, count=2))
    assert len(clients) == 2
    assert clients[1].posted == [api.AddSimulatedNodes(request_id=9, count=2)]
    bridge.close()


def _text(batches: list[tuple[Message, ...]]) -> str:
    found = [event for batch in batches for event in batch]
    return "".join(event.text for event in found if isinstance(event, api.TokensGenerated))
