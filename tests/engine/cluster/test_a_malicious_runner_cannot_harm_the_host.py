"""Table D1, a runner against the engine host's coordinator: one error with the device, and a plan
can be put in force again."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import msgspec
import numpy as np
import pytest
import zmq
from msgspec.structs import replace

from engine.cluster import messages as m
from engine.cluster.coordinator import Coordinator, DeviceAnswer, LoadRequest, StepFailed
from engine.cluster.runner_links import RunnerAddress
from engine.cluster.security import Gatekeeper, new_key_pair
from engine.cluster.transport import MAX_MESSAGE_BYTES, Channel, listen
from engine.decode.gather import continued_ids, gather_candidates, join_full_logits
from engine.errors import EngineError, PeerRefused, ProtocolError, WorkerLost
from engine.weights.checkpoint import Checkpoint, open_checkpoint
from tests.engine.cluster.runner_under_attack import (
    GROWTH_BYTES,
    IDS,
    memory_bytes,
    plan_of,
    segment,
)
from tests.tiny_models import VOCAB_SIZE, save_tiny_llama

pytestmark = pytest.mark.network

# What a runner says to a message: messages with tensors, or frames as they are.
Said = tuple[m.Message, Sequence[m.Array]] | list[bytes]
Script = Callable[[Any], list[Said]]


def says(*messages: m.Message) -> list[Said]:
    return [(message, ()) for message in messages]


def top(**changes: Any) -> list[m.Array]:
    """Tensors of a good answer in short form for one position, but for the changes."""
    ids = np.arange(VOCAB_SIZE, dtype=np.int64)[None]
    fields: dict[str, Any] = {
        "ids": ids,
        "values": -ids.astype(np.float32),
        "log_sums": np.zeros(1, np.float64),
        "raw_sums": np.zeros(1, np.float64),
        "asked": np.zeros(0, np.float32),
    }
    return list({**fields, **changes}.values())


def step_answer(step: m.Step, **changes: Any) -> m.StepAnswer:
    answer = m.StepAnswer(
        epoch=step.epoch,
        step_id=step.step_id,
        compute_ns=1,
        wait_ns=0,
        serialise_ns=0,
        sent_bytes=0,
        received_bytes=0,
        cache_bytes=0,
    )
    return replace(answer, **changes)


def honest(message: Any) -> list[Said]:
    """A runner without a model that keeps the rules."""
    if isinstance(message, m.Load):
        return says(m.Loaded(epoch=message.epoch, weight_bytes=1))
    if isinstance(message, m.Connect):
        return says(m.Connected(epoch=message.epoch, links=()))
    if isinstance(message, m.Step):
        return [(step_answer(message), top())]
    return []


class Bench:
    """A coordinator in this thread, and a runner in another that says what its script tells it."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.plan = plan_of(checkpoint, 1)
        self._checkpoint = checkpoint
        self._context: zmq.Context[Any] = zmq.Context()
        self._gatekeeper = Gatekeeper(self._context)
        keys, host_keys = new_key_pair(), new_key_pair()
        self._gatekeeper.allow("control", host_keys.public)
        socket, endpoint = listen(self._context, zmq.ROUTER, keys, "control", "tcp://127.0.0.1:*")
        self._channel: Channel[Any] = Channel(socket, m.RUNNER_ACCEPTS)
        self.script: Script = honest
        self._should_end = threading.Event()
        self._thread = threading.Thread(target=self._serve, name="malicious runner")
        self._thread.start()
        self._address = RunnerAddress(
            self.plan.devices[0], endpoint, endpoint, keys.public, host_keys
        )
        self.coordinator = Coordinator(self._context)
        self.progress: list[tuple[int, int]] = []
        self._epoch = self._step_id = 0

    def close(self) -> None:
        self._should_end.set()
        self._thread.join()
        self.coordinator.close()
        self._channel.close()
        self._gatekeeper.close()
        self._context.destroy(linger=0)

    def _serve(self) -> None:
        while not self._should_end.is_set():
            received = self._channel.receive(50)
            if received is None:
                continue
            for said in self.script(received.message):
                if isinstance(said, list):
                    self._channel.socket.send_multipart([received.route, *said])
                else:
                    self._channel.send(said[0], list(said[1]), received.route)

    def load(self, script: Script = honest) -> None:
        """Put a plan in force with a runner that follows a script."""
        self.script = script
        self._epoch += 1
        request = LoadRequest(
            epoch=self._epoch,
            config=self._checkpoint.config,
            plan=self.plan,
            dtype="float32",
            kv_window=64,
            kv_dtype="float32",
            kept_positions=0,
            threads={self.plan.devices[0]: 1},
            checkpoint_id="tiny",
            tensors=tuple(self._checkpoint.tensors.values()),
            source=self._checkpoint,
        )
        self.coordinator.load(
            request,
            [self._address],
            lambda _device, done, total: self.progress.append((done, total)),
            lambda: False,
        )

    def step(self, script: Script = honest) -> int:
        """One token; its id."""
        candidates = gather_candidates(self.plan, self.answers(script), [[]])[0]
        return int(candidates.ids[np.argmax(candidates.logits)])

    def answers(self, script: Script) -> list[DeviceAnswer]:
        """What came to a step."""
        self.script = script
        self._step_id += 1
        step = m.Step(
            epoch=self._epoch,
            step_id=self._step_id,
            kind="prompt",
            segments=(segment(logit_offsets=(4,)),),
            operations=(),
            logits=m.LogitsWanted(form="top", ids=((),), temperatures=(1.0,), raw_sums=(True,)),
        )
        rows = self._checkpoint.embed(IDS)
        return self.coordinator.step(step, rows, lambda: False, lambda: None)

    def still_serves(self) -> None:
        """A good plan and step end well."""
        self.load()
        assert self.step() == 0


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Checkpoint]:
    """A tiny model."""
    folder = tmp_path_factory.mktemp("tiny")
    save_tiny_llama(folder)
    with open_checkpoint(folder) as opened:
        yield opened


