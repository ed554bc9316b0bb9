"""Table D1, a paired engine host against a runner: one error that names the field, and it goes on."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from msgspec.structs import replace

from engine.cluster import messages as m
from engine.cluster.codec import MAX_HEADER_BYTES
from engine.cluster.transport import MAX_MESSAGE_BYTES
from engine.model.config import Experts
from engine.model.kv_cache import MAX_SLOTS
from engine.weights.checkpoint import Checkpoint, open_checkpoint
from tests.engine.cluster.runner_under_attack import (
    GROWTH_BYTES,
    IDS,
    AttackedRunner,
    memory_bytes,
    segment,
)
from tests.tiny_models import save_tiny_llama

pytestmark = pytest.mark.network

HUGE = 1 << 63


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Checkpoint]:
    """A tiny model."""
    folder = tmp_path_factory.mktemp("tiny")
    save_tiny_llama(folder)
    with open_checkpoint(folder) as opened:
        yield opened


@pytest.fixture
def attacked(checkpoint: Checkpoint, tmp_path: Path) -> Iterator[AttackedRunner]:
    """A runner with a share of its own, which has computed."""
    with AttackedRunner(checkpoint, tmp_path) as attacked:
        attacked.load()
        attacked.logits()
        yield attacked


def still_serves(attacked: AttackedRunner, expected: m.Array) -> None:
    """A load and a step end as they did before."""
    attacked.load()
    np.testing.assert_array_equal(attacked.logits(), expected)
    assert attacked.error is None


def header(body: Any, *specs: Any) -> bytes:
    return msgspec.msgpack.encode((m.PROTOCOL_VERSION, body, specs))


# ---- rows 1, 6, 7, 8, 13, 14: what is no message ------------------------------------------------

ABORT = ["Abort", 1]
NO_MESSAGES: dict[str, tuple[list[bytes], str, str]] = {
    "pickle": ([pickle.dumps({"a": 1})], "ProtocolError", "first bytes 80 0"),
    "pickle as a tensor": ([header(ABORT), pickle.dumps(1)], "ProtocolError", "brings 1"),
    "a dtype nobody knows": ([header(ABORT, (250, (1,))), b"x"], "ProtocolError", "dtype"),
    "a dtype by another name": (
        [header(ABORT, ("x" * 9999, (1,)))],
        "ProtocolError",
        "Invalid enum",
    ),
    "a part too short": (
        [header(ABORT, ("float32", (1, 7))), b"x" * 27],
        "ProtocolError",
        r"\[1, 7\] float32 = 28 bytes, part has 27",
    ),
    "a shape past 64 bits": (
        [header(ABORT, ("float32", (2**40, 2**40))), b"x"],
        "ProtocolError",
        "part has 1",
    ),
    "a part that is missing": ([header(ABORT, ("float32", (1,)))], "ProtocolError", "brings 0"),
    "no frame": ([b""], "ProtocolError", "part 0 is not a known message"),
    "seventeen parts": (
        [header(ABORT, *[("uint8", (1,))] * 17), *[b"x"] * 17],
        "ProtocolError",
        "at most 16",
    ),
    "a thousand parts": ([header(ABORT), *[b""] * 1000], "ProtocolError", "brings 1000"),
    "deep nesting": ([b"\x91" * 100_000], "ProtocolError", "first bytes 91 91"),
    "an object with a field twice": (
        [b"\x93" + bytes([m.PROTOCOL_VERSION]) + b"\x82\xa5epoch\x01\xa5epoch\x02\x90"],
        "ProtocolError",
        "array",
    ),
    "a field too many": ([header([*ABORT, 2])], "ProtocolError", "at most"),
    "a field too few": ([header(["Abort"])], "ProtocolError", "at least"),
    "a field of another type": ([header(["Abort", "1"])], "ProtocolError", "which is epoch"),
    "a negative epoch": ([header(["Abort", -1])], "ProtocolError", "which is epoch"),
    "an epoch past 53 bits": ([header(["Abort", HUGE])], "ProtocolError", "which is epoch"),
    "a message for a worker": ([header(["Hello", "x", 1.0])], "ProtocolError", "Hello"),
    "a name full of control characters": (
        [header(["\x1b[2J\n" * 1000, 1])],
        "ProtocolError",
        "Invalid value",
    ),
    "a header past the limit": (
        [header(["Failed", 1, "x", "y" * (MAX_HEADER_BYTES + 1), 0, None])],
        "ProtocolError",
        "exceeds the limit",
    ),
    "another protocol version": (
        [msgspec.msgpack.encode((m.PROTOCOL_VERSION + 1, ["Unheard"], ()))],
        "PeerRefused",
        "install the same version",
    ),
}


def test_what_is_no_message_is_refused_with_the_field(attacked: AttackedRunner) -> None:
    expected, before = attacked.logits(), memory_bytes()
    for what, (frames, kind, words) in NO_MESSAGES.items():
        attacked.channel.socket.send_multipart(frames)
        failed, _ = attacked.hear(m.Failed)
        assert failed.error == kind, what
        assert failed.message.isprintable(), what
        assert len(failed.message) < 2000, what
        with pytest.raises(AssertionError, match=words):
            raise AssertionError(failed.message)
    assert memory_bytes() - before < GROWTH_BYTES
    np.testing.assert_array_equal(attacked.logits(), expected)  # The same plan goes on.


def test_a_frame_past_the_limit_ends_the_connection_and_nothing_else(
    attacked: AttackedRunner,
) -> None:
    """Row 5: libzmq drops the connection at the announced length, before it takes memory."""
    expected = attacked.logits()
    events = attacked.channel.socket.get_monitor_socket()
    attacked.channel.socket.send_multipart(
        [header(ABORT, ("uint8", (MAX_MESSAGE_BYTES + 1,))), bytes(MAX_MESSAGE_BYTES + 1)],
        copy=False,
    )
    assert events.poll(30_000), "the connection stands"
    attacked.channel.socket.disable_monitor()
    events.close(linger=0)
    attacked.reconnect()
    still_serves(attacked, expected)


# ---- rows 9, 14, 15: loads that do not fit together ---------------------------------------------

Change = Callable[[m.Load], m.Load]


def of_config(**changes: Any) -> Change:
    return lambda load: replace(load, config=replace(load.config, **changes))


def of_plan(**changes: Any) -> Change:
    return lambda load: replace(load, plan=replace(load.plan, **changes))


def of_load(**changes: Any) -> Change:
    return lambda load: replace(load, **changes)


def first_tensor(**changes: Any) -> Change:
    def change(load: m.Load) -> m.Load:
        first, *others = load.tensors
        return replace(load, tensors=(replace(first, **changes), *others))

    return change


def with_peer(**changes: Any) -> Change:
    peer = {"device_index": 1, "exchange_endpoint": "tcp://127.0.0.1:5", "public_key": b"k" * 40}
    return of_load(peers=(m.Peer(**{**peer, **changes}),))


def fewer_layers(load: m.Load) -> m.Load:
    return replace(load, config=replace(load.config, layers=load.config.layers[:1]))


def wider_mlp(load: m.Load) -> m.Load:
    layers = tuple(replace(layer, mlp_width=layer.mlp_width + 1) for layer in load.config.layers)
    return replace(load, config=replace(load.config, layers=layers))


def many_ropes(load: m.Load) -> m.Load:
    return replace(load, config=replace(load.config, ropes=load.config.ropes * 1000))


def thousand_experts(load: m.Load) -> m.Load:
    experts = Experts(
        count=4096,
        used=1,
        router="softmax",
        is_normalized=False,
        weighs="output",
        has_shared=False,
    )
    layers = tuple(replace(layer, has_experts=True) for layer in load.config.layers)
    return replace(load, config=replace(load.config, experts=experts, layers=layers))


LOADS: dict[str, tuple[Change, str]] = {
    "a width past all models": (of_config(width=1 << 40), "width"),
    "no layers": (of_config(layers=()), "num_layers"),
    "heads of no width": (of_config(head_width=0), "head_width"),
    "a norm that divides by nothing": (of_config(norm_epsilon=float("nan")), "norm_epsilon"),
    "a vocabulary of 2^62": (of_config(vocab_size=1 << 62), "vocab_size"),
    "a thousand RoPE tables": (many_ropes, "RoPE tables"),
    "fewer layers than the plan": (fewer_layers, "num_layers is 3, the model has 1"),
    "a wider MLP than the plan": (wider_mlp, "columns"),
    "experts out of nothing": (thousand_experts, "tensors has"),
    "a plan without devices": (of_plan(devices=()), "names no device"),
    "a plan without rows": (of_plan(cells=()), "rows"),
    "a plan whose device is a control character": (of_plan(devices=("\x1b[2J",)), "named"),
    "a device past the plan": (of_load(device_index=1), "device 1 has no share"),
    "a window of none": (of_load(kv_window=0), "kv_window"),
    "a negative window": (of_load(kv_window=-8192), "kv_window"),
    "a window of 2^63": (of_load(kv_window=HUGE), "kv_window"),
    "no threads": (of_load(num_threads=0), "num_threads"),
    "a peer too many": (with_peer(), "peers are devices"),
    "a peer that is the runner itself": (with_peer(device_index=0), "peers are devices"),
    "no tensors": (of_load(tensors=()), "tensors has 0 entries"),
    "a tensor twice": (lambda load: replace(load, tensors=load.tensors * 2), "twice"),
    "a tensor of another shape": (first_tensor(shape=(1 << 62, 48)), "the model needs"),
    "a negative dimension": (first_tensor(shape=(-99, -48)), "the model needs"),
    "a tensor of no dimension": (first_tensor(shape=()), "the model needs"),
    "a format nobody knows": (first_tensor(format="\x1b" * 99), "cannot be in format"),
    "a format that is no weight": (first_tensor(format="I8"), "cannot be in format 'I8'"),
    "a rendezvous that is none": (of_load(rendezvous="/etc/passwd"), "rendezvous"),
    "transport torch unasked": (of_plan(transport="torch"), "not started for transport torch"),
    "files without end": (
        of_load(
            files=(
                m.LocalFile(path="/etc/passwd", num_bytes=1, modified_ns=1, is_same_computer=True),
            )
            * 5000
        ),
        "files",
    ),
}


def test_a_load_that_does_not_fit_together_is_refused(attacked: AttackedRunner) -> None:
    expected, before = attacked.logits(), memory_bytes()
    for what, (change, words) in LOADS.items():
        attacked.say(change(attacked.good_load()))
        failed, _ = attacked.hear(m.Failed)
        assert failed.error in ("ProtocolError", "ConfigError", "PlanError"), what
        assert failed.epoch == attacked.epoch, what
        assert failed.message.isprintable(), what
        with pytest.raises(AssertionError, match=words):
            raise AssertionError(failed.message)
    assert memory_bytes() - before < GROWTH_BYTES
    still_serves(attacked, expected)


ENDPOINTS = [
    "ipc:///etc/passwd",
    "inproc://zeromq.zap.01",
    "tcp://127.0.0.1:0",
    "tcp://127.0.0.1:65536",
    "tcp://*:5",
    "tcp://127.0.0.1:5;127.0.0.1:6",
    "tcp://" + "a" * 100_000 + ":5",
    "pgm://eth0;239.0.0.1:5",
    "",
]


def test_a_peer_at_an_endpoint_that_is_none_is_refused(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    with AttackedRunner(checkpoint, tmp_path, num_devices=2) as attacked:
        for endpoint in ENDPOINTS:
            peers = tuple(replace(p, exchange_endpoint=endpoint) for p in attacked.peers)
            attacked.say(attacked.good_load(peers=peers))
            failed, _ = attacked.hear(m.Failed)
            assert failed.error == "ProtocolError"
            assert "exchange_endpoint of peer 1" in failed.message
        peers = tuple(replace(peer, public_key=b"no key") for peer in attacked.peers)
        attacked.say(attacked.good_load(peers=peers))
        assert "public_key of peer 1" in attacked.hear(m.Failed)[0].message
        attacked.say(attacked.good_load(peers=attacked.peers * 2))
        assert "peers are devices [1, 1]" in attacked.hear(m.Failed)[0].message
        attacked.load()


def test_files_at_hostile_paths_are_not_opened(attacked: AttackedRunner, tmp_path: Path) -> None:
    """A path is only opened if it is a regular file of that size and time; this one would wait."""
    expected = attacked.logits()
    pipe = tmp_path / "model.gguf"
    os.mkfifo(pipe)
    paths = [str(pipe), "/dev/zero", "/etc", "../../etc/passwd", "/\0", "\ud7ff" * 1000, "C:\\x"]
    for path in paths:
        try:
            modified_ns, size = os.stat(path).st_mtime_ns, os.stat(path).st_size
        except (OSError, ValueError):
            modified_ns, size = 1, 1
        file = m.LocalFile(
            path=path, num_bytes=size, modified_ns=modified_ns, is_same_computer=True
        )
        attacked.say(attacked.good_load(files=(file,), checkpoint_id=path))
        assert attacked.hear(m.Loaded)[0].local_bytes == 0
    still_serves(attacked, expected)


# ---- rows 8 to 11, 15: steps that do not fit the slots -----------------------------------------


STEPS: dict[str, tuple[dict[str, Any], str]] = {
    "a gap": ({"segments": (segment(slot=3, first_position=12),)}, "expected position 0, got 12"),
    "no tokens": (
        {"segments": (segment(token_count=0, logit_offsets=()),)},
        "0 tokens at position 0",
    ),
    "more tokens than a step has": (
        {"segments": (segment(token_count=1 << 30, logit_offsets=()),)},
        "tokens in one step",
    ),
    "a slot twice": ({"segments": (segment(), segment())}, "twice"),
    "an offset outside": ({"segments": (segment(logit_offsets=(5,)),)}, "outside"),
    "an offset repeated without end": (
        {"segments": (segment(logit_offsets=(0,) * 100_000),)},
        "do not ascend",
    ),
    "lists of ids for nobody": (
        {"logits": m.LogitsWanted(form="top", ids=((1,),) * 9)},
        "9 id lists",
    ),
    "a temperature that is no number": (
        {
            "logits": m.LogitsWanted(
                form="top",
                ids=((),) * 5,
                temperatures=(float("nan"),) * 5,
                raw_sums=(False,) * 5,
            )
        },
        "temperature",
    ),
    "operations without end": (
        {"operations": (m.SlotOperation(action="free", slot=1),) * 50_000},
        "slot operations",
    ),
    "a copy of a slot that is not there": (
        {"operations": (m.SlotOperation(action="copy", slot=1, length=1, source=77),)},
        "slot 77, which holds 0",
    ),
    "a copy of a slot onto itself": (
        {"operations": (m.SlotOperation(action="copy", slot=0, length=1, source=0),)},
        "slot 0 cannot begin",
    ),
    "a longer copy than there is": (
        {"operations": (m.SlotOperation(action="copy", slot=1, length=2**31 - 1, source=0),)},
        "slot 1 cannot begin with 2,147,483,647",
    ),
    "more slots than are kept": (
        {
            "segments": tuple(
                segment(slot=n, token_count=1, logit_offsets=()) for n in range(1, MAX_SLOTS + 2)
            )
        },
        "slots",
    ),
    "another epoch": ({"epoch": 999}, "step of epoch 999"),
    "a step that is past": ({"step_id": 0}, "is past"),
}


def embeddings_for(attacked: AttackedRunner, step: m.Step) -> m.Array:
    count = sum(s.token_count for s in step.segments)
    return np.zeros((min(count, 1 << 16), attacked.checkpoint.config.width), np.float32)


def test_a_step_that_does_not_fit_the_slots_is_refused(attacked: AttackedRunner) -> None:
    expected, before = attacked.logits(), memory_bytes()
    for what, (changes, words) in STEPS.items():
        step = attacked.good_step(**changes)
        attacked.say(step, embeddings_for(attacked, step))
        failed, _ = attacked.hear(m.Failed)
        assert failed.error == "ProtocolError", what
        assert failed.step_id == step.step_id, what
        with pytest.raises(AssertionError, match=words):
            raise AssertionError(failed.message)
    assert memory_bytes() - before < GROWTH_BYTES
    np.testing.assert_array_equal(attacked.logits(), expected)


@pytest.mark.parametrize(
    "rows",
    [
        np.zeros((0, 48), np.float32),
        np.zeros((5, 47), np.float32),
        np.zeros((6, 48), np.float32),
        np.zeros((5, 48), np.float16),
        np.zeros((5, 48), np.float64),
        np.zeros(240, np.float32),
    ],
    ids=["empty", "narrow", "tall", "half", "double", "flat"],
)
def test_embeddings_of_another_shape_are_refused(attacked: AttackedRunner, rows: m.Array) -> None:
    attacked.say(attacked.good_step(), rows)
    failed, _ = attacked.hear(m.Failed)
    assert failed.error == "ProtocolError"
    assert "input embeddings is" in failed.message


def test_positions_are_neither_skipped_nor_repeated(attacked: AttackedRunner) -> None:
    """Row 11, with the stored answer for a step that is asked for again."""
    rows = attacked.checkpoint.embed(IDS)
    first = attacked.good_step(operations=(), segments=(segment(slot=7),))
    attacked.say(first, rows)
    _, tensors = attacked.hear(m.StepAnswer)
    answer = np.array(tensors[0])
    attacked.say(first, rows)
    again = attacked.hear(m.StepAnswer)[1][0]
    np.testing.assert_array_equal(again, answer)
    for position in (0, 4, 6):
        segments = (segment(slot=7, first_position=position),)
        attacked.say(attacked.good_step(operations=(), segments=segments), rows)
        message = attacked.hear(m.Failed)[0].message
        assert message == f"slot 7: expected position 5, got {position}"
    attacked.say(
        attacked.good_step(operations=(), segments=(segment(slot=7, first_position=5),)), rows
    )
    attacked.hear(m.StepAnswer)


def test_logits_that_no_answer_carries_are_not_computed(
    attacked: AttackedRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A vocabulary of 128 k reaches the real limit with 262 positions; this one is tiny."""
    expected = attacked.logits()
    with monkeypatch.context() as patch:
        patch.setattr("engine.cluster.messages.MAX_LOGITS_BYTES", 5 * 99 * 4 - 1)
        attacked.say(attacked.good_step(), attacked.checkpoint.embed(IDS))
        assert "logits of 5 positions are 1,980 bytes" in attacked.hear(m.Failed)[0].message
    np.testing.assert_array_equal(attacked.logits(), expected)


