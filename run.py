#!/usr/bin/env python3
"""Set up Shardmix in .venv and start it. Standard library only.

Nothing but this file is needed to begin: it makes `.venv` with `venv`, installs the project with
`pip` (so a mirror, a proxy or a local build that pip is configured for is used), checks the shared
libraries that the window needs on Linux, and then becomes what was asked for. It installs again only
when `pyproject.toml` or what is compiled at installation has changed. The syntax is that of Python 3.8, so that an old Python can say
what it lacks.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

USAGE = """\
usage: python3 run.py [OPTIONS]         set up, then open the window (options go to it)
       python3 run.py test [OPTIONS]    set up, then run all tests (options go to pytest)
       python3 run.py bench [OPTIONS]   set up, then run the benchmarks
       python3 run.py setup             set up only
       python3 run.py COMMAND ...       set up, then run `shardmix COMMAND ...`
"""

MINIMUM_PYTHON = (3, 11)
ROOT = Path(__file__).resolve().parent
STAMP_NAME = "shardmix-setup.json"
LOG_NAME = "shardmix-setup.log"
APT_SECONDS = 900
FULL_DISK_BYTES = 64 << 20

# Shared library -> Debian package, as the Qt wheels link them.
QT_LIBRARIES = {
    "libEGL.so.1": "libegl1",
    "libGL.so.1": "libgl1",
    "libfontconfig.so.1": "libfontconfig1",
    "libfreetype.so.6": "libfreetype6",
    "libX11.so.6": "libx11-6",
    "libxkbcommon.so.0": "libxkbcommon0",
    "libdbus-1.so.3": "libdbus-1-3",
    "libglib-2.0.so.0": "libglib2.0-0",
    "libgthread-2.0.so.0": "libglib2.0-0",
    "libz.so.1": "zlib1g",
    "libzstd.so.1": "libzstd1",
    "libxcb-cursor.so.0": "libxcb-cursor0",
    "libxcb-icccm.so.4": "libxcb-icccm4",
    "libxcb-util.so.1": "libxcb-util1",
    "libxcb-image.so.0": "libxcb-image0",
    "libxcb-keysyms.so.1": "libxcb-keysyms1",
    "libxcb-randr.so.0": "libxcb-randr0",
    "libxcb-render.so.0": "libxcb-render0",
    "libxcb-render-util.so.0": "libxcb-render-util0",
    "libxcb-shape.so.0": "libxcb-shape0",
    "libxcb-shm.so.0": "libxcb-shm0",
    "libxcb-sync.so.1": "libxcb-sync1",
    "libxcb-xfixes.so.0": "libxcb-xfixes0",
    "libxcb-xkb.so.1": "libxcb-xkb1",
    "libX11-xcb.so.1": "libx11-xcb1",
    "libxkbcommon-x11.so.0": "libxkbcommon-x11-0",
    "libwayland-client.so.0": "libwayland-client0",
    "libwayland-cursor.so.0": "libwayland-cursor0",
}
FONT_PACKAGE = "fonts-dejavu-core"
FONT_FOLDERS = ("/usr/share/fonts", "/usr/local/share/fonts", "~/.local/share/fonts", "~/.fonts")

# What pip's log says -> what to tell a person; the first match counts.
PIP_FAILURES = (
    ("No space left on device", "the disk is full. Free about 3 GB and run this again"),
    ("Disk quota exceeded", "the disk quota is used up. Free about 3 GB and run this again"),
    ("Permission denied", "a file in {venv} cannot be written. Check who owns it"),
    ("CERTIFICATE_VERIFY_FAILED", "a TLS certificate is not trusted. Check pip's `cert` setting"),
    ("ProxyError", "the proxy did not answer. Check the proxy settings and run this again"),
    ("name resolution", "the package index cannot be reached. Connect and run this again"),
    ("getaddrinfo failed", "the package index cannot be reached. Connect and run this again"),
    ("nodename nor servname", "the package index cannot be reached. Connect and run this again"),
    ("Network is unreachable", "the package index cannot be reached. Connect and run this again"),
    ("Connection refused", "the package index cannot be reached. Connect and run this again"),
    ("ConnectTimeout", "the package index did not answer in time. Run this again"),
    ("Read timed out", "the package index did not answer in time. Run this again"),
    (
        "(from versions: none)",
        "the index cannot be reached or lacks a package. Check the connection",
    ),
    ("No matching distribution found", "a package is not offered for this Python and system"),
    ("ResolutionImpossible", "the packages that were found do not fit together"),
)


class SetupError(Exception):
    """Set-up cannot go on; the text is one line for a person."""


def main(arguments: list[str]) -> int:
    """Set up and start; on Linux and macOS this returns only where nothing was started.

    Returns: the exit code: 0, 1 for an error told in one line, 130 when interrupted.
    """
    if arguments and arguments[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0
    try:
        check_python(sys.version_info[:3])
        command = arguments[0] if arguments else ""
        set_up(for_tests=command == "test")
        if command == "setup":
            say("ready")
            return 0
        return start(*child_command(arguments, has_display()))
    except SetupError as error:
        say(f"error: {error}.")
        return 1
    except OSError as error:
        say(f"error: {error.filename or 'this computer'}: {error.strerror}.")
        return 1
    except KeyboardInterrupt:
        say("interrupted")
        return 130


def say(text: str) -> None:
    """One line to stderr: stdout belongs to the command that is started."""
    print(f"shardmix: {text}", file=sys.stderr, flush=True)


def check_python(version: tuple[int, ...]) -> None:
    """Raise unless this Python is new enough, naming one on this computer that is."""
    if version >= MINIMUM_PYTHON:
        return
    needed = ".".join(map(str, MINIMUM_PYTHON))
    advice = f"Install Python {needed} or newer"
    for minor in range(19, MINIMUM_PYTHON[1] - 1, -1):
        if shutil.which(f"python3.{minor}"):
            advice = f"Run: python3.{minor} run.py"
            break
    found = ".".join(map(str, version))
    raise SetupError(f"Shardmix needs Python {needed} or newer, this is {found}. {advice}")


def set_up(for_tests: bool) -> None:
    """Bring .venv and the system's libraries to what the project needs."""
    if sys.platform == "linux":
        install_system_packages(missing_packages(for_tests))
    venv = ROOT / ".venv"
    wanted = wanted_stamp()
    if read_stamp(venv) == wanted and python_runs(venv):
        return
    if not is_usable(venv, wanted):
        make_venv(venv)
    remove_half_installed(venv)
    install_project(venv)
    (venv / STAMP_NAME).write_text(json.dumps(wanted), encoding="utf-8")


