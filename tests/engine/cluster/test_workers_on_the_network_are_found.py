"""Discovery over mDNS, on the loopback; forged and foreign announcements propose nothing."""

from __future__ import annotations

import gc
import queue
import threading

import pytest
import zeroconf

from engine.cluster.discovery import (
    SERVICE_TYPE,
    Advertiser,
    Browser,
    Found,
    read_announcement,
)
from engine.cluster.security import new_key_pair

KEY = new_key_pair().public
GOOD = {"protocol": "3", "key": KEY.decode(), "version": "0.1.0", "name": "attic"}


@pytest.mark.network
def test_a_worker_is_found_by_its_key_and_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHARDMIX_DISCOVERY", "127.0.0.1")
    heard: queue.SimpleQueue[Found | bytes] = queue.SimpleQueue()
    browser = Browser(
        lambda found: heard.put(found) if found.public_key == KEY else None,
        lambda key: heard.put(key) if key == KEY else None,
    )
    advertiser = Advertiser("attic", KEY, "tcp://127.0.0.1:47500")
    try:
        found = heard.get(timeout=20)
        assert isinstance(found, Found)
        assert found[:3] == ("attic", KEY, "tcp://127.0.0.1:47500")
        advertiser.close()
        while isinstance(gone := heard.get(timeout=20), Found):
            pass  # The same announcement may be heard more than once.
        assert gone == KEY
    finally:
        advertiser.close()
        browser.close()


def test_nothing_is_opened_when_discovery_is_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHARDMIX_DISCOVERY", "off")
    before = threading.active_count()
    advertiser = Advertiser("attic", KEY, "tcp://127.0.0.1:47500")
    browser = Browser(lambda found: None, lambda key: None)
    assert threading.active_count() == before
    advertiser.close()
    browser.close()


# zeroconf leaves a socket behind when it cannot join an interface.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interface_that_is_not_there_is_a_line_in_the_log(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("SHARDMIX_DISCOVERY", "192.0.2.7")
    browser = Browser(lambda found: None, lambda key: None)
    browser.close()
    gc.collect()
    assert "add them by address" in caplog.text


def service(properties: dict[str, str], port: int | None = 47500) -> zeroconf.ServiceInfo:
    """What somebody announces."""
    return zeroconf.ServiceInfo(
        SERVICE_TYPE,
        f"x.{SERVICE_TYPE}",
        port=port,
        parsed_addresses=["192.168.1.7"],
        properties=properties,
    )


def test_a_proper_announcement_is_read() -> None:
    assert read_announcement(service(GOOD)) == Found(
        "attic", KEY, "tcp://192.168.1.7:47500", "0.1.0", 3
    )


@pytest.mark.parametrize(
    "change",
    [
        {"key": "short"},
        {"key": " " * 40},
        {"name": "this"},
        {"name": "local-1"},
        {"name": "../../etc"},
        {"name": "\x1b[2J"},
        {"protocol": "x"},
        {"protocol": "9" * 200},
        {"version": "\x07"},
    ],
)
def test_a_forged_or_foreign_announcement_proposes_nothing(change: dict[str, str]) -> None:
    assert read_announcement(service({**GOOD, **change})) is None


def test_an_announcement_without_its_parts_proposes_nothing() -> None:
    for missing in GOOD:
        if missing != "version":
            left = {key: value for key, value in GOOD.items() if key != missing}
            assert read_announcement(service(left)) is None
    assert read_announcement(service(GOOD, port=0)) is None
