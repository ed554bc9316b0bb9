"""The tests of the native kernels find no wrong access and no undefined arithmetic in them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from engine.kernels.build_native import build
from tests.engine.kernels.conftest import LIBRARY_VARIABLE

ROOT = Path(__file__).resolve().parents[3]
TESTS = (
    "test_native_products_equal_their_arithmetic.py",
    "test_native_half_layers_equal_torch.py",
)


def _run_sanitized(arguments: list[str], library: Path, runtime: str) -> tuple[int, str]:
    """Exit code and output of a Python whose memory is watched."""
    environment = os.environ | {
        LIBRARY_VARIABLE: str(library),
        "LD_PRELOAD": runtime,
        # Python keeps what it allocated once, and torch has its own ways with exceptions.
        "ASAN_OPTIONS": "detect_leaks=0:halt_on_error=1",
        "UBSAN_OPTIONS": "halt_on_error=1",
    }
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        timeout=280,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(sys.platform != "linux", reason="the runtime is preloaded as on Linux")
def test_the_kernel_tests_run_clean(compiler: list[str], tmp_path: Path) -> None:
    named = subprocess.run(
        [*compiler, "-print-file-name=libasan.so"],
        capture_output=True,
        encoding="utf-8",
        timeout=60,
        check=False,
    )
    runtime = named.stdout.strip()
    if not os.path.isabs(runtime):
        pytest.skip(f"{compiler[0]} has no shared address sanitizer")
    library = tmp_path / "sanitized.so"
    build(library, is_sanitized=True)
    tests = [f"tests/engine/kernels/{name}" for name in TESTS]
    code, output = _run_sanitized(["-m", "pytest", "-q", "-x", *tests], library, runtime)
    assert code == 0, output[-4000:]
    # The watch itself: a product that writes past its output is noticed.
    script = "from tests.engine.kernels.past_the_end import write_past_the_end as w; w()"
    code, output = _run_sanitized(["-c", script], library, runtime)
    assert code != 0
    assert "AddressSanitizer: heap-buffer-overflow" in output
