"""Which kernels compute on this machine's CPU. Imports no torch: the engine host asks, too."""

from __future__ import annotations


def kernels_in_use() -> str:
    """A name for people: "native ..." with the instruction set, or "torch"."""
    return "torch"


def has_native_kernels() -> bool:
    """Whether products with quantised weights are faster here than with bfloat16 ones."""
    return kernels_in_use().startswith("native")
