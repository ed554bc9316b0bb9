"""The child process that turns image files into features: `python -m engine.vision.process MODEL`.

Started by `engine.vision.encoder`, so that the engine host needs no torch, and so that no damaged
image can take it along. In and out: the frames of `engine.vision.frames` on standard input and
output. It ends when standard input ends, also in the middle of its work.
"""

from __future__ import annotations

import os
import queue
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import msgspec

from engine.errors import EngineError
from engine.vision.frames import Answer, PrepareRequest, Proceed, read_frame, write_frame

if TYPE_CHECKING:
    from engine.model.vision import VisionEncoder
    from engine.vision.tiles import PreparedImages

Result = TypeVar("Result")

# Tiles encoded at a time: what attention and the MLP hold grows with them.
TILES_AT_ONCE = 4


class _Encoder:
    """The open model; its weights are read at the first request."""

    def __init__(self, model: Path) -> None:
        self._model = model
        self._loaded: tuple[VisionEncoder, int] | None = None
        self._is_gpu_full = False

    def prepare(self, request: PrepareRequest) -> PreparedImages:
        """Decode and cut the images of one request."""
        from engine.vision.preprocessor import read_max_tiles
        from engine.vision.tiles import prepare_images
        from engine.weights.checkpoint import open_checkpoint

        with open_checkpoint(self._model) as checkpoint:
            vision = checkpoint.config.vision
        assert vision is not None
        max_tiles = read_max_tiles(self._model, vision)
        return prepare_images(request.files, vision, max_tiles, request.numbers)

    def encode(self, prepared: PreparedImages) -> tuple[int, list[bytes]]:
        """Width of the features, and those of each image; its own do not depend on its company."""
        import torch

        device = "cuda" if torch.cuda.is_available() and not self._is_gpu_full else "cpu"
        try:
            return self._encode(prepared, device)
        except torch.OutOfMemoryError:
            # The GPU is shared with the runners, which were there first.
            self._is_gpu_full, self._loaded = True, None
        torch.cuda.empty_cache()
        return self._encode(prepared, "cpu")

    def _encode(self, prepared: PreparedImages, device: str) -> tuple[int, list[bytes]]:
        import torch

        encoder, width = self._loaded or self._load(device)
        features: list[bytes] = []
        start = 0
        with torch.inference_mode():
            for grid in prepared.grids:
                end = start + grid.num_tiles
                parts: list[torch.Tensor] = []
                for first in range(start, end, TILES_AT_ONCE):
                    tiles = prepared.tiles[first : min(first + TILES_AT_ONCE, end)]
                    parts.append(encoder.encode(torch.as_tensor(tiles).to(device)))
                start = end
                features.append(torch.cat(parts).cpu().numpy().tobytes())
        return width, features

    def _load(self, device: str) -> tuple[VisionEncoder, int]:
        """The encoder, and the width of what it gives."""
        import torch

        from engine.model.vision import VisionEncoder
        from engine.weights.checkpoint import open_checkpoint

        with open_checkpoint(self._model) as checkpoint:
            vision, width = checkpoint.config.vision, checkpoint.config.width
            assert vision is not None
            weights = {
                name: torch.as_tensor(checkpoint.read_values(name)).contiguous().to(device)
                for name in checkpoint.tensors
                if name.startswith("vision.")
            }
        self._loaded = VisionEncoder(vision, width, weights), width
        return self._loaded


def main() -> None:
    """Serve until standard input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    waiting: queue.SimpleQueue[bytes] = queue.SimpleQueue()

    def read() -> None:
        while (frame := read_frame(sys.stdin.buffer)) is not None:
            waiting.put(frame)
        os._exit(0)  # Nobody is left to answer.

    threading.Thread(target=read, name="requests", daemon=True).start()
    encoder = _Encoder(Path(sys.argv[1]))
    while True:
        _serve(encoder, waiting)


def _serve(encoder: _Encoder, waiting: queue.SimpleQueue[bytes]) -> None:
    """One request, in its two steps."""
    request = msgspec.msgpack.decode(waiting.get(), type=PrepareRequest)
    prepared = _try(lambda: encoder.prepare(request))
    if isinstance(prepared, Answer):
        _say(prepared)
        return
    _say(Answer(grids=tuple((grid.rows, grid.columns) for grid in prepared.grids)))
    if not msgspec.msgpack.decode(waiting.get(), type=Proceed).is_wanted:
        return
    encoded = _try(lambda: encoder.encode(prepared))
    if isinstance(encoded, Answer):
        _say(encoded)
        return
    width, features = encoded
    _say(Answer(width=width))
    for part in features:
        write_frame(sys.stdout.buffer, part)


def _say(answer: Answer) -> None:
    write_frame(sys.stdout.buffer, msgspec.msgpack.encode(answer))


def _try(work: Callable[[], Result]) -> Result | Answer:
    try:
        return work()
    except EngineError as error:
        return Answer(type(error).__name__, str(error))
    except MemoryError:
        message = "the images need more memory than there is. Send fewer or smaller ones"
        return Answer("PromptError", message)


if __name__ == "__main__":
    main()