@pytest.fixture
def bench(checkpoint: Checkpoint) -> Iterator[Bench]:
    bench = Bench(checkpoint)
    try:
        yield bench
    finally:
        bench.close()


def frames(body: list[Any], *specs: Any) -> list[bytes]:
    return [msgspec.msgpack.encode((m.PROTOCOL_VERSION, body, specs))]


def at_load(*said: Callable[[m.Load], m.Message] | list[bytes]) -> Script:
    """Say these to a Load, and be honest otherwise."""

    def script(message: Any) -> list[Said]:
        if not isinstance(message, m.Load):
            return honest(message)
        return [s if isinstance(s, list) else (s(message), ()) for s in said]

    return script


def weights(**changes: Any) -> Callable[[m.Load], m.Message]:
    fields = {"name": "head", "axis": 0, "start": 0, "end": 9, **changes}
    return lambda load: m.WeightRequest(epoch=load.epoch, **fields)


def hashes(**changes: Any) -> Callable[[m.Load], m.Message]:
    fields = {"name": "head", "axis": 0, "unit": 32, "start": 0, "end": 1, **changes}
    return lambda load: m.HashesRequest(epoch=load.epoch, **fields)


def connected(*links: m.LinkFigures) -> Script:
    def script(message: Any) -> list[Said]:
        if isinstance(message, m.Connect):
            return says(m.Connected(epoch=message.epoch, links=links))
        return honest(message)

    return script


def figures(round_trip: float = 1e-3, bandwidth: float = 1e9) -> m.LinkFigures:
    return m.LinkFigures(device_index=0, round_trip_seconds=round_trip, bytes_per_second=bandwidth)


