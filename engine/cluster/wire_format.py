"""The format that partial sums are rounded to before they are sent, and back.

In: float32 arrays. Out: what travels as a raw frame; numpy has no bfloat16, its bits go as uint16.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from engine.cluster.messages import Array

Activations = NDArray[np.float32]


def to_wire(values: Activations, wire: str) -> Array:
    """Round to the wire format: float32, float16, or bfloat16 bits as uint16, to nearest even."""
    if wire == "float32":
        return np.ascontiguousarray(values)
    if wire == "float16":
        with np.errstate(over="ignore"):
            return values.astype(np.float16)
    bits = np.ascontiguousarray(values).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    # A NaN must not be carried into infinity by the addition.
    return np.where(np.isnan(values), np.uint32(0x7FC0), rounded).astype(np.uint16)


def from_wire(array: Array) -> Activations:
    """The float32 values of an array in wire format."""
    if array.dtype == np.uint16:
        return (array.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return array.astype(np.float32, copy=False)
