"""Small files that only their owner may read, and that several processes change.

In: a path and bytes. Out: the file replaced at once, or as it was; never half of it. What is in it
is not known here.
"""

from __future__ import annotations

import contextlib
import logging
import os
import stat
import tempfile
import time
from collections.abc import Generator
from pathlib import Path

from engine.errors import Cancelled, ConfigError
from engine.weights.file_lock import FileLock

logger = logging.getLogger(__name__)

LOCK_SECONDS = 10.0
OWNER_ONLY = 0o600


def read_private(path: Path) -> bytes | None:
    """Bytes of a file, or None where there is none; a mode that others may use is tightened.

    Raises: ConfigError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            # Windows keeps a user's folder to the user; its mode bits say nothing.
            if os.name != "nt" and mode & 0o077:
                path.chmod(OWNER_ONLY)
                logger.warning("%s could be used by others (mode %o); now 600", path, mode)
            return file.read()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be read: {error.strerror}. Make it readable for you, or remove it"
        ) from error


def write_private(path: Path, content: bytes) -> None:
    """Put `content` in the place of a file, for its owner only.

    Raises: ConfigError: it cannot be written.
    """
    temporary = ""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
        with open(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise ConfigError(
            f"{path} cannot be written: {error.strerror}. Make its folder writable, or name "
            "another one in SHARDMIX_CONFIG"
        ) from error


@contextlib.contextmanager
def locked(path: Path) -> Generator[None]:
    """Keep other processes from changing a file meanwhile.

    Raises: ConfigError: another one holds it for longer than LOCK_SECONDS.
    """
    deadline = time.monotonic() + LOCK_SECONDS
    lock = FileLock(
        path.with_name(f".{path.name}.lock"), cancelled=lambda: time.monotonic() > deadline
    )
    with contextlib.ExitStack() as stack:
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            stack.enter_context(lock)
        except Cancelled:
            raise ConfigError(
                f"{path} is held by another process for {LOCK_SECONDS:.0f} s; end that one"
            ) from None
        except OSError as error:
            raise ConfigError(
                f"{path} cannot be locked: {error.strerror}. Make its folder writable, or name "
                "another one in SHARDMIX_CONFIG"
            ) from error
        yield
