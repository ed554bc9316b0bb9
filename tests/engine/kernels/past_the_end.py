"""Uses a native kernel wrongly, so that a sanitizer can be seen to notice."""

from __future__ import annotations

import ctypes
import os
from ctypes import byref
from pathlib import Path

from engine.kernels.native_library import INT8, MatrixStruct, NativeLibrary
from tests.engine.kernels.conftest import LIBRARY_VARIABLE

ROWS, COLUMNS = 64, 32


def write_past_the_end() -> None:
    """Multiply into memory that is half as large as the output."""
    library = NativeLibrary(Path(os.environ[LIBRARY_VARIABLE]))
    struct = MatrixStruct(INT8, ROWS, COLUMNS, COLUMNS, 1, None)
    panels = ctypes.create_string_buffer(library.packed_bytes(byref(struct)))
    struct.panels = ctypes.addressof(panels)
    x = (ctypes.c_float * COLUMNS)()
    system = ctypes.CDLL(None)
    system.malloc.restype = ctypes.c_void_p
    library.multiply(byref(struct), x, 1, system.malloc(ctypes.c_size_t(ROWS * 2)))