LOADS: dict[str, tuple[Script, type[EngineError], str]] = {
    "pickle": (at_load([pickle.dumps([1])]), ProtocolError, "first bytes 80 0"),
    "nothing": (at_load([b""]), ProtocolError, "part 0"),
    "deep nesting": (at_load([b"\x91" * 100_000]), ProtocolError, "first bytes 91 91"),
    "a dtype nobody knows": (
        at_load([*frames(["Loaded", 1, 1], (250, (1,))), b"x"]),
        ProtocolError,
        "dtype of tensor 0",
    ),
    "a negative number of bytes": (
        at_load(frames(["Loaded", 1, -5])),
        ProtocolError,
        "which is weight_bytes",
    ),
    "another protocol version": (
        at_load([msgspec.msgpack.encode((m.PROTOCOL_VERSION + 1, ["New"], ()))]),
        PeerRefused,
        "node-0/cpu: the peer speaks",
    ),
    "weights of no tensor": (
        at_load(weights(name="\x1b[2J" * 9999)),
        ProtocolError,
        "unknown tensor",
    ),
    "weights past the end": (at_load(weights(end=100)), ProtocolError, "0-100 along axis 0"),
    "weights that end before they begin": (at_load(weights(start=9, end=9)), ProtocolError, "9-9"),
    "weights along no axis": (at_load(weights(axis=2)), ProtocolError, "axis 2"),
    "hashes by nothing": (at_load(hashes(unit=0)), ProtocolError, "by 0 along axis 0"),
    "hashes along another axis": (at_load(hashes(axis=1)), ProtocolError, "along axis 1"),
    "hashes past the end": (at_load(hashes(end=1 << 50)), ProtocolError, "which has 4"),
    "hashes of less than nothing": (
        at_load(frames(["HashesRequest", 1, "head", 0, -1, 0, 1])),
        ProtocolError,
        "which is unit",
    ),
    "more bytes than there are": (
        at_load(lambda load: m.LoadProgress(epoch=load.epoch, done_bytes=2, total_bytes=1)),
        ProtocolError,
        "2 of 1 bytes",
    ),
    "connected unasked": (
        at_load(lambda load: m.Connected(epoch=load.epoch, links=())),
        ProtocolError,
        "unasked",
    ),
    "an error nobody knows": (
        at_load(lambda load: m.Failed(epoch=load.epoch, error="\x1b", message="\x1b\n" * 10**6)),
        EngineError,
        "node-0/cpu",
    ),
    "a link that is no number": (connected(figures(float("nan"))), ProtocolError, "nan"),
    "a link of infinite speed": (connected(figures(1.0, float("inf"))), ProtocolError, "inf"),
    "links without end": (connected(*[figures()] * 10_000), ProtocolError, "10,000 links"),
}


def test_a_load_answered_with_nonsense_ends_in_one_error(bench: Bench) -> None:
    before = memory_bytes()
    for what, (script, kind, words) in LOADS.items():
        with pytest.raises(kind, match=words) as caught:
            bench.load(script)
        assert str(caught.value).isprintable(), what
        assert len(str(caught.value)) < 2000, what
    assert memory_bytes() - before < GROWTH_BYTES
    assert bench.progress == []
    bench.still_serves()


def test_who_says_twice_that_it_has_loaded_is_refused(bench: Bench) -> None:
    loaded = at_load(*[lambda load: m.Loaded(epoch=load.epoch, weight_bytes=1)] * 2)
    with pytest.raises(ProtocolError, match="twice"):
        bench.load(lambda message: [] if isinstance(message, m.Connect) else loaded(message))
    bench.still_serves()


def answering(*tensors: m.Array, **changes: Any) -> Script:
    def script(message: Any) -> list[Said]:
        if isinstance(message, m.Step):
            return [(step_answer(message, **changes), tensors)]
        return honest(message)

    return script


