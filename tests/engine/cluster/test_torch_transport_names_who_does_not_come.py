"""Devices that meet over torch.distributed wait for each other within bounds, and can be told to
stop."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch

from engine.cluster import torch_group
from engine.cluster.torch_group import Rendezvous, TorchGroup
from engine.errors import EngineError, ProtocolError

pytestmark = pytest.mark.network

# Far more than a busy machine needs, far less than torch's own half hour.
PATIENCE_SECONDS = 30.0


@pytest.fixture
def rendezvous() -> Iterator[Rendezvous]:
    """Of the first device."""
    opened = Rendezvous("tcp://127.0.0.1:*")
    yield opened
    opened.close()


def first_of_three(rendezvous: Rendezvous) -> TorchGroup:
    """A group whose other two devices never come."""
    memory = torch.device("cpu")
    return TorchGroup("1/0", 0, 3, rendezvous.endpoint, rendezvous, memory)


def test_who_does_not_come_is_named(
    rendezvous: Rendezvous, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch_group, "CONNECT_SECONDS", 0.3)
    group = first_of_three(rendezvous)
    assert group.connecting.done.wait(PATIENCE_SECONDS)
    assert group.connecting.error is not None
    assert group.connecting.error.peer == 1
    later = group.start([], [(1, torch.empty(4))], 0)
    assert later.done.is_set()
    assert later.error is not None
    group.close()


def test_a_group_that_still_connects_can_be_closed(
    rendezvous: Rendezvous, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch_group, "CONNECT_SECONDS", PATIENCE_SECONDS)
    group = first_of_three(rendezvous)
    group.close()
    assert group.connecting.error is not None
    assert not any(thread.name == "torch group 1/0" for thread in threading.enumerate())


def test_nobody_at_the_meeting_point_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_group, "CONNECT_SECONDS", 0.3)
    gone = Rendezvous("tcp://127.0.0.1:*")
    gone.close()
    group = TorchGroup("1/0", 1, 2, gone.endpoint, None, torch.device("cpu"))
    assert group.connecting.done.wait(PATIENCE_SECONDS)
    assert group.connecting.error is not None
    assert "\n" not in str(group.connecting.error)
    group.close()


def test_a_meeting_point_that_is_none_is_an_error() -> None:
    group = TorchGroup("1/0", 1, 2, "nonsense", None, torch.device("cpu"))
    assert group.connecting.done.wait(PATIENCE_SECONDS)
    assert "'nonsense' is not an ADDRESS:PORT" in str(group.connecting.error)
    group.close()


def test_a_rendezvous_takes_a_free_port_of_its_range() -> None:
    first = Rendezvous("tcp://127.0.0.1:*")
    port = int(first.endpoint.rpartition(":")[2])
    with pytest.raises(ProtocolError, match="Choose another range"):
        Rendezvous(f"tcp://127.0.0.1:{port}-{port}")
    second = Rendezvous(f"tcp://127.0.0.1:{port}-{port + 20}")
    assert port < int(second.endpoint.rpartition(":")[2]) <= port + 20
    first.close()
    second.close()


def test_an_address_that_is_not_of_this_computer_is_refused() -> None:
    assert torch_group.interface_of("127.0.0.1")
    with pytest.raises(EngineError, match=r"203\.0\.113\.7, but no network interface"):
        torch_group.interface_of("203.0.113.7")
