"""The native kernels as a loaded library: found, checked against its sources, and typed.

In: the library that `build_native` made, and the environment variable SHARDMIX_KERNELS. Out: C
functions and mirrors of their structs. It knows no tensors: whoever calls has checked every size.
"""

from __future__ import annotations

import ctypes
import logging
import os
from collections.abc import Mapping
from ctypes import POINTER, Structure, c_char_p, c_double, c_int64, c_void_p
from functools import cache
from pathlib import Path
from typing import Any

from engine.errors import ConfigError, EngineError
from engine.kernels.build_native import LIBRARY_NAME, SOURCES, source_hash

logger = logging.getLogger(__name__)

KERNELS_VARIABLE = "SHARDMIX_KERNELS"
TORCH = "torch"
PATH = SOURCES / LIBRARY_NAME

# Formats of a packed matrix.
INT4, INT8, BFLOAT16, SYMMETRIC_INT4 = range(4)


class MatrixStruct(Structure):
    """`shardmix_matrix` of native/shardmix_native.h; so the others below."""

    _fields_ = (
        ("format", c_int64),
        ("num_rows", c_int64),
        ("num_columns", c_int64),
        ("block", c_int64),
        ("num_groups", c_int64),
        ("panels", c_void_p),
    )


class AttentionStruct(Structure):
    """`shardmix_attention_share`."""

    _fields_ = (
        ("qkv", POINTER(MatrixStruct)),
        ("output", POINTER(MatrixStruct)),
        ("norm", c_void_p),
        ("qkv_bias", c_void_p),
        ("output_bias", c_void_p),
        ("q_norm", c_void_p),
        ("k_norm", c_void_p),
        ("first_heads", POINTER(c_int64)),
        ("num_heads", c_int64),
        ("num_kv_heads", c_int64),
        ("head_width", c_int64),
        ("place", c_int64),
        ("rope", c_int64),
        ("rope_layout", c_int64),
        ("has_l2_norm", c_int64),
        ("reach", c_int64),
        ("chunk", c_int64),
        ("cache_dtype", c_int64),
        ("norm_epsilon", c_double),
        ("scale", c_double),
    )


class MlpStruct(Structure):
    """`shardmix_mlp_share`."""

    _fields_ = (
        ("gate_up", POINTER(MatrixStruct)),
        ("down", POINTER(MatrixStruct)),
        ("norm", c_void_p),
        ("activation", c_int64),
        ("norm_epsilon", c_double),
    )


class RowStruct(Structure):
    """`shardmix_row`."""

    _fields_ = (
        ("attention", POINTER(AttentionStruct)),
        ("mlp", POINTER(MlpStruct)),
        ("post_norm", c_void_p),
        ("norm_epsilon", c_double),
    )


class HeadStruct(Structure):
    """`shardmix_head_share`."""

    _fields_ = (
        ("matrix", POINTER(MatrixStruct)),
        ("norm", c_void_p),
        ("norm_epsilon", c_double),
        ("softcap", c_double),
    )


_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "instruction_set": (c_char_p, c_int64),
    "can_run": (c_int64, c_int64),
    "select": (c_int64, c_int64),
    "selected": (c_int64,),
    "set_num_threads": (c_int64, c_int64),
    "packed_bytes": (c_int64, POINTER(MatrixStruct)),
    "pack": (c_int64, POINTER(MatrixStruct), c_void_p, c_void_p, c_void_p, c_void_p),
    "dequantize": (c_int64, POINTER(MatrixStruct), c_int64, c_int64, c_int64, c_void_p),
    "multiply": (c_int64, POINTER(MatrixStruct), c_void_p, c_int64, c_void_p),
    "rows": (
        *(c_int64, c_void_p, c_int64, c_void_p),
        *(c_int64, c_void_p, c_int64, c_void_p),
        *(c_void_p, c_void_p, c_int64, c_void_p),
    ),
    "attend": (c_int64, POINTER(AttentionStruct), c_void_p, c_void_p, c_void_p),
    "head_part": (c_int64, POINTER(HeadStruct), c_void_p, c_int64, c_void_p),
    "largest": (c_int64, c_void_p, c_int64, c_int64, c_void_p, c_void_p),
    "log_sum_exp": (c_double, c_void_p, c_int64, c_double),
    "measure_read_bandwidth": (c_double, c_int64, c_int64),
}
_OUT_OF_MEMORY = 2


