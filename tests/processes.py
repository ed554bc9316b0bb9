"""Find real processes by their command lines, though any of them may end while it is asked."""

from __future__ import annotations

import psutil


def command_of(process: psutil.Process) -> list[str]:
    """The words of its command line; none if it ended, or ended and nobody waited for it."""
    try:
        return process.cmdline()
    except psutil.NoSuchProcess:
        return []


def has_ended(process: psutil.Process) -> bool:
    """Whether it is gone, or ended and nobody waited for it (a container without init)."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def processes_below(ancestor: psutil.Process, *words: str) -> list[psutil.Process]:
    """All that `ancestor` started, directly or not, whose command lines have all these words.

    Raises: psutil.NoSuchProcess: `ancestor` ended.
    """
    children = ancestor.children(recursive=True)
    return [child for child in children if set(words).issubset(command_of(child))]
