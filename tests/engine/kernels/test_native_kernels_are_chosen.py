"""SHARDMIX_KERNELS chooses what computes; what is not there is told in one line, or done without."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from engine.errors import ConfigError
from engine.kernels import build_native
from engine.kernels.build_native import BuildError, build
from engine.kernels.native_library import (
    KERNELS_VARIABLE,
    PATH,
    NativeLibrary,
    open_library,
)

ROOT = Path(__file__).resolve().parents[3]


def test_the_best_instruction_set_of_the_machine_is_the_default(library: NativeLibrary) -> None:
    opened = open_library({})
    assert opened is not None
    best = next(name for name, runs in library.instruction_sets.items() if runs)
    assert opened.selected_name == best
    assert library.instruction_sets["portable"]


def test_every_instruction_set_of_the_machine_can_be_asked_for(library: NativeLibrary) -> None:
    for name, runs in library.instruction_sets.items():
        if runs:
            opened = open_library({KERNELS_VARIABLE: name})
            assert opened is not None
            assert opened.selected_name == name


def test_torch_can_be_asked_for() -> None:
    assert open_library({KERNELS_VARIABLE: "torch"}) is None


def test_what_is_unknown_or_not_there_is_an_error_in_one_line(library: NativeLibrary) -> None:
    missing = [name for name, runs in library.instruction_sets.items() if not runs]
    assert missing, "x86 and ARM exclude each other"
    for name, reason in [("sse9", "there is no such set"), (missing[0], "this machine does not")]:
        with pytest.raises(
            ConfigError, match=rf"{name} asks for kernels, but {reason}.*"
        ) as caught:
            open_library({KERNELS_VARIABLE: name})
        assert "\n" not in str(caught.value)
        assert "portable" in str(caught.value)


def test_without_a_library_torch_computes_unless_another_was_asked_for(tmp_path: Path) -> None:
    path = tmp_path / PATH.name
    assert open_library({}, path) is None
    with pytest.raises(ConfigError, match="they were not built"):
        open_library({KERNELS_VARIABLE: "portable"}, path)


def test_a_library_of_other_sources_is_not_called(library: NativeLibrary, tmp_path: Path) -> None:
    """Its structs may be laid out otherwise: calling it could do anything."""
    assert library.selected_name
    with pytest.raises(ConfigError, match=r"was built from sources \w+, those here are abc"):
        NativeLibrary(PATH, "abc")


def test_the_hash_follows_every_source(tmp_path: Path) -> None:
    folder = tmp_path / "native"
    shutil.copytree(build_native.SOURCES, folder)
    before = build_native.source_hash(folder)
    assert before == build_native.source_hash()
    for pattern in ("*.cpp", "*.h"):
        source = next(iter(sorted(folder.glob(pattern))))
        source.write_text(source.read_text() + "\n")
        assert build_native.source_hash(folder) != before
        before = build_native.source_hash(folder)


def test_a_failing_compiler_leaves_no_library(tmp_path: Path) -> None:
    with pytest.raises(BuildError):
        build(tmp_path / "library.so", compiler=[sys.executable, "-c", "raise SystemExit(3)"])
    with pytest.raises(BuildError, match="did not run"):
        build(tmp_path / "library.so", compiler=[str(tmp_path / "nothing")])
    assert not list(tmp_path.iterdir())


def test_the_package_installs_without_a_compiler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    output = str(tmp_path)
    done = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--build-lib", output, "--build-temp", output],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "native kernels are not built, torch computes everything" in done.stdout + done.stderr
    assert not list(tmp_path.rglob("*.so"))
