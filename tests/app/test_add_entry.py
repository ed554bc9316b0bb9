"""One field takes a join token or an address, and says which it is."""

from __future__ import annotations

import pytest

from app.cluster.add_entry import read_entry
from engine.cluster.join_token import JoinToken
from engine.cluster.security import new_key_pair


def test_a_token_that_a_worker_prints_is_recognised_however_it_was_copied() -> None:
    keys = new_key_pair()
    token = JoinToken("attic", "tcp://192.168.1.20:47500", keys.public, keys).encode()
    assert read_entry(token).kind == "token"
    broken = f"  {token[:70]}\n{token[70:]} \n"
    assert read_entry(broken) == read_entry(token)
    assert read_entry(broken).value == token


@pytest.mark.parametrize(
    ("text", "endpoint"),
    [
        ("192.168.1.20:47500", "tcp://192.168.1.20:47500"),
        (" attic.local:47500 ", "tcp://attic.local:47500"),
        ("tcp://attic:47500", "tcp://attic:47500"),
        ("[fe80::1%eth0]:47500", "tcp://[fe80::1%eth0]:47500"),
    ],
)
def test_an_address_with_a_port_is_recognised(text: str, endpoint: str) -> None:
    entry = read_entry(text)
    assert (entry.kind, entry.value) == ("address", endpoint)


@pytest.mark.parametrize(
    "text",
    ["attic", "attic:", "attic:0", "attic:65536", ":47500", "shardmix1-", "fe80::1:47500:", "a b?"],
)
def test_anything_else_is_refused_before_it_is_sent(text: str) -> None:
    assert not read_entry(text).is_usable


def test_an_empty_field_is_no_mistake() -> None:
    assert read_entry(" \n").kind == "empty"
