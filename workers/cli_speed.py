"""The command `shardmix-worker speed`: measure this computer now.

In: nothing. Out: a line for each figure on standard output; the figures are kept for the worker.
"""

from __future__ import annotations

import logging

import typer

from engine.cluster.messages import SpeedReport
from engine.weights.models import cache_folder
from workers.speed_test import SpeedTest
from workers.telemetry import list_devices


def speed() -> None:
    """Measure how fast this computer is, now; the worker does it by itself at its first start."""
    logging.basicConfig(level="WARNING", format="shardmix-worker: %(message)s")
    test = SpeedTest("this", list_devices("this"), cache_folder())
    try:
        test.start(again=True)
        report = test.wait()
    finally:
        test.close()
    if report is None:
        raise typer.Exit(1)  # The log has said why.
    typer.echo("\n".join(speed_lines(report)))


def speed_lines(report: SpeedReport) -> list[str]:
    """The figures for a person."""
    lines = [
        f"{speed.device}: {speed.flops / 1e9:,.1f} GFLOP/s (float32), memory "
        f"{speed.memory_bytes_per_second / 1e9:,.1f} GB/s"
        for speed in report.devices
    ]
    if report.disk_bytes_per_second is not None:
        lines.append(f"disk of the cache: {report.disk_bytes_per_second / 1e6:,.0f} MB/s")
    return lines
