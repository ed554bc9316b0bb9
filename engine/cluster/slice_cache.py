"""Weight slices on a node's disk, found by the hash of their content.

In: slices and their SHA-256. Out: those slices again, verified. Many slices lie in one pack file,
behind one another; an index in sqlite says where. Several processes use one folder at a time: each
appends to a pack of its own. When the limit is reached, the packs that were used least recently go.

It never fails its user: what it cannot read it does not have, and a disk that takes nothing more is
left alone, with a line in the log. It does not know what a slice belongs to.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import secrets
import sqlite3
import time
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

from engine.cluster.small_database import open_database
from engine.errors import Cancelled
from engine.weights.file_lock import FileLock

logger = logging.getLogger(__name__)

PACK_BYTES = 64 << 20
# The limit is kept by whole packs; with fewer than so many, too much would go at a time.
MIN_PACKS = 8
# What a process that is killed can lose: one batch.
BATCH_BYTES = 1 << 20
BATCH_SECONDS = 0.2
# sqlite takes 999 parameters in its oldest builds.
MAX_PARAMETERS = 500

_TABLES = """
CREATE TABLE IF NOT EXISTS packs (
    id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, bytes INTEGER NOT NULL, used INTEGER NOT NULL
);
CREATE TABLE IF NOT EXISTS slices (
    sum BLOB PRIMARY KEY, pack INTEGER NOT NULL, start INTEGER NOT NULL, length INTEGER NOT NULL
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS slices_by_pack ON slices (pack);
"""


class _Place(NamedTuple):
    """Where a slice lies."""

    pack: int
    start: int
    length: int
    sum: bytes


class _Pack(NamedTuple):
    """The pack that this process appends to; `lock` keeps others from doing so."""

    id: int
    path: Path
    lock: FileLock


class SliceCache:
    """Belongs to one thread of one process; `close` commits what is left."""

    def __init__(self, folder: Path, limit_bytes: int, pack_bytes: int = PACK_BYTES) -> None:
        """Open a folder, or make it.

        Args:
            limit_bytes: of all packs together; 0 turns the cache off.
            pack_bytes: of one pack, less where the limit is small.
        """
        self._folder = folder
        self._limit = limit_bytes
        self._pack_bytes = max(1, min(pack_bytes, limit_bytes // MIN_PACKS))
        self._batch: dict[bytes, bytes] = {}
        self._batch_bytes = 0
        self._committed_at = time.monotonic()
        self._touched: set[int] = set()
        self._pack: _Pack | None = None
        self._database: sqlite3.Connection | None = None
        self._takes_more = True
        if limit_bytes <= 0:
            return
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._database = open_database(folder / "index.sqlite", _TABLES)
            self._remove_orphans()
        except (OSError, sqlite3.Error) as error:
            self._give_up(error)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def num_bytes(self) -> int:
        """Bytes of all packs in the folder, what is not committed yet not counted."""
        if self._database is None:
            return 0
        try:
            return _total(self._database)
        except sqlite3.Error as error:
            self._give_up(error)
            return 0

    def read(self, sums: Sequence[bytes]) -> dict[bytes, memoryview]:
        """Slices that are here and undamaged.

        Args:
            sums: SHA-256 of each; ask for no more at a time than fits memory.
        Returns: bytes by their sum; what is absent or was damaged is left out.
        """
        found = {s: memoryview(self._batch[s]) for s in sums if s in self._batch}
        if self._database is None:
            return found
        wanted = list(dict.fromkeys(s for s in sums if s not in found))
        try:
            for run in _runs(self._places(self._database, wanted)):
                self._read_run(self._database, run, found)
        except (OSError, sqlite3.Error) as error:
            self._give_up(error)
        return found

    def put(self, content_sum: bytes, data: bytes) -> None:
        """Keep a slice; it is safe from a sudden end after the next `commit`.

        Args:
            content_sum: SHA-256 of `data`, which the caller has verified.
        """
        if self._database is None or not self._takes_more or content_sum in self._batch:
            return
        if len(data) > self._pack_bytes * MIN_PACKS // 2:
            return  # It would drive out most of what is here.
        self._batch[content_sum] = data
        self._batch_bytes += len(data)
        is_old = time.monotonic() - self._committed_at > BATCH_SECONDS
        if is_old or self._batch_bytes >= min(BATCH_BYTES, self._pack_bytes):
            self.commit()

    def commit(self) -> None:
        """Write what was put, and which packs were used."""
        self._committed_at = time.monotonic()
        if self._database is None or not (self._batch or self._touched):
            return
        try:
            self._write_batch(self._database)
        except (OSError, sqlite3.Error) as error:
            logger.warning("the weight cache in %s takes nothing more: %s", self._folder, error)
            self._takes_more = False
        self._batch.clear()
        self._batch_bytes = 0
        self._touched.clear()

    def close(self) -> None:
        """Commit and release the files; a second call does nothing."""
        self.commit()
        self._leave_pack()
        if self._database is not None:
            self._database.close()
            self._database = None

    # ---- reading -----------------------------------------------------------------------------

    def _places(self, database: sqlite3.Connection, sums: list[bytes]) -> list[_Place]:
        places: list[_Place] = []
        for first in range(0, len(sums), MAX_PARAMETERS):
            some = sums[first : first + MAX_PARAMETERS]
            marks = ",".join("?" * len(some))
            rows = database.execute(
                f"SELECT pack, start, length, sum FROM slices WHERE sum IN ({marks})", some
            )
            places.extend(_Place(*row) for row in rows)
        return places

    def _read_run(
        self, database: sqlite3.Connection, run: list[_Place], found: dict[bytes, memoryview]
    ) -> None:
        """Read slices that lie behind one another; those that are damaged leave the index."""
        pack, first = run[0].pack, run[0].start
        self._touched.add(pack)
        data = b""
        name = database.execute("SELECT name FROM packs WHERE id = ?", (pack,)).fetchone()
        if name is not None:
            with contextlib.suppress(FileNotFoundError), open(self._folder / name[0], "rb") as file:
                file.seek(first)
                data = file.read(run[-1].start + run[-1].length - first)
        view = memoryview(data)
        damaged: list[tuple[bytes, int]] = []
        for place in run:
            part = view[place.start - first : place.start - first + place.length]
            if hashlib.sha256(part).digest() == place.sum:
                found[place.sum] = part
            else:
                damaged.append((place.sum, pack))
        if damaged:
            logger.warning("%d slices in %s are damaged or gone", len(damaged), self._folder)
            with _transaction(database):
                database.executemany("DELETE FROM slices WHERE sum = ? AND pack = ?", damaged)

    # ---- writing -----------------------------------------------------------------------------

    def _write_batch(self, database: sqlite3.Connection) -> None:
        gone: list[str] = []
        with _transaction(database):
            known = {p.sum for p in self._places(database, list(self._batch))}
            new = {s: data for s, data in self._batch.items() if s not in known}
            self._mark_used(database)
            needed = sum(map(len, new.values()))
            gone = self._evict(database, needed) if new else []
            entries = list(new.items())
            while entries:
                entries = entries[self._append(database, entries) :]
        for name in gone:
            _remove(self._folder / name)

    def _mark_used(self, database: sqlite3.Connection) -> None:
        """Order packs by use with a counter, which no change of the clock can confuse."""
        touched = set(self._touched)
        if self._pack is not None:
            touched.add(self._pack.id)
        database.executemany(
            "UPDATE packs SET used = (SELECT max(used) + 1 FROM packs) WHERE id = ?",
            [(pack,) for pack in sorted(touched)],
        )

    def _evict(self, database: sqlite3.Connection, needed_bytes: int) -> list[str]:
        """Take the least recently used packs out of the index; returns their files."""
        surplus = _total(database) + needed_bytes - self._limit
        gone: list[str] = []
        rows = database.execute("SELECT id, name, bytes FROM packs ORDER BY used").fetchall()
        for pack, name, size in rows:
            if surplus <= 0:
                break
            if self._pack is not None and pack == self._pack.id:
                self._leave_pack()
            database.execute("DELETE FROM slices WHERE pack = ?", (pack,))
            database.execute("DELETE FROM packs WHERE id = ?", (pack,))
            gone.append(str(name))
            surplus -= int(size)
        return gone

    def _append(self, database: sqlite3.Connection, entries: list[tuple[bytes, bytes]]) -> int:
        """Append as many slices as the pack takes, at least one; returns their number."""
        pack, start = self._open_pack(database, len(entries[0][1]))
        rows: list[tuple[bytes, int, int, int]] = []
        end = start
        for content_sum, data in entries:
            if rows and end + len(data) > self._pack_bytes:
                break
            rows.append((content_sum, pack.id, end, len(data)))
            end += len(data)
        with open(pack.path, "r+b") as file:
            # What a killed process left behind the last commit is written over.
            file.seek(start)
            file.write(b"".join(data for _sum, data in entries[: len(rows)]))
            file.truncate()
        database.executemany("INSERT INTO slices VALUES (?, ?, ?, ?)", rows)
        database.execute("UPDATE packs SET bytes = ? WHERE id = ?", (end, pack.id))
        return len(rows)

    def _open_pack(self, database: sqlite3.Connection, num_bytes: int) -> tuple[_Pack, int]:
        """A pack with room for so many bytes, an empty one if need be, and where it ends."""
        room = self._pack_bytes - num_bytes
        if self._pack is not None:
            row = database.execute(
                "SELECT bytes FROM packs WHERE id = ?", (self._pack.id,)
            ).fetchone()
            if row is not None and row[0] <= max(0, room):
                return self._pack, int(row[0])
            self._leave_pack()  # It is full, or another process evicted it.
        half_full = database.execute(
            "SELECT id, name, bytes FROM packs WHERE bytes <= ? ORDER BY used DESC LIMIT 8",
            (min(self._pack_bytes // 2, room),),
        ).fetchall()
        for pack, name, size in half_full:
            path = self._folder / str(name)
            with contextlib.suppress(OSError):
                if path.stat().st_size >= size and self._take_pack(int(pack), path):
                    assert self._pack is not None
                    return self._pack, int(size)
        name = f"{secrets.token_hex(8)}.pack"
        inserted = database.execute(
            "INSERT INTO packs (name, bytes, used) VALUES "
            "(?, 0, (SELECT coalesce(max(used), 0) + 1 FROM packs))",
            (name,),
        )
        assert inserted.lastrowid is not None
        path = self._folder / name
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
        if not self._take_pack(inserted.lastrowid, path):
            raise OSError(f"{path} cannot be locked")
        assert self._pack is not None
        return self._pack, 0

    def _take_pack(self, pack: int, path: Path) -> bool:
        """Make a pack the one to append to, unless another process does so."""
        lock = FileLock(_lock_path(path), lambda: True)
        try:
            lock.__enter__()
        except Cancelled:
            return False
        self._pack = _Pack(pack, path, lock)
        return True

    def _leave_pack(self) -> None:
        if self._pack is not None:
            self._pack.lock.__exit__(None, None, None)
            self._pack = None

    # ---- upkeep ------------------------------------------------------------------------------

    def _remove_orphans(self) -> None:
        """Remove packs that the index does not know: a process ended before it could."""
        assert self._database is not None
        # Where others are busy with the index for long, one of them has done this.
        with contextlib.suppress(sqlite3.OperationalError), _transaction(self._database):
            known = {str(row[0]) for row in self._database.execute("SELECT name FROM packs")}
            for path in self._folder.glob("*.pack"):
                if path.name not in known:
                    _remove(path)

    def _give_up(self, error: Exception) -> None:
        logger.warning("the weight cache in %s is not used: %s", self._folder, error)
        self._leave_pack()
        if self._database is not None:
            self._database.close()
            self._database = None


def _total(database: sqlite3.Connection) -> int:
    row: Any = database.execute("SELECT coalesce(sum(bytes), 0) FROM packs").fetchone()
    return int(row[0])


def _runs(places: list[_Place]) -> Iterator[list[_Place]]:
    """Slices that lie behind one another in one pack."""
    run: list[_Place] = []
    for place in sorted(places):
        if run and (run[-1].pack, run[-1].start + run[-1].length) != (place.pack, place.start):
            yield run
            run = []
        run.append(place)
    if run:
        yield run


@contextlib.contextmanager
def _transaction(database: sqlite3.Connection) -> Generator[None]:
    """A write transaction, which keeps other processes from writing."""
    database.execute("BEGIN IMMEDIATE")
    try:
        yield
        database.execute("COMMIT")
    except BaseException:
        if database.in_transaction:  # A full disk may have ended it already.
            database.execute("ROLLBACK")
        raise


def _lock_path(pack: Path) -> Path:
    return pack.with_name(pack.name + ".lock")


def _remove(pack: Path) -> None:
    for path in (pack, _lock_path(pack)):
        # On Windows a file that another process has open stays until the next start.
        with contextlib.suppress(FileNotFoundError, PermissionError):
            path.unlink()
