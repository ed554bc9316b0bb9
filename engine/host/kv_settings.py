"""How large the KV cache may be and in what dtype it is kept: option, environment, default.

The environment's names are those of the system this project grew from, so that its scripts run.
"""

from __future__ import annotations

from collections.abc import Mapping

from engine.errors import ConfigError
from engine.host.messages import CacheDtypeChoice
from engine.model.batch import ComputeDtype
from engine.model.config import CacheDtype
from engine.model.view import DEFAULT_WINDOW

WINDOW_VARIABLE = "OPEN_CLUSTER_KV_WINDOW"
DTYPE_VARIABLE = "OPEN_CLUSTER_KV_CACHE_DTYPE"
MAX_WINDOW = 1 << 24
_NAMES: dict[str, CacheDtype] = {
    "fp32": "float32",
    "bf16": "bfloat16",
    "fp16": "float16",
    "float32": "float32",
    "bfloat16": "bfloat16",
    "float16": "float16",
}


def choose_window(option: int | None, environment: Mapping[str, str], max_positions: int) -> int:
    """Positions that a conversation's cache holds.

    Args:
        option: what was asked for with --kv-window; None leaves it to the environment.
        max_positions: the model's trained context.
    Raises: ConfigError: a number out of range, or an environment variable that is no number.
    """
    if option is not None:
        return _checked_window(option, "--kv-window", str(option))
    text = environment.get(WINDOW_VARIABLE, "").strip()
    if not text:
        return min(max_positions, DEFAULT_WINDOW)
    value = int(text) if text.isascii() and text.isdigit() and len(text) < 12 else 0
    return _checked_window(value, WINDOW_VARIABLE, text)


def _checked_window(value: int, name: str, shown: str) -> int:
    if not 1 <= value <= MAX_WINDOW:
        raise ConfigError(
            f"{name} {shown[:40]} is not between 1 and {MAX_WINDOW:,} positions. Choose such a number"
        )
    return value


def choose_dtype(
    option: CacheDtypeChoice, environment: Mapping[str, str], dtype: ComputeDtype
) -> CacheDtype:
    """What keys and values are kept in.

    Args:
        option: what was asked for with --kv-dtype; "auto" leaves it to the environment.
        dtype: what the model computes in, which decides where nothing was asked for.
    Raises: ConfigError: the environment variable names no dtype.
    """
    if option != "auto":
        return option
    text = environment.get(DTYPE_VARIABLE, "").strip().lower()
    if not text:
        return "float32" if dtype == "float32" else "bfloat16"
    found = _NAMES.get(text)
    if found is None:
        raise ConfigError(
            f"{DTYPE_VARIABLE} {text[:40]!r} is no dtype of the KV cache; use one of "
            f"{', '.join(_NAMES)}"
        )
    return found
