"""systemd reads the unit as it was meant, whatever stands in paths and flags, and runs it."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.workers.service_sandbox import (
    FakeManager,
    UserManager,
    snapshot,
    user_manager,
    why_no_user_manager,
)
from workers.install.service import Launch
from workers.install.steps import InstallError
from workers.install.systemd_unit import UNIT, Footprint, quote, read_footprint, render_unit

ODD_FOLDERS = (
    "plain",
    "with space",
    "per%cent %h %%",
    "dol$lar ${HOME} $$",
    "qu\"ote 'single'",
    "back\\slash \\x41 \\n",
    "über 模型 🦊",
    "tab\tnew\nline",
    "-dash ; # = @ : + !",
)
ODD_WORDS = (
    "",
    " ",
    "$HOME",
    "${HOME}",
    "%h",
    "%%",
    '"',
    "'",
    "\\",
    ";",
    "a\nb",
    "\x07",
    "模型 🦊",
)
WAIT_SECONDS = 30.0


def odd_program(folder: Path, script: str) -> Path:
    """A program in a folder whose name is a trap."""
    folder.mkdir()
    program = folder / "python"
    program.write_text(script, encoding="utf-8")
    program.chmod(0o755)
    return program


def wait_for(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is missing")
@pytest.mark.parametrize("folder", ODD_FOLDERS)
def test_systemd_finds_no_fault_in_the_unit(tmp_path: Path, folder: str) -> None:
    program = odd_program(tmp_path / folder, "#!/bin/sh\n")
    unit = tmp_path / UNIT

    def verify(path: Path) -> str:
        launch = Launch(command=(str(path), *ODD_WORDS), environment={"ODD": folder})
        unit.write_text(render_unit(launch, Footprint()), encoding="utf-8")
        done = subprocess.run(
            ["systemd-analyze", "--user", "verify", str(unit)],
            env={**os.environ, "XDG_RUNTIME_DIR": str(tmp_path)},
            capture_output=True,
            encoding="utf-8",
            timeout=WAIT_SECONDS,
            check=False,
        )
        return done.stdout + done.stderr

    assert verify(program) == ""
    if not any(character in folder for character in "\"'\\\t\n"):
        # It looks for the program, so it has read its path as it was meant.
        assert "not executable" in verify(program.with_name("missing"))


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20))
def test_a_quoted_word_is_one_line_and_can_be_read_back(word: str) -> None:
    text = quote(word)
    assert "\n" not in text and text[0] == text[-1] == '"'
    inner = text[1:-1]
    assert '"' not in inner and "%" not in inner.replace("%%", "")
    read = ""
    while inner:
        if inner.startswith("\\x"):
            read, inner = read + chr(int(inner[2:4], 16)), inner[4:]
        elif inner.startswith("%%"):
            read, inner = read + "%", inner[2:]
        else:
            read, inner = read + inner[0], inner[1:]
    assert read == word


@pytest.mark.parametrize("word", ["a\0b", "\udcff"])
def test_what_no_unit_can_hold_is_refused(word: str) -> None:
    with pytest.raises(InstallError, match=r"UTF-8|NUL"):
        quote(word)


@pytest.mark.parametrize("linger", [False, True])
@pytest.mark.parametrize("folders", [0, 3])
def test_the_unit_remembers_what_installing_changed(linger: bool, folders: int) -> None:
    footprint = Footprint(turned_on_linger=linger, made_folders=folders)
    assert read_footprint(render_unit(Launch(command=("/x",), environment={}), footprint)) == (
        footprint
    )
    assert read_footprint("[Service]\nExecStart=/x\n") == Footprint()


@pytest.fixture
def fake(tmp_path: Path) -> FakeManager:
    return FakeManager(tmp_path)


@pytest.fixture
def manager(fake: FakeManager, tmp_path: Path) -> Iterator[UserManager]:
    reason = why_no_user_manager()
    if reason:
        pytest.skip(reason)
    root = str(Path(__file__).resolve().parents[2])
    variables = {
        "PYTHONPATH": root,
        "SHARDMIX_DISCOVERY": "off",
        # What the worker itself keeps is not the service's.
        "SHARDMIX_CONFIG": str(tmp_path / "settings"),
        "SHARDMIX_CACHE": str(tmp_path / "cache"),
    }
    with user_manager(fake, variables) as running:
        yield running


def test_systemd_starts_the_very_words(
    fake: FakeManager, manager: UserManager, tmp_path: Path
) -> None:
    heard = tmp_path / "heard"
    for number, folder in enumerate(ODD_FOLDERS):
        program = odd_program(
            tmp_path / folder,
            f'#!/bin/sh\nprintf "%s\\0" "$0" "$ODD" "$@" >{heard}\nmv {heard} {heard}-{number}\n',
        )
        launch = Launch(command=(str(program), *ODD_WORDS), environment={"ODD": folder})
        fake.unit.parent.mkdir(parents=True, exist_ok=True)
        fake.unit.write_text(render_unit(launch, Footprint()), encoding="utf-8")
        manager.systemctl("daemon-reload")
        manager.systemctl("start", UNIT)
        written = tmp_path / f"heard-{number}"
        wait_for(written.exists, f"{folder!r} was not started")
        words = written.read_text(encoding="utf-8").split("\0")[:-1]
        assert words == [str(program), folder, *ODD_WORDS]


def test_the_worker_runs_comes_back_and_goes_for_good(
    fake: FakeManager, manager: UserManager, tmp_path: Path
) -> None:
    quick = fake.unit.with_name(f"{UNIT}.d") / "quick.conf"
    quick.parent.mkdir(parents=True)
    quick.write_text("[Service]\nRestartSec=0.1\n", encoding="utf-8")
    before = snapshot(fake.home)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = min(int(probe.getsockname()[1]), 64000)
    cli = [sys.executable, "-P", "-m", "workers.cli"]
    flags = ["--name", "attic", "--host", "127.0.0.1", "--port", str(port)]
    done = manager.run([*cli, "install", *flags])
    assert done.returncode == 0, done.stderr
    assert "installed and running" in done.stdout
    assert manager.systemctl("is-enabled", UNIT) == "enabled"

    def listens() -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    wait_for(listens, f"nothing listens on {port}: {manager.systemctl('status', UNIT)}")

    first = manager.systemctl("show", "--property=MainPID", "--value", UNIT)
    assert manager.run(["kill", f"-{int(signal.SIGKILL)}", first]).returncode == 0
    wait_for(
        lambda: (
            manager.systemctl("show", "--property=NRestarts", "--value", UNIT) == "1"
            and manager.systemctl("is-active", UNIT) == "active"
        ),
        "it was not started again",
    )
    wait_for(listens, "the second one does not listen")
    assert manager.systemctl("show", "--property=MainPID", "--value", UNIT) != first

    done = manager.run([*cli, "uninstall"])
    assert done.returncode == 0, done.stderr
    assert not listens()
    assert snapshot(fake.home) == before
    assert manager.systemctl("show", "--property=LoadState", "--value", UNIT) == "not-found"
    assert UNIT not in manager.systemctl("list-units", "--all", "--plain")


def test_a_service_that_fails_is_removed_whole(fake: FakeManager, manager: UserManager) -> None:
    """A failed unit stays in the manager's list when only its file goes."""
    before = snapshot(fake.home)
    cli = [sys.executable, "-P", "-m", "workers.cli"]
    # Nobody's address: the worker ends with a one-line error.
    assert manager.run([*cli, "install", "--host", "192.0.2.1"]).returncode == 0
    unit = fake.unit.read_text(encoding="utf-8")
    fake.unit.write_text(unit.replace("Restart=on-failure", "Restart=no"), encoding="utf-8")
    manager.systemctl("daemon-reload")
    manager.systemctl("restart", UNIT)
    wait_for(lambda: manager.systemctl("is-failed", UNIT) == "failed", "it did not fail")
    code = "from workers.install.commands import service_lines; print(*service_lines(), sep='|')"
    lines = manager.run([sys.executable, "-P", "-c", code]).stdout
    assert "installed but failed (exit-code, exit status 1" in lines
    assert manager.run([*cli, "uninstall"]).returncode == 0
    assert UNIT not in manager.systemctl("list-units", "--all", "--plain")
    assert snapshot(fake.home) == before
