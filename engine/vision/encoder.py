"""Image features for the engine host, computed in a process of their own.

In: the path of a model that reads images, and image files. Out: features and tile grids. It starts
the process at the first request and ends it with `close`; it also ends with its starter. Features
of the last images are kept, and not computed again.
"""

from __future__ import annotations

import contextlib
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np

from engine.errors import Cancelled, EngineError, error_by_name
from engine.vision.frames import Answer, PrepareRequest, Proceed, read_frame, write_frame
from engine.vision.kept_features import EncodedImage, KeptFeatures, file_digest
from engine.vision.layout import TileGrid

# Loading the encoder and one image in 17 tiles take a minute on a slow computer.
ENCODE_SECONDS = 600.0
_POLL_SECONDS = 0.1


@dataclass(frozen=True, slots=True)
class _Child:
    """The process and the threads that write to it and read from it.

    Neither end may block the encoder: a process that is stopped reads no request, too.

    Attributes:
        requests: what to write; None ends the writer.
        frames: what the process said; None when it ended.
    """

    process: subprocess.Popen[bytes]
    requests: queue.SimpleQueue[bytes | None]
    frames: queue.SimpleQueue[bytes | None]
    threads: tuple[threading.Thread, ...]


class ImageEncoder:
    """One model's encoder process; `encode` belongs to one thread at a time, `close` to any."""

    def __init__(self, model: Path) -> None:
        """Start nothing yet."""
        self._model = model
        self._lock = threading.Lock()
        self._is_closed = False
        self._child: _Child | None = None
        self._kept = KeptFeatures()

    def encode(
        self,
        files: Sequence[bytes],
        is_cancelled: Callable[[], bool],
        check_grids: Callable[[tuple[TileGrid, ...]], None] = lambda _grids: None,
        deadline_seconds: float = ENCODE_SECONDS,
    ) -> tuple[EncodedImage, ...]:
        """Features of images.

        Args:
            files: contents of PNG, JPEG, WebP, GIF or BMP files, at least one.
            check_grids: hears the grids of all images before one is encoded; what it raises ends
                the request.
        Raises:
            PromptError: an image cannot be used.
            Cancelled: `is_cancelled` said so; the process is ended.
            EngineError: the process ended, took too long, or was closed.
        """
        self._refuse_closed()
        deadline = time.monotonic() + deadline_seconds

        def check_time() -> None:
            if is_cancelled():
                self._end_child()
                raise Cancelled("reading the images was cancelled")
            if time.monotonic() > deadline:
                self._end_child()
                raise EngineError(
                    f"encoding the images took longer than {deadline_seconds:.0f} s and was given "
                    "up. Send fewer or smaller ones"
                )

        digests = [file_digest(data) for data in files]
        found = {
            digest: image for digest in digests if (image := self._kept.find(digest)) is not None
        }
        missing = [digest for digest in dict.fromkeys(digests) if digest not in found]
        if missing:
            new = [files[digests.index(digest)] for digest in missing]
            numbers = tuple(digests.index(digest) + 1 for digest in missing)
            child = self._start()
            _write(child, PrepareRequest(tuple(new), numbers))
            answer = self._hear(child, check_time)
            shapes = (TileGrid(rows=rows, columns=columns) for rows, columns in answer.grids)
            grids = dict(zip(missing, shapes, strict=True))
            is_wanted = False
            try:
                check_grids(tuple(grids.get(d) or found[d].grid for d in digests))
                is_wanted = True
            finally:
                _write(child, Proceed(is_wanted))
            width = self._hear(child, check_time).width
            for digest in missing:
                values = np.frombuffer(self._next_frame(child, check_time), dtype=np.float32)
                found[digest] = EncodedImage(
                    digest=digest, grid=grids[digest], features=values.reshape(-1, width)
                )
        else:
            check_grids(tuple(found[digest].grid for digest in digests))
        images = tuple(found[digest] for digest in digests)
        self._kept.keep(images)
        return images

    def close(self) -> None:
        """End the process, and whatever it was asked for."""
        with self._lock:
            self._is_closed = True
        self._end_child()

    def _hear(self, child: _Child, check_time: Callable[[], None]) -> Answer:
        answer = msgspec.msgpack.decode(self._next_frame(child, check_time), type=Answer)
        if answer.error:
            raise error_by_name(answer.error, answer.message)
        return answer

    def _next_frame(self, child: _Child, check_time: Callable[[], None]) -> bytes:
        while True:
            check_time()
            try:
                frame = child.frames.get(timeout=_POLL_SECONDS)
            except queue.Empty:
                continue
            if frame is not None:
                return frame
            code = child.process.wait()
            self._end_child()
            self._refuse_closed()
            raise EngineError(
                f"the process that encodes images ended with code {code}. Send fewer or "
                "smaller images, or run with SHARDMIX_LOG=INFO to see why"
            )

    def _start(self) -> _Child:
        with self._lock:
            self._refuse_closed()
            if self._child is None:
                process = subprocess.Popen(
                    [sys.executable, "-P", "-m", "engine.vision.process", str(self._model)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                )
                requests = queue.SimpleQueue[bytes | None]()
                frames = queue.SimpleQueue[bytes | None]()
                threads = (
                    threading.Thread(
                        target=_read_all, args=(process, frames), name="image features", daemon=True
                    ),
                    threading.Thread(
                        target=_write_all, args=(process, requests), name="images", daemon=True
                    ),
                )
                for thread in threads:
                    thread.start()
                self._child = _Child(process, requests, frames, threads)
            return self._child

    def _refuse_closed(self) -> None:
        if self._is_closed:
            raise EngineError("the model was closed before its images were encoded; ask again")

    def _end_child(self) -> None:
        """End the process; a later request starts a new one."""
        with self._lock:
            child, self._child = self._child, None
        if child is None:
            return
        child.process.kill()
        child.process.wait()
        child.requests.put(None)
        for thread in child.threads:
            thread.join()


def _write(child: _Child, request: PrepareRequest | Proceed) -> None:
    child.requests.put(msgspec.msgpack.encode(request))


def _read_all(process: subprocess.Popen[bytes], frames: queue.SimpleQueue[bytes | None]) -> None:
    assert process.stdout is not None
    with process.stdout as stream:
        while (frame := read_frame(stream)) is not None:
            frames.put(frame)
    frames.put(None)


def _write_all(process: subprocess.Popen[bytes], requests: queue.SimpleQueue[bytes | None]) -> None:
    assert process.stdin is not None
    # It ended: the reader says so.
    with contextlib.suppress(OSError), process.stdin as stream:
        while (request := requests.get()) is not None:
            write_frame(stream, request)
