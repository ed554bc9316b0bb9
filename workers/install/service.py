"""What every service manager offers to the commands, and the answer where there is none yet.

In: what to start. Out: steps, which others show or carry out, and lines that tell how the service
is. Nothing here changes the computer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from workers.install.steps import InstallError, RunCommand, Step


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """What the service starts.

    Attributes:
        command: program (an absolute path) and its arguments.
        environment: variables that the program needs.
    """

    command: tuple[str, ...]
    environment: Mapping[str, str]


class Service(Protocol):
    """A way in which a system starts programs by itself."""

    def check(self) -> None:
        """See whether the system can do it now.

        Raises: InstallError: it cannot; the message says what to do.
        """
        ...

    def install_steps(self, launch: Launch) -> Sequence[Step]:
        """What sets the service up and starts it.

        Raises: InstallError: this launch cannot be a service.
        """
        ...

    def after_undo(self) -> Sequence[RunCommand]:
        """What follows when steps of an installation were taken back."""
        ...

    def uninstall_steps(self) -> Sequence[Step]:
        """What leaves nothing of the service behind; empty where it is not installed."""
        ...

    def lines(self) -> list[str]:
        """How the service is, for a person."""
        ...


class UnsupportedService:
    """A system for which no service is written yet."""

    def __init__(self, system: str) -> None:
        """Args: system: its name for a person."""
        self._system = system

    def check(self) -> None:
        """Raises: InstallError: always."""
        raise InstallError(
            f"a service was asked for, but on {self._system} it is not supported yet (only on "
            "Linux); run `shardmix-worker run`"
        )

    def install_steps(self, launch: Launch) -> Sequence[Step]:
        """Raises: InstallError: always."""
        self.check()
        return ()

    def after_undo(self) -> Sequence[RunCommand]:
        """Nothing: no step was ever taken."""
        return ()

    def uninstall_steps(self) -> Sequence[Step]:
        """Nothing: it cannot have been installed."""
        return ()

    def lines(self) -> list[str]:
        """One line that says so."""
        return [f"service: not supported on {self._system} yet; run `shardmix-worker run`"]
