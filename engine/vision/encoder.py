"""Image features for the engine host, computed in a process of their own.

In: the path of a model that reads images, and image files. Out: features and tile grids. It starts
the process at the first request and ends it with `close`; it also ends with its starter.
"""

from __future__ import annotations

import contextlib
import logging
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
from numpy.typing import NDArray

from engine.errors import Cancelled, EngineError, error_by_name
from engine.vision.frames import EncodeAnswer, EncodeRequest, read_frame, write_frame
from engine.vision.layout import TileGrid

logger = logging.getLogger(__name__)

# Loading the encoder and one image in 17 tiles take a minute on a slow computer.
ENCODE_SECONDS = 600.0
_POLL_SECONDS = 0.1


@dataclass(frozen=True, slots=True)
class EncodedImages:
    """The images of a request.

    Attributes:
        features: float32 [N, text width], of all tiles of all images in order.
        grids: one per image.
    """

    features: NDArray[np.float32]
    grids: tuple[TileGrid, ...]


class ImageEncoder:
    """One model's encoder process; used by one thread at a time."""

    def __init__(self, model: Path) -> None:
        """Start nothing yet."""
        self._model = model
        self._process: subprocess.Popen[bytes] | None = None
        self._reader: threading.Thread | None = None
        # What the process said; None when it ended.
        self._frames: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()

    def encode(
        self,
        files: Sequence[bytes],
        is_cancelled: Callable[[], bool],
        deadline_seconds: float = ENCODE_SECONDS,
    ) -> EncodedImages:
        """Features of images.

        Args:
            files: contents of PNG, JPEG, WebP, GIF or BMP files, at least one.
        Raises:
            PromptError: an image cannot be used.
            Cancelled: `is_cancelled` said so; the process is ended.
            EngineError: the process ended, or took too long.
        """
        process = self._start()
        deadline = time.monotonic() + deadline_seconds
        assert process.stdin is not None
        with contextlib.suppress(OSError):  # It ended: reading its answer says so.
            write_frame(process.stdin, msgspec.msgpack.encode(EncodeRequest(tuple(files))))
        frames: list[bytes] = []
        while len(frames) < 2:
            if is_cancelled() or time.monotonic() > deadline:
                self.close()
                if is_cancelled():
                    raise Cancelled("reading the images was cancelled")
                raise EngineError(
                    f"encoding the images took longer than {deadline_seconds:.0f} s and was given "
                    "up. Send fewer or smaller ones"
                )
            try:
                frame = self._frames.get(timeout=_POLL_SECONDS)
            except queue.Empty:
                continue
            if frame is None:
                code = process.wait()
                self.close()
                raise EngineError(
                    f"the process that encodes images ended with code {code}. Send fewer or "
                    "smaller images, or run with SHARDMIX_LOG=INFO to see why"
                )
            frames.append(frame)
        answer = msgspec.msgpack.decode(frames[0], type=EncodeAnswer)
        if answer.error:
            raise error_by_name(answer.error, answer.message)
        features = np.frombuffer(frames[1], dtype=np.float32).reshape(answer.shape)
        grids = tuple(TileGrid(rows=rows, columns=columns) for rows, columns in answer.grids)
        return EncodedImages(features, grids)

    def close(self) -> None:
        """End the process; a later request starts a new one."""
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        process.wait()
        assert process.stdin is not None
        with contextlib.suppress(OSError):
            process.stdin.close()
        assert self._reader is not None
        self._reader.join()

    def _start(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            self._process = process = subprocess.Popen(
                [sys.executable, "-P", "-m", "engine.vision.process", str(self._model)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            )
            self._frames = queue.SimpleQueue()
            self._reader = threading.Thread(
                target=_read, args=(process, self._frames), name="image features", daemon=True
            )
            self._reader.start()
        return self._process


def _read(process: subprocess.Popen[bytes], frames: queue.SimpleQueue[bytes | None]) -> None:
    assert process.stdout is not None
    with process.stdout as stream:
        while (frame := read_frame(stream)) is not None:
            frames.put(frame)
    frames.put(None)
