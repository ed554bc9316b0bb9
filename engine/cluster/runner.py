"""What computes on one device, in a process of its own (`engine.cluster.runner_process`).

In: messages of one engine host (load a share, compute a step) and hand-overs of its peers. Out:
answers. It is started by a worker, trusts the keys it is told, and ends with its worker.
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import gc
import logging
import sys
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import zmq

from engine.cluster import messages as m
from engine.cluster.collective import Collective
from engine.cluster.exchange import Exchange
from engine.cluster.load_check import check_load
from engine.cluster.loading import Loader
from engine.cluster.peer_links import PeerLinks
from engine.cluster.security import Gatekeeper, KeyPair, new_key_pair
from engine.cluster.slice_cache import SliceCache
from engine.cluster.stepping import Stepping, to_tensor
from engine.cluster.torch_exchange import TorchExchange
from engine.cluster.torch_group import Rendezvous
from engine.cluster.transport import Channel, listen
from engine.errors import EngineError, ProtocolError, WorkerLost, one_line
from engine.kernels.available import kernels_in_use
from engine.kernels.matrices import Matrix
from engine.kernels.native_library import TORCH
from engine.kernels.native_matrices import NativeMatrix
from engine.kernels.threads import set_num_threads
from engine.model.batch import StepKind
from engine.model.shard import ModelShard
from engine.model.share_keys import WeightKey

logger = logging.getLogger(__name__)

# At most so often the engine host hears of a long step, and of links that changed.
REPORT_SECONDS = 1.0
# Characters of what is wrong: some of them may be a peer's.
MAX_REASON = 1000


class _AbortedError(Exception):
    """The engine host gave the step up."""


class Runner:
    """Sockets and state of the process; everything happens in one thread."""

    def __init__(
        self,
        device: str,
        host_key: bytes,
        control_endpoint: str,
        exchange_endpoint: str,
        should_end: threading.Event,
        rendezvous_endpoint: str | None = None,
        cache_folder: Path = Path(),
        cache_limit_bytes: int = 0,
        is_host_here: bool = False,
        checks_numbers: bool = False,
    ) -> None:
        """Listen.

        Args:
            device: name, such as "this/cpu" or "laptop/cuda0".
            host_key: public key of the engine host.
            exchange_endpoint: where peers of the plan connect; a free port of it for each of the
                sockets that they connect to.
            should_end: set by whoever wants the loop to end.
            rendezvous_endpoint: where plans with transport "torch" meet; None refuses them.
            cache_folder: where weights that came over the wire are kept, at most
                `cache_limit_bytes` of them; 0 keeps none.
            is_host_here: whether the engine host is this computer's own.
            checks_numbers: whether peers' hand-overs must be finite; not with transport "torch".
        """
        self.device = device
        kind = device.rpartition("/")[2]
        self._torch_device = torch.device(
            "cpu" if kind == "cpu" else f"cuda:{kind.removeprefix('cuda')}"
        )
        self.keys: KeyPair = new_key_pair()
        self._context: zmq.Context[Any] = zmq.Context()
        self._gatekeeper = Gatekeeper(self._context)
        self._gatekeeper.allow("control", host_key)
        control, self.control_endpoint = listen(
            self._context, zmq.ROUTER, self.keys, "control", control_endpoint
        )
        inbox, self.exchange_endpoint = listen(
            self._context, zmq.PULL, self.keys, "exchange", exchange_endpoint
        )
        self._exchange_pattern = exchange_endpoint
        self.rendezvous = Rendezvous(rendezvous_endpoint) if rendezvous_endpoint else None
        self._control: Channel[Any] = Channel(control, m.RUNNER_ACCEPTS)
        self._inbox: Channel[Any] = Channel(inbox, m.EXCHANGE_ACCEPTS)
        self._poller = zmq.Poller()
        self._poller.register(control, zmq.POLLIN)
        self._poller.register(inbox, zmq.POLLIN)
        self._pending: collections.deque[tuple[m.Message, list[m.Array]]] = collections.deque()
        self._route = b""
        self._should_end = should_end
        self._cache_folder = cache_folder
        self._cache_limit_bytes = cache_limit_bytes
        self._is_host_here = is_host_here
        self._checks_numbers = checks_numbers
        self._shard: ModelShard | None = None
        self._loaded: m.Load | None = None
        self._stepping: Stepping | None = None
        self._packed: dict[WeightKey, Matrix | torch.Tensor] = {}
        self._packed_for: tuple[str, str] = ("", "")
        self._epoch = 0
        self._aborted_epoch = 0
        self._step_id = 0
        self._last_answer: tuple[int, m.StepAnswer, list[m.Array]] | None = None
        self._row: int = -1
        self._reported_row: int = -1
        self._step_reported_at = self._links_reported_at = 0.0

    def run(self) -> None:
        """Serve until asked to end."""
        while not self._should_end.is_set():
            try:
                received = self._next(0.25)
            except EngineError as error:
                self._fail(error, None)
                continue
            if received is None:
                continue
            message, tensors = received
            if isinstance(message, m.Shutdown):
                return
            try:
                self._handle(message, tensors)
            except _AbortedError:
                logger.info("step given up")
            except EngineError as error:
                self._fail(error, message)
            except (torch.OutOfMemoryError, MemoryError) as error:
                self._fail(EngineError(f"out of memory on {self.device}: {error}"), message)
            except RuntimeError as error:
                # What torch's CPU allocator raises has no class of its own.
                if "DefaultCPUAllocator" not in str(error):
                    raise
                self._fail(EngineError(f"out of memory on {self.device}"), message)

    def close(self) -> None:
        """Release sockets."""
        self._disconnect()
        self._control.close()
        self._inbox.close()
        if self.rendezvous is not None:
            self.rendezvous.close()
        self._gatekeeper.close()
        self._context.term()

    # ---- messages ----------------------------------------------------------------------------

    def _next(self, timeout_seconds: float) -> tuple[m.Message, list[m.Array]] | None:
        if self._pending:
            return self._pending.popleft()
        timeout_ms = int(timeout_seconds * 1000)
        if self._stepping is not None:
            ready = dict(self._poller.poll(timeout_ms))
            timeout_ms = 0
            if ready.keys() - {self._control.socket, self._inbox.socket}:
                self._stepping.exchange.links.note_losses()
            if ready.keys() - {self._control.socket}:
                # Peers may still measure their links, or be a step ahead.
                self._stepping.exchange.take_early()
        received = self._control.receive(timeout_ms)
        if received is None:
            return None
        self._route = received.route
        return received.message, received.tensors

    def _send(self, message: m.Message, tensors: list[m.Array] | None = None) -> None:
        self._control.send(message, tensors or [], self._route)

    def _fail(self, error: EngineError, cause: m.Message | None) -> None:
        """Tell the engine host that what it asked for cannot be done."""
        logger.warning("%s: %s", type(error).__name__, error)
        epoch = getattr(cause, "epoch", self._epoch)
        step_id = cause.step_id if isinstance(cause, m.Step | m.FetchLogits) else 0
        lost = error.device if isinstance(error, WorkerLost) else None
        devices = self._loaded.plan.devices if self._loaded is not None else ()
        failed = m.Failed(
            epoch=epoch,
            step_id=step_id,
            error=type(error).__name__,
            message=one_line(str(error), MAX_REASON),
            peer_index=devices.index(lost) if lost in devices else None,
        )
        with contextlib.suppress(WorkerLost):  # The engine host may be what is gone.
            self._send(failed)

    def _handle(self, message: m.Message, tensors: list[m.Array]) -> None:
        if isinstance(message, m.Load):
            self._load(message)
        elif isinstance(message, m.Step):
            self._step(message, tensors)
        elif isinstance(message, m.Connect):
            self._connect(message)
        elif isinstance(message, m.FetchLogits):
            self._fetch_logits(message)
        elif isinstance(message, m.Abort):
            self._note_aborted(message)
        elif isinstance(message, m.AbortStep):
            self._note_given_up(message)  # Its answer is on the way already.
        elif isinstance(message, m.WeightSlice | m.SliceHashes):
            pass  # Asked for by a load that failed since.
        else:
            raise ProtocolError(f"unexpected {type(message).__name__} for an idle runner")

    def _wait(self, timeout_seconds: float) -> None:
        """While waiting for peers: hear the engine host, and give up when it says so.

        Raises: WorkerLost: the connection to a peer broke.
        """
        ready = dict(self._poller.poll(int(timeout_seconds * 1000)))
        if self._should_end.is_set():
            raise _AbortedError
        if self._control.socket in ready:
            self._hear_host()
        if self._stepping is not None and ready.keys() - {self._control.socket, self._inbox.socket}:
            links = self._stepping.exchange.links
            links.note_losses()
            links.check()
        self._report_progress()

    def _between_rows(self, row: int, kind: StepKind) -> None:
        """In a step: say where it is if it takes long, and give it up when asked to."""
        self._row = row
        self._report_progress()
        # A piece of a prompt takes long enough to be given up.
        if kind == "prompt":
            self._hear_host()

    def _report_progress(self) -> None:
        now = time.monotonic()
        if now - self._step_reported_at < REPORT_SECONDS or self._row == self._reported_row:
            return
        self._step_reported_at, self._reported_row = now, self._row
        self._send(m.StepProgress(epoch=self._epoch, step_id=self._step_id, row=self._row))

    def _hear_host(self) -> None:
        """In the middle of a step: take one message of the engine host, if there is one."""
        received = self._control.receive(0)
        if received is None:
            return
        if isinstance(received.message, m.Abort):
            self._note_aborted(received.message)
            if received.message.epoch >= self._epoch:
                raise _AbortedError
        elif isinstance(received.message, m.AbortStep):
            self._note_given_up(received.message)
            if (received.message.epoch, received.message.step_id) == (self._epoch, self._step_id):
                raise _AbortedError
        elif isinstance(received.message, m.Shutdown):
            self._should_end.set()
            raise _AbortedError
        else:
            self._pending.append((received.message, received.tensors))

    def _note_aborted(self, message: m.Abort) -> None:
        # Never an epoch that nobody has heard of: no load could follow it.
        known = [load.epoch for load, _ in self._pending if isinstance(load, m.Load)]
        newest = max([self._epoch, *known])
        self._aborted_epoch = max(self._aborted_epoch, min(message.epoch, newest))

    def _note_given_up(self, message: m.AbortStep) -> None:
        if self._stepping is not None and message.epoch == self._epoch:
            self._stepping.exchange.give_up(message.step_id)

    # ---- load --------------------------------------------------------------------------------

    def _load(self, load: m.Load) -> None:
        if load.epoch <= self._aborted_epoch:
            raise ProtocolError(
                f"load for epoch {load.epoch}, which was given up; the next one is after "
                f"{self._aborted_epoch}"
            )
        check_load(load)
        if load.plan.transport == "torch" and self.rendezvous is None:
            raise ProtocolError(
                f"{self.device} was not started for transport torch: whether its network is "
                "trusted was not asked. Start its runner for that transport"
            )
        set_num_threads(load.num_threads)
        self._epoch = load.epoch
        self._shard = self._loaded = None
        self._gatekeeper.allow("exchange", *(peer.public_key for peer in load.peers))
        self._last_answer = None
        self._disconnect()
        shard = ModelShard(
            load.config,
            load.plan,
            load.device_index,
            load.dtype,
            load.kv_window,
            load.kv_dtype,
            self._torch_device,
        )
        packed_for = (load.checkpoint_id, load.dtype)
        if packed_for != self._packed_for:
            self._packed = {}
        self._packed_for = packed_for
        # What the old plan alone needed is dropped before the new weights come in.
        loader = Loader(
            load, shard, self._packed, self._torch_device, self._open_cache, self._is_host_here
        )
        with loader:
            self._packed = loader.store.packed
            if not self._bring_in(loader):
                return
        shard.take(loader.store.packed)
        self._shard, self._loaded = shard, load
        # What stays until the next load need not be looked through again and again.
        gc.unfreeze()
        gc.collect()
        gc.freeze()
        _give_memory_back()
        self._send(
            m.Loaded(
                epoch=load.epoch,
                weight_bytes=loader.packed_bytes,
                received_bytes=loader.received_bytes,
                cached_bytes=loader.cached_bytes,
                local_bytes=loader.local_bytes,
                kernels=_kernels(shard, self._packed.values()),
            )
        )

    def _open_cache(self) -> SliceCache:
        return SliceCache(self._cache_folder, self._cache_limit_bytes)

    def _bring_in(self, loader: Loader) -> bool:
        """Load until every weight is there; False where this process is to end."""
        while not loader.is_complete:
            for request in loader.messages():
                self._send(request)
            is_busy = loader.work()
            received = self._next(0 if is_busy else 0.25)
            if self._should_end.is_set():
                return False
            if received is None:
                if not is_busy:
                    loader.rest()
                continue
            message, tensors = received
            if isinstance(message, m.WeightSlice | m.SliceHashes):
                loader.take(message, tensors)
            elif isinstance(message, m.Abort):
                self._note_aborted(message)
                if message.epoch >= self._epoch:
                    raise _AbortedError
            elif isinstance(message, m.AbortStep):
                pass  # Of the plan before.
            elif isinstance(message, m.Failed):
                raise ProtocolError(one_line(message.message))
            elif isinstance(message, m.Load):
                # The engine host has given this one up, whether or not it could say so.
                self._pending.appendleft((message, tensors))
                raise _AbortedError
            elif isinstance(message, m.Shutdown):
                self._should_end.set()
                return False
            else:
                raise ProtocolError(f"unexpected {type(message).__name__} while loading")
        for progress in loader.messages():
            self._send(progress)
        return True

    def _connect(self, message: m.Connect) -> None:
        """Connect to the peers, and answer once all of them do.

        Raises: WorkerLost: a peer does not.
        """
        shard, loaded = self._shard, self._loaded
        if message.epoch <= self._aborted_epoch:
            return
        if shard is None or loaded is None or message.epoch != self._epoch:
            raise ProtocolError(f"connect for epoch {message.epoch}, loaded is {self._epoch}")
        links = self._connected(loaded, shard).exchange.links
        figures = links.measure(self._wait)
        self._send(m.Connected(epoch=message.epoch, links=figures))

    def _connected(self, load: m.Load, shard: ModelShard) -> Stepping:
        """What computes this epoch's steps, with its exchange.

        Connections are made when the engine host asks for them, or at the first step: by then
        every peer has the allow list of this epoch, because the engine host has heard Loaded from
        all of them. A peer that refuses once is not asked again by libzmq.
        """
        if self._stepping is not None:
            return self._stepping
        devices = load.plan.devices
        links = PeerLinks(
            self._context,
            self.keys,
            self._inbox,
            load.epoch,
            load.device_index,
            devices,
            load.peers,
            self._poller,
            "" if load.plan.transport == "torch" else self._exchange_pattern,
        )
        device = self._torch_device

        def add(row: int, x: m.Array, total: m.Array) -> m.Array:
            if not shard.has_post_norm(row):
                return x + total
            parts = [to_tensor(array, device) for array in (x, total)]
            return shard.add(row, *parts).cpu().numpy()

        exchange: Collective
        if load.plan.transport == "torch":
            exchange = TorchExchange(
                load.epoch,
                load.plan,
                load.device_index,
                load.config.width,
                links,
                load.rendezvous,
                self.rendezvous if load.device_index == load.plan.used_devices()[0] else None,
                device,
                self._wait,
                add,
            )
        else:
            exchange = Exchange(
                load.epoch,
                load.plan,
                load.device_index,
                load.config.width,
                links,
                self._wait,
                add,
                checks_numbers=self._checks_numbers,
            )
        self._stepping = Stepping(
            shard, exchange, device, self._between_rows, may_go_ahead=load.may_go_ahead
        )
        return self._stepping

    def _disconnect(self) -> None:
        """End the exchange of the epoch before."""
        if self._stepping is not None:
            self._stepping.exchange.close()
            self._stepping = None

    # ---- step --------------------------------------------------------------------------------

    def _step(self, step: m.Step, tensors: list[m.Array]) -> None:
        if step.epoch <= self._aborted_epoch:
            return
        shard, loaded = self._shard, self._loaded
        if shard is None or loaded is None or step.epoch != self._epoch:
            raise ProtocolError(f"step of epoch {step.epoch}, loaded is epoch {self._epoch}")
        if self._last_answer is not None and step.step_id <= self._last_answer[0]:
            if step.step_id == self._last_answer[0]:  # Asked again: the answer was lost.
                self._send(self._last_answer[1], self._last_answer[2])
                return
            raise ProtocolError(f"step {step.step_id} is past, the last was {self._last_answer[0]}")
        stepping = self._connected(loaded, shard)
        exchange = stepping.exchange
        self._step_id = step.step_id
        self._row = self._reported_row = -1
        self._step_reported_at = time.monotonic()
        exchange.begin_step(step.step_id, step.kind)
        stepping.hear(step, tensors)
        stepping.change_slots(step.operations)
        with torch.inference_mode():
            answer_tensors = stepping.compute(step, tensors)
        c = exchange.counters
        answer = m.StepAnswer(
            epoch=step.epoch,
            step_id=step.step_id,
            compute_ns=c.compute_ns,
            wait_ns=c.wait_ns,
            serialise_ns=c.serialise_ns,
            sent_bytes=c.sent_bytes,
            received_bytes=c.received_bytes,
            cache_bytes=shard.cache.num_bytes,
            links=c.links(),
            figures=self._changed_figures(exchange.links),
            continued=tuple(stepping.continued),
        )
        self._last_answer = (step.step_id, answer, answer_tensors)
        self._send(answer, answer_tensors)
        with torch.inference_mode():
            stepping.prepare_next()
            if not (self._pending or self._control.has_message()):
                stepping.go_ahead()

    def _changed_figures(self, links: PeerLinks) -> tuple[m.LinkFigures, ...]:
        now = time.monotonic()
        if now - self._links_reported_at < REPORT_SECONDS:
            return ()
        self._links_reported_at = now
        return links.fresh_figures()

    def _fetch_logits(self, message: m.FetchLogits) -> None:
        last = self._last_answer
        logits = self._stepping.full_logits() if self._stepping is not None else None
        is_last = last is not None and last[0] == message.step_id and message.epoch == self._epoch
        if last is None or not is_last or logits is None:
            raise ProtocolError(f"the logits of step {message.step_id} are gone")
        self._send(last[1], [logits])


def _give_memory_back() -> None:
    """Let the system have what the last plan's weights took; only glibc keeps it."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def _kernels(shard: ModelShard, packed: Iterable[Matrix | torch.Tensor]) -> str:
    """What computes generated tokens with these weights, for people."""
    if not any(isinstance(weight, NativeMatrix) for weight in packed):
        return TORCH
    # Mixtures of experts, for example: torch routes, and multiplies by native products.
    return kernels_in_use() if shard.is_native else f"{kernels_in_use()} and {TORCH}"
