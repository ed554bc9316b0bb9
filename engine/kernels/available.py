"""Which kernels compute on this machine's CPU. Imports no torch: the engine host asks, too."""

from __future__ import annotations

from engine.kernels.native_library import TORCH, native_library


def kernels_in_use() -> str:
    """A name for people: "native ..." with the instruction set, or "torch".

    Raises: ConfigError: SHARDMIX_KERNELS asks for what is unknown, or cannot be had here.
    """
    library = native_library()
    return TORCH if library is None else f"native {library.selected_name}"


def has_native_kernels() -> bool:
    """Whether products with quantised weights are faster here than with bfloat16 ones."""
    return kernels_in_use().startswith("native")
