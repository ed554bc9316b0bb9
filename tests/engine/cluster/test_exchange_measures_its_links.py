"""Round trip and bandwidth of every link, by pings first and by real traffic later."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.cluster.link_estimate import LARGE_BYTES, WINDOW_NS, LinkEstimate
from engine.cluster.messages import LinkFigures
from tests.engine.cluster.exchange_members import WIDTH, Member, Members, plan_of_groups

# What no loopback misses however busy the machine is, in seconds and bytes per second.
SLOWEST_ROUND_TRIP, FASTEST_ROUND_TRIP = 1.0, 5e-6
LEAST_BANDWIDTH, MOST_BANDWIDTH = 1e4, 1e12


def assert_sane(figures: tuple[LinkFigures, ...]) -> None:
    """Check the figures of links on the loopback."""
    for link in figures:
        assert FASTEST_ROUND_TRIP <= link.round_trip_seconds <= SLOWEST_ROUND_TRIP
        assert LEAST_BANDWIDTH <= link.bytes_per_second <= MOST_BANDWIDTH


def measure(member: Member) -> tuple[LinkFigures, ...]:
    """Measure, and answer the pings of those who are slower, as a runner does while idle."""
    assert member.links is not None
    return member.links.measure(member.wait)


def measure_together(members: Members) -> list[tuple[LinkFigures, ...]]:
    """All measure; who is done answers the pings of the others, as an idle runner does."""
    done: list[int] = []

    def work(member: Member) -> tuple[LinkFigures, ...]:
        assert member.links is not None
        figures = member.links.measure(member.wait)
        done.append(member.index)
        while len(done) < len(members.members):
            member.wait(0.01)
            member.exchange.take_early()
        return figures

    return members.all_do(work)


@pytest.mark.network
def test_everyone_measures_everyone_at_once() -> None:
    plan = plan_of_groups([[0, 1, 2, 3]] * 3, 4)
    with Members(plan) as members:
        for index, figures in enumerate(measure_together(members)):
            assert {link.device_index for link in figures} == {0, 1, 2, 3} - {index}
            assert_sane(figures)


@pytest.mark.network
def test_traffic_refreshes_the_figures() -> None:
    plan = plan_of_groups([[0, 1]] * 3, 2)
    large = np.ones((LARGE_BYTES // WIDTH, WIDTH), np.float32)

    def work(member: Member) -> tuple[LinkFigures, ...]:
        exchange = member.exchange
        for step_id in range(1, 200):
            exchange.begin_step(step_id, "generated")
            values = large if step_id % 2 else large[:1]
            exchange.hand_over(0, values, values, len(values))
        return exchange.links.fresh_figures()

    with Members(plan) as members:
        figures = members.all_do(work)
        assert members.members[0].exchange.links.fresh_figures() == ()
    for index, links in enumerate(figures):
        assert [link.device_index for link in links] == [1 - index]
        assert_sane(links)


@given(
    offset_ns=st.integers(-(10**15), 10**15),
    latency_ns=st.integers(50_000, 20_000_000),
    bandwidth=st.floats(1e6, 1e10),
)
def test_clocks_that_differ_do_not_matter(
    offset_ns: int, latency_ns: int, bandwidth: float
) -> None:
    """Both ends hear a small and a large message; the far clock is ahead by `offset_ns`."""
    estimate = LinkEstimate()
    heard_by_the_other = latency_ns + offset_ns
    now = 10**16
    for num_bytes in (1000, 10 * LARGE_BYTES):
        now += 10**8
        travels_ns = latency_ns + (num_bytes / bandwidth * 1e9 if num_bytes > 1000 else 0)
        sent_ns = now - int(travels_ns) + offset_ns
        estimate.take_message(num_bytes, sent_ns, now, heard_by_the_other)
    assert estimate.is_fresh
    assert estimate.round_trip_seconds == pytest.approx(2e-9 * latency_ns, rel=0.01)
    assert estimate.bytes_per_second == pytest.approx(bandwidth, rel=0.01)


def test_a_link_that_changes_is_followed() -> None:
    estimate = LinkEstimate()
    now = 0
    for bandwidth in (1e8, 1e7, 1e9):
        for _ in range(5):
            now += WINDOW_NS // 2
            estimate.take_message(100, now - 300_000, now, None)
            large_ns = 300_000 + int(LARGE_BYTES / bandwidth * 1e9)
            estimate.take_message(LARGE_BYTES, now - large_ns, now, None)
        assert estimate.bytes_per_second == pytest.approx(bandwidth, rel=0.01)


def test_large_messages_alone_say_nothing_of_a_link() -> None:
    estimate = LinkEstimate()
    estimate.take_message(LARGE_BYTES, 0, 10**9, None)
    assert not estimate.is_fresh
    assert estimate.heard_ns is None
