"""A real runner in a thread of this process, and an engine host or a peer that says what it likes.

Sockets, keys and the runner are real; only the other end is the test's.
"""

from __future__ import annotations

import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import psutil
import zmq

from engine.cluster import messages as m
from engine.cluster.runner import Runner
from engine.cluster.security import Gatekeeper, new_key_pair
from engine.cluster.transport import Channel, connect, listen
from engine.cluster.weight_transfer import WeightServer
from engine.plan.plan import Plan, PlanShape
from engine.weights.checkpoint import Checkpoint
from tests.weight_loading import server_of

# Generous: nothing waits for it to pass.
PATIENCE_SECONDS = 30.0
GROWTH_BYTES = 64 << 20
IDS = [5, 17, 40, 8, 77]
KV_WINDOW = 64


def plan_of(checkpoint: Checkpoint, num_devices: int) -> Plan:
    """Every row shared out as evenly as its quanta allow, for devices node-0/cpu, node-1/cpu."""
    config = checkpoint.config
    shape = PlanShape(
        num_layers=config.num_layers,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        mlp_width=config.layers[0].mlp_width,
        vocab_size=config.vocab_size,
        head_quantum=32,
    )
    rows: list[tuple[int, ...]] = []
    for row in range(shape.num_rows):
        count = shape.num_quanta(row)
        cells = [
            count * (n + 1) // num_devices - count * n // num_devices for n in range(num_devices)
        ]
        rows.append(tuple(cells))
    names = tuple(f"node-{n}/cpu" for n in range(num_devices))
    return Plan(shape, names, tuple(rows)).validate()


