"""`install` does what its dry run shows, or nothing; `uninstall` leaves the home as it was.

systemctl and loginctl are scripts that write down how they were called.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import pytest

from tests.workers.service_sandbox import FakeManager, snapshot
from workers.install import choose_service
from workers.install.service import Launch
from workers.install.steps import InstallError

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="systemd is Linux's")

WAIT_SECONDS = 30.0
FLAGS = ("--name", "attic", "--port", "47612", "--threads", "3", "--trusted-network")


@pytest.fixture
def manager(tmp_path: Path) -> FakeManager:
    return FakeManager(tmp_path)


def shown_commands(text: str) -> list[str]:
    return [line.removeprefix("run ") for line in text.splitlines() if line.startswith("run ")]


def shown_files(text: str) -> dict[str, str]:
    """Path and content of each file that a dry run shows."""
    files: dict[str, str] = {}
    path = None
    for line in text.splitlines():
        if line.startswith("write file "):
            path = line.removeprefix("write file ")
            files[path] = ""
        elif line and not line.startswith("    "):
            path = None
        elif path is not None:
            files[path] += line.removeprefix("    ") + "\n"
    return files


def test_a_dry_run_shows_every_file_and_command_and_changes_nothing(manager: FakeManager) -> None:
    before = snapshot(manager.home)
    dry = manager.run_python("-m", "workers.cli", "install", "--dry-run", *FLAGS)
    assert dry.returncode == 0, dry.stderr
    assert snapshot(manager.home) == before
    assert manager.commands() == []

    real = manager.run("install", *FLAGS)
    assert real.returncode == 0, real.stderr
    assert manager.commands() == shown_commands(dry.stdout)
    written = {
        str(path): path.read_text(encoding="utf-8")
        for path in manager.home.rglob("*")
        if path.is_file()
    }
    assert written == shown_files(dry.stdout)
    assert real.stdout.startswith(dry.stdout)
    assert "service: installed and running, process 12" in real.stdout


def test_the_unit_starts_this_interpreter_with_the_flags_and_folders_given(
    manager: FakeManager, tmp_path: Path
) -> None:
    done = manager.run_python(
        *("-m", "workers.cli", "install", *FLAGS, "--devices", "cpu,cuda0"),
        *("--memory-limit", "75%", "--leave-cores", "1", "--cache-dir", "slices"),
        variables={"SHARDMIX_CACHE": "relative/cache"},
    )
    assert done.returncode == 0, done.stderr
    unit = manager.unit.read_text(encoding="utf-8")
    assert f'ExecStart=:"{sys.executable}" "-P" "-m" "workers.cli" "run" "--name=attic"' in unit
    rest = (
        '"--port=47612" "--devices=cpu,cuda0" "--memory-limit=75%%" "--threads=3" '
        f'"--leave-cores=1" "--cache-dir={Path.cwd()}/slices" "--trusted-network"\n'
    )
    assert rest in unit
    assert f'Environment="SHARDMIX_CACHE={Path.cwd()}/relative/cache"\n' in unit
    assert "SHARDMIX_CONFIG" not in unit


@pytest.mark.parametrize("lingers", [False, True])
def test_uninstall_leaves_the_home_as_it_was(manager: FakeManager, lingers: bool) -> None:
    own = manager.home / ".config" / "systemd" / "own.conf"
    if lingers:
        own.parent.mkdir(parents=True)
        own.write_text("mine", encoding="utf-8")
    manager.set_linger(lingers)
    before = snapshot(manager.home)
    assert manager.run("install").returncode == 0
    # Installed a second time, while lingering is on by the first.
    manager.set_linger(True)
    assert manager.run("install", *FLAGS).returncode == 0
    enabled = [line for line in manager.commands() if "enable-linger" in line]
    assert len(enabled) == (0 if lingers else 1)

    dry = manager.run("uninstall", "--dry-run")
    assert dry.returncode == 0 and manager.unit.exists() and manager.commands() == []
    done = manager.run("uninstall")
    assert done.returncode == 0, done.stderr
    assert snapshot(manager.home) == before
    commands = manager.commands()
    assert commands == shown_commands(dry.stdout)
    assert any("disable-linger" in line for line in commands) is not lingers
    again = manager.run("uninstall")
    assert again.returncode == 0 and "not installed" in again.stdout
    assert manager.commands() == []


@pytest.mark.parametrize("failing", ["daemon-reload", "enable-linger", "enable", "restart"])
def test_a_failure_in_the_middle_takes_everything_back(manager: FakeManager, failing: str) -> None:
    before = snapshot(manager.home)
    done = manager.run("install", fail_on=failing)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert failing in done.stderr and "refused by the test" in done.stderr
    assert snapshot(manager.home) == before
    commands = manager.commands()
    is_left = "left behind: " in done.stderr
    assert is_left is (
        failing == "daemon-reload"
    )  # The manager that fails to reload does it twice.
    verbs = [line.split()[2] for line in commands]
    for done_verb, undo_verb in (("enable-linger", "disable-linger"), ("enable", "disable")):
        was_done = done_verb in verbs and done_verb != failing
        assert (undo_verb in verbs) is was_done, verbs
    assert verbs[-1] == "daemon-reload"


def test_an_interrupted_installation_is_taken_back(manager: FakeManager) -> None:
    process = manager.start("install", hang_on="enable")
    deadline = time.monotonic() + WAIT_SECONDS
    while not manager.is_called("enable"):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=WAIT_SECONDS)
    assert process.returncode not in (0, None)
    assert list(manager.home.iterdir()) == []
    verbs = [line.split()[2] for line in manager.commands()]
    assert verbs == ["daemon-reload", "enable-linger", "enable", "disable-linger", "daemon-reload"]


def test_a_failed_change_brings_the_old_unit_back(manager: FakeManager) -> None:
    assert manager.run("install", "--name", "old").returncode == 0
    manager.set_linger(True)
    manager.commands()
    before = snapshot(manager.home)
    assert manager.run("install", "--name", "new", fail_on="enable").returncode == 1
    assert snapshot(manager.home) == before
    verbs = [line.split()[2] for line in manager.commands()]
    assert verbs == ["daemon-reload", "enable", "daemon-reload", "restart"]


def test_uninstall_goes_on_and_names_what_is_left_to_do(manager: FakeManager) -> None:
    assert manager.run("install").returncode == 0
    done = manager.run("uninstall", fail_on="disable-linger")
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert "do by hand: `loginctl --no-ask-password disable-linger" in done.stderr
    assert list(manager.home.iterdir()) == []


def test_without_a_user_manager_one_line_says_what_to_do(manager: FakeManager) -> None:
    done = manager.run("install", fail_on="show")
    assert done.returncode == 1 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert "no user manager of systemd answers" in done.stderr
    assert "shardmix-worker run" in done.stderr
    assert list(manager.home.iterdir()) == [] and manager.commands() == []
    dry = manager.run("install", "--dry-run", fail_on="show")
    assert dry.returncode == 0 and "[Service]" in dry.stdout
    assert "nothing of this could be done now" in dry.stderr


def test_without_systemd_one_line_says_what_to_do(manager: FakeManager) -> None:
    manager.environment["PATH"] = str(manager.home)
    done = manager.run("install")
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
    assert "has no systemctl" in done.stderr and "shardmix-worker run" in done.stderr
    assert list(manager.home.iterdir()) == []


@pytest.mark.parametrize("name", ["local-1", "this", "a b", "ü"])
def test_a_name_that_run_would_refuse_is_refused_at_once(manager: FakeManager, name: str) -> None:
    done = manager.run("install", "--name", name)
    assert done.returncode == 1 and repr(name) in done.stderr
    assert list(manager.home.iterdir()) == [] and manager.commands() == []


def test_status_tells_how_the_service_is(manager: FakeManager) -> None:
    def status(fail_on: str = "") -> str:
        code = (
            "from workers.install.commands import service_lines; print(*service_lines(), sep='|')"
        )
        return manager.run_python("-c", code, variables={"SANDBOX_FAIL": fail_on}).stdout.strip()

    assert status() == "service: not installed"
    assert manager.run("install").returncode == 0
    manager.set_linger(True)
    assert status() == "service: installed and running, process 12,"
    manager.set_state(
        "ActiveState=failed\nSubState=failed\nResult=exit-code\nExecMainStatus=1\nNRestarts=30\n"
    )
    assert status() == (
        "service: installed but failed (exit-code, exit status 1, 30 restarts), not tried any more"
        "|  the port is taken"
    )
    manager.set_linger(False)
    assert "lingering is off" in status()
    assert "not reachable" in status("show")


@pytest.mark.parametrize(("platform", "system"), [("darwin", "macOS"), ("win32", "Windows")])
def test_other_systems_say_that_they_are_not_supported_yet(platform: str, system: str) -> None:
    service = choose_service(platform)
    with pytest.raises(InstallError, match=f"on {system} it is not supported yet"):
        service.install_steps(Launch(command=("x",), environment={}))
    assert service.uninstall_steps() == ()
    assert service.lines() == [f"service: not supported on {system} yet; run `shardmix-worker run`"]


@pytest.mark.skipif(sys.platform == "linux" and os.getuid() == 0, reason="root may write anywhere")
def test_a_home_that_cannot_be_written_is_left_alone(manager: FakeManager) -> None:
    manager.home.chmod(0o500)
    done = manager.run("install")
    manager.home.chmod(0o700)
    assert done.returncode == 1 and "could not make folder" in done.stderr
    assert manager.commands() == []
