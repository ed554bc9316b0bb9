"""Image features in the places of a prompt's image tokens.

In: positions and features. Out: input embeddings with the features put in, and what tells one
image from another among cached tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


class ImageRows:
    """The features of one prompt."""

    def __init__(self, positions: Sequence[int], features: NDArray[np.float32]) -> None:
        """Keep them.

        Args:
            positions: of the image tokens, ascending.
            features: float32 [len(positions), width].
        """
        self._positions = np.asarray(positions, dtype=np.int64)
        self._features = features
        digest = hashlib.blake2b(features.tobytes(), digest_size=7).digest()
        # Below every id, and different for other features.
        self._mark = -1 - int.from_bytes(digest, "little")

    def put(self, rows: NDArray[np.float32], first_position: int) -> None:
        """Replace the embeddings of image tokens, in place.

        Args:
            rows: float32 [n, width], of consecutive positions from `first_position` on.
        """
        start, end = np.searchsorted(
            self._positions, [first_position, first_position + len(rows)]
        ).tolist()
        rows[self._positions[start:end] - first_position] = self._features[start:end]

    def identify(self, ids: list[int]) -> list[int]:
        """The first ids of the prompt, with a mark of these images in place of image tokens."""
        marked = list(ids)
        for position in self._positions.tolist():
            if position < len(marked):
                marked[position] = self._mark
        return marked
