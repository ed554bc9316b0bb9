"""Use of processor, memory, network and sensors, as the worker reports it ten times a second."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from workers.cpu_sensors import CpuSensors
from workers.gpus import Gpus
from workers.telemetry import Meter, list_devices, system_label

NUM_PROCESSES = 5
NUM_READINGS = 100
# One hundredth of a core at 10 Hz is 1 ms; the other tests' load makes even CPU time vary.
MAX_READ_SECONDS = 0.002


def write(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{content}\n", encoding="ascii")


def test_the_package_sensor_is_the_temperature(tmp_path: Path) -> None:
    disk, core = (tmp_path / "class" / "hwmon" / f"hwmon{n}" for n in (0, 1))
    write(disk / "name", "nvme")
    write(disk / "temp1_input", 91000)
    write(core / "name", "coretemp")
    for number, (label, degrees) in enumerate([("Core 0", 70000), ("Package id 0", 64500)], 1):
        write(core / f"temp{number}_label", label)
        write(core / f"temp{number}_input", degrees)
    sensors = CpuSensors(tmp_path)
    assert sensors.temperature_c() == 64.5
    write(core / "temp2_input", 66000)
    assert sensors.temperature_c() == 66.0
    (core / "temp2_input").unlink()
    assert sensors.temperature_c() is None


def test_two_packages_count_by_the_hottest_and_a_chip_without_labels_by_its_first(
    tmp_path: Path,
) -> None:
    for number, degrees in enumerate((50000, 61000)):
        chip = tmp_path / "class" / "hwmon" / f"hwmon{number}"
        write(chip / "name", "cpu_thermal" if number else "coretemp")
        write(chip / "temp1_input", degrees)
        write(chip / "temp2_input", 99000)
    assert CpuSensors(tmp_path).temperature_c() == 61.0


def test_tdie_is_preferred_to_tctl(tmp_path: Path) -> None:
    """Tctl of some AMD models lies 20 or 27 degrees above what is measured."""
    chip = tmp_path / "class" / "hwmon" / "hwmon3"
    write(chip / "name", "k10temp")
    for number, (label, degrees) in enumerate([("Tctl", 82000), ("Tdie", 62000)], 1):
        write(chip / f"temp{number}_label", label)
        write(chip / f"temp{number}_input", degrees)
    assert CpuSensors(tmp_path).temperature_c() == 62.0


def test_a_thermal_zone_serves_where_there_is_no_chip(tmp_path: Path) -> None:
    for number, (kind, degrees) in enumerate([("acpitz", 20000), ("x86_pkg_temp", 48000)]):
        zone = tmp_path / "class" / "thermal" / f"thermal_zone{number}"
        write(zone / "type", kind)
        write(zone / "temp", degrees)
    assert CpuSensors(tmp_path).temperature_c() == 48.0


def test_power_is_the_energy_of_all_packages_between_two_readings(tmp_path: Path) -> None:
    zones = tmp_path / "class" / "powercap"
    names = {"intel-rapl:0": "package-0", "intel-rapl:0:0": "core", "intel-rapl:1": "package-1"}
    for zone, name in {**names, "intel-rapl:2": "psys"}.items():
        write(zones / zone / "name", name)
        write(zones / zone / "energy_uj", 1_000_000)
        write(zones / zone / "max_energy_range_uj", 9_000_000)
    sensors = CpuSensors(tmp_path)
    assert sensors.power_w(100.0) is None
    write(zones / "intel-rapl:0" / "energy_uj", 7_000_000)
    write(zones / "intel-rapl:0:0" / "energy_uj", 5_000_000)
    write(zones / "intel-rapl:2" / "energy_uj", 8_000_000)
    assert sensors.power_w(102.0) == pytest.approx(3.0)
    # The first counter passes its end; the second can no longer be read.
    write(zones / "intel-rapl:0" / "energy_uj", 2_000_000)
    (zones / "intel-rapl:1" / "energy_uj").unlink()
    assert sensors.power_w(106.0) == pytest.approx(1.0)


@pytest.mark.parametrize("content", ["", "many", "\x00"])
def test_sensors_that_say_nonsense_are_no_sensors(tmp_path: Path, content: str) -> None:
    write(tmp_path / "class" / "hwmon" / "hwmon0" / "name", "coretemp")
    write(tmp_path / "class" / "hwmon" / "hwmon0" / "temp1_input", content)
    write(tmp_path / "class" / "powercap" / "intel-rapl:0" / "energy_uj", content)
    sensors = CpuSensors(tmp_path)
    assert sensors.temperature_c() is None
    assert sensors.power_w(1.0) is None and sensors.power_w(2.0) is None


class FakeDriver:
    """pynvml on a computer with two GPUs, the second of which refuses most questions."""

    class NVMLError(Exception):
        """As the library's."""

    NVML_TEMPERATURE_GPU = 0

    def __init__(self, has_driver: bool = True) -> None:
        self.opened = 0
        self._has_driver = has_driver

    def nvmlInit(self) -> None:  # noqa: N802 - the library's name
        if not self._has_driver:
            raise self.NVMLError
        self.opened += 1

    def nvmlShutdown(self) -> None:  # noqa: N802
        self.opened -= 1

    def __getattr__(self, name: str) -> Any:
        answers: dict[str, Any] = {
            "nvmlSystemGetDriverVersion": b"560.35.03",
            "nvmlDeviceGetCount": 2,
            "nvmlDeviceGetName": "GeForce",
            "nvmlDeviceGetMemoryInfo": SimpleNamespace(used=3, total=24),
            "nvmlDeviceGetUtilizationRates": SimpleNamespace(gpu=71),
            "nvmlDeviceGetTemperature": 55,
            "nvmlDeviceGetPowerUsage": 123456,
        }

        def answer(*arguments: object) -> Any:
            if name == "nvmlDeviceGetHandleByIndex":
                return f"handle {arguments[0]}"
            if arguments[:1] == ("handle 1",) and name != "nvmlDeviceGetUtilizationRates":
                raise self.NVMLError
            return answers[name]

        return answer


