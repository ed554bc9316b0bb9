"""A weight on its way from file to compute format is never in memory as a whole in a third form."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROWS, COLUMNS = 16384, 2048
FLOAT32_BYTES = ROWS * COLUMNS * 4

# Prints by how many bytes the process has grown at most beyond the packed weight.
MEASURE = """
import resource, sys
import numpy as np, torch
from engine.model.share_keys import SliceKey, WeightKey
from engine.model.weight_store import WeightStore
from engine.weights.formats import TensorInfo, num_bytes
torch.set_num_threads(1)
format, dtype, rows, columns = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
def pack(rows):
    raw = np.ones(num_bytes(format, (rows, columns)), dtype=np.uint8)
    tensors = {"layers.0.o": TensorInfo("layers.0.o", format, (rows, columns))}
    store = WeightStore(tensors, dtype, torch.device("cpu"), {})
    key = WeightKey((SliceKey("layers.0.o", 0, 0, rows),))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    store.pack(key, [raw])
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return grown * 1024 - store.packed[key].num_bytes
pack(1)
print(pack(rows))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="others count in other units")
@pytest.mark.parametrize(("format", "dtype"), [("F16", "int4"), ("Q8_0", "int4"), ("Q4_1", "int8")])
def test_a_packed_matrix_takes_less_beside_itself_than_half_its_float32_values(
    format: str, dtype: str
) -> None:
    found = subprocess.run(
        [sys.executable, "-c", MEASURE, format, dtype, str(ROWS), str(COLUMNS)],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
        cwd=Path(__file__).parents[3],
    )
    beside = int(found.stdout)
    assert beside < FLOAT32_BYTES / 2, f"{beside:,} bytes of {FLOAT32_BYTES:,}"
