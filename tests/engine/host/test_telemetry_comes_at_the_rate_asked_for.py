"""The rate of telemetry is a variable's, within bounds; a host with a wrong one says so and ends."""

from __future__ import annotations

import pytest

from engine.client import EngineClient
from engine.errors import ConfigError, WorkerLost
from engine.host.telemetry_rate import DEFAULT_HZ, RATE_VARIABLE, wanted_hz


@pytest.mark.parametrize(("text", "rate"), [("", DEFAULT_HZ), ("0.2", 0.2), ("10", 10.0)])
def test_a_rate_is_taken(monkeypatch: pytest.MonkeyPatch, text: str, rate: float) -> None:
    monkeypatch.setenv(RATE_VARIABLE, text)
    assert wanted_hz() == rate


@pytest.mark.parametrize("text", ["0", "-1", "1000", "nan", "inf", "often"])
def test_what_is_no_rate_is_refused(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv(RATE_VARIABLE, text)
    with pytest.raises(ConfigError, match="is no rate between"):
        wanted_hz()


@pytest.mark.network
def test_a_host_with_a_wrong_rate_ends_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(RATE_VARIABLE, "often")
    with pytest.raises(WorkerLost, match="often is no rate between"):
        EngineClient()
