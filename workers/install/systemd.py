"""The worker as a systemd unit of its user, who lingers so that it starts at boot.

In: what to start. Out: the steps that do it or take it back, and how the service is. It asks
systemctl and loginctl, and changes nothing itself.
"""

from __future__ import annotations

import os
import pwd
import shutil
from collections.abc import Sequence
from pathlib import Path

from workers.install.service import Launch
from workers.install.steps import (
    InstallError,
    MakeFolder,
    RemoveFile,
    RemoveFolder,
    RunCommand,
    Step,
    WriteFile,
    run_command,
)
from workers.install.systemd_unit import UNIT, Footprint, read_footprint, render_unit

LOG_LINES = 5
_BY_HAND = "or run `shardmix-worker run` by what starts programs here"
_RELOAD = RunCommand(command=("systemctl", "--user", "daemon-reload"))


class SystemdService:
    """The user manager of systemd, and what it knows of our unit."""

    def check(self) -> None:
        """Raises: InstallError: no user manager answers, or nobody can make the user linger."""
        for program in ("systemctl", "loginctl"):
            if shutil.which(program) is None:
                raise InstallError(
                    f"a service was asked for, but this computer has no {program}, so no systemd; "
                    f"install systemd, {_BY_HAND}"
                )
        _unit_path()

    def install_steps(self, launch: Launch) -> Sequence[Step]:
        """The unit file, lingering, and the start."""
        file = _unit_file()
        unit = _read_unit(file)
        missing = [folder for folder in reversed(file.parents) if not folder.is_dir()]
        lingers = _lingers()
        if unit is None:
            footprint = Footprint(turned_on_linger=not lingers, made_folders=len(missing))
        else:
            before = read_footprint(unit)
            footprint = Footprint(
                turned_on_linger=before.turned_on_linger or not lingers,
                made_folders=before.made_folders,
            )
        steps: list[Step] = [MakeFolder(path=folder) for folder in missing]
        steps.append(WriteFile(path=file, content=render_unit(launch, footprint)))
        steps.append(_RELOAD)
        if not lingers:
            steps.append(RunCommand(command=_linger("enable"), undo=_linger("disable")))
        is_new = unit is None
        # restart and not start: one that runs already takes up its new flags.
        steps.append(
            RunCommand(command=_systemctl("enable"), undo=_systemctl("disable") if is_new else ())
        )
        steps.append(
            RunCommand(command=_systemctl("restart"), undo=_systemctl("stop") if is_new else ())
        )
        return steps

    def after_undo(self) -> Sequence[RunCommand]:
        """The manager forgets the unit; or reads and starts the one that was there before."""
        was_installed = _read_unit(_unit_file()) is not None
        return (_RELOAD, RunCommand(command=_systemctl("restart"))) if was_installed else (_RELOAD,)

    def uninstall_steps(self) -> Sequence[Step]:
        """All that installing made."""
        file = _unit_file()
        unit = _read_unit(file)
        if unit is None:
            return ()
        footprint = read_footprint(unit)
        steps: list[Step] = [
            RunCommand(command=(*_systemctl("disable"), "--now")),
            # A unit that failed stays in the manager's list without its file; one that did not
            # may have left it by itself.
            RunCommand(command=_systemctl("reset-failed"), may_fail=True),
            RemoveFile(path=file),
            _RELOAD,
        ]
        if footprint.turned_on_linger:
            steps.append(RunCommand(command=_linger("disable")))
        steps += [RemoveFolder(path=folder) for folder in file.parents[: footprint.made_folders]]
        return steps

    def lines(self) -> list[str]:
        """Whether it is installed, what it does, and the log's end where it fails."""
        file = _unit_file()
        if not file.exists():
            return ["service: not installed"]
        try:
            state = _show()
        except InstallError as error:
            return [f"service: installed as {file}, but not reachable: {error}"]
        active, sub = state.get("ActiveState", "unknown"), state.get("SubState", "unknown")
        if active == "active":
            since = state.get("ActiveEnterTimestamp", "")
            lines = [f"service: installed and running, process {state.get('MainPID')}, {since}"]
        elif active == "failed" or sub == "auto-restart":
            again = "will be tried again" if sub == "auto-restart" else "not tried any more"
            how = (
                f"{state.get('Result')}, exit status {state.get('ExecMainStatus')}, "
                f"{state.get('NRestarts')} restarts"
            )
            lines = [f"service: installed but failed ({how}), {again}", *_log_lines()]
        else:
            lines = [f"service: installed, {active} ({sub})"]
        if not _lingers():
            lines.append(
                "service: it starts when you log in, not at boot, for lingering is off; turn it "
                f"on with `{' '.join(_linger('enable'))}`"
            )
        return lines


def _systemctl(verb: str) -> tuple[str, ...]:
    return ("systemctl", "--user", verb, UNIT)


def _linger(verb: str) -> tuple[str, ...]:
    # Nobody would see the question for a password.
    return ("loginctl", "--no-ask-password", f"{verb}-linger", _user())


def _user() -> str:
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:  # A container's user without a name; loginctl takes the number.
        return str(os.getuid())


def _lingers() -> bool:
    try:
        shown = run_command(("loginctl", "show-user", _user(), "--property=Linger", "--value"))
    except InstallError:
        return False  # logind knows only users who are logged in or linger.
    return shown.strip() == "yes"


def _unit_path() -> str:
    """The folders in which the user manager looks for units, as it prints them.

    Raises: InstallError: no manager answers.
    """
    try:
        return run_command(("systemctl", "--user", "show", "--property=UnitPath", "--value"))
    except InstallError as error:
        raise InstallError(
            f"a service was asked for, but no user manager of systemd answers: {error}; log in as "
            f"this user (not by sudo or su), {_BY_HAND}"
        ) from None


def _unit_file() -> Path:
    """Where our unit is or belongs.

    A new one belongs where the manager looks, whose environment need not be this shell's.
    """
    home = Path.home() / ".config"
    chosen = os.environ.get("XDG_CONFIG_HOME", "")
    config = Path(chosen) if Path(chosen).is_absolute() else home
    files = [folder / "systemd" / "user" / UNIT for folder in (config, home)]
    for file in files:
        if file.exists():
            return file
    try:
        known = _unit_path()
    except InstallError:
        known = ""
    return next((file for file in files if str(file.parent) in known), files[0])


def _read_unit(file: Path) -> str | None:
    """The unit's text; None where there is none.

    Raises: InstallError: there is one that cannot be read.
    """
    try:
        return file.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise InstallError(f"the unit {file} cannot be read: {error}; remove it first") from None


def _show() -> dict[str, str]:
    keys = "ActiveState,SubState,Result,ExecMainStatus,NRestarts,MainPID,ActiveEnterTimestamp"
    shown = run_command((*_systemctl("show"), f"--property={keys}"))
    pairs = (line.partition("=") for line in shown.splitlines())
    return {key: value for key, _, value in pairs}


def _log_lines() -> list[str]:
    command = ("journalctl", "--user", f"--unit={UNIT}", f"--lines={LOG_LINES}")
    try:
        shown = run_command((*command, "--output=cat", "--no-pager"))
    except InstallError as error:
        return [f"  its log cannot be read: {error}"]
    return [f"  {line}" for line in shown.splitlines()]