# --- The virtual environment ----------------------------------------------------------------------


def wanted_stamp() -> dict[str, str]:
    """What a finished set-up of this tree would record."""
    digest = hashlib.sha256()
    sources = [ROOT / "pyproject.toml"]
    if (ROOT / "setup.py").exists():  # compiled at installation, so they count
        sources += [ROOT / "setup.py", *sorted((ROOT / "engine").rglob("build_native.py"))]
        for pattern in ("*.cpp", "*.h"):
            sources += sorted((ROOT / "engine").rglob(pattern))
    try:
        for source in sources:
            digest.update(source.read_bytes())
    except OSError as error:
        raise SetupError(f"{error.filename} cannot be read: {error.strerror}") from None
    return {"root": str(ROOT), "sources": digest.hexdigest()}


def read_stamp(venv: Path) -> object:
    """What the last finished set-up recorded; None where there is none."""
    try:
        return json.loads((venv / STAMP_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def venv_program(venv: Path, name: str) -> Path:
    """Path of a program in the environment."""
    if os.name == "nt":
        return venv / "Scripts" / f"{name}.exe"
    return venv / "bin" / name


def python_runs(venv: Path) -> bool:
    """Whether the environment's interpreter still exists and is new enough."""
    check = f"import sys; sys.exit(sys.version_info < {MINIMUM_PYTHON})"
    return succeeds([str(venv_program(venv, "python")), "-I", "-S", "-c", check])


def is_usable(venv: Path, wanted: dict[str, str]) -> bool:
    """Whether pip can install into the environment; says why where it cannot."""
    if not venv.exists():
        return False
    stamp = read_stamp(venv)
    if isinstance(stamp, dict) and stamp.get("root") != wanted["root"]:
        say("this folder was moved: making .venv anew")
        return False
    pip_answers = [str(venv_program(venv, "python")), "-m", "pip", "--version"]
    if not python_runs(venv) or not succeeds(pip_answers):
        say(".venv is damaged or its Python is gone: making it anew")
        return False
    return True


def succeeds(command: list[str]) -> bool:
    """Whether a short command runs and exits with 0."""
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=setup_environment(),
            timeout=120,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0


def setup_environment() -> dict[str, str]:
    """This process's environment without what would lead pip out of .venv."""
    environment = dict(os.environ)
    for name in ("PYTHONPATH", "PYTHONHOME", "PIP_TARGET", "PIP_PREFIX", "PIP_ROOT"):
        environment.pop(name, None)
    environment["PIP_USER"] = "0"
    environment["PIP_DISABLE_PIP_VERSION_CHECK"] = "1"
    return environment


def make_venv(venv: Path) -> None:
    """Make .venv, replacing what is there."""
    if find_spec("venv") is None or find_spec("ensurepip") is None:
        install_venv_module()
    version = ".".join(map(str, sys.version_info[:3]))
    say(f"making .venv with Python {version}")
    # The environment may be the one that runs this, so its base interpreter makes the new one.
    python = getattr(sys, "_base_executable", None) or sys.executable
    done = subprocess.run(
        [python, "-m", "venv", "--clear", str(venv)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=setup_environment(),
        check=False,
    )
    if done.returncode:
        lines = done.stdout.decode(errors="replace").strip().splitlines() or ["no reason given"]
        text = "\n".join(lines)
        reason = known_failure(text, venv) or lines[-1].rstrip(".")
        raise SetupError(f"{venv} cannot be made: {reason}")


def install_venv_module() -> None:
    """Install Debian's package with ensurepip where that is allowed, else raise."""
    package = "python{}.{}-venv".format(*sys.version_info[:2])
    if can_use_apt():
        install_system_packages([package])
        if succeeds([sys.executable, "-c", "import ensurepip, venv"]):
            return
    raise SetupError(
        "this Python has no venv module. On Debian and Ubuntu run: "
        f"sudo apt-get install {package}; elsewhere install Python from python.org"
    )


def remove_half_installed(venv: Path) -> None:
    """Let pip install again what an interrupted installation left incomplete.

    pip writes INSTALLER after a package's own files, and takes a package with metadata for complete.
    """
    for folder in ("lib/python3*/site-packages", "Lib/site-packages"):
        for metadata in venv.glob(f"{folder}/*.dist-info"):
            if not (metadata / "INSTALLER").exists():
                shutil.rmtree(metadata, ignore_errors=True)


def install_project(venv: Path) -> None:
    """Run pip; editable, so that a change of the sources needs no new installation."""
    say("installing the packages (the first time this takes some minutes)")
    log = venv / LOG_NAME
    try:
        log.unlink()
    except FileNotFoundError:
        pass
    except OSError as error:
        raise SetupError(f"{log} cannot be written: {error.strerror}") from None
    command = [str(venv_program(venv, "python")), "-m", "pip", "--log", str(log), "install"]
    code = run_pip([*command, "--editable", ".[app,test]"])
    if code:
        try:
            text = log.read_text(encoding="utf-8", errors="replace")
        except OSError:
            text = ""
        reason = (
            known_failure(text, venv) or f"pip ended with code {code} {last_error(text)}".strip()
        )
        raise SetupError(f"the packages could not be installed: {reason}. Details: {log}")


def run_pip(command: list[str]) -> int:
    """Run pip with its own progress bar on a terminal, else with one line per package."""
    environment = setup_environment()
    if sys.stderr.isatty():
        # pip draws on stdout; ours belongs to the command that is started afterwards.
        return subprocess.call(command, cwd=ROOT, env=environment, stdout=sys.stderr.fileno())
    environment["PIP_PROGRESS_BAR"] = "off"
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
    )
    assert process.stdout is not None
    try:
        for line in process.stdout:
            news = pip_news(line.strip())
            if news:
                say(news)
        code = process.wait()
    except BaseException:
        process.terminate()
        process.wait()
        raise
    return code


def pip_news(line: str) -> str | None:
    """A line of pip's output in short, where it tells of progress."""
    first, _, rest = line.partition(" ")
    if first == "Downloading" and ".whl " in rest:
        file, _, size = rest.partition(" ")
        name, version = file.rpartition("/")[2].split("-")[:2]
        return f"downloading {name} {version} {size}"
    if line.startswith("Installing collected packages:"):
        return f"installing {line.count(',') + 1} packages"
    return None


def known_failure(text: str, venv: Path) -> str | None:
    """What to tell a person about a failure that a log describes."""
    # A full disk may have had no room for the log either.
    if shutil.disk_usage(venv.parent).free < FULL_DISK_BYTES:
        return PIP_FAILURES[0][1]
    for sign, advice in PIP_FAILURES:
        if sign in text:
            return advice.format(venv=venv)
    return None


def last_error(text: str) -> str:
    """The last error in pip's log, in brackets; empty where there is none."""
    errors = [line.partition("ERROR: ")[2] for line in text.splitlines() if "ERROR: " in line]
    return f"({errors[-1].strip().rstrip('.')})" if errors else ""


# --- The system's libraries -----------------------------------------------------------------------


def missing_packages(for_tests: bool) -> list[str]:
    """Debian packages of what Qt needs and this system lacks, without repetition."""
    packages = [
        package for library, package in QT_LIBRARIES.items() if not is_library_there(library)
    ]
    if not has_font():
        packages.append(FONT_PACKAGE)
    if for_tests and can_use_apt() and shutil.which("Xvfb") is None:
        packages.append("xvfb")
    return list(dict.fromkeys(packages))


def is_library_there(library: str) -> bool:
    """Whether the loader finds a shared library."""
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


def has_font() -> bool:
    """Whether there is one font file; without any, Qt draws boxes."""
    for folder in FONT_FOLDERS:
        for _, _, files in os.walk(os.path.expanduser(folder)):
            if any(file.lower().endswith((".ttf", ".otf", ".ttc", ".pfb")) for file in files):
                return True
    return False


def can_use_apt() -> bool:
    """Whether packages may be installed without asking anybody."""
    return sys.platform == "linux" and os.geteuid() == 0 and shutil.which("apt-get") is not None


def install_system_packages(packages: list[str]) -> None:
    """Install Debian packages, or print the command that does; never fatal."""
    if not packages:
        return
    names = " ".join(packages)
    if not can_use_apt():
        if shutil.which("apt-get"):
            say(f"the window needs more of the system, run: sudo apt-get install {names}")
        else:
            say(f"the window needs more of the system; Debian calls these packages: {names}")
        return
    say(f"installing system packages: {names}")
    environment = dict(os.environ, DEBIAN_FRONTEND="noninteractive")
    apt = ["apt-get", "-qq", "-o", "DPkg::Lock::Timeout=120"]
    install = [*apt, "install", "--yes", "--no-install-recommends", *packages]
    # The package lists may be missing (containers) or old, so a failure is tried again with new ones.
    for command in (install, [*apt, "update"], install):
        try:
            done = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env=environment,
                timeout=APT_SECONDS,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired):
            break
        if command is install and done.returncode == 0:
            return
    say(f"the system packages could not be installed; later run: apt-get install {names}")


# --- Starting -------------------------------------------------------------------------------------


def has_display() -> bool:
    """Whether a window can be shown."""
    if sys.platform != "linux":
        return True
    names = ("DISPLAY", "WAYLAND_DISPLAY", "QT_QPA_PLATFORM")
    return any(os.environ.get(name) for name in names)


def child_command(arguments: list[str], display: bool) -> tuple[str, list[str]]:
    """Program of the environment, and its arguments, for what was asked.

    Args:
        arguments: of this script.
        display: whether a window can be shown; without it the chat runs in the terminal.
    """
    if arguments and arguments[0] == "test":
        return "python", ["-m", "pytest", *arguments[1:]]
    if arguments and arguments[0] == "bench":
        return "python", ["benchmarks", *arguments[1:]]
    opens_window = not arguments or arguments[0].startswith("-")
    if not opens_window or display:
        return "shardmix", arguments
    say("no display found (DISPLAY and WAYLAND_DISPLAY are empty): chat starts in the terminal")
    # The window calls them demo workers, the commands workers.
    renamed = [
        "--workers" + argument[len("--demo-workers") :]
        if argument.partition("=")[0] == "--demo-workers"
        else argument
        for argument in arguments
    ]
    return "shardmix", ["chat", *renamed]


def start(program: str, arguments: list[str]) -> int:
    """Become the child, so that its signals and its exit code are this process's own.

    Returns: the exit code, on Windows, where a process cannot become another.
    """
    path = str(venv_program(ROOT / ".venv", program))
    command = [path, *arguments]
    if program == "python":  # tests and benchmarks run in the tree, wherever this was called from
        os.chdir(ROOT)
    sys.stdout.flush()
    sys.stderr.flush()
    try:
        if os.name != "nt":
            os.execv(path, command)
        process = subprocess.Popen(command)
    except OSError as error:
        raise SetupError(f"{path} cannot be started: {error.strerror}. Run run.py setup") from None
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:  # the console sent it to the child as well
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()
            return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
