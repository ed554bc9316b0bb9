"""A scheduler and the runners of a plan in threads of this process, with real sockets and keys.

What a computer says of its free memory can be replaced here, and only here: no test can fill it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil
import pytest
import torch
import zmq
from transformers import LlamaForCausalLM

from engine.cluster import messages as m
from engine.cluster.coordinator import Coordinator, LoadRequest, PlanLoaded
from engine.cluster.runner import Runner
from engine.cluster.runner_links import RunnerAddress
from engine.cluster.security import new_key_pair
from engine.decode.listener import Measured
from engine.decode.scheduler import Scheduler
from engine.decode.sequence import Sequence
from engine.errors import EngineError, WorkerLost
from engine.host import messages as api
from engine.host.opened_model import OpenedModel
from engine.plan.plan import Plan
from tests.engine.cluster.runner_under_attack import plan_of
from tests.tiny_models import save_tiny_llama

PATIENCE_SECONDS = 60.0
KV_WINDOW = 2000


class Memory:
    """What the system says of its free memory: the truth, or for some threads what a test says."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self._truth = psutil.virtual_memory
        # Asked with the name of the thread; None is the truth.
        self.say: Callable[[str], int | None] = lambda _thread: None
        patch.setattr(psutil, "virtual_memory", self)

    def __call__(self) -> Any:
        truth, said = self._truth(), self.say(threading.current_thread().name)
        return truth if said is None else truth._replace(available=said)


class Heard:
    """A listener that keeps what it hears.

    Attributes:
        ended: requests by id: the sequence where they ended well, else the error.
        losses: of plans.
        epoch: of the plan in force.
        while_loading: called in the scheduler's thread when weights have come.
    """

    def __init__(self) -> None:
        self.ended: dict[int, Sequence | EngineError] = {}
        self.losses: list[EngineError] = []
        self._news = threading.Condition()
        self.epoch = 0
        self.while_loading: Callable[[], None] = lambda: None

    def wait(self, is_so: Callable[[], bool]) -> None:
        """Until something holds that is told here."""
        with self._news:
            assert self._news.wait_for(is_so, PATIENCE_SECONDS), (self.ended, self.losses)

    def end(self, request_id: int) -> Sequence | EngineError:
        """How a request ended."""
        self.wait(lambda: request_id in self.ended)
        return self.ended[request_id]

    def on_finished(self, sequence: Sequence, plan: Plan) -> None:
        with self._news:
            self.ended[sequence.request_id] = sequence
            self._news.notify_all()

    def on_failed(self, request_id: int, error: EngineError) -> None:
        with self._news:
            self.ended[request_id] = error
            self._news.notify_all()

    def on_plan(self, request_id: int, load: LoadRequest, loaded: PlanLoaded) -> None:
        with self._news:
            self.epoch = load.epoch
            self._news.notify_all()

    def on_plan_interrupted(self, error: WorkerLost, epoch: int) -> None:
        self.losses.append(error)

    def on_plan_lost(self, error: EngineError) -> None:
        self.losses.append(error)

    def on_logits(self, request_id: int, first_position: int, rows: m.Array) -> None: ...

    def on_links(self, links: Mapping[tuple[str, str], m.LinkFigures]) -> None: ...

    def on_load_progress(self, request_id: int, device: str, done: int, total: int) -> None:
        self.while_loading()

    def on_measured(self, measured: Measured) -> None: ...

    def on_step_sent(self) -> None: ...

    def on_draft_lost(self, error: EngineError) -> None: ...


class Running:
    """A tiny model on the runners of a plan, under a scheduler."""

    def __init__(self, folder: Path, num_devices: int) -> None:
        save_tiny_llama(folder, max_position_embeddings=2048)
        self.model = OpenedModel(folder, "float32", KV_WINDOW)
        self._oracle: Any = LlamaForCausalLM.from_pretrained(folder).eval()
        self.heard = Heard()
        self._context: zmq.Context[Any] = zmq.Context()
        self.scheduler = Scheduler(lambda: Coordinator(self._context), self.heard)
        plan = plan_of(self.model.checkpoint, num_devices)
        self._should_end = threading.Event()
        keys = new_key_pair()
        self.runners = [
            Runner(
                device,
                keys.public,
                "tcp://127.0.0.1:*",
                "tcp://127.0.0.1:*",
                self._should_end,
                cache_folder=folder / device.replace("/", " "),
            )
            for device in plan.devices
        ]
        self._threads = [
            threading.Thread(target=runner.run, name=runner.device) for runner in self.runners
        ]
        for thread in self._threads:
            thread.start()
        self._load = LoadRequest(
            epoch=0,
            config=self.model.config,
            plan=plan,
            dtype=self.model.dtype,
            kv_window=self.model.kv_window,
            kv_dtype=self.model.kv_dtype,
            kept_positions=self.model.kv_window,
            threads=dict.fromkeys(plan.devices, 1),
            checkpoint_id=self.model.identity,
            tensors=self.model.tensors,
            source=self.model.checkpoint,
        )
        self._addresses = tuple(
            RunnerAddress(r.device, r.control_endpoint, r.exchange_endpoint, r.keys.public, keys)
            for r in self.runners
        )

    def begin_anew(self) -> None:
        """Put the plan in force with nothing in the cache, and forget what was heard."""
        self.heard.ended.clear()
        self._load = self._load._replace(epoch=self._load.epoch + 1)
        self.scheduler.put_plan(0, self._load, self._addresses, self.model.checkpoint)
        self.heard.wait(lambda: self.heard.epoch == self._load.epoch)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.scheduler.close()
        self._should_end.set()
        for thread in self._threads:
            thread.join(PATIENCE_SECONDS)
            assert not thread.is_alive(), f"{thread.name} hangs"
        for runner in self.runners:
            runner.close()
        self.model.close()
        self._context.destroy(linger=0)

    def ask(
        self,
        request_id: int,
        prompt: str,
        count: int,
        *,
        on_text: Callable[[], None] = lambda: None,
        on_prefill: Callable[[int], None] = lambda _done: None,
        speculation: api.Speculation = "auto",
    ) -> None:
        """Submit a request; the callbacks are called in the scheduler's thread."""
        call = api.Generate(
            request_id=request_id,
            raw_prompt=prompt,
            max_tokens=count,
            ignore_eos=True,
            sampling=api.SamplingSettings(temperature=0.0),
            speculation=speculation,
        )
        sequence = self.model.generation(
            call,
            self.model.prompt_ids(call),
            lambda _id, _text: on_text(),
            lambda done, _total: on_prefill(done),
            lambda: False,
        )
        self.scheduler.submit(sequence)

    def assert_answered(self, request_id: int, count: int) -> Sequence:
        """Wait for an answer, and compare it with the one of transformers."""
        found = self.heard.end(request_id)
        assert isinstance(found, Sequence), found
        ids = found.ids[: found.num_prompt]
        with torch.no_grad():
            output = self._oracle.generate(
                torch.tensor([ids]),
                attention_mask=torch.ones(1, len(ids), dtype=torch.int64),
                max_new_tokens=count,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
        assert found.ids == output[0].tolist()
        return found
