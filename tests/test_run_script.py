"""run.py sets up from nothing, repairs, says in one line what is wrong, and becomes its child."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import venv
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent
needs_posix = pytest.mark.skipif(os.name == "nt", reason="scripts stand in for programs")

# Stands in for pip, which test_a_real_environment does not: records its arguments, or fails with a log.
FAKE_PYTHON = """\
#!{python}
import os, subprocess, sys
from pathlib import Path

folder = Path(__file__).parent.parent
arguments = sys.argv[1:]
with open(folder / "calls", "a") as calls:
    calls.write(" ".join(arguments) + chr(10))
if arguments[:2] == ["-m", "pip"] and "install" in arguments:
    failure = os.environ.get("FAKE_PIP_FAILURE")
    if failure:
        Path(arguments[arguments.index("--log") + 1]).write_text(failure)
        sys.exit(1)
    print("Downloading torch-2.13.0-cp311-cp311-linux_x86_64.whl (190.5 MB)")
    print("Installing collected packages: a, b, c")
elif arguments[:2] == ["-m", "pytest"]:
    sys.exit(5)
elif arguments[:1] != ["-m"]:
    sys.exit(subprocess.call([{python!r}, *arguments]))
"""


@pytest.fixture
def script() -> ModuleType:
    """run.py as a module."""
    spec = importlib.util.spec_from_file_location("run_script", ROOT / "run.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A project folder with run.py and a pyproject.toml, whose path has a space."""
    folder = tmp_path / "a tree"
    folder.mkdir()
    shutil.copy(ROOT / "run.py", folder)
    (folder / "pyproject.toml").write_text("[project]\nname = 'shardmix'\n")
    return folder


def add_fake_environment(tree: Path) -> Path:
    """A .venv whose interpreter records what it is asked."""
    programs = tree / ".venv" / "bin"
    programs.mkdir(parents=True)
    python = programs / "python"
    python.write_text(FAKE_PYTHON.format(python=sys.executable))
    python.chmod(0o755)
    shardmix = programs / "shardmix"
    shardmix.write_text('#!/bin/sh\necho "shardmix $*"\nexit 7\n')
    shardmix.chmod(0o755)
    return tree / ".venv"


