"""How often this host wants to hear from its workers; benchmarks measure what that costs."""

from __future__ import annotations

import os

from engine.errors import ConfigError

RATE_VARIABLE = "SHARDMIX_TELEMETRY_HZ"
DEFAULT_HZ = 1.0
# Between a worker that is taken for silent and one that does nothing else.
MIN_HZ, MAX_HZ = 0.2, 20.0


def wanted_hz() -> float:
    """Telemetry messages a second.

    Raises: ConfigError: the variable holds no such number.
    """
    text = os.environ.get(RATE_VARIABLE)
    if not text:
        return DEFAULT_HZ
    try:
        rate = float(text)
    except ValueError:
        rate = float("nan")
    if not MIN_HZ <= rate <= MAX_HZ:
        raise ConfigError(
            f"{RATE_VARIABLE}={text[:40]} is no rate between {MIN_HZ} and {MAX_HZ:.0f} a second. "
            "Unset it, or give another"
        )
    return rate
