"""Image features in the places of a prompt's image tokens.

In: positions, and the images with their features. Out: input embeddings with the features put in,
and what tells one image from another among cached tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from engine.vision.kept_features import EncodedImage


class ImageRows:
    """The features of one prompt."""

    def __init__(self, positions: Sequence[int], images: Sequence[EncodedImage]) -> None:
        """Keep them.

        Args:
            positions: of the image tokens of all images, ascending.
            images: in the order of their places; as many features as positions.
        """
        self._positions = np.asarray(positions, dtype=np.int64)
        self._features = np.concatenate([image.features for image in images])
        # Below every id. Each image has its own: one that a later turn adds changes none before.
        self._marks = [
            -1 - int.from_bytes(image.digest, "little") for image in images for _ in image.features
        ]
        assert len(self._positions) == len(self._features), "a feature for each image token"

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
        """The first ids of the prompt, with a mark of its image in place of each image token."""
        marked = list(ids)
        for position, mark in zip(self._positions.tolist(), self._marks, strict=True):
            if position >= len(marked):
                break
            marked[position] = mark
        return marked
