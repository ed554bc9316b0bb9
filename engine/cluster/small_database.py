"""Opens a small sqlite file that several processes of one user share and that may be thrown away.

In: a path and the tables it has. Out: a connection. A damaged file is replaced by an empty one,
because everything in it can be had again. It knows no table.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sqlite3
from pathlib import Path

logger = logging.getLogger(__name__)

# Others hold the file for one small transaction at a time; one that was frozen holds it for longer.
BUSY_SECONDS = 2.0


def open_database(path: Path, tables: str) -> sqlite3.Connection:
    """Open or make a database that only this user can read.

    Args:
        path: its folder is made if absent.
        tables: SQL that makes what is missing.
    Returns: a connection without implicit transactions, for one thread.
    Raises: OSError, sqlite3.Error: it can be neither opened nor made.
    """
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
        return _open(path, tables)
    except sqlite3.OperationalError:
        raise  # Locked, or not writable: nothing is wrong with the file.
    except sqlite3.DatabaseError as error:
        logger.warning("%s is damaged and begun anew: %s", path, error)
        remove_database(path)
        return _open(path, tables)


def remove_database(path: Path) -> None:
    """Remove a database and what sqlite keeps beside it."""
    for ending in ("", "-wal", "-shm"):
        with contextlib.suppress(FileNotFoundError):
            path.with_name(path.name + ending).unlink()


def _open(path: Path, tables: str) -> sqlite3.Connection:
    # sqlite would make it readable by others; what it keeps beside it has the same mode.
    os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
    connection = sqlite3.connect(path, timeout=BUSY_SECONDS, isolation_level=None)
    try:
        connection.execute("PRAGMA journal_mode = WAL")
        # A loss of power may cost the last entries, never the file.
        connection.execute("PRAGMA synchronous = NORMAL")
        connection.executescript(tables)
    except BaseException:
        connection.close()
        raise
    return connection
