"""Draws a result of `speed.py` as bars: decode and prefill of every model, ours beside others.

`python benchmarks/plot.py [RESULT.json] [--out assets/speed.svg]`: without a result the newest one.
In: the JSON that `speed.py` wrote. Out: an SVG file without scripts or outside references. The
dashed line is the ceiling: the memory's bandwidth by the weights that a token reads.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

from engine.errors import ConfigError, EngineError

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
OUT = ROOT / "assets" / "speed.svg"

WIDTH, MARGIN = 960, 24
LABEL_WIDTH, VALUE_WIDTH, GAP = 218, 50, 24
BAR_HEIGHT, BAR_STEP = 16, 24
HEAD_HEIGHT, TITLE_HEIGHT, AXIS_HEIGHT = 56, 58, 14
OURS, OTHERS, CEILING, INK, PAPER = "#2f6fde", "#6d7785", "#c2410c", "#1c2430", "#ffffff"
FIRST_WORD = "shardmix"
MEMORY, WEIGHT_BYTES = "memory bandwidth", "weight bytes"
MAIN = "shardmix auto, 2 threads"

Figures = Mapping[str, Mapping[str, float]]


def draw(result: Mapping[str, Any]) -> str:
    """The SVG of a result.

    Raises: ConfigError: it is no result of `speed.py`.
    """
    try:
        machine, models = result["machine"], result["rows"]["models"]
        about = f"{machine['processor']}, {machine['cores']} cores, {machine['date']}"
        keys = (
            f"decode at {result['rows']['context']}",
            f"prefill {result['rows']['prompt_tokens']}",
        )
        parts: list[str] = []
        top = HEAD_HEIGHT
        for kept in models.values():
            found: Figures = kept["median"]
            parts.append(_text(MARGIN, top + 22, kept["title"], size=16, is_bold=True))
            column = (WIDTH - 2 * MARGIN - GAP) / 2
            bottoms = [
                _panel(parts, found, key, MARGIN + number * (column + GAP), top, column)
                for number, key in enumerate(keys)
            ]
            top = max(bottoms) + 18
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise ConfigError(
            f"a result of benchmarks/speed.py was to be drawn, this one lacks {error}. Measure again"
        ) from None
    height = round(top)
    head = [
        (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" '
            f'height="{height}" font-family="system-ui, Segoe UI, Helvetica, Arial, sans-serif">'
        ),
        f'<rect width="{WIDTH}" height="{height}" rx="10" fill="{PAPER}"/>',
        _text(MARGIN, 34, "Tokens per second, more is better", size=18, is_bold=True),
        _text(WIDTH - MARGIN, 34, about, size=12, anchor="end"),
    ]
    return "\n".join([*head, *parts, "</svg>"]) + "\n"


def _panel(
    parts: list[str], found: Figures, key: str, left: float, top: float, width: float
) -> float:
    """Bars of one figure. Returns: where they end."""
    is_decode = key.startswith("decode")
    bars = {name: values[key] for name, values in found.items() if key in values}
    ceiling = 0.0
    if is_decode and WEIGHT_BYTES in found[MAIN]:  # of models with experts it is not known
        ceiling = max(found[MEMORY].values()) / found[MAIN][WEIGHT_BYTES]
    longest = max([*bars.values(), ceiling])
    # A ceiling far away would leave no room for the bars.
    has_ceiling = 0 < ceiling <= 4 * max(bars.values())
    scale = (width - LABEL_WIDTH - VALUE_WIDTH) / (longest if has_ceiling else max(bars.values()))
    title = f"{key} tokens of context" if is_decode else f"{key} tokens"
    parts.append(_text(left, top + 46, title, size=13))
    y = top + TITLE_HEIGHT
    for name, value in bars.items():
        is_ours = name.startswith(FIRST_WORD)
        label = name.removeprefix(f"{FIRST_WORD} auto, ") if is_ours else name
        label = f"{FIRST_WORD}, {label}" if is_ours and label != name else label
        colour = OURS if is_ours else OTHERS
        x = left + LABEL_WIDTH
        parts.append(_text(x - 8, y + 12.5, label, size=12, anchor="end"))
        parts.append(
            f'<rect x="{x:.1f}" y="{y:.1f}" width="{max(1.0, value * scale):.1f}" '
            f'height="{BAR_HEIGHT}" rx="2" fill="{colour}"/>'
        )
        end = x + value * scale
        # Inside a long bar, where no ceiling crosses it.
        if value * scale > VALUE_WIDTH:
            parts.append(
                _text(end - 6, y + 12.5, _number(value), size=12, anchor="end", colour=PAPER)
            )
        else:
            parts.append(_text(end + 6, y + 12.5, _number(value), size=12))
        y += BAR_STEP
    if has_ceiling:
        x = left + LABEL_WIDTH + ceiling * scale
        parts.append(
            f'<line x1="{x:.1f}" y1="{top + TITLE_HEIGHT - 6:.1f}" x2="{x:.1f}" y2="{y:.1f}" '
            f'stroke="{CEILING}" stroke-width="1.5" stroke-dasharray="5 4"/>'
        )
    if ceiling:
        text = f"what the memory allows: {_number(ceiling)}"
        y += AXIS_HEIGHT
        parts.append(_text(left + LABEL_WIDTH, y, text, size=12, colour=CEILING))
    return y


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _text(
    x: float,
    y: float,
    text: str,
    *,
    size: int,
    anchor: str = "start",
    is_bold: bool = False,
    colour: str = INK,
) -> str:
    weight = ' font-weight="600"' if is_bold else ""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}" '
        f'fill="{colour}"{weight}>{escape(text)}</text>'
    )


def newest_result(folder: Path) -> Path:
    """The result with the latest date in its name.

    Raises: ConfigError: there is none.
    """
    found = [p for p in folder.glob("speed-*.json") if re.search(r"\d{4}-\d\d-\d\d$", p.stem)]
    if not found:
        raise ConfigError(
            f"a result was to be drawn and {folder} has no speed-MACHINE-DATE.json. Run: python3 "
            "run.py bench"
        )
    # Of two of one day any will do, but always the same.
    return max(found, key=lambda path: (path.stem[-len("2026-01-01") :], path.stem))


def main() -> int:
    """Draw; an error is one line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("result", type=Path, nargs="?", help="JSON file; default: the newest")
    parser.add_argument("--out", type=Path, default=OUT, help="SVG file to write")
    options = parser.parse_args()
    try:
        path = options.result or newest_result(RESULTS)
        try:
            result = json.loads(path.read_text(encoding="utf-8"))
            drawing = draw(result)
            options.out.write_text(drawing, encoding="utf-8")
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"{path} was to be drawn to {options.out}: {' '.join(str(error).split())}. Name a "
                "result of benchmarks/speed.py and a file that can be written"
            ) from None
    except EngineError as error:
        print(f"plot.py: {error}", file=sys.stderr)
        return 1
    print(f"{options.out}: {path.name} drawn", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
