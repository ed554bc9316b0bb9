"""The text of the systemd unit that runs a worker.

In: what to start, and what installing found. Out: the unit file's text; and from a text what
installing found. Pure: it knows no paths of this computer and runs nothing.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from workers.install.service import Launch
from workers.install.steps import InstallError

UNIT = "shardmix-worker.service"

# Keys of our own section, which systemd ignores for its X-.
_LINGER_KEY = "TurnedOnLinger"
_FOLDERS_KEY = "MadeFolders"


@dataclass(frozen=True, slots=True, kw_only=True)
class Footprint:
    """What installing changed beside the unit, so that uninstalling takes back just that.

    Attributes:
        turned_on_linger: the user did not linger before.
        made_folders: how many of the unit file's folders, counted from the innermost, were made.
    """

    turned_on_linger: bool = False
    made_folders: int = 0


def render_unit(launch: Launch, footprint: Footprint) -> str:
    """The unit file.

    Raises: InstallError: a word of the command or environment cannot stand in a unit file.
    """
    environment = "".join(
        f"Environment={quote(f'{name}={value}')}\n" for name, value in launch.environment.items()
    )
    return f"""\
[Unit]
Description=Shardmix worker: offers this computer's CPU and GPUs
# A network that comes up late is waited for; after five minutes of failing it stays down.
StartLimitIntervalSec=600
StartLimitBurst=30

[Service]
Type=exec
ExecStart={_exec_line(launch.command)}
{environment}Restart=on-failure
RestartSec=10
# A flag that is wrong does not mend by itself.
RestartPreventExitStatus=2
# The worker ends its runners in order; what is left after that is killed.
KillMode=mixed
TimeoutStopSec=10
# A runner that runs out of memory is reported by the worker, which must outlive it.
OOMPolicy=continue
# A person at this computer comes first.
Nice=5
UMask=0077
NoNewPrivileges=yes
RestrictSUIDSGID=yes
LockPersonality=yes

[Install]
WantedBy=default.target

[X-Shardmix]
{_LINGER_KEY}={"yes" if footprint.turned_on_linger else "no"}
{_FOLDERS_KEY}={footprint.made_folders}
"""


def read_footprint(unit: str) -> Footprint:
    """What the installation that wrote this unit changed; nothing where it does not say."""
    linger = re.search(rf"^{_LINGER_KEY}=(yes|no)$", unit, re.MULTILINE)
    folders = re.search(rf"^{_FOLDERS_KEY}=(\d+)$", unit, re.MULTILINE)
    return Footprint(
        turned_on_linger=linger is not None and linger[1] == "yes",
        made_folders=int(folders[1]) if folders else 0,
    )


def quote(word: str) -> str:
    """One word as systemd reads it back, whatever is in it.

    Raises: InstallError: it has bytes that are no text, or a NUL.
    """
    try:
        word.encode("utf-8")
    except UnicodeEncodeError:
        raise InstallError(
            f"{word!r} is not UTF-8, which a systemd unit must be; rename it, then install again"
        ) from None
    if "\0" in word:
        raise InstallError(f"{word!r} holds a NUL, which no argument can; leave it out")
    escaped = re.sub(r"[\x01-\x1f\x7f\"\\]", lambda found: f"\\x{ord(found[0]):02x}", word)
    # %: specifiers are expanded even inside quotes.
    return '"' + escaped.replace("%", "%%") + '"'


def _exec_line(command: tuple[str, ...]) -> str:
    program = command[0]
    if re.search(r"[\x01-\x1f\x7f\"'\\]", program):
        # systemd takes no such path for a program, however it is quoted; a shell takes it as a word
        # and puts the program in its own place.
        command = ("/bin/sh", "-c", 'exec "$0" "$@"', *command)
    # The colon: no $VARIABLE is expanded in this line.
    return ":" + " ".join(quote(word) for word in command)
