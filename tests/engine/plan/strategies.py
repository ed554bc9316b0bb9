"""Hypothesis strategies: shapes with odd sizes, and plans in which every row sums."""

from __future__ import annotations

from hypothesis import strategies as st

from engine.plan.plan import TRANSPORTS, WIRE_FORMATS, Plan, PlanShape

DEVICE_CHARACTERS = st.characters(categories=("L", "N", "P", "S"))
DEVICES = st.lists(
    st.text(DEVICE_CHARACTERS, min_size=1, max_size=8), min_size=1, max_size=6, unique=True
)


@st.composite
def shapes(draw: st.DrawFn) -> PlanShape:
    """Up to 7 layers; the last quantum of a row is often cut short."""
    num_kv_heads = draw(st.integers(1, 5))
    num_layers = draw(st.integers(1, 7))
    width = st.integers(1, 300)
    # Layers with experts are narrower than those without.
    two_widths = st.lists(width, min_size=2, max_size=2).flatmap(
        lambda both: st.lists(st.sampled_from(both), min_size=num_layers, max_size=num_layers)
    )
    return PlanShape(
        num_layers=num_layers,
        num_heads=num_kv_heads * draw(st.integers(1, 5)),
        num_kv_heads=num_kv_heads,
        mlp_width=draw(st.one_of(width, two_widths.map(tuple))),
        vocab_size=draw(st.integers(1, 3000)),
        mlp_quantum=draw(st.sampled_from([1, 7, 32])),
        head_quantum=draw(st.sampled_from([1, 100, 256])),
    ).validate()


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    """Any cells that sum, rows drawn from few so that runs of equal layers occur."""
    shape = draw(shapes())
    devices = draw(DEVICES)

    def cells(row: int) -> tuple[int, ...]:
        total = shape.num_quanta(row)
        cuts = sorted(
            draw(
                st.lists(
                    st.integers(0, total), min_size=len(devices) - 1, max_size=len(devices) - 1
                )
            )
        )
        edges = [0, *cuts, total]
        return tuple(edges[index + 1] - edges[index] for index in range(len(devices)))

    num_kinds = draw(st.integers(1, 2))
    kinds: dict[tuple[int, int], tuple[tuple[int, ...], tuple[int, ...]]] = {}
    rows: list[tuple[int, ...]] = []
    for layer in range(shape.num_layers):
        row = shape.mlp_row(layer)
        kind = draw(st.integers(1, num_kinds)), shape.num_quanta(row)
        if kind not in kinds:
            kinds[kind] = cells(0), cells(row)
        rows.extend(kinds[kind])
    rows.append(cells(shape.head_row))
    wire = draw(st.sampled_from(WIRE_FORMATS))
    prompt_wire = draw(st.sampled_from([None, *WIRE_FORMATS]))
    transport = draw(st.sampled_from(TRANSPORTS))
    return Plan(shape, tuple(devices), tuple(rows), wire, prompt_wire, transport).validate()


def weight_lists(count: int) -> st.SearchStrategy[list[float]]:
    """Shares, at least one above 0."""
    share = st.one_of(st.just(0.0), st.floats(0.001, 100, allow_nan=False))
    return st.lists(share, min_size=count, max_size=count).filter(any)


def as_percentages(weights: list[float]) -> list[float]:
    """Scaled to sum 100, with the rounding of floats."""
    return [100 * weight / sum(weights) for weight in weights]
