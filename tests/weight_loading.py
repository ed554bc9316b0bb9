"""Loading weights without a session: real runner processes under a coordinator, or one process.

Both let a test see where every byte came from, and change what the engine host serves.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
import zmq
from numpy.typing import NDArray

from engine.cluster import messages as m
from engine.cluster.codec import Codec
from engine.cluster.coordinator import (
    Coordinator,
    DeviceAnswer,
    LoadRequest,
    RunnerAddress,
)
from engine.cluster.loading import Loader
from engine.cluster.local_copies import describe_files
from engine.cluster.processes import Child, Greeting
from engine.cluster.security import new_key_pair
from engine.cluster.slice_cache import SliceCache
from engine.cluster.transport import new_local_endpoint
from engine.cluster.weight_transfer import WeightServer
from engine.model.batch import ComputeDtype, Segment
from engine.model.shard import ModelShard
from engine.model.weight_store import WeightStore, fetch_weights
from engine.plan.plan import Plan, PlanShape
from engine.weights.checkpoint import Checkpoint

START_SECONDS = 90.0
CACHE_BYTES = 1 << 30

Source = Callable[[str, int, int, int], NDArray[np.uint8]]


class _Source:
    """A checkpoint whose slices go through a function of the test."""

    def __init__(self, read: Source) -> None:
        self.read_slice = read


class RunnerProcesses:
    """Runner processes, each with a cache folder of its own."""

    def __init__(
        self,
        folder: Path,
        devices: Sequence[str],
        *,
        uses_local_files: bool = False,
        is_host_here: bool = True,
    ) -> None:
        """Start them.

        Args:
            folder: of the caches; survives a restart.
            is_host_here: what their worker tells them of the engine host.
        """
        self._is_host_here = is_host_here
        self.folder = folder
        self._environment = {"SHARDMIX_LOCAL_FILES": "on" if uses_local_files else "off"}
        self.devices = list(devices)
        self._context: zmq.Context[Any] = zmq.Context()
        self._coordinator = Coordinator(self._context)
        self._keys = new_key_pair()
        self._children: dict[str, Child] = {}
        self._addresses: dict[str, RunnerAddress] = {}
        self._epoch = 0
        self.restart()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._coordinator.close()
        for child in self._children.values():
            child.end()
        self._context.term()

    def cache_folder(self, device: str) -> Path:
        """Where a device's runner keeps slices."""
        return self.folder / f"slices of {device.replace('/', ' ')}"

    def restart(self, *devices: str) -> None:
        """End the runners of some devices, or of all, and start new ones."""
        which = devices or tuple(self.devices)
        for device in which:
            if device in self._children:
                self._children[device].end()
            settings = {
                "control_endpoint": new_local_endpoint(),
                "exchange_endpoint": "tcp://127.0.0.1:*",
                "cache_dir": str(self.cache_folder(device)),
                "cache_limit_bytes": CACHE_BYTES,
                "is_host_here": self._is_host_here,
            }
            self._children[device] = Child(
                "engine.cluster.runner_process",
                ["shardmix-runner", device],
                Greeting(self._keys.public.decode("ascii"), settings),
                environment=self._environment,
            )
        for device in which:
            address = self._children[device].address(START_SECONDS)
            control, exchange = address.endpoints
            public_key = address.public_key.encode("ascii")
            self._addresses[device] = RunnerAddress(
                device, control, exchange, public_key, self._keys
            )

    def kill(self, device: str) -> None:
        """SIGKILL."""
        os.kill(self._children[device].pid, signal.SIGKILL)

    def load(
        self,
        checkpoint: Checkpoint,
        plan: Plan,
        checkpoint_id: str = "",
        read: Source | None = None,
        hashes_path: Path | None = None,
        dtype: ComputeDtype = "float32",
    ) -> Mapping[str, m.Loaded]:
        """Put a plan in force.

        Args:
            checkpoint_id: runners keep packed weights between loads that have the same.
            read: serves slices instead of the checkpoint.
            hashes_path: where content hashes are kept.
            dtype: to compute in.
        """
        self._epoch += 1
        request = LoadRequest(
            epoch=self._epoch,
            config=checkpoint.config,
            plan=plan,
            dtype=dtype,
            kv_window=64,
            kv_dtype="float32",
            kept_positions=0,
            threads=dict.fromkeys(self.devices, 1),
            checkpoint_id=checkpoint_id,
            tensors=tuple(checkpoint.tensors.values()),
            source=_Source(read or checkpoint.read_slice),
            files=dict.fromkeys(self.devices, describe_files(checkpoint.files, True)),
            hashes_path=hashes_path,
        )
        runners = [self._addresses[plan.devices[i]] for i in plan.used_devices()]
        return self._coordinator.load(request, runners, lambda *_: None, lambda: False).devices

    def logits(self, checkpoint: Checkpoint, ids: list[int]) -> NDArray[np.float32]:
        """Logits [T, V] of a prompt under the plan in force; once per load."""
        step = m.Step(
            epoch=self._epoch,
            step_id=1,
            kind="prompt",
            segments=(
                Segment(
                    slot=0,
                    first_position=0,
                    token_count=len(ids),
                    logit_offsets=tuple(range(len(ids))),
                ),
            ),
            operations=(),
            logits=m.LogitsWanted(form="full", raw_sums=(False,) * len(ids)),
        )
        answers = self._step(checkpoint, step, ids)
        return np.concatenate([a.tensors[0] for a in answers if a.tensors], axis=1)

    def step(self, checkpoint: Checkpoint, step: m.Step, ids: list[int]) -> list[m.Array]:
        """The tensors of the answer to a step, under a plan of one device."""
        (answer,) = self._step(checkpoint, step, ids)
        return answer.tensors

    def _step(self, checkpoint: Checkpoint, step: m.Step, ids: list[int]) -> list[DeviceAnswer]:
        return self._coordinator.step(step, checkpoint.embed(ids), lambda: False, lambda: None)


