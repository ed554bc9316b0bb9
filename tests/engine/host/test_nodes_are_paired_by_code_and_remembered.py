"""A person adds a computer by its address, compares six digits, and has it from then on."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from engine.errors import ConfigError, EngineError, PeerRefused
from engine.host import messages as api
from engine.host.neighbours import RETRY_SECONDS
from tests.engine.host.elsewhere import Desk, Elsewhere, own_key, remember, remembered

pytestmark = pytest.mark.network


def test_two_persons_who_see_the_same_digits_pair_their_computers(tmp_path: Path) -> None:
    with Elsewhere(tmp_path / "attic") as attic:
        with Desk() as desk:
            desk.call(api.AddAddress, endpoint=f"127.0.0.1:{attic.port}")
            seen = desk.node("127.0.0.1", "discovered")
            assert (seen.key, seen.devices) == ("", ())

            refused = desk.post(api.PairNode, name="127.0.0.1")
            failed = desk.event(api.CallFailed, refused)
            assert isinstance(failed, api.CallFailed)
            assert failed.error == "PeerRefused"
            assert "Run `shardmix-worker pair`" in failed.message

            with attic.wait_for_pairing() as person:
                person.read_until("Waiting")
                pairing = desk.post(api.PairNode, name="127.0.0.1")
                shown = desk.event(api.PairingCode, pairing)
                assert isinstance(shown, api.PairingCode)
                assert shown.code == person.code()
                desk.wait_until(
                    lambda: desk.node("127.0.0.1", "pairing").code == shown.code, "listed"
                )
                desk.call(api.ConfirmPairing, name="127.0.0.1", is_same=True)
                assert remembered() == []
                person.answer("y")
                desk.event(api.Done, pairing)
                assert person.ended()[0] == 0
            ready = desk.node("attic", "ready")
            assert ready.key == attic.key
            assert [device.device for device in ready.devices] == ["attic/cpu"]
            assert desk.names() == {"attic"}
            desk.wait_until(
                lambda: desk.node("attic").round_trip_seconds is not None, "a measured round trip"
            )
            assert 0 < (desk.node("attic").round_trip_seconds or 0) < 1
        assert [(peer.name, peer.endpoint) for peer in remembered()] == [("attic", attic.endpoint)]
        with Desk() as desk:
            assert desk.node("attic", "ready").key == attic.key


def test_a_no_on_either_side_leaves_both_as_they_were(tmp_path: Path) -> None:
    with Elsewhere(tmp_path / "attic") as attic, Desk() as desk:
        desk.call(api.AddAddress, endpoint=attic.endpoint)
        for answer_here, answer_there in ((True, "n"), (False, None)):
            with attic.wait_for_pairing() as person:
                person.read_until("Waiting")
                pairing = desk.post(api.PairNode, name="127.0.0.1")
                desk.event(api.PairingCode, pairing)
                person.code()
                desk.call(api.ConfirmPairing, name="127.0.0.1", is_same=answer_here)
                if answer_there is not None:
                    person.answer(answer_there)
                failed = desk.event(api.CallFailed, pairing)
                assert isinstance(failed, api.CallFailed)
                assert "the codes were not the same" in failed.message
                assert person.ended()[0] == 1
            node = desk.node("127.0.0.1", "discovered")
            assert "not the same" in node.reason
            assert node.code == ""
        assert remembered() == []
        trusted = tmp_path / "attic" / "trusted_hosts.json"
        assert not trusted.exists() or own_key().decode() not in trusted.read_text()


def test_a_node_that_forgot_us_is_paired_with_again_without_hurry(tmp_path: Path) -> None:
    attic = Elsewhere(tmp_path / "attic")
    remember(attic)
    attic.distrust(own_key())
    with attic, Desk() as desk:
        desk.node("attic", "lost")
        with attic.wait_for_pairing() as person:
            person.read_until("Waiting")
            pairing = desk.post(api.PairNode, name="attic")
            shown = desk.event(api.PairingCode, pairing)
            with pytest.raises(PeerRefused, match="attic is being paired with already"):
                desk.call(api.PairNode, name="attic")
            with pytest.raises(PeerRefused, match="attic is being paired with already"):
                desk.call(api.AddNode, token=attic.token)
            assert isinstance(shown, api.PairingCode)
            code = shown.code  # It is told at once, changes of nodes a moment later.
            desk.wait_until(lambda: desk.node("attic").code == code, "the node has its digits")
            begun = desk.node("attic", "pairing")
            # A person looks at two screens for longer than this host waits between attempts.
            later = time.monotonic() + RETRY_SECONDS + 1
            desk.wait_until(lambda: time.monotonic() > later, "later")
            now = desk.node("attic")
            assert (now.state, now.code, now.since_s) == ("pairing", code, begun.since_s)
            desk.call(api.ConfirmPairing, name="attic", is_same=True)
            person.answer("y")
            desk.event(api.Done, pairing)
            assert person.ended()[0] == 0
        desk.node("attic", "ready")


def test_a_pairing_that_cannot_be_written_down_leaves_the_node_as_it_was(
    tmp_path: Path, own_settings: Path
) -> None:
    with Elsewhere(tmp_path / "attic") as attic, Desk() as desk:
        desk.call(api.AddAddress, endpoint=attic.endpoint)
        (own_settings / "nodes.json").write_text("[")
        with attic.wait_for_pairing() as person:
            person.read_until("Waiting")
            pairing = desk.post(api.PairNode, name="127.0.0.1")
            desk.event(api.PairingCode, pairing)
            desk.call(api.ConfirmPairing, name="127.0.0.1", is_same=True)
            person.answer("y")
            failed = desk.event(api.CallFailed, pairing)
            assert isinstance(failed, api.CallFailed)
            assert failed.error == "ConfigError"
        node = desk.node("attic", "discovered")
        assert "is damaged" in node.reason
        assert node.code == ""


def test_what_cannot_be_asked_is_refused_in_one_line() -> None:
    with Desk() as desk:
        desk.node("this", "ready")
        with pytest.raises(ConfigError, match="is no address of a worker"):
            desk.call(api.AddAddress, endpoint="http://attic/")
        with pytest.raises(EngineError, match="there is no node 'cellar'; known are this"):
            desk.call(api.PairNode, name="cellar")
        with pytest.raises(PeerRefused, match="this is ready; only a node that was discovered"):
            desk.call(api.PairNode, name="this")
        with pytest.raises(PeerRefused, match="begin to pair first"):
            desk.call(api.ConfirmPairing, name="this", is_same=True)
        with pytest.raises(EngineError, match="on this computer; only other computers"):
            desk.call(api.ForgetNode, name="this")
        desk.call(api.AddAddress, endpoint="127.0.0.1:9")
        with pytest.raises(PeerRefused, match=r"no worker waits for pairing at 127\.0\.0\.1:9"):
            desk.call(api.PairNode, name="127.0.0.1")