IDS_OF_ALL = np.arange(VOCAB_SIZE, dtype=np.int64)[None]
NAN = np.full(1, np.nan)
ANSWERS: dict[str, tuple[Script, str]] = {
    "no tensors": (answering(), "0 tensors, expected 5"),
    "sixteen tensors": (answering(*[NAN] * 16), "16 tensors, expected 5"),
    "another shape": (answering(*top(values=np.zeros((2, VOCAB_SIZE), np.float32))), "float32"),
    "an empty shape": (answering(*top(ids=np.zeros((), np.int64))), "int64"),
    "another dtype": (answering(*top(ids=IDS_OF_ALL.astype(np.float64))), "float64"),
    "ids past the shard": (answering(*top(ids=IDS_OF_ALL + 1)), "lies outside 0 to 98"),
    "ids of 2^62": (answering(*top(ids=IDS_OF_ALL + (1 << 62))), "lies outside"),
    "negative ids": (answering(*top(ids=IDS_OF_ALL - 1)), "lies outside"),
    "an id twice": (answering(*top(ids=IDS_OF_ALL // 2)), "an id comes twice"),
    "the largest last": (
        answering(*top(values=IDS_OF_ALL.astype(np.float32))),
        "the largest do not come first",
    ),
    "a sum that is no number": (answering(*top(log_sums=NAN)), "not a number"),
    "a raw sum that is no number": (answering(*top(raw_sums=NAN)), "not a number"),
    "logits of ids nobody asked": (answering(*top(asked=np.zeros(9, np.float32))), "float32"),
    "figures that are no numbers": (answering(*top(), figures=(figures(-1.0),)), "-1.0"),
}


@pytest.mark.parametrize(
    "ids", [(3, 4, 5), (3, VOCAB_SIZE)], ids=["too many", "past the vocabulary"]
)
def test_tokens_that_nobody_asked_for_are_refused(bench: Bench, ids: tuple[int, ...]) -> None:
    """Of a step that its device may go on with for two tokens."""
    bench.load()
    answers = bench.answers(answering(*top(), continued=ids))
    with pytest.raises(ProtocolError, match=r"node-0/cpu went on with \d tokens, at most 2 were"):
        continued_ids(bench.plan, answers, 2)
    bench.still_serves()


def test_an_answer_that_does_not_fit_the_step_is_refused(bench: Bench) -> None:
    """Rows 8, 9 and 12. After a gathered answer the scheduler gives the plan up, as here."""
    before = memory_bytes()
    for what, (script, words) in ANSWERS.items():
        bench.load()
        with pytest.raises(ProtocolError, match=words) as caught:
            bench.step(script)
        assert "node-0/cpu" in str(caught.value), what
        bench.coordinator.abort()
    assert memory_bytes() - before < GROWTH_BYTES
    bench.still_serves()


def test_full_logits_of_another_shape_are_refused(bench: Bench) -> None:
    bench.load()
    bench.step()

    def script(message: Any) -> list[Said]:
        if isinstance(message, m.FetchLogits):
            step: Any = message
            return [(step_answer(step), [np.zeros((1, 98), np.float32)])]
        return honest(message)

    bench.script = script
    with pytest.raises(ProtocolError, match="logits of node-0/cpu is float32"):
        join_full_logits(bench.plan, bench.coordinator.fetch_logits(1), 1)
    bench.still_serves()


def test_answers_nobody_asked_for_are_passed_over(bench: Bench) -> None:
    """Row 11: of other steps and epochs, before the right one."""
    bench.load()

    def script(message: Any) -> list[Said]:
        if not isinstance(message, m.Step):
            return honest(message)
        wrong = [
            step_answer(message, step_id=message.step_id + 1),
            step_answer(message, epoch=message.epoch + 1),
        ]
        return [*[(answer, top(values=NAN)) for answer in wrong], *honest(message)]

    assert bench.step(script) == 0


def test_a_step_that_always_goes_on_has_an_end(bench: Bench) -> None:
    """Each word that a step goes on moves its deadline; there are no more of them than rows."""
    bench.load()

    def script(message: Any) -> list[Said]:
        if not isinstance(message, m.Step):
            return honest(message)
        progress = m.StepProgress(epoch=message.epoch, step_id=message.step_id, row=0)
        # Fewer than a socket queues: the runner must be there to serve again.
        return says(*[progress] * 100)

    with pytest.raises(ProtocolError, match="node-0/cpu says more often"):
        bench.step(script)
    bench.still_serves()


def failing(error: str, message: str, **changes: Any) -> Script:
    def script(said: Any) -> list[Said]:
        if not isinstance(said, m.Step):
            return honest(said)
        failed = m.Failed(epoch=said.epoch, step_id=said.step_id, error=error, message=message)
        return says(replace(failed, **changes))

    return script


def test_a_runner_that_blames_nobody_is_itself_what_is_lost(bench: Bench) -> None:
    """The plan would be put in force again and again without end: nobody was left out of it."""
    bench.load()
    with pytest.raises(WorkerLost) as caught:
        bench.step(failing("WorkerLost", "somebody is gone"))
    assert caught.value.device == "node-0/cpu"
    bench.load()
    with pytest.raises(WorkerLost) as caught:
        bench.step(failing("WorkerLost", "x", peer_index=200))
    assert caught.value.device == "node-0/cpu"
    bench.still_serves()


def test_a_step_refused_with_a_book_ends_in_one_line(bench: Bench) -> None:
    bench.load()
    with pytest.raises(StepFailed) as caught:
        bench.step(failing("os.system", "\x1b[2J\n" * 500_000))
    assert type(caught.value.error) is EngineError
    assert str(caught.value.error).isprintable()
    assert len(str(caught.value.error)) < 2000
    assert bench.step() == 0  # Only that request was lost.


def test_a_frame_past_the_limit_loses_the_runner_alone(bench: Bench) -> None:
    """Row 5."""
    bench.load()
    answer = [*frames(["Loaded", 1, 1]), bytes(MAX_MESSAGE_BYTES + 1)]
    with pytest.raises(WorkerLost, match="node-0/cpu"):
        bench.step(lambda message: [answer] if isinstance(message, m.Step) else honest(message))
    bench.still_serves()
