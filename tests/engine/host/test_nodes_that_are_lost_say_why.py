"""Refused, another's, foreign, of another version: the reason tells which, in words."""

from __future__ import annotations

import os
import shutil
import socket
from pathlib import Path

import pytest

from engine.errors import PeerRefused
from engine.host import messages as api
from tests.engine.host.elsewhere import Desk, Elsewhere, own_key, remember, remembered

pytestmark = pytest.mark.network


def test_refused_foreign_and_silent_are_told_apart(tmp_path: Path) -> None:
    attic, cellar, shed = (Elsewhere(tmp_path / n, n) for n in ("attic", "cellar", "shed"))
    for there in (attic, cellar, shed):
        remember(there)
    attic.distrust(own_key())
    shutil.rmtree(tmp_path / "cellar")  # Installed anew: another key.
    with attic, cellar, socket.create_server(("127.0.0.1", shed.port)), Desk() as desk:
        refused = desk.node("attic", "lost")
        assert refused.reason == "attic does not let this computer in: pair with it again"
        assert "is not cellar: it has another key" in desk.node("cellar", "lost").reason
        # It takes the connection and says nothing.
        assert "shed does not answer at 127.0.0.1" in desk.node("shed", "lost").reason
        attic.trust(own_key())
        desk.node("attic", "ready")


def test_a_worker_that_another_host_has_says_whose_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attic = Elsewhere(tmp_path / "attic")
    remember(attic)
    with attic, Desk() as first:
        first.node("attic", "ready")
        monkeypatch.setenv("SHARDMIX_CONFIG", str(tmp_path / "second desk"))
        remember(attic)
        with Desk() as second:
            lost = second.node("attic", "lost")
            assert lost.reason == f"busy with {socket.gethostname()}"
            assert first.node("attic").state == "ready"
            first.client.close()
            second.node("attic", "ready")


def test_a_token_works_once_and_is_remembered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Elsewhere(tmp_path / "attic") as attic:
        with Desk() as desk:
            desk.call(api.AddNode, token=attic.token)
            assert desk.node("attic", "ready").key == attic.key
            assert [peer.name for peer in remembered()] == ["attic"]
            # Who is in already may come with the line again.
            desk.call(api.AddNode, token=attic.token)
        with Desk() as desk:
            desk.node("attic", "ready")
        monkeypatch.setenv("SHARDMIX_CONFIG", str(tmp_path / "second desk"))
        with Desk() as second:
            with pytest.raises(PeerRefused, match="the join token was used or has expired"):
                second.call(api.AddNode, token=attic.token)
            second.wait_until(lambda: bool(second.nodes) and not second.names(), "not listed")
            assert remembered() == []


def test_a_damaged_list_of_nodes_is_told_in_one_line(own_settings: Path) -> None:
    own_settings.mkdir(exist_ok=True)
    (own_settings / "nodes.json").write_text("[")
    with pytest.raises(Exception, match=r"nodes\.json.*is damaged\. Remove it"):
        Desk()
    assert os.listdir(own_settings)
