"""`shardmix-worker` in processes of its own, with settings and a cache of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.workers.hosts import PATIENCE_SECONDS, free_port
from workers.speed_file import Figures, Speed, SpeedFile
from workers.speed_test import FILE_NAME, hardware_of
from workers.telemetry import list_devices


class WorkerCommand:
    """One computer, as far as its files and ports go."""

    def __init__(self, folder: Path) -> None:
        self.settings = folder / "settings"
        self.cache = folder / "cache"
        self.port = free_port()
        self.process: subprocess.Popen[str] | None = None
        # Measuring takes a core for seconds, and is tested elsewhere.
        devices = list_devices("box")
        speeds = tuple(
            Speed(device=info.device.rpartition("/")[2], flops=1e9, memory_bytes_per_second=1e9)
            for info in devices
        )
        SpeedFile(self.cache / FILE_NAME).write(
            hardware_of(devices), Figures(devices=speeds, disk_bytes_per_second=1e9)
        )

    def run(self, *flags: str) -> str:
        """Start the worker box; returns its join token, printed once it listens."""
        arguments = ["run", "--name=box", "--host=127.0.0.1", f"--port={self.port}", "--token"]
        self.process = self.start(*arguments, *flags)
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def start(
        self, *arguments: str, stdin: int = subprocess.DEVNULL, stdout: int = subprocess.PIPE
    ) -> subprocess.Popen[str]:
        """Start a command."""
        return subprocess.Popen(
            [sys.executable, "-m", "workers.cli", *arguments],
            stdin=stdin,
            stdout=stdout,
            stderr=subprocess.PIPE,
            text=True,
            env=self._environment(),
        )

    def command(self, *arguments: str) -> tuple[int, str, str]:
        """Run a command to its end: exit code, standard output, standard error."""
        process = self.start(*arguments)
        output, errors = process.communicate(timeout=PATIENCE_SECONDS)
        return process.returncode, output, errors

    def signal(self, number: int) -> tuple[int, str]:
        """Send a signal to the worker: its exit code, and what it said on standard error."""
        process, self.process = self.process, None
        assert process is not None
        process.send_signal(number)
        _, errors = process.communicate(timeout=PATIENCE_SECONDS)
        return process.returncode, errors

    def close(self) -> None:
        """End the worker, if it runs."""
        if self.process is not None:
            self.process.kill()
            self.process.communicate()

    def _environment(self) -> dict[str, str]:
        own = {"SHARDMIX_CONFIG": str(self.settings), "SHARDMIX_CACHE": str(self.cache)}
        return {**os.environ, **own}
