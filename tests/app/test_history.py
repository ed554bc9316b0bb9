"""What the charts draw is what was measured."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.monitor.history import DeviceTotals, History, Ring, bottleneck_text
from engine.host.messages import DeviceUsage, Throughput

NOW = 1000.0


def _sample(time_s: float, tokens: int = 2, seconds: float = 0.125, **usage: float) -> Throughput:
    used = {"compute_s": 0.05, "wait_s": 0.03, "network_s": 0.01, **usage}
    return Throughput(
        time_s=time_s,
        seconds=seconds,
        prompt_tokens=0,
        generated_tokens=tokens,
        devices=(DeviceUsage(device="a", network_bytes=0, cache_bytes=0, **used),),
    )


@given(st.integers(1, 9), st.integers(0, 40))
def test_a_ring_shows_the_last_rows_in_order(capacity: int, count: int) -> None:
    ring = Ring(capacity, 1)
    for value in range(count):
        ring.append((float(value),))
    expected = list(range(max(0, count - capacity), count))
    assert ring.view()[:, 0].tolist() == expected
    assert ring.view().base is not None, "a view, not a copy"


def test_a_steady_speed_is_drawn_as_a_line() -> None:
    history = History()
    for index in range(80):
        history.add(_sample(NOW - 10 + 0.125 * (index + 1), tokens=2 + index % 2))
    x, y = history.rate_series(NOW, 30.0)
    assert x[-1] == pytest.approx(0)
    assert np.allclose(y[8:], 20, rtol=0.1)
    assert history.rate_now(NOW) == pytest.approx(20, rel=0.1)


def test_a_pause_is_a_gap_and_not_a_line() -> None:
    history = History()
    history.add(_sample(NOW - 20))
    history.add(_sample(NOW - 5))
    _, y = history.rate_series(NOW, 30.0)
    assert np.isnan(y).tolist() == [False, True, False]
    assert y[2] == pytest.approx(16), "the pause does not count as time of generation"


def test_reading_a_prompt_is_no_speed_of_generation() -> None:
    history = History()
    history.add(_sample(NOW - 0.2, tokens=0))
    _, y = history.rate_series(NOW, 30.0)
    assert np.isnan(y).all()
    assert history.rate_now(NOW) is None


@pytest.mark.parametrize("window", [30.0, 120.0, 600.0])
def test_bins_hold_all_measured_time(window: float) -> None:
    history = History()
    for index in range(100):
        history.add(_sample(NOW - 14 + 0.125 * index))
    bins = history.device_bins("a", NOW, window, 120)
    assert bins.shape == (120, 3)
    seconds = bins.sum(axis=0) * window / 120
    assert seconds == pytest.approx([5.0, 3.0, 1.0], rel=1e-6)
    assert bins.sum(axis=1).max() <= 1 + 1e-9


def test_clocks_that_measure_too_much_do_not_overflow_a_bar() -> None:
    history = History()
    history.add(_sample(NOW - 1, seconds=0.1, compute_s=0.2, wait_s=0.1, network_s=0.0))
    (total,) = history.totals(NOW)
    assert total.compute + total.wait + total.network == pytest.approx(1)


def test_the_bottleneck_is_named_in_words() -> None:
    names = {"a": "this computer", "b": "local-1"}
    busy = [DeviceTotals("a", 0.2, 0.6, 0.1), DeviceTotals("b", 0.9, 0.0, 0.1)]
    assert bottleneck_text(busy, names) == "the others wait 70 % of the time, mostly for local-1"
    assert "one device" in bottleneck_text(busy[:1], names)
    assert bottleneck_text([], names) == ""