def test_keys_and_values_that_do_not_fit_are_cache_full(
    attacked: AttackedRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Row 15. The machine's own free memory is what cannot be real here."""
    expected = attacked.logits()
    with monkeypatch.context() as patch:
        patch.setattr("engine.model.kv_cache.free_bytes", lambda _device: 10)
        attacked.say(attacked.good_step(), attacked.checkpoint.embed(IDS))
        failed, _ = attacked.hear(m.Failed)
    assert failed.error == "CacheFull"
    assert "5 positions need 0.0 GiB more" in failed.message
    np.testing.assert_array_equal(attacked.logits(), expected)


def test_what_comes_out_of_turn_harms_nothing(attacked: AttackedRunner) -> None:
    """Row 10: what belongs to no load, or to one that is over."""
    expected, epoch = attacked.logits(), attacked.epoch
    failures: list[m.Message] = [
        m.FetchLogits(epoch=epoch, step_id=99),
        m.FetchLogits(epoch=epoch + 1, step_id=2),
        m.Connect(epoch=epoch + 1),
        m.Failed(epoch=epoch, error="\x1b", message="x" * (1 << 20)),
    ]
    for message in failures:
        attacked.say(message)
        assert attacked.hear(m.Failed)[0].error == "ProtocolError"
    slice_bounds = {"name": "head", "axis": 0, "start": 0, "end": 1}
    quiet: list[m.Message] = [
        m.WeightSlice(epoch=epoch, **slice_bounds),
        m.SliceHashes(epoch=epoch, unit=1, **slice_bounds),
        m.AbortStep(epoch=epoch, step_id=99),
        m.Abort(epoch=epoch - 1),
    ]
    for message in quiet:
        attacked.say(message, np.zeros(1 << 20, np.uint8))
    np.testing.assert_array_equal(attacked.logits(), expected)
    # An epoch nobody has heard of does not forbid those that come.
    attacked.say(m.Abort(epoch=1 << 53))
    still_serves(attacked, expected)


def test_weights_that_were_not_asked_for_end_the_load(attacked: AttackedRunner) -> None:
    expected = attacked.logits()
    bounds = {"name": "head", "axis": 0, "start": 0, "end": 99}
    wrong: list[tuple[m.Message, m.Array]] = [
        (m.WeightSlice(epoch=0, **bounds), np.zeros(5, np.uint8)),
        (m.SliceHashes(epoch=0, unit=1, **bounds), np.zeros((99, 32), np.uint8)),
    ]
    for message, data in wrong:
        load = attacked.good_load(checkpoint_id=f"new {attacked.epoch}")
        attacked.say(load)
        attacked.say(replace(message, epoch=load.epoch), data)
        failed, _ = attacked.hear(m.Failed)
        assert (failed.error, failed.epoch) == ("ProtocolError", load.epoch)
        assert "not asked for" in failed.message
    still_serves(attacked, expected)


def test_a_load_takes_the_place_of_one_that_never_ends(attacked: AttackedRunner) -> None:
    """A second Load was refused, and lost, while the first one waited for its weights."""
    expected = attacked.logits()
    attacked.say(attacked.good_load(checkpoint_id="never sent"))
    attacked.hear(m.HashesRequest)
    still_serves(attacked, expected)


def test_a_host_that_reads_nothing_does_not_stop_the_runner(attacked: AttackedRunner) -> None:
    """Row 2: answers that nobody takes are dropped with an error, and another line is served."""
    expected, before = attacked.logits(), memory_bytes()
    deaf = attacked.connect_host()
    for _ in range(3000):
        deaf.socket.send(b"\x80\x04")
    while True:  # A step in which nonsense comes in between is refused as well.
        attacked.say(attacked.good_step(), attacked.checkpoint.embed(IDS))
        message, _ = attacked.hear(m.StepAnswer | m.Failed)
        if isinstance(message, m.StepAnswer):
            break
    deaf.close()
    assert memory_bytes() - before < GROWTH_BYTES
    still_serves(attacked, expected)
