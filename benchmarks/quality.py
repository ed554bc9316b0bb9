"""What a compute dtype or wire format costs in quality, against float32 of the same file.

`python benchmarks/quality.py`: on a reference text, KL divergence of the next-token distribution,
perplexity ratio, and share of greedy choices that change; for prompt arithmetic and for generated
arithmetic, which differ with native kernels, or where the machine has no bfloat16 units. Two devices
for the wire formats.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import machine
import msgspec
import numpy as np
import torch
from numpy.typing import NDArray

from engine.host.kv_settings import choose_dtype
from engine.kernels.available import kernels_in_use
from engine.model.batch import ComputeDtype, StepKind
from engine.model.weight_formats import auto_dtype
from engine.plan.plan import Plan, PlanShape
from engine.plan.presets import even, single
from engine.text.tokenizer import load_tokenizer
from engine.weights.checkpoint import open_checkpoint
from engine.weights.models import fetch_default_model

sys.path.insert(0, str(Path(__file__).parent.parent))
from tests.one_process import OneProcess

# Generated tokens at a time: as many as verifying a draft or a few conversations bring.
FEW = 16
TEXT = Path(__file__).parent / "reference_text.txt"


def compare(
    found: NDArray[np.float32], exact: NDArray[np.float32], ids: list[int]
) -> dict[str, float]:
    """KL in nats, perplexity ratio, share of changed greedy choices."""
    log_found = torch.log_softmax(torch.as_tensor(found).double(), -1)
    log_exact = torch.log_softmax(torch.as_tensor(exact).double(), -1)
    divergence = (log_exact.exp() * (log_exact - log_found)).sum(-1)
    targets = torch.tensor(ids[1:])[:, None]
    surprise = [-rows[:-1].gather(1, targets).mean() for rows in (log_found, log_exact)]
    return {
        "kl_mean": float(divergence.mean()),
        "kl_max": float(divergence.max()),
        "perplexity": float(surprise[0].exp()),
        "perplexity_ratio": float((surprise[0] - surprise[1]).exp()),
        "changed_greedy": float((log_found.argmax(-1) != log_exact.argmax(-1)).double().mean()),
    }


def logits_of(model: OneProcess, ids: list[int], kind: StepKind) -> NDArray[np.float32]:
    """Logits of prompt tokens in one pass, or of generated ones, a few at a time.

    The arithmetic of generated tokens is that of their kind, however many come together.
    """
    if kind == "prompt":
        return model.logits(ids)
    starts = range(0, len(ids), FEW)
    return np.concatenate([model.logits(ids[n : n + FEW], n, "generated") for n in starts])


def main() -> None:
    """Measure and write the result."""
    about = machine.describe()
    path = fetch_default_model(lambda _done, _total: None)
    checkpoint = open_checkpoint(path)
    ids = load_tokenizer(path).encode(TEXT.read_text(encoding="utf-8"))
    shape = PlanShape.from_config(checkpoint.config)
    one = single(shape, "a/cpu")
    two = even(shape, ["a/cpu", "b/cpu"])
    exact = logits_of(OneProcess(checkpoint, one, window=len(ids)), ids, "prompt")
    cases: list[tuple[str, Plan, ComputeDtype, StepKind]] = [
        ("float32, generated", one, "float32", "generated"),
        ("float32, two devices", two, "float32", "prompt"),
    ]
    tensors = checkpoint.tensors.values()
    autos = {auto_dtype(tensors, has_native): has_native for has_native in (False, True)}
    for dtype in ("bfloat16", "int8", "int4"):
        name = dtype
        if dtype in autos:
            name += f" (auto {'with' if autos[dtype] else 'without'} native kernels)"
        for kind in ("prompt", "generated"):
            cases.append((f"{name}, {kind}", one, dtype, kind))
    cases.append(("int4, two devices", two, "int4", "prompt"))
    for wire in ("bfloat16", "float16"):
        plan = msgspec.structs.replace(two, wire=wire)
        cases.append((f"float32, two devices, {wire} wire", plan, "float32", "prompt"))
    rows: dict[str, Any] = {}
    lines = [
        (
            f"SmolLM2-135M-Instruct Q4_1, {len(ids)} tokens of `benchmarks/reference_text.txt`, "
            f"against one device in float32 in one pass. Keys and values as each "
            f"dtype keeps them: bfloat16 but for float32. Kernels: {kernels_in_use()}."
        ),
        "",
        "| arithmetic | KL mean (nats) | KL max | perplexity ratio | changed greedy choices |",
        "|---|---|---|---|---|",
    ]
    for name, plan, dtype, kind in cases:
        print(name, file=sys.stderr, flush=True)
        kv_dtype = choose_dtype("auto", {}, dtype)
        model = OneProcess(checkpoint, plan, dtype, window=len(ids), kv_dtype=kv_dtype)
        found = logits_of(model, ids, kind)
        row = compare(found, exact, ids)
        rows[name] = row
        lines.append(
            f"| {name} | {row['kl_mean']:.2e} | {row['kl_max']:.2e} | "
            f"{row['perplexity_ratio']:.5f} | {row['changed_greedy']:.2%} |"
        )
    machine.write("quality", about, rows, lines)


if __name__ == "__main__":
    main()
