"""How long a product with one matrix takes in each compute format, for few and for many tokens.

`python benchmarks/products.py`: the best of several times in milliseconds on one thread, of an MLP
matrix of a 1B model. It is where the constants of `engine/kernels/matrices.py` come from: how many
values are widened at a time, and from how many generated tokens bfloat16 weights are; and which
instruction sets of `engine/kernels/native_matrices.py` take prompts, whose integer products stand here
beside torch's of the same weights dequantised.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import machine
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from engine.kernels import matrices, native_matrices
from engine.kernels.native_library import native_library
from engine.model.batch import StepKind

ROWS, COLUMNS = 8192, 2048
TOKENS = (1, 2, 4, 8, 16, 64, 512)
PIECES = (1 << 17, 1 << 18, 1 << 19, 1 << 20, 1 << 21)
REPEATS = 12
NEVER = 1 << 30


def best_ms(matrix: matrices.Matrix, num_tokens: int, kind: StepKind) -> float:
    """The shortest of several products; others' load only ever adds."""
    x = torch.randn(num_tokens, COLUMNS)
    times: list[float] = []
    for _ in range(max(3, REPEATS * 16 // (16 + num_tokens))):
        start = time.perf_counter()
        matrix.multiply(x, kind)
        times.append(time.perf_counter() - start)
    return min(times) * 1e3


def main() -> None:
    """Measure and write the result."""
    about = machine.describe()
    torch.set_num_threads(1)
    values = torch.randn(ROWS, COLUMNS)
    float32, bfloat16 = matrices.Float32Matrix(values), matrices.BFloat16Matrix(values)
    int8 = matrices.Int8Matrix.from_values(values, COLUMNS)
    int4 = matrices.Int4Matrix.from_values(values, COLUMNS)
    rows: dict[str, Any] = {}

    def measure(name: str, matrix: matrices.Matrix, kind: StepKind) -> None:
        rows[name] = {str(count): best_ms(matrix, count, kind) for count in TOKENS}

    measure("float32", float32, "generated")
    for name, threshold in (("as it is", NEVER), ("widened", 0)):
        matrices.WIDEN_FROM_TOKENS = threshold
        measure(f"bfloat16, generated, {name}", bfloat16, "generated")
    for elements in PIECES:
        matrices.SCRATCH_ELEMENTS = elements
        for name, matrix in (("bfloat16", bfloat16), ("int8", int8), ("int4", int4)):
            measure(f"{name}, prompt, {elements:,} values at a time", matrix, "prompt")
    library = native_library()
    for name, matrix in (("int8", int8), ("int4", int4)):
        native = native_matrices.repack(matrix, library)
        if library is None or not isinstance(native, native_matrices.NativeMatrix):
            break
        library.set_num_threads(1)
        measure(f"{name}, {library.selected_name} kernels", native, "generated")
        native.most_prompt_tokens = 0
        measure(f"{name}, prompt, dequantised by {library.selected_name} kernels", native, "prompt")
    lines = [
        (
            f"Milliseconds for x @ W.T with W [{ROWS}, {COLUMNS}] on one thread, by torch where no "
            "other kernels are named, best of several, by number of tokens. bfloat16 units: "
            f"{'yes' if matrices.has_bfloat16_units('cpu') else 'no'}."
        ),
        "",
        "| weights | " + " | ".join(str(count) for count in TOKENS) + " |",
        "|---" * (len(TOKENS) + 1) + "|",
    ]
    for name, row in rows.items():
        lines.append(f"| {name} | " + " | ".join(f"{ms:.1f}" for ms in row.values()) + " |")
    machine.write("products", about, rows, lines)


if __name__ == "__main__":
    main()
