"""The content hashes of an open checkpoint, computed when they are first asked for.

In: a checkpoint and how its tensors are cut into units. Out: SHA-256 sums of units in file format.
What was computed once is kept in a small table on disk, so that a model is read for it only once.
"""

from __future__ import annotations

import logging
import sqlite3
import time
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from engine.cluster.small_database import open_database
from engine.model.content_units import SUM_BYTES, Units, content_sum

logger = logging.getLogger(__name__)

KEEP_SECONDS = 5.0
# Models whose sums are kept: some megabytes for one that just fits a home.
MAX_MODELS = 16

Sums = NDArray[np.uint8]

_TABLES = """
CREATE TABLE IF NOT EXISTS models (identity TEXT PRIMARY KEY, used INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS tensors (
    identity TEXT NOT NULL, name TEXT NOT NULL, unit INTEGER NOT NULL, sums BLOB NOT NULL,
    PRIMARY KEY (identity, name, unit)
);
"""


class WeightSource(Protocol):
    """Whoever can cut slices out of a checkpoint."""

    def read_slice(self, name: str, axis: int, start: int, end: int) -> NDArray[np.uint8]:
        """Bytes of elements [start, end) along an axis, in file format."""
        ...


class ContentHashes:
    """Belongs to one thread; `close` keeps what was computed."""

    def __init__(self, source: WeightSource, identity: str, path: Path | None) -> None:
        """Open nothing yet.

        Args:
            identity: of the checkpoint's files and tensors; another one for every change of them.
            path: the table on disk; None to keep nothing.
        """
        self._source = source
        self._identity = identity
        self._sums: dict[tuple[str, int], Sums] = {}
        self._changed: set[tuple[str, int]] = set()
        self._kept_at = time.monotonic()
        self._path = path
        self._database: sqlite3.Connection | None = None

    def sums(self, name: str, units: Units, first: int, end: int) -> Sums:
        """The sums of units [first, end) of a tensor; reads those that are not known yet.

        Returns: uint8 [end - first, 32]; not to be written to.
        Raises: CheckpointError: the tensor cannot be read.
        """
        key = (name, units.size)
        if key not in self._sums:
            self._sums[key] = self._stored(key, units.num_units)
        table = self._sums[key]
        # A sum of zeros stands for one that is not known; no input is known to have it.
        missing = np.flatnonzero(~table[first:end].any(axis=1)) + first
        if missing.size:
            self._compute(name, units, table, int(missing[0]), int(missing[-1]) + 1)
            self._changed.add(key)
            if time.monotonic() - self._kept_at > KEEP_SECONDS:
                self._keep()
        return table[first:end]

    def close(self) -> None:
        """Keep what was computed; a second call does nothing."""
        self._keep()
        if self._database is not None:
            self._database.close()
            self._database = None

    def _compute(self, name: str, units: Units, table: Sums, first: int, end: int) -> None:
        start, stop = first * units.size, min(end * units.size, units.length)
        raw = self._source.read_slice(name, units.axis, start, stop)
        rows = stop - start if units.is_rows else units.unit_bytes // units.step
        grid = raw.reshape(rows, -1)
        for index in range(first, end):
            digest = content_sum(units.view(grid, index - first, index - first + 1))
            table[index] = np.frombuffer(digest, np.uint8)

    def _stored(self, key: tuple[str, int], count: int) -> Sums:
        """What the disk knows of a tensor, as far as it fits."""
        empty = np.zeros((count, SUM_BYTES), np.uint8)
        if self._path is None:
            return empty
        try:
            if self._database is None:
                self._database = open_database(self._path, _TABLES)
                self._mark_used(self._database)
            row = self._database.execute(
                "SELECT sums FROM tensors WHERE identity = ? AND name = ? AND unit = ?",
                (self._identity, *key),
            ).fetchone()
        except (OSError, sqlite3.Error) as error:
            self._give_up(error)
            return empty
        if row is None or not isinstance(row[0], bytes) or len(row[0]) != empty.nbytes:
            return empty
        return np.frombuffer(row[0], np.uint8).reshape(empty.shape).copy()

    def _keep(self) -> None:
        self._kept_at = time.monotonic()
        if self._database is None or not self._changed:
            return
        rows = [(self._identity, *key, self._sums[key].tobytes()) for key in self._changed]
        try:
            self._database.execute("BEGIN IMMEDIATE")
            self._database.executemany("INSERT OR REPLACE INTO tensors VALUES (?, ?, ?, ?)", rows)
            self._database.execute("COMMIT")
            self._changed.clear()
        except sqlite3.Error as error:
            self._give_up(error)

    def _mark_used(self, database: sqlite3.Connection) -> None:
        """Make this model the one used last, and forget those not used for long."""
        database.execute(
            "INSERT OR REPLACE INTO models VALUES "
            "(?, (SELECT coalesce(max(used), 0) + 1 FROM models))",
            (self._identity,),
        )
        database.execute(
            "DELETE FROM models WHERE identity NOT IN "
            "(SELECT identity FROM models ORDER BY used DESC LIMIT ?)",
            (MAX_MODELS,),
        )
        database.execute("DELETE FROM tensors WHERE identity NOT IN (SELECT identity FROM models)")

    def _give_up(self, error: Exception) -> None:
        logger.warning("content hashes are not kept in %s: %s", self._path, error)
        self._path = None
        if self._database is not None:
            self._database.close()
            self._database = None
