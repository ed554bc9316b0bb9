"""Features of the last images, so that the next turn of a chat does not encode them again.

In and out: features by the digest of an image's file. It computes none.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engine.vision.layout import TileGrid

# Five images of Llama 4 in 17 tiles of 144 features of 5,120 float32.
MAX_KEPT_BYTES = 256 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedImage:
    """An image as a model reads it.

    Attributes:
        digest: of its file.
        features: float32 [N, text width], of all its tiles in order; not to be changed.
    """

    digest: bytes
    grid: TileGrid
    features: NDArray[np.float32]


class KeptFeatures:
    """See the module; one thread at a time."""

    def __init__(self, max_bytes: int = MAX_KEPT_BYTES) -> None:
        """Keep nothing yet."""
        self._max_bytes = max_bytes
        # In the order of last use.
        self._images: dict[bytes, EncodedImage] = {}

    def find(self, digest: bytes) -> EncodedImage | None:
        """The image whose file has this digest."""
        return self._images.get(digest)

    def keep(self, images: Iterable[EncodedImage]) -> None:
        """Keep images that were just used; those used longest ago go when there are too many."""
        for image in images:
            self._images.pop(image.digest, None)
            self._images[image.digest] = image
        num_bytes = sum(image.features.nbytes for image in self._images.values())
        while num_bytes > self._max_bytes:
            oldest = next(iter(self._images))
            num_bytes -= self._images.pop(oldest).features.nbytes


def file_digest(data: bytes) -> bytes:
    """What tells an image file from every other."""
    return hashlib.blake2b(data, digest_size=16).digest()
