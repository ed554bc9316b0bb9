"""The speed test finds figures in a process of its own, keeps them, and never harms the worker."""

from __future__ import annotations

import logging
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import psutil
import pytest

from engine.cluster.messages import DeviceInfo
from tests.processes import has_ended, processes_below
from workers.speed_file import Figures, Speed, SpeedFile
from workers.speed_test import FILE_NAME, SpeedTest, hardware_of
from workers.telemetry import list_devices

WAIT_SECONDS = 60.0
FIGURES = Figures(
    devices=(Speed(device="cpu", flops=4e10, memory_bytes_per_second=2e10),),
    disk_bytes_per_second=None,
)


def cpu(label: str = "Tiny 3000", num_cores: int = 3) -> tuple[DeviceInfo, ...]:
    return (
        DeviceInfo(
            device="attic/cpu",
            kind="cpu",
            label=label,
            num_cores=num_cores,
            memory_bytes=1 << 30,
        ),
    )


@pytest.mark.slow
def test_figures_are_found_once_and_kept_for_every_name(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "cache"
    devices = list_devices("attic")
    first = SpeedTest("attic", devices, folder)
    assert first.report() is None
    first.start()
    report = first.wait()
    first.close()
    assert report is not None, caplog.text
    assert [speed.device for speed in report.devices] == [info.device for info in devices]
    for speed in report.devices:
        # From the slowest board to the fastest accelerator.
        assert 1e8 < speed.flops < 1e15
        assert 1e8 < speed.memory_bytes_per_second < 1e14
    assert report.disk_bytes_per_second is not None
    assert 1e5 < report.disk_bytes_per_second < 1e12
    assert [path.name for path in folder.iterdir()] == [FILE_NAME]

    second = SpeedTest("cellar", list_devices("cellar"), folder)
    again = second.report()
    assert again is not None
    assert again.disk_bytes_per_second == report.disk_bytes_per_second
    assert again.devices[0] == msgspec.structs.replace(report.devices[0], device="cellar/cpu")
    second.start()  # It has nothing to do.
    assert not measuring_children()
    second.close()


@pytest.mark.parametrize("changed", [cpu("Tiny 3001"), cpu(num_cores=4), (*cpu(), *cpu())])
def test_figures_of_other_hardware_are_void(
    tmp_path: Path, changed: tuple[DeviceInfo, ...]
) -> None:
    SpeedFile(tmp_path / FILE_NAME).write(hardware_of(cpu()), FIGURES)
    assert SpeedTest("attic", cpu(), tmp_path).report() is not None
    assert SpeedTest("attic", changed, tmp_path).report() is None


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"\xff\xfe", b'{"hardware": 3}', b"[" * 100_000],
    ids=["empty", "cut", "another kind", "no text", "wrong type", "deep"],
)
def test_a_damaged_file_is_as_none(
    tmp_path: Path, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / FILE_NAME).write_bytes(content)
    assert SpeedTest("attic", cpu(), tmp_path).report() is None
    assert FILE_NAME in caplog.text


@pytest.mark.parametrize("flops", [0.0, -1.0, 1e999])
def test_figures_that_no_plan_can_use_are_void(tmp_path: Path, flops: float) -> None:
    speed = msgspec.structs.replace(FIGURES.devices[0], flops=flops)
    file = SpeedFile(tmp_path / FILE_NAME)
    if math.isfinite(flops):
        file.write(hardware_of(cpu()), msgspec.structs.replace(FIGURES, devices=(speed,)))
    else:
        file.write(hardware_of(cpu()), FIGURES)
        text = file.path.read_text(encoding="ascii").replace("40000000000.0", "1e999")
        file.path.write_text(text, encoding="ascii")
    assert SpeedTest("attic", cpu(), tmp_path).report() is None


def measuring_children() -> list[psutil.Process]:
    """Helpers of other tests may be there, too."""
    return processes_below(psutil.Process(), "shardmix-speed-test")


def measuring_child() -> psutil.Process:
    (child,) = measuring_children()
    return child


def test_a_killed_measurement_gives_no_figures_and_a_line_in_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    test = SpeedTest("attic", cpu(), tmp_path / "cache")
    test.start()
    measuring_child().kill()
    with caplog.at_level(logging.WARNING):
        assert test.wait() is None
    test.close()
    (record,) = caplog.records
    assert "speed could not be measured: killed by SIGKILL" in record.message
    assert not (tmp_path / "cache").exists()


def test_closing_ends_a_measurement_that_runs(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    test = SpeedTest("attic", cpu(), tmp_path)
    test.start()
    child = measuring_child()
    test.close()
    assert not child.is_running()
    assert test.report() is None and not caplog.records


def test_a_measurement_ends_with_the_worker_that_asked_for_it(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from workers.speed_test import SpeedTest; "
        "from workers.telemetry import list_devices; "
        "test = SpeedTest('x', list_devices('x'), Path(sys.argv[1])); test.start(); "
        "print(test._child.pid, 'torch' in sys.modules, flush=True); sys.stdin.read()"
    )
    parent = subprocess.Popen(
        [sys.executable, "-P", "-c", code, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert parent.stdout is not None
    pid, has_torch = parent.stdout.readline().split()
    child = psutil.Process(int(pid))
    assert has_torch == "False"
    deadline = time.monotonic() + WAIT_SECONDS
    if os.name != "nt":
        while child.nice() <= psutil.Process().nice():
            assert time.monotonic() < deadline, "it measures at full priority"
            time.sleep(0.02)
    parent.kill()
    parent.communicate()
    while not has_ended(child):
        assert time.monotonic() < deadline, "it outlived its worker"
        time.sleep(0.02)
    assert list(tmp_path.iterdir()) == []
