"""Numbers as the window shows them: a unit, three significant digits, a dash where unknown.

In: plain numbers or None. Out: text. Nothing here knows of Qt.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

DASH = "\u2013"
UNKNOWN = DASH
_BYTE_UNITS = ("B", "kB", "MB", "GB", "TB")
_BIT_RATE_UNITS = ("bit/s", "kbit/s", "Mbit/s", "Gbit/s", "Tbit/s")
_FLOP_UNITS = ("FLOP/s", "kFLOP/s", "MFLOP/s", "GFLOP/s", "TFLOP/s")
_SIGNIFICANT = 3


def figure(value: float | None, unit: str = "") -> str:
    """A number with three significant digits and its unit, such as "97.3 tok/s".

    Args:
        value: None or NaN is unknown.
        unit: appended after a space; empty for none.
    """
    if value is None or not math.isfinite(value):
        return UNKNOWN
    text = _three_digits(value)
    return f"{text} {unit}" if unit else text


def figure_bytes(value: float | None) -> str:
    """A size in powers of 1000, such as "98.4 MB"."""
    return _with_power(value, _BYTE_UNITS)


def figure_rate(bytes_per_second: float | None) -> str:
    """A network rate, such as "1.20 MB/s"."""
    text = figure_bytes(bytes_per_second)
    return text if text == UNKNOWN else f"{text}/s"


def figure_seconds(value: float | None) -> str:
    """A duration, such as "812 ms", "1.24 s" or "2 min 05 s"."""
    if value is None or not math.isfinite(value):
        return UNKNOWN
    if value < 0.9995:
        return f"{_three_digits(value * 1000)} ms"
    if value < 99.95:
        return f"{_three_digits(value)} s"
    minutes, seconds = divmod(round(value), 60)
    return f"{minutes} min {seconds:02d} s"


def figure_age(seconds: float) -> str:
    """How long something has been so, in whole units: "42 s", "3 min", "2 h 05 min", "4 days"."""
    whole = max(0, int(seconds))
    if whole < 100:
        return f"{whole} s"
    minutes = whole // 60
    if minutes < 100:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours < 48 else f"{hours // 24} days"


def figure_bit_rate(bytes_per_second: float | None) -> str:
    """The speed of a link as its makers give it, such as "940 Mbit/s"."""
    return _with_power(None if bytes_per_second is None else 8 * bytes_per_second, _BIT_RATE_UNITS)


def figure_flops(operations_per_second: float | None) -> str:
    """How fast a device multiplies, such as "412 GFLOP/s"."""
    return _with_power(operations_per_second, _FLOP_UNITS)


def figure_percent(fraction: float | None) -> str:
    """A fraction as a percentage, such as "33.3 %"."""
    if fraction is None or not math.isfinite(fraction):
        return UNKNOWN
    percent = 100 * fraction
    if abs(percent - round(percent)) < 0.05:
        return f"{round(percent)} %"
    return f"{percent:.1f} %"


def figure_count(value: int | None) -> str:
    """A whole number with thousands separators."""
    return UNKNOWN if value is None else f"{value:,}"


def plural(count: int, noun: str) -> str:
    """Such as "1 node", "3 nodes", "2 processes"."""
    if count == 1:
        return f"{count:,} {noun}"
    return f"{count:,} {noun}{'es' if noun.endswith('s') else 's'}"


def ranges_text(numbers: Sequence[int]) -> str:
    """Ascending whole numbers as runs, such as "0-9, 12"."""
    runs: list[tuple[int, int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1] = (runs[-1][0], number)
        else:
            runs.append((number, number))
    return ", ".join(
        str(first) if first == last else f"{first}{DASH}{last}" for first, last in runs
    )


def layers_text(layers: Sequence[int]) -> str:
    """Such as "layer 7" or "layers 0-9, 12"; empty where there are none."""
    if not layers:
        return ""
    return f"layer{'s' if len(layers) > 1 else ''} {ranges_text(layers)}"


def _with_power(value: float | None, units: Sequence[str]) -> str:
    """A value with the unit, a thousand apart each, that leaves it below a thousand."""
    if value is None or not math.isfinite(value):
        return UNKNOWN
    power = 0
    while abs(value) >= 999.5 and power < len(units) - 1:
        value /= 1000
        power += 1
    return f"{_three_digits(value)} {units[power]}"


def _three_digits(value: float) -> str:
    if value == 0:
        return "0"
    digits = math.floor(math.log10(abs(value))) + 1
    decimals = min(max(_SIGNIFICANT - digits, 0), 6)
    text = f"{value:,.{decimals}f}"
    # Rounding may have added a digit: 9.999 -> "10.00".
    if decimals and sum(c.isdigit() for c in text.lstrip("0.,-")) > _SIGNIFICANT:
        text = f"{value:,.{decimals - 1}f}"
    return text