class NativeLibrary:
    """The C functions, by the names of the header without their prefix."""

    def __init__(self, path: Path, expected_hash: str = "") -> None:
        """Load it.

        Args: expected_hash: of the sources it must be made from; empty takes any.
        Raises:
            OSError: the file is missing, or the system cannot load it.
            ConfigError: it was made from other sources.
        """
        library = ctypes.CDLL(str(path))
        library.shardmix_source_hash.restype = c_char_p
        found = str(library.shardmix_source_hash().decode())
        if expected_hash and found != expected_hash:
            raise ConfigError(
                f"{path.name} was built from sources {found}, those here are {expected_hash}. "
                "Run: python -m engine.kernels.build_native"
            )
        for name, (result, *arguments) in _SIGNATURES.items():
            function: Any = getattr(library, f"shardmix_{name}")
            function.restype, function.argtypes = result, arguments
            setattr(self, name, function)

    instruction_set: Any
    can_run: Any
    select: Any
    selected: Any
    set_num_threads: Any
    packed_bytes: Any
    pack: Any
    dequantize: Any
    multiply: Any
    rows: Any
    attend: Any
    head_part: Any
    largest: Any
    log_sum_exp: Any
    measure_read_bandwidth: Any

    @property
    def instruction_sets(self) -> dict[str, bool]:
        """Every instruction set, best first, and whether this machine can run it."""
        sets: dict[str, bool] = {}
        while name := self.instruction_set(len(sets)):
            sets[name.decode()] = bool(self.can_run(len(sets)))
        return sets

    @property
    def selected_name(self) -> str:
        """The instruction set in use."""
        return self.instruction_set(self.selected()).decode()

    def use(self, name: str) -> None:
        """Compute with an instruction set from now on.

        Raises: ConfigError: there is none of that name, or this machine lacks it.
        """
        sets = self.instruction_sets
        if not sets.get(name):
            usable = ", ".join([TORCH, *(known for known, runs in sets.items() if runs)])
            found = "this machine does not have it" if name in sets else "there is no such set"
            raise ConfigError(
                f"{KERNELS_VARIABLE}={name[:40]} asks for kernels, but {found}; usable here: "
                f"{usable}. Name one of these, or leave the variable out"
            )
        self.select(list(sets).index(name))


def check_status(status: int) -> None:
    """Raise what a C function reports.

    Raises: EngineError: there is no memory left, or the arguments contradict each other.
    """
    if not status:
        return
    if status == _OUT_OF_MEMORY:
        raise MemoryError("native kernels")
    raise EngineError(
        "a native kernel was handed sizes that contradict each other and refused them. Report "
        f"this, and run with {KERNELS_VARIABLE}={TORCH} until then"
    )


def open_library(environment: Mapping[str, str], path: Path = PATH) -> NativeLibrary | None:
    """The library, with the instruction set that the environment asks for.

    Args: environment: may name torch or an instruction set in SHARDMIX_KERNELS.
    Returns: None where torch is asked for, or nothing is and there is no library.
    Raises: ConfigError: what is asked for is unknown, or cannot be had here.
    """
    wanted = environment.get(KERNELS_VARIABLE, "").strip()
    if wanted == TORCH:
        return None
    try:
        library = NativeLibrary(path, source_hash())
    except (OSError, ConfigError) as error:
        reason = str(error) if path.exists() else "they were not built (no C++ compiler?)"
        if wanted:
            raise ConfigError(
                f"{KERNELS_VARIABLE}={wanted[:40]} asks for native kernels, but {reason}. "
                f"Install the project again, or set {TORCH}"
            ) from None
        logger.warning("native kernels are not used: %s", reason)
        return None
    if wanted:
        library.use(wanted)
    return library


@cache
def native_library() -> NativeLibrary | None:
    """The library of this process; None where everything runs on torch.

    Raises: ConfigError: SHARDMIX_KERNELS asks for what is unknown, or cannot be had here.
    """
    return open_library(os.environ)
