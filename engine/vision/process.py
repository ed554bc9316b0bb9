"""The child process that turns image files into features: `python -m engine.vision.process MODEL`.

Started by `engine.vision.encoder`, so that the engine host needs no torch, and so that no damaged
image can take it along. In: frames on standard input, each eight bytes of length (little-endian)
and a msgpack `EncodeRequest`. Out: one `EncodeAnswer` each, then a frame with the features as raw
float32. It ends when standard input ends, also in the middle of its work.
"""

from __future__ import annotations

import os
import queue
import signal
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from engine.errors import EngineError
from engine.vision.frames import EncodeAnswer, EncodeRequest, read_frame, write_frame

if TYPE_CHECKING:
    from engine.model.vision import VisionEncoder

# Tiles encoded at a time: what attention and the MLP hold grows with them.
TILES_AT_ONCE = 4


class _Encoder:
    """The open model; its weights are read at the first request."""

    def __init__(self, model: Path) -> None:
        self._model = model
        self._loaded: VisionEncoder | None = None

    def answer(self, request: EncodeRequest) -> tuple[EncodeAnswer, bytes]:
        """Prepare and encode the images of one request."""
        import torch

        from engine.vision.tiles import prepare_images
        from engine.weights.checkpoint import open_checkpoint

        with open_checkpoint(self._model) as checkpoint:
            vision = checkpoint.config.vision
            assert vision is not None
            prepared = prepare_images(request.files, vision)
            if self._loaded is None:
                from engine.model.vision import VisionEncoder

                weights = {
                    name: torch.as_tensor(checkpoint.read_values(name)).contiguous()
                    for name in checkpoint.tensors
                    if name.startswith("vision.")
                }
                self._loaded = VisionEncoder(vision, checkpoint.config.width, weights)
        parts: list[torch.Tensor] = []
        with torch.inference_mode():
            for start in range(0, len(prepared.tiles), TILES_AT_ONCE):
                tiles = torch.as_tensor(prepared.tiles[start : start + TILES_AT_ONCE])
                parts.append(self._loaded.encode(tiles).flatten(0, 1))
        features = torch.cat(parts).numpy()
        grids = tuple((grid.rows, grid.columns) for grid in prepared.grids)
        answer = EncodeAnswer("", "", grids, (features.shape[0], features.shape[1]))
        return answer, features.tobytes()


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
    output = sys.stdout.buffer
    while True:
        request = msgspec.msgpack.decode(waiting.get(), type=EncodeRequest)
        try:
            answer, features = encoder.answer(request)
        except EngineError as error:
            answer, features = EncodeAnswer(type(error).__name__, str(error)), b""
        except MemoryError:
            message = "the images need more memory than there is. Send fewer or smaller ones"
            answer, features = EncodeAnswer("PromptError", message), b""
        write_frame(output, msgspec.msgpack.encode(answer))
        write_frame(output, features)


if __name__ == "__main__":
    main()