class OneLoad:
    """A loader and a weight server in this process, their messages decoded and encoded between."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        plan: Plan,
        device_index: int,
        cache_folder: Path,
        *,
        files: tuple[m.LocalFile, ...] = (),
        read: Source | None = None,
        hashes_path: Path | None = None,
        is_host_here: bool = True,
    ) -> None:
        """Load a share to the end."""
        load = m.Load(
            epoch=1,
            config=checkpoint.config,
            plan=plan,
            device_index=device_index,
            dtype="float32",
            kv_window=64,
            kv_dtype="float32",
            num_threads=1,
            checkpoint_id="",
            tensors=tuple(checkpoint.tensors.values()),
            peers=(),
            files=files,
        )
        device = torch.device("cpu")
        shard = ModelShard(
            load.config, plan, device_index, load.dtype, load.kv_window, load.kv_dtype, device
        )
        self.asked: list[m.WeightRequest] = []
        server = server_of(checkpoint, plan.shape, read, hashes_path)
        with Loader(
            load, shard, {}, device, lambda: SliceCache(cache_folder, CACHE_BYTES), is_host_here
        ) as loader:
            try:
                self._run(loader, server)
            finally:
                server.close()
        self.loader = loader
        self.keys = shard.weight_keys()

    def _run(self, loader: Loader, server: WeightServer) -> None:
        to_host: Codec[Any] = Codec(m.RUNNER_SENDS)
        to_runner: Codec[Any] = Codec(m.RUNNER_ACCEPTS)
        while not loader.is_complete:
            sent = loader.messages()
            is_busy = loader.work()
            if not sent and not is_busy:
                raise AssertionError("the loader waits for something that it did not ask for")
            for message in sent:
                asked, _ = to_host.decode(to_host.encode(message))
                if isinstance(asked, m.LoadProgress):
                    continue
                if isinstance(asked, m.WeightRequest):
                    self.asked.append(asked)
                answer, tensor = server.answer(asked)
                loader.take(*to_runner.decode(to_runner.encode(answer, [tensor])))

    def assert_equals(self, checkpoint: Checkpoint) -> None:
        """Compare every packed weight with one packed from slices read at one go."""
        expected = WeightStore(checkpoint.tensors, "float32", torch.device("cpu"), {})
        fetch_weights(
            expected, self.keys, lambda s: checkpoint.read_slice(s.name, s.axis, s.start, s.end)
        )
        assert set(expected.packed) == set(self.loader.store.packed)
        for key, weight in expected.packed.items():
            found = self.loader.store.packed[key]
            np.testing.assert_array_equal(_values(found), _values(weight), err_msg=str(key))


def _values(weight: Any) -> NDArray[np.float32]:
    """The values of a packed weight, up to order."""
    if isinstance(weight, torch.Tensor):
        return weight.numpy()
    return weight.values.numpy()


def server_of(
    checkpoint: Checkpoint,
    shape: PlanShape,
    read: Source | None = None,
    hashes_path: Path | None = None,
) -> WeightServer:
    """What answers a runner; the caller closes it."""
    tensors = tuple(checkpoint.tensors.values())
    source = _Source(read or checkpoint.read_slice)
    return WeightServer(checkpoint.config, shape, tensors, source, "tiny", hashes_path)
