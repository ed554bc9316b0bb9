"""What a result was measured on, and how results are written down."""

from __future__ import annotations

import json
import os
import platform
import statistics
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

RESULTS = Path(__file__).parent / "results"


def describe() -> dict[str, Any]:
    """Processor, cores, memory, versions, date."""
    from workers.telemetry import cpu_label, usable_cores

    flags: set[str] = set()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text(encoding="utf-8").splitlines()
        flags = set(next((ln for ln in lines if ln.startswith("flags")), "").split())
    wanted = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "processor": cpu_label(),
        "instruction_sets": [flag for flag in wanted if flag in flags],
        "cores": usable_cores(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": metadata.version("torch"),
        "transformers": metadata.version("transformers"),
        "load_average_before": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
    }


def median(values: Sequence[float]) -> float:
    """The middle one."""
    return statistics.median(values)


def write(
    name: str,
    machine: dict[str, Any],
    rows: dict[str, Any],
    lines: Sequence[str],
    folder: Path | None = RESULTS,
    *,
    is_shown: bool = True,
) -> None:
    """Print a result as Markdown, and keep it there and as JSON in a folder; None keeps nothing.

    The file's name says what is measured, the machine's kind, and the date.
    """
    sets = ", ".join(machine["instruction_sets"]) or "unknown instruction sets"
    head = [
        f"# {name}, {machine['date']}",
        "",
        (
            f"{machine['processor']}, {machine['cores']} cores ({sets}), {machine['memory_gb']} GB, "
            f"{machine['system']}; Python {machine['python']}, torch {machine['torch']}, transformers "
            f"{machine['transformers']}; load average before: {machine['load_average_before']}."
        ),
        "",
    ]
    text = "\n".join([*head, *lines]) + "\n"
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        kind = (machine["instruction_sets"] or [platform.machine() or "unknown"])[-1]
        stem = folder / f"{name}-{kind}-{machine['date']}"
        stem.with_suffix(".json").write_text(
            json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n", encoding="utf-8"
        )
        stem.with_suffix(".md").write_text(text, encoding="utf-8")
    if is_shown:
        print(text)
