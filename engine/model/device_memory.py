"""How much memory a device has left right now.

In: a torch device. Out: bytes, as its driver or the system says. It reserves nothing.
"""

from __future__ import annotations

import psutil
import torch


def free_bytes(device: torch.device) -> int:
    """Bytes that may still be taken on a device."""
    if device.type != "cuda":
        return int(psutil.virtual_memory().available)
    free, _total = torch.cuda.mem_get_info(device)
    # What torch keeps for itself and does not use can be used again.
    idle = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(free) + int(idle)