def test_every_figure_a_driver_refuses_is_none() -> None:
    driver = FakeDriver()
    gpus = Gpus(driver)
    first, second = gpus.read("attic")
    assert (first.device, first.percent, first.temperature_c) == ("attic/cuda0", 71.0, 55.0)
    assert first.power_w == pytest.approx(123.456)
    assert (first.memory_used_bytes, first.memory_total_bytes) == (3, 24)
    assert (second.device, second.percent) == ("attic/cuda1", 71.0)
    assert (second.temperature_c, second.power_w, second.memory_total_bytes) == (None, None, 0)
    assert [info.device for info in gpus.devices("attic")] == ["attic/cuda0"]
    assert gpus.driver_version() == "560.35.03"
    assert driver.opened == 1
    gpus.close()
    gpus.close()
    assert driver.opened == 0 and gpus.read("attic") == ()


def test_without_a_driver_there_are_no_gpus() -> None:
    gpus = Gpus(FakeDriver(has_driver=False))
    assert gpus.read("attic") == () and gpus.devices("attic") == []
    assert gpus.driver_version() is None
    gpus.close()


def test_the_real_driver_tells_what_its_gpus_do() -> None:
    gpus = Gpus()
    try:
        infos, usages = gpus.devices("attic"), gpus.read("attic")
    finally:
        gpus.close()
    if not infos:
        pytest.skip("needs an NVIDIA driver")
    assert [info.device for info in infos] == [usage.device for usage in usages]
    for usage in usages:
        assert 0 < usage.memory_used_bytes <= usage.memory_total_bytes
        assert usage.temperature_c is None or 0 < usage.temperature_c < 130


def test_a_busy_process_shows_and_one_that_ended_does_not() -> None:
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    meter = Meter("attic", memory_seconds=0)
    try:
        roles = {busy.pid: "runner attic/cpu", os.getpid(): "worker"}
        first = meter.read(roles)
        assert [usage.cpu_percent for usage in first.processes] == [0.0, 0.0]
        deadline = time.monotonic() + 30
        started = psutil.Process(busy.pid).cpu_times().user
        while psutil.Process(busy.pid).cpu_times().user < started + 0.2:
            assert time.monotonic() < deadline, "the process gets no time"
            time.sleep(0.02)
        usage, own = meter.read(roles).processes
        assert (usage.role, usage.pid) == ("runner attic/cpu", busy.pid)
        assert 0 < usage.cpu_percent < 150 and usage.memory_bytes > 1 << 20
        assert own.cpu_percent < usage.cpu_percent
    finally:
        busy.kill()
        busy.wait()
    telemetry = meter.read(roles)
    meter.close()
    assert [usage.role for usage in telemetry.processes] == ["worker"]
    assert 0 < telemetry.memory_used_bytes < telemetry.memory_total_bytes


def test_processes_are_looked_at_again_when_they_are_others_or_some_time_has_gone_by() -> None:
    meter = Meter("attic", memory_seconds=3600)
    own = {os.getpid(): "worker"}
    first = meter.read(own)
    assert meter.read(own).processes is first.processes
    assert [usage.role for usage in meter.read({os.getpid(): "other"}).processes] == ["other"]
    meter.close()


def test_a_reading_costs_little() -> None:
    processes = [
        subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
        for _ in range(NUM_PROCESSES)
    ]
    meter = Meter("attic", memory_seconds=0)
    try:
        roles = {process.pid: "runner" for process in processes}
        costs: list[float] = []
        for _ in range(NUM_READINGS):
            before = time.thread_time()
            assert len(meter.read(roles).processes) == NUM_PROCESSES
            costs.append(time.thread_time() - before)
    finally:
        for process in processes:
            process.kill()
            process.communicate()
        meter.close()
    cost = sorted(costs)[NUM_READINGS // 2]
    assert cost < MAX_READ_SECONDS, f"{cost * 1e3:.3f} ms of CPU time for one reading"


def test_versions_are_told_without_importing_torch() -> None:
    code = (
        "import sys; from workers.telemetry import system_label, list_devices; "
        "list_devices('x'); print(system_label()); assert 'torch' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, encoding="utf-8", check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == system_label()
    assert ", torch 2." in system_label()
    assert list_devices("attic")[0].device == "attic/cpu"
