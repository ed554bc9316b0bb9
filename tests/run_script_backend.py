"""A build backend in one file, so that a test can install a project without the network."""

from __future__ import annotations

import zipfile
from pathlib import Path

NAME = "shardmix-0.1.0"
FILES = {
    f"{NAME}.dist-info/METADATA": (
        "Metadata-Version: 2.1\nName: shardmix\nVersion: 0.1.0\n"
        "Provides-Extra: app\nProvides-Extra: test\n"
    ),
    f"{NAME}.dist-info/WHEEL": (
        "Wheel-Version: 1.0\nGenerator: backend\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    ),
    f"{NAME}.dist-info/RECORD": "",
}


def build_editable(
    wheel_directory: str,
    config_settings: object = None,
    metadata_directory: str | None = None,
) -> str:
    """Write a wheel that holds nothing but metadata, and return its name (PEP 660)."""
    name = f"{NAME}-py3-none-any.whl"
    with zipfile.ZipFile(Path(wheel_directory) / name, "w") as wheel:
        for path, text in FILES.items():
            wheel.writestr(path, text)
    return name
