"""What most choices need to know of logits, computed by the native kernels where there are any.

In: rows of logits. Out: the largest and their indices, and log-sum-exps. Torch computes the same on
other devices, and where nothing was built.
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine.kernels.native_library import NativeLibrary, check_status, native_library


def largest(logits_NV: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The largest logits of each row, descending; what is no number comes first.

    Args:
        logits_NV: float32.
        count: at least 1, at most V.
    Returns: values float32 [N, count], and their indices int64 [N, count], on the CPU.
    """
    library = _library_for(logits_NV)
    if library is None:
        values, indices = torch.topk(logits_NV, count, dim=-1)
        return values.float().cpu(), indices.cpu()
    logits = logits_NV.contiguous()
    num_rows, width = logits.shape
    values = torch.empty(num_rows, count)
    indices = torch.empty(num_rows, count, dtype=torch.int64)
    for n in range(num_rows):
        status = library.largest(
            logits.data_ptr() + 4 * width * n,
            width,
            count,
            indices.data_ptr() + 8 * count * n,
            values.data_ptr() + 4 * count * n,
        )
        check_status(status)
    return values, indices


def log_sum_exp(logits_V: Tensor, temperature: float) -> float:
    """log(sum(exp(logits / temperature))) in double precision.

    Args:
        logits_V: float32 [V].
        temperature: above 0.
    """
    library = _library_for(logits_V)
    if library is None:
        return float(torch.logsumexp(logits_V.double() / temperature, 0))
    logits = logits_V.contiguous()
    return float(library.log_sum_exp(logits.data_ptr(), logits.shape[0], temperature))


def _library_for(logits: Tensor) -> NativeLibrary | None:
    is_ours = logits.is_cpu and logits.dtype == torch.float32 and logits.numel() > 0
    return native_library() if is_ours else None
