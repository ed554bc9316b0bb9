"""The native kernels for tests: built where they are not, skipped where they cannot be."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from engine.errors import ConfigError
from engine.kernels.build_native import BuildError, build, find_compiler, source_hash
from engine.kernels.native_library import PATH, NativeLibrary

# Set by test_native_kernels_pass_sanitizers.py for the tests that it runs.
LIBRARY_VARIABLE = "SHARDMIX_TEST_LIBRARY"


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Products this small only make a second thread of torch's wait, on a busy machine for long."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def compiler() -> list[str]:
    """The C++ compiler's command."""
    try:
        return find_compiler()
    except BuildError as error:
        pytest.skip(f"native kernels cannot be built here: {error}")


@pytest.fixture(scope="session")
def built_library() -> NativeLibrary:
    """The library of the sources here; the one under test, where an outer test names it."""
    if under_test := os.environ.get(LIBRARY_VARIABLE):
        return NativeLibrary(Path(under_test), source_hash())
    try:
        return NativeLibrary(PATH, source_hash())
    except (OSError, ConfigError):
        pass
    try:
        build(PATH)
    except BuildError as error:
        pytest.skip(f"native kernels cannot be built here: {error}")
    return NativeLibrary(PATH, source_hash())


@pytest.fixture
def library(built_library: NativeLibrary) -> Iterator[NativeLibrary]:
    """The same, as it was before when the test ends."""
    selected = built_library.selected_name
    yield built_library
    built_library.use(selected)
    built_library.set_num_threads(1)
