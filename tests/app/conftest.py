"""What the window's tests share: a small model, real event structs, and someone who takes calls."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from PySide6.QtWidgets import QApplication

from app.look import Look
from app.session import Session
from app.settings import Settings
from app.stages import StartOptions
from engine.cluster.messages import Message, ProcessUsage
from engine.host import messages as api
from engine.model.config import Layer, ModelConfig, Rope
from engine.plan.plan import Plan, PlanShape
from engine.plan.presets import single

# Odd sizes: 9 heads on 3 KV heads, 7 blocks of columns of which the last is short.
CONFIG = ModelConfig(
    family="llama",
    width=48,
    layers=(Layer(mlp_width=211),) * 5,
    num_heads=9,
    num_kv_heads=3,
    head_width=16,
    vocab_size=999,
    norm_epsilon=1e-5,
    ropes=(Rope(theta=10_000.0),),
    rope_layout="half",
    max_positions=2048,
    is_head_tied=True,
)


class Recorder:
    """Takes calls as the bridge does, and keeps them."""

    def __init__(self) -> None:
        self.calls: list[Message] = []
        self.num_starts = 0

    def post(self, call: Message) -> None:
        self.calls.append(call)

    def start(self) -> None:
        self.num_starts += 1

    def last(self, kind: type[Message]) -> Message:
        return [call for call in self.calls if isinstance(call, kind)][-1]


def node(name: str, state: str = "ready", devices: tuple[str, ...] = ("cpu",)) -> api.NodeState:
    """A node as the engine host reports it."""
    return api.NodeState(
        name=name,
        kind="this" if name == "this" else "simulated",
        state=state,  # type: ignore[arg-type]
        reason="killed by SIGKILL" if state == "lost" else "",
        host_name="desk",
        version="0.1.0",
        devices=tuple(
            api.NodeDevice(
                device=f"{name}/{device}",
                kind="cpu" if device == "cpu" else "cuda",
                label="a chip",
                memory_bytes=8_000_000_000,
                in_use=name == "this",
            )
            for device in devices
        ),
        processes=(
            ProcessUsage(
                role="worker", pid=len(name) * 100, cpu_percent=1.5, memory_bytes=40_000_000
            ),
        ),
        cpu_percent=12.0,
        memory_used_bytes=1_000_000_000,
        memory_total_bytes=8_000_000_000,
    )


def remote_node(
    name: str, state: str = "ready", devices: tuple[str, ...] = ("cpu",), **more: Any
) -> api.NodeState:
    """A node on another computer, of which nothing is measured but what is given."""
    bare = msgspec.structs.replace(
        node(name, state, devices),
        kind="remote",
        host_name=f"{name}.local",
        reason="",
        cpu_percent=None,
        memory_used_bytes=None,
        memory_total_bytes=None,
        key=f"key of {name}",
        endpoint=f"tcp://{name}.local:47500",
    )
    if state in ("discovered", "pairing"):
        bare = msgspec.structs.replace(bare, devices=(), processes=())
    return msgspec.structs.replace(bare, **more)


def model_opened(request_id: int, config: ModelConfig = CONFIG) -> api.ModelOpened:
    """The event of an opened model."""
    return api.ModelOpened(
        request_id=request_id,
        name="tiny",
        path="/models/tiny.gguf",
        config=config,
        dtype="float32",
        kv_window=1024,
        kv_dtype="bfloat16",
        file_bytes=1000,
    )


def finished(request_id: int, text: str, plan: Plan, num_tokens: int = 3) -> api.Finished:
    """The event of a finished answer."""
    return api.Finished(
        request_id=request_id,
        finish_reason="stop",
        text=text,
        token_ids=tuple(range(num_tokens)),
        prompt_tokens=20,
        seed=7,
        ttft_s=0.25,
        prefill_tps=300.0,
        decode_tps=41.25,
        devices=(),
        plan=plan,
    )


def home_plan(config: ModelConfig = CONFIG) -> Plan:
    """Everything on this computer."""
    return single(PlanShape.from_config(config), "this/cpu")


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


@pytest.fixture
def session(recorder: Recorder, qapp: QApplication) -> Session:
    """A session that has been started, and has heard nothing yet."""
    started = Session(recorder, StartOptions())
    started.start()
    return started


@pytest.fixture
def make_ready(recorder: Recorder) -> Callable[..., Plan]:
    """Brings a session to where questions can be asked, with the given nodes."""

    def make(session: Session, *names: str) -> Plan:
        opening = recorder.last(api.OpenModel)
        assert isinstance(opening, api.OpenModel)
        session.engine_started()
        session.hear([model_opened(opening.request_id), api.Done(request_id=opening.request_id)])
        session.hear([api.NodesChanged(nodes=tuple(node(name) for name in ("this", *names)))])
        apply = recorder.last(api.ApplyPlan)
        assert isinstance(apply, api.ApplyPlan)
        session.hear(
            [
                api.PlanApplied(epoch=1, plan=apply.plan),
                api.Done(request_id=apply.request_id),
            ]
        )
        assert session.is_ready
        return apply.plan

    return make


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(tmp_path / "window.ini")


@pytest.fixture
def look(settings: Settings, qapp: QApplication) -> Iterator[Look]:
    qapp.setStyle("Fusion")
    made = Look(settings)
    made.apply()
    yield made
    qapp.setStyleSheet("")
