"""The engine host's side of loading: answers what runners ask about weights.

In: requests for content hashes and for slices of the open checkpoint. Out: the answers, after
checking that what was asked for lies inside its tensor. It sends nothing and keeps no connection.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from engine.cluster import messages as m
from engine.cluster.content_hashes import ContentHashes, WeightSource
from engine.errors import ProtocolError, one_line
from engine.model.config import ModelConfig
from engine.model.content_units import units_of
from engine.plan.plan import PlanShape
from engine.weights.formats import format_named, num_bytes

# Reading and hashing this much takes some tens of milliseconds: nobody else waits for long.
MAX_HASHED_BYTES = 16 << 20
# What a runner asks for at a time: small enough that a link of some Mbit/s carries it within the
# time of a few heartbeats.
CHUNK_BYTES = 512 << 10
# Only a row, or a column of blocks, that cannot be cut further may be more.
MAX_SLICE_BYTES = 64 << 20


class WeightServer:
    """Serves the weights of one load; belongs to one thread."""

    def __init__(
        self,
        config: ModelConfig,
        shape: PlanShape,
        tensors: Sequence[m.TensorInfo],
        source: WeightSource,
        checkpoint_id: str,
        hashes_path: Path | None,
    ) -> None:
        """Args: hashes_path: where content hashes are kept; None to keep none."""
        self._head_width = config.head_width
        self._shape = shape
        self._tensors = {info.name: info for info in tensors}
        self._source = source
        self._hashes = ContentHashes(source, checkpoint_id, hashes_path)

    def answer(self, asked: m.HashesRequest | m.WeightRequest) -> tuple[m.Message, m.Array]:
        """The answer to a request of this epoch, and its tensor.

        Raises:
            ProtocolError: there is no such tensor, or the range is not one of it.
            CheckpointError: the checkpoint cannot be read.
        """
        info = self._tensors.get(asked.name)
        if info is None:
            raise ProtocolError(
                f"a runner asked for the unknown tensor {one_line(asked.name, 100)!r}"
            )
        if isinstance(asked, m.HashesRequest):
            return self._sums(asked, info)
        return self._slice(asked, info)

    def close(self) -> None:
        """Keep the content hashes."""
        self._hashes.close()

    def _sums(self, asked: m.HashesRequest, info: m.TensorInfo) -> tuple[m.Message, m.Array]:
        units = units_of(info, self._head_width, self._shape)
        if (asked.axis, asked.unit) != (units.axis, units.size):
            raise ProtocolError(
                f"a runner asked for hashes of {asked.name} by {asked.unit} along axis "
                f"{asked.axis}, they are by {units.size} along axis {units.axis}"
            )
        count = asked.end - asked.start
        is_inside = 0 <= asked.start < asked.end <= units.num_units
        if not is_inside or (count > 1 and count * units.unit_bytes > MAX_HASHED_BYTES):
            raise ProtocolError(
                f"a runner asked for hashes {asked.start}-{asked.end} of {asked.name}, which has "
                f"{units.num_units}; at most {MAX_HASHED_BYTES:,} bytes at a time"
            )
        sums = self._hashes.sums(asked.name, units, asked.start, asked.end)
        answer = m.SliceHashes(
            epoch=asked.epoch,
            name=asked.name,
            axis=asked.axis,
            unit=asked.unit,
            start=asked.start,
            end=asked.end,
        )
        return answer, np.ascontiguousarray(sums)

    def _slice(self, asked: m.WeightRequest, info: m.TensorInfo) -> tuple[m.Message, m.Array]:
        is_inside = (
            0 <= asked.axis < len(info.shape)
            and 0 <= asked.start < asked.end <= info.shape[asked.axis]
        )
        if not is_inside:
            raise ProtocolError(
                f"a runner asked for {asked.start}-{asked.end} along axis {asked.axis} of "
                f"{asked.name} {list(info.shape)}"
            )
        size = num_bytes(info.format, info.shape)
        size = size * (asked.end - asked.start) // info.shape[asked.axis]
        is_rows = asked.axis == 0 and len(info.shape) > 1
        least = 1 if is_rows else format_named(info.format).block_size
        limit = MAX_SLICE_BYTES if asked.end - asked.start <= least else CHUNK_BYTES
        if size > limit:
            raise ProtocolError(
                f"a runner asked for {size:,} bytes of {asked.name} at once, at most "
                f"{limit:,} are sent"
            )
        data = self._source.read_slice(asked.name, asked.axis, asked.start, asked.end)
        answer = m.WeightSlice(
            epoch=asked.epoch,
            name=asked.name,
            axis=asked.axis,
            start=asked.start,
            end=asked.end,
        )
        return answer, np.ascontiguousarray(data).reshape(-1)