class AttackedRunner:
    """The runner of device 0; this end has the engine host's key and, as device 1, a peer's.

    Attributes:
        epoch: of the last good load.
        error: what came out of the runner's loop, which nothing may.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        folder: Path,
        num_devices: int = 1,
        *,
        checks_numbers: bool = False,
    ) -> None:
        self.checkpoint = checkpoint
        self.plan = plan_of(checkpoint, num_devices)
        self._keys, self._peer_keys = new_key_pair(), new_key_pair()
        self._context: zmq.Context[Any] = zmq.Context()
        self._gatekeeper = Gatekeeper(self._context)
        self._should_end = threading.Event()
        self._server: WeightServer = server_of(checkpoint, self.plan.shape)
        self.runner = Runner(
            "node-0/cpu",
            self._keys.public,
            "tcp://127.0.0.1:*",
            "tcp://127.0.0.1:*",
            self._should_end,
            cache_folder=folder,
            cache_limit_bytes=1 << 20,
            checks_numbers=checks_numbers,
        )
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="attacked runner")
        self._thread.start()
        self.channel = self.connect_host()
        inbox, endpoint = listen(
            self._context, zmq.PULL, self._peer_keys, "exchange", "tcp://127.0.0.1:*"
        )
        self._gatekeeper.allow("exchange", self.runner.keys.public)
        self.inbox: Channel[Any] = Channel(inbox, m.EXCHANGE_ACCEPTS)
        peer = m.Peer(device_index=1, exchange_endpoint=endpoint, public_key=self._peer_keys.public)
        self.peers = (peer,) if num_devices > 1 else ()
        self.outbox: Channel[Any] | None = None
        self.epoch = 0
        self._step_id = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._should_end.set()
        self._thread.join(PATIENCE_SECONDS)
        assert not self._thread.is_alive(), "the runner hangs"
        self.runner.close()
        self.channel.close()
        self.inbox.close()
        if self.outbox is not None:
            self.outbox.close()
        self._gatekeeper.close()
        self._context.destroy(linger=0)
        self._server.close()

    def _run(self) -> None:
        try:
            self.runner.run()
        except BaseException as error:  # noqa: BLE001 - the test looks at it
            self.error = error

    def connect_host(self) -> Channel[Any]:
        """Another connection of the engine host."""
        socket = connect(
            self._context,
            zmq.DEALER,
            self._keys,
            self.runner.keys.public,
            self.runner.control_endpoint,
        )
        return Channel(socket, m.RUNNER_SENDS)

    def reconnect(self) -> None:
        """After this end was disconnected for what it sent."""
        self.channel.close()
        self.channel = self.connect_host()

    def attack_inbox(self) -> Channel[Any]:
        """As the peer: a way into the runner's inbox, which lets it in after a good load."""
        if self.outbox is not None:
            self.outbox.close()
        socket = connect(
            self._context,
            zmq.PUSH,
            self._peer_keys,
            self.runner.keys.public,
            self.runner.exchange_endpoint,
        )
        self.outbox = Channel(socket, m.HandOver)
        return self.outbox

    # ---- talking -----------------------------------------------------------------------------

    def say(self, message: m.Message, *tensors: m.Array) -> None:
        self.channel.send(message, tensors)

    def hear(self, kind: Any) -> tuple[Any, list[m.Array]]:
        """The next message of a kind, or of a union of them; requests for weights are answered, others passed over."""
        heard: list[str] = []
        deadline = time.monotonic() + PATIENCE_SECONDS
        while (left := deadline - time.monotonic()) > 0:
            assert self.error is None, f"the runner's loop ended: {self.error!r}"
            received = self.channel.receive(int(min(left, 0.5) * 1000))
            if received is None:
                continue
            message = received.message
            if isinstance(message, kind):
                return message, received.tensors
            if isinstance(message, m.HashesRequest | m.WeightRequest):
                answer, data = self._server.answer(message)
                self.channel.send(answer, [data])
            heard.append(f"{type(message).__name__}: {getattr(message, 'message', '')}")
        raise AssertionError(f"no {kind.__name__}; heard {heard[-5:]}")

    # ---- good requests -----------------------------------------------------------------------

    def good_load(self, **changes: Any) -> m.Load:
        """A Load of the next epoch, but for the changes."""
        self.epoch += 1
        fields: dict[str, Any] = {
            "epoch": self.epoch,
            "config": self.checkpoint.config,
            "plan": self.plan,
            "device_index": 0,
            "dtype": "float32",
            "kv_window": KV_WINDOW,
            "kv_dtype": "float32",
            "num_threads": 1,
            "checkpoint_id": "tiny",
            "tensors": tuple(self.checkpoint.tensors.values()),
            "peers": self.peers,
        }
        return m.Load(**{**fields, **changes})

    def load(self) -> m.Loaded:
        """Load for real."""
        load = self.good_load()
        self.say(load)
        while True:
            loaded, _ = self.hear(m.Loaded)
            if loaded.epoch == load.epoch:
                self._step_id = 0
                return loaded

    def good_step(self, **changes: Any) -> m.Step:
        """The next step: a prompt in a slot of its own, all logits wanted, but for the changes."""
        self._step_id += 1
        fields: dict[str, Any] = {
            "epoch": self.epoch,
            "step_id": self._step_id,
            "kind": "prompt",
            "segments": (segment(),),
            "operations": (m.SlotOperation(action="free", slot=0),),
            "logits": m.LogitsWanted(form="full"),
        }
        return m.Step(**{**fields, **changes})

    def logits(self) -> m.Array:
        """What a runner alone answers to the good prompt."""
        step = self.good_step()
        self.say(step, self.checkpoint.embed(IDS))
        while True:
            answer, tensors = self.hear(m.StepAnswer)
            if (answer.epoch, answer.step_id) == (step.epoch, step.step_id):
                return np.array(tensors[0])


def segment(**changes: Any) -> m.Segment:
    """The good prompt's, but for the changes."""
    fields: dict[str, Any] = {
        "slot": 0,
        "first_position": 0,
        "token_count": len(IDS),
        "logit_offsets": tuple(range(len(IDS))),
    }
    return m.Segment(**{**fields, **changes})


def memory_bytes() -> int:
    """Resident memory of this process, in which the runner is."""
    return int(psutil.Process().memory_info().rss)