def run(tree: Path, *arguments: str, **changes: str) -> subprocess.CompletedProcess[str]:
    """Run the tree's run.py without a display and without apt-get."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in ("DISPLAY", "WAYLAND_DISPLAY", "QT_QPA_PLATFORM")
    }
    # Without apt-get on the path, nothing of this system is changed.
    environment.update({"PATH": "/nonexistent", **changes})
    return subprocess.run(
        [sys.executable, str(tree / "run.py"), *arguments],
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


def pip_installs(environment: Path) -> int:
    """How often pip was asked to install."""
    calls = environment / "calls"
    return sum("pip" in call and "install" in call for call in calls.read_text().splitlines())


def test_an_old_python_can_read_the_script() -> None:
    ast.parse((ROOT / "run.py").read_text(encoding="utf-8"), feature_version=(3, 8))


def test_only_the_standard_library_is_imported() -> None:
    tree = ast.parse((ROOT / "run.py").read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        for name in names:
            assert name.partition(".")[0] in sys.stdlib_module_names


def test_an_old_python_is_told_which_to_use(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script.shutil, "which", lambda name: "x" if name == "python3.12" else None)
    with pytest.raises(script.SetupError, match=r"3\.11 or newer, this is 3\.8\.18\. Run: python3"):
        script.check_python((3, 8, 18))
    monkeypatch.setattr(script.shutil, "which", lambda name: None)
    with pytest.raises(script.SetupError, match=r"Install Python 3\.11 or newer"):
        script.check_python((3, 10, 0))
    script.check_python((3, 11, 0))


@pytest.mark.parametrize(
    ("arguments", "has_display", "program", "expected"),
    [
        ([], True, "shardmix", []),
        (["--demo-workers", "2"], True, "shardmix", ["--demo-workers", "2"]),
        ([], False, "shardmix", ["chat"]),
        (["--demo-workers", "2"], False, "shardmix", ["chat", "--workers", "2"]),
        (["--demo-workers=2", "--model", "m"], False, "shardmix", ["chat", "--workers=2", "--model", "m"]),
        (["generate", "Hi"], False, "shardmix", ["generate", "Hi"]),
        (["bench"], False, "python", ["benchmarks"]),
        (["test", "-k", "plan"], False, "python", ["-m", "pytest", "-k", "plan"]),
    ],
)  # fmt: skip
def test_what_is_started(
    script: ModuleType,
    arguments: list[str],
    has_display: bool,
    program: str,
    expected: list[str],
) -> None:
    assert script.child_command(arguments, has_display) == (program, expected)


@needs_posix
def test_the_exit_code_and_output_of_the_child_are_passed_on(tree: Path) -> None:
    add_fake_environment(tree)
    done = run(tree, "generate", "Hi there")
    assert done.returncode == 7
    assert done.stdout == "shardmix generate Hi there\n", "progress goes to stderr"
    assert "downloading torch 2.13.0 (190.5 MB)" in done.stderr
    assert "installing 3 packages" in done.stderr
    assert run(tree, "test").returncode == 5


@needs_posix
def test_it_installs_again_only_when_the_project_file_changed(tree: Path) -> None:
    environment = add_fake_environment(tree)
    assert run(tree, "setup").returncode == 0
    assert run(tree, "setup").returncode == 0
    (tree / "engine").mkdir()
    (tree / "engine" / "new.py").touch()
    assert run(tree, "setup").returncode == 0
    assert pip_installs(environment) == 1
    (tree / "pyproject.toml").write_text("[project]\nname = 'shardmix'\nversion = '2'\n")
    assert run(tree, "setup").returncode == 0
    assert pip_installs(environment) == 2


@needs_posix
def test_without_a_display_it_says_so_and_starts_the_chat(tree: Path) -> None:
    add_fake_environment(tree)
    done = run(tree)
    assert done.stdout == "shardmix chat\n"
    assert "no display found" in done.stderr
    done = run(tree, DISPLAY=":0")
    assert done.stdout == "shardmix \n"


@needs_posix
@pytest.mark.parametrize(
    ("log", "expected"),
    [
        ("OSError: [Errno 28] No space left on device", "the disk is full"),
        ("Temporary failure in name resolution\nNo matching distribution", "cannot be reached"),
        ("ERROR: No matching distribution found for torch", "not offered for this Python"),
        ("something else", "pip ended with code 1. Details"),
        ("2026 ERROR: a\n2026 ERROR: It broke.\nmore", "pip ended with code 1 (It broke). Details"),
    ],
)
def test_a_failed_installation_is_told_in_one_line_and_tried_again(
    tree: Path, log: str, expected: str
) -> None:
    environment = add_fake_environment(tree)
    done = run(tree, "setup", FAKE_PIP_FAILURE=log)
    assert done.returncode == 1
    errors = [line for line in done.stderr.splitlines() if "error:" in line]
    assert len(errors) == 1
    assert expected in errors[0]
    assert "Traceback" not in done.stderr
    assert run(tree, "setup").returncode == 0
    assert pip_installs(environment) == 2


@needs_posix
def test_a_half_installed_package_is_installed_again(tree: Path, script: ModuleType) -> None:
    """Bug this avoids: pip takes a package for complete once it sees its metadata."""
    packages = tree / ".venv" / "lib" / "python3.11" / "site-packages"
    complete, incomplete = packages / "a-1.dist-info", packages / "b-1.dist-info"
    for folder in (complete, incomplete):
        folder.mkdir(parents=True)
        (folder / "METADATA").touch()
    (complete / "INSTALLER").write_text("pip\n")
    script.remove_half_installed(tree / ".venv")
    assert complete.exists()
    assert not incomplete.exists()


def test_a_missing_project_file_is_named(tree: Path) -> None:
    (tree / "pyproject.toml").unlink()
    done = run(tree, "setup")
    assert done.returncode == 1
    assert "pyproject.toml cannot be read" in done.stderr
    assert "Traceback" not in done.stderr


def test_help_sets_up_nothing(tree: Path) -> None:
    done = run(tree, "--help")
    assert done.returncode == 0
    assert "python3 run.py test" in done.stdout
    assert not (tree / ".venv").exists()


@needs_posix
@pytest.mark.slow
def test_a_real_environment_is_made_repaired_and_moved(tree: Path) -> None:
    """With venv and pip themselves; the project installed has no dependencies."""
    (tree / "pyproject.toml").write_text(
        textwrap.dedent("""\
            [build-system]
            requires = []
            build-backend = "backend"
            backend-path = ["."]
            """)
    )
    shutil.copy(Path(__file__).parent / "run_script_backend.py", tree / "backend.py")
    first = run(tree, "setup")
    assert first.returncode == 0, first.stderr
    assert "making .venv" in first.stderr
    assert "ready" in first.stderr
    python = tree / ".venv" / "bin" / "python"
    stamp = tree / ".venv" / "shardmix-setup.json"
    assert json.loads(stamp.read_text())["root"] == str(tree)

    python.unlink()
    python.symlink_to("/nonexistent/python3.11")
    repaired = run(tree, "setup")
    assert repaired.returncode == 0, repaired.stderr
    assert "damaged or its Python is gone" in repaired.stderr

    moved = tree.parent / "moved"
    tree.rename(moved)
    again = run(moved, "setup")
    assert again.returncode == 0, again.stderr
    assert "was moved" in again.stderr
    assert "making" not in run(moved, "setup").stderr


@needs_posix
def test_an_environment_without_pip_is_made_anew(tree: Path, script: ModuleType) -> None:
    """As an interrupted `venv` leaves it."""
    venv.create(tree / ".venv", with_pip=False)
    assert script.python_runs(tree / ".venv")
    assert not script.is_usable(tree / ".venv", {"root": str(tree)})


@needs_posix
def test_ctrl_c_during_set_up_ends_with_130_and_no_traceback(tree: Path) -> None:
    environment = add_fake_environment(tree)
    python = environment / "bin" / "python"
    slow = "if 'install' in arguments:\n    import time\n    print('Downloading x-1-a.whl (1 kB)', flush=True)\n    time.sleep(60)\n"
    source = python.read_text().replace(
        'if arguments[:2] == ["-m", "pip"] and', f"{slow}if False and"
    )
    python.write_text(source)
    process = subprocess.Popen(
        [sys.executable, str(tree / "run.py"), "setup"],
        env=dict(os.environ, PATH="/nonexistent"),
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    lines: list[str] = []
    for line in process.stderr:
        lines.append(line)
        if "downloading x 1" in line:
            break
    process.send_signal(signal.SIGINT)
    _, rest = process.communicate(timeout=20)
    assert process.returncode == 130, lines
    assert "interrupted" in rest
    assert "Traceback" not in rest


@pytest.mark.skipif(sys.platform != "linux", reason="Debian packages")
def test_what_the_system_lacks_is_told_as_one_command(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lacking = {"libEGL.so.1", "libglib-2.0.so.0", "libgthread-2.0.so.0"}
    monkeypatch.setattr(script, "is_library_there", lambda library: library not in lacking)
    monkeypatch.setattr(script, "has_font", lambda: False)
    monkeypatch.setattr(script, "can_use_apt", lambda: False)
    monkeypatch.setattr(script.shutil, "which", lambda name: f"/usr/bin/{name}")
    script.install_system_packages(script.missing_packages(for_tests=True))
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "run: sudo apt-get install libegl1 libglib2.0-0 fonts-dejavu-core\n" in message


def test_no_library_is_found_under_a_wrong_name(script: ModuleType) -> None:
    assert not script.is_library_there("libno-such-thing.so.1")
