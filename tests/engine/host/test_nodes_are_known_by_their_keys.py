"""What discovery proposes changes no trust: keys are identities, names stay unique, floods end."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import zmq

from engine.cluster.discovery import Found
from engine.cluster.identity import TrustedPeer, TrustedPeers
from engine.cluster.messages import PROTOCOL_VERSION
from engine.cluster.security import new_key_pair
from engine.errors import ConfigError
from engine.host.neighbours import MAX_DISCOVERED, Neighbours
from engine.host.node import Node
from engine.host.node_words import parse_address

OWN = new_key_pair()


class Here:
    """The neighbours of a host that has started and connects to nobody: `tick` is not called."""

    def __init__(self, context: zmq.Context[Any], folder: Path) -> None:
        self.nodes: dict[str, Node] = {"this": Node("this", "this", OWN)}
        self.trusted = TrustedPeers(folder / "nodes.json")
        self.neighbours = Neighbours(
            context, OWN, self.trusted, "desk", self.nodes, lambda node, cause: None, lambda: None
        )

    def start(self) -> None:
        self.neighbours.start(lambda function: function())

    def remote(self) -> dict[str, str]:
        return {n.name: n.state for n in self.nodes.values() if n.kind == "remote"}


@pytest.fixture
def here(tmp_path: Path) -> Iterator[Here]:
    context: zmq.Context[Any] = zmq.Context()
    here = Here(context, tmp_path)
    yield here
    here.neighbours.let_go()
    here.neighbours.close()
    context.term()


def found(
    name: str, key: bytes = b"", port: int = 47500, protocol: int = PROTOCOL_VERSION
) -> Found:
    """An announcement."""
    key = key or new_key_pair().public
    return Found(name, key, f"tcp://192.168.1.7:{port}", "0.1.0", protocol)


def known(name: str, key: bytes) -> TrustedPeer:
    """Somebody who is trusted."""
    endpoint = "tcp://192.168.1.5:47500"
    return TrustedPeer(public_key=key, name=name, added_s=1.0, endpoint=endpoint)


def test_this_computers_own_service_is_no_other_computer(here: Here) -> None:
    here.neighbours.found(found("attic", OWN.public))
    assert here.remote() == {}


def test_names_are_unique_and_stay_with_their_keys(here: Here) -> None:
    key = new_key_pair().public
    here.trusted.add(known("attic", key))
    here.start()
    stranger = found("attic")
    here.neighbours.found(stranger)
    here.neighbours.found(stranger)
    assert here.remote() == {"attic": "starting", "attic-2": "discovered"}
    assert here.nodes["attic"].public_key == key
    assert here.nodes["attic-2"].public_key == stranger.public_key


def test_an_announcement_moves_no_node_before_its_key_answers_there(here: Here) -> None:
    key = new_key_pair().public
    here.trusted.add(known("attic", key))
    here.start()
    here.neighbours.found(found("mallory", key))
    node = here.nodes["attic"]
    assert here.remote() == {"attic": "starting"}
    assert (node.endpoint, node.announced) == ("tcp://192.168.1.5:47500", "tcp://192.168.1.7:47500")
    assert [peer.endpoint for peer in here.trusted] == ["tcp://192.168.1.5:47500"]


def test_a_flood_of_announcements_does_not_fill_the_list(here: Here) -> None:
    for number in range(MAX_DISCOVERED + 20):
        here.neighbours.found(found(f"n{number}"))
    assert len(here.remote()) == MAX_DISCOVERED


def test_another_protocol_is_told_before_anybody_tries(here: Here) -> None:
    here.neighbours.found(found("attic", protocol=PROTOCOL_VERSION - 1))
    assert "install the same version of shardmix on both" in here.nodes["attic"].reason


def test_an_announcement_gives_an_address_its_name_and_key(here: Here) -> None:
    node = here.neighbours.add_address("192.168.1.7")
    assert here.neighbours.add_address("tcp://192.168.1.7:47500") is node
    announced = found("attic")
    here.neighbours.found(announced)
    assert list(here.remote().values()) == ["discovered"]
    assert node.public_key == announced.public_key


def test_what_is_gone_is_no_longer_proposed_and_still_trusted(here: Here) -> None:
    key = new_key_pair().public
    here.trusted.add(known("attic", key))
    here.start()
    stranger = found("cellar")
    for announcement in (stranger, found("attic", key)):
        here.neighbours.found(announcement)
        here.neighbours.gone(announcement.public_key)
    assert here.remote() == {"attic": "starting"}


def test_what_another_program_of_this_installation_writes_down_counts(
    here: Here, tmp_path: Path
) -> None:
    gone, new = new_key_pair().public, new_key_pair().public
    here.trusted.add(known("attic", gone))
    here.start()
    other = TrustedPeers(tmp_path / "nodes.json")
    other.remove(gone)
    other.add(known("cellar", new))
    here.neighbours.tick()
    assert here.remote() == {"cellar": "starting"}


@pytest.mark.parametrize(
    ("text", "endpoint"),
    [
        ("192.168.1.7", "tcp://192.168.1.7:47500"),
        (" attic.local:5000 ", "tcp://attic.local:5000"),
        ("tcp://10.0.0.1:1", "tcp://10.0.0.1:1"),
        ("[fe80::1%eth0]:5000", "tcp://[fe80::1%eth0]:5000"),
    ],
)
def test_an_address_is_read_as_people_write_it(text: str, endpoint: str) -> None:
    assert parse_address(text) == endpoint


@pytest.mark.parametrize("text", ["", "http://attic", "attic:0", "attic:65535", "a b", "ipc://x"])
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="write HOST or HOST:PORT"):
        parse_address(text)
