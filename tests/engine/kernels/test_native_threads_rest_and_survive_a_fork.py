"""The native kernels' own threads sleep when there is nothing to do, and know of a fork."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import torch

from engine.kernels.native_library import NativeLibrary
from engine.kernels.native_matrices import repack
from tests.engine.kernels.native_arithmetic import random_matrix

DEADLINE_SECONDS = 20.0
TASKS = Path("/proc/self/task")

pytestmark = pytest.mark.skipif(not TASKS.exists(), reason="reads threads from Linux's /proc")


def _threads() -> set[str]:
    return {task.name for task in TASKS.iterdir()}


def _is_asleep(thread: str) -> bool:
    """Whether it waits in the system, and not on a processor."""
    state = (TASKS / thread / "stat").read_text().rpartition(")")[2].split()[0]
    return state == "S"


def _wait_until_asleep(threads: set[str]) -> bool:
    deadline = time.monotonic() + DEADLINE_SECONDS
    while time.monotonic() < deadline:
        if all(_is_asleep(thread) for thread in threads):
            return True
        time.sleep(0.001)
    return False


def _num_since(before: set[str], expected: int) -> int:
    """Threads that are new; one that was joined may be listed for a moment more."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    while len(_threads() - before) > expected and time.monotonic() < deadline:
        time.sleep(0.001)
    return len(_threads() - before)


def test_helpers_come_and_go_with_the_number_asked_for(library: NativeLibrary) -> None:
    library.set_num_threads(1)
    before = _threads()
    assert library.set_num_threads(4) == 4
    assert _num_since(before, 3) == 3
    assert library.set_num_threads(2) == 2
    assert _num_since(before, 1) == 1
    assert library.set_num_threads(1) == 1
    assert _num_since(before, 0) == 0


def test_helpers_sleep_between_steps_and_compute_again(library: NativeLibrary) -> None:
    library.set_num_threads(1)
    before = _threads()
    native = repack(random_matrix("int8", 200, 96, 96, 0), library)
    x = torch.randn(3, 96, generator=torch.Generator().manual_seed(1))
    expected = native.multiply(x, "generated")
    library.set_num_threads(3)
    for _ in range(3):
        helpers = _threads() - before
        assert len(helpers) == 2
        assert _wait_until_asleep(helpers), "a helper still runs with nothing to do"
        assert torch.equal(native.multiply(x, "generated"), expected)


# Python 3.12 and later warn of forks with threads: that one works nevertheless is the promise.
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_forked_child_computes_and_its_parent_goes_on(library: NativeLibrary) -> None:
    """The child has the memory of a team, and none of its threads."""
    native = repack(random_matrix("int8", 200, 96, 96, 0), library)
    x = torch.randn(3, 96, generator=torch.Generator().manual_seed(1))
    library.set_num_threads(3)
    expected = native.multiply(x, "generated")
    pid = os.fork()
    if pid == 0:
        is_equal = torch.equal(native.multiply(x, "generated"), expected)
        is_equal &= library.set_num_threads(2) == 2
        is_equal &= torch.equal(native.multiply(x, "generated"), expected)
        os._exit(0 if is_equal else 1)
    deadline = time.monotonic() + DEADLINE_SECONDS
    while (done := os.waitpid(pid, os.WNOHANG))[0] == 0:
        if time.monotonic() > deadline:
            os.kill(pid, 9)
            os.waitpid(pid, 0)
            pytest.fail("the child hangs")
        time.sleep(0.005)
    assert done[1] == 0
    assert torch.equal(native.multiply(x, "generated"), expected)


def test_reading_memory_has_a_speed(library: NativeLibrary) -> None:
    library.set_num_threads(2)
    assert library.measure_read_bandwidth(8 << 20, 2) > 0
    assert library.measure_read_bandwidth(0, 2) == 0
