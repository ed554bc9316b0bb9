"""The process that measures: `python -m workers.speed_process shardmix-speed-test`.

Started by `SpeedTest`. In: what to measure and the file for the figures, on standard input. Out:
the file. It watches its parent before it imports torch, which takes seconds.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

import msgspec
import psutil

from engine.cluster.processes import end_with_parent, read_greeting
from workers.speed_file import Figures, Hardware, SpeedFile

NICE = 10


def main() -> None:
    """Measure, write the file, end."""
    logging.basicConfig(level=os.environ.get("SHARDMIX_LOG", "WARNING"), format="%(message)s")
    greeting = read_greeting()
    end_with_parent(lambda: os._exit(0))
    process = psutil.Process()
    process.nice(psutil.BELOW_NORMAL_PRIORITY_CLASS if os.name == "nt" else NICE)
    hardware = msgspec.convert(greeting.settings["hardware"], Hardware)
    file = SpeedFile(Path(str(greeting.settings["file"])))

    from workers.speed_measure import measure_device, measure_disk

    figures = Figures(
        devices=tuple(measure_device(device) for device in hardware.devices),
        disk_bytes_per_second=measure_disk(file.path.parent),
    )
    file.write(hardware, figures)


if __name__ == "__main__":
    main()
