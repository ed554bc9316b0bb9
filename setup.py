"""Builds the native kernels while the package is installed, where there is a C++ compiler.

Everything else about the package is in pyproject.toml. Without a compiler, or when it fails, the
installation succeeds and says so: the torch kernels compute everything.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
BUILD_SCRIPT = "engine/kernels/build_native.py"


def load_build_script() -> Any:
    """`engine.kernels.build_native` by its path: the package cannot be imported yet."""
    spec = importlib.util.spec_from_file_location("build_native", ROOT / BUILD_SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


build_native = load_build_script()


class BuildNative(build_ext):
    """A plain shared library instead of a Python extension, and no error without it."""

    def get_ext_filename(self, fullname: str) -> str:
        """Where the library lies in the package; it belongs to no version of Python."""
        return str(Path(*fullname.split(".")[:-1]) / build_native.LIBRARY_NAME)

    def build_extension(self, ext: Extension) -> None:
        """Compile; a failure is a warning."""
        try:
            build_native.build(Path(self.get_ext_fullpath(ext.name)))
        except build_native.BuildError as error:
            self.warn(f"native kernels are not built, torch computes everything: {error}")


setup(
    ext_modules=[Extension("engine.kernels.native.shardmix_native", sources=[], optional=True)],
    cmdclass={"build_ext": BuildNative},
)
